"""Write the plots into PNG files.

A training run imports this file and draws its plots at the end. A plot is never worth a run. So
matplotlib is imported only when something is drawn, and whatever fails in it (its installation,
backend, fonts or settings) raises AnalysisError, which the run reports without failing.
"""

import shlex
from pathlib import Path

from bandwidth_analysis.errors import AnalysisError
from bandwidth_analysis.runs import Run


def write_plots(runs: list[Run], folder: Path) -> list[Path]:
    """Draw the runs together into PNG files in `folder`, which is made if need be.

    Returns the paths of the files; each appears whole or not at all. Raises AnalysisError if the
    folder cannot be written, and, once the other plots are written, if one cannot be drawn.
    """
    folder = Path(folder)
    pictures, failures = _draw(runs)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths = [_write(picture, folder / f"{name}.png") for name, picture in pictures.items()]
    except OSError as error:
        problem = f"{folder}: plots cannot be written ({error.strerror})"
        raise AnalysisError(f"{problem}; make room or name another folder") from None
    if failures:
        error = next(iter(failures.values()))
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        command = shlex.join(["python", "-m", "bandwidth_analysis", *(str(r.folder) for r in runs)])
        raise AnalysisError(
            f"{folder}: {' and '.join(failures)} not drawn ({reason}); mend that, then: {command}"
        )
    return paths


def _draw(runs: list[Run]) -> tuple[dict[str, bytes], dict[str, Exception]]:
    """Return the PNG file of each plot by name, and the errors of the plots that failed."""
    try:
        from bandwidth_analysis.drawing import render
        from bandwidth_analysis.plots import plots_of
    except Exception as error:  # matplotlib also reads its settings when it is imported
        return {}, {"plots": error}
    pictures, failures = {}, {}
    for name, draw in plots_of(runs).items():
        try:
            pictures[name] = render(draw, runs)
        except Exception as error:  # matplotlib raises many kinds, for fonts, sizes and so on
            failures[name] = error
    return pictures, failures


def _write(picture: bytes, path: Path) -> Path:
    """Write a file beside `path` and rename it, so that a kill leaves no half picture there."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(picture)
        return temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
