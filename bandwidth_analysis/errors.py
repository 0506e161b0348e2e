"""The error of this package; its message is one line that can be printed."""

REPAIR = "restore the file or repeat the run"


class AnalysisError(Exception):
    """A run folder cannot be read, or plots cannot be drawn or written.

    The message is one line that says what is wrong and what to do.
    """

    def __init__(self, message: str):
        super().__init__(printable(message))


def printable(text: str) -> str:
    """Escape what cannot be printed, such as line ends and bytes that are not UTF-8."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )
