"""Reads a CSV file whose columns are known by name."""

import csv
from collections.abc import Collection, Iterator
from pathlib import Path


def read_table(
    path: Path, required: Collection[str], optional: Collection[str] = ()
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield for each row its place, file:line, and its values by column.

    Raises ValueError: file and line, and what is wrong there; OSError.
    """
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        reader = csv.DictReader(file)
        try:
            heading = reader.fieldnames or []
            for name in heading:
                if name not in (*required, *optional):
                    known = ", ".join((*required, *optional))
                    raise ValueError(f"{path}:1: no column {name!r} is known; there are {known}")
                if heading.count(name) > 1:
                    raise ValueError(f"{path}:1: the column {name} stands there twice")
            for name in required:
                if name not in heading:
                    raise ValueError(f"{path}:1: the column {name} is missing")
            for row in reader:
                place = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    raise ValueError(f"{place}: not {len(heading)} values as in line 1")
                yield place, row
        except csv.Error as error:
            raise ValueError(f"{path}:{reader.line_num}: not a CSV file: {error}") from None
