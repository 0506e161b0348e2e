"""The one error of this package, and what it says on stderr: a line each, whatever is in it."""

import sys


class DataError(Exception):
    """Data or a partition that cannot be used; the message says what is wrong and what to do."""

    def __init__(self, message: str):
        super().__init__(printable(message))


def say(message: str) -> None:
    """Print a line on stderr."""
    print(printable(message), file=sys.stderr)


def printable(text: str) -> str:
    """Escape what cannot be printed: ends of lines, bytes of file names that are not UTF-8, ..."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )
