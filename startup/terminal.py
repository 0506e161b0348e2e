"""Standard output and error of a run that goes on when nobody reads them any more."""

import io
import os
import sys


def outlive_readers() -> None:
    """Let a run survive the end of its reader, as in `python main.py | head -1`.

    A character that the terminal does not have is printed as its number.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # it was closed before Python started
            setattr(sys, name, open(os.devnull, "w"))
        elif not isinstance(stream, Output):  # a second one would close the first one's file
            mode = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
            setattr(sys, name, Output(stream.buffer, stream.encoding, "backslashreplace", **mode))


class Output(io.TextIOWrapper):
    """A stream of text; once its reader has gone, what is written goes nowhere."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except BrokenPipeError:
            self._go_nowhere()
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except BrokenPipeError:
            self._go_nowhere()

    def _go_nowhere(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
