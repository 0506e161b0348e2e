"""The command line: python -m bandwidth_analysis RUN [RUN ...] [--table FORMAT] and so on.

Exit statuses: 0 done; 1 done, but for run folders that could not be read, which are named; 2
nothing could be done.
"""

import argparse
import sys
from pathlib import Path

from bandwidth_analysis.errors import AnalysisError, printable
from bandwidth_analysis.group_table import FORMATS, format_table
from bandwidth_analysis.groups import Group, group_runs
from bandwidth_analysis.page import write_page
from bandwidth_analysis.plot_files import write_plots
from bandwidth_analysis.records import make_records
from bandwidth_analysis.runs import Run, read_run
from bandwidth_analysis.table import comparison_table

COMPARISON = "comparison"  # the folder, next to the first run, for the plots of several runs


def main(argv: list[str] | None = None) -> int:
    """Print the table and write the plots; return the exit status."""
    arguments = _parser().parse_args(argv)
    if (arguments.target or arguments.baseline) and not arguments.html:
        arguments.table = arguments.table or "text"
    try:
        folders = run_folders(arguments.runs)
        if arguments.timeline is not None and len(folders) > 1:
            raise AnalysisError("--timeline: a timeline shows one run; give one run folder")
        runs, problems = read_runs(folders, arguments)
        if arguments.table or arguments.html:
            _show_groups(group_runs(runs), arguments)
        else:
            _print(comparison_table(runs))
            folder = arguments.output or default_output([run.folder for run in runs])
            _print("\nplots:", *(f"  {path}" for path in write_plots(runs, folder)))
    except AnalysisError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if problems else 0


def _show_groups(groups: list[Group], arguments: argparse.Namespace) -> None:
    """Print the table of the groups and write the page, as far as they are asked for."""
    baseline = _group_of(groups, arguments.baseline) if arguments.baseline else None
    records = make_records(groups, arguments.target, baseline)
    if arguments.table:
        _print(format_table(records, arguments.table))
    if arguments.html:
        write_page(records, arguments.html)
        print(printable(f"page: {arguments.html}"), file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bandwidth_analysis",
        description="Compare run folders in a table and in plots.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where the plots go")
    parser.add_argument(
        "--timeline", type=int, metavar="ROUND", help="the round of timeline.png; else the last"
    )
    parser.add_argument(
        "--table",
        choices=FORMATS,
        help="print a row for each group of runs that differ in their seed only, and draw nothing",
    )
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="write a page that opens anywhere, draw nothing"
    )
    parser.add_argument(
        "--target", type=_accuracy, metavar="ACCURACY", help="0.6: when was 60 %% reached?"
    )
    parser.add_argument(
        "--baseline", type=Path, metavar="RUN", help="compare the others with this run's group"
    )
    return parser


def _accuracy(text: str) -> float:
    accuracy = float(text)
    if not 0 < accuracy <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no accuracy from 0 to 1, such as 0.6")
    return accuracy


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


def read_runs(folders: list[Path], arguments: argparse.Namespace) -> tuple[list[Run], int]:
    """Read the folders, the baseline's too; return the runs and how many could not be read.

    Each of these is named in a line on stderr. Raises AnalysisError if none could be read, or if
    the baseline could not.
    """
    if arguments.baseline:
        folders = run_folders([*folders, arguments.baseline])
    runs, problems = [], []
    for folder in folders:
        try:
            runs.append(read_run(folder, arguments.timeline))
        except AnalysisError as error:
            if arguments.baseline and folder.resolve() == arguments.baseline.resolve():
                raise AnalysisError(f"--baseline: {error}") from None
            problems.append(error)
    if not runs:
        raise problems[0]
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    return runs, len(problems)


def _group_of(groups: list[Group], folder: Path) -> Group:
    """The group of the run in `folder`, which is one of theirs."""
    resolved = folder.resolve()
    return next(g for g in groups if resolved in [run.folder.resolve() for run in g.runs])


def default_output(folders: list[Path]) -> Path:
    """Return RUN/plots for one run, and comparison/ next to the first run for several."""
    return folders[0] / "plots" if len(folders) == 1 else folders[0].resolve().parent / COMPARISON


def _print(*lines: object) -> None:
    """Print the lines, with escapes for characters that the terminal's encoding does not have."""
    encoding = sys.stdout.encoding or "utf-8"
    print("\n".join(map(str, lines)).encode(encoding, "backslashreplace").decode(encoding))


if __name__ == "__main__":
    sys.exit(main())
