"""The command line: python -m bandwidth_analysis RUN [RUN ...] [--output DIR] [--timeline N]."""

import argparse
import sys
from pathlib import Path

from bandwidth_analysis.errors import AnalysisError, printable
from bandwidth_analysis.plot_files import write_plots
from bandwidth_analysis.runs import read_run
from bandwidth_analysis.table import comparison_table

COMPARISON = "comparison"  # the folder, next to the first run, for the plots of several runs


def run_folders(arguments: list[Path]) -> list[Path]:
    """Return the folders to read, each once and in the order given.

    `outputFolder/*` also matches outputFolder/README.md and the comparison folder that an earlier
    call wrote. These are skipped, and a line on stderr says so. Raises AnalysisError if nothing
    else is left.
    """
    skipped = [path for path in arguments if path.is_file() or _is_comparison(path)]
    folders: dict[Path, Path] = {}  # resolved path -> path as given
    for path in arguments:
        if path not in skipped:
            folders.setdefault(path.resolve(), path)
    if not folders:
        raise AnalysisError(f"{skipped[0]}: not a run folder; give outputFolder/<name>-s0")
    for path in skipped:
        print(printable(f"skipped {path}: not a run folder"), file=sys.stderr)
    return list(folders.values())


def _is_comparison(path: Path) -> bool:
    return path.name == COMPARISON and path.is_dir() and not (path / "config.yaml").exists()


def default_output(folders: list[Path]) -> Path:
    """Return RUN/plots for one run, and comparison/ next to the first run for several."""
    return folders[0] / "plots" if len(folders) == 1 else folders[0].resolve().parent / COMPARISON


def main(argv: list[str] | None = None) -> int:
    """Print the table and write the plots; return the exit status, which is 2 after an error."""
    parser = argparse.ArgumentParser(prog="python -m bandwidth_analysis", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where the plots go")
    parser.add_argument(
        "--timeline", type=int, metavar="ROUND", help="the round of timeline.png; else the last"
    )
    arguments = parser.parse_args(argv)
    try:
        folders = run_folders(arguments.runs)
        if arguments.timeline is not None and len(folders) > 1:
            raise AnalysisError("--timeline: a timeline shows one run; give one run folder")
        runs = [read_run(folder, arguments.timeline) for folder in folders]
        _print(comparison_table(runs))
        paths = write_plots(runs, arguments.output or default_output(folders))
    except AnalysisError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    _print("\nplots:", *(f"  {path}" for path in paths))
    return 0


def _print(*lines: object) -> None:
    """Print the lines, with escapes for characters that the terminal's encoding does not have."""
    encoding = sys.stdout.encoding or "utf-8"
    print("\n".join(map(str, lines)).encode(encoding, "backslashreplace").decode(encoding))


if __name__ == "__main__":
    sys.exit(main())
