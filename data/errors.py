"""The error of this package and its lines on stderr. Each is one line that can be printed."""

import sys


class DataError(Exception):
    """Data or a partition that cannot be used; the message says what is wrong and what to do."""

    def __init__(self, message: str):
        super().__init__(printable(message))


def say(message: str) -> None:
    """Print a line on stderr."""
    print(printable(message), file=sys.stderr)


def printable(text: str) -> str:
    """Escape what cannot be printed, such as line ends and bytes that are not UTF-8."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )
