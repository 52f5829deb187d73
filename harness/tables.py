"""
harness/tables.py - reads the CSVs that runs write, row by row, and says which cell is wrong.

Needs   nothing else of this repo: copy it and it works.
"""
import csv
import math
from pathlib import Path


def rows(file, needed, empty=False):
    """A run's CSV -> its rows as dicts, one by one; a list of rows is given as it is. ValueError: it cannot be read, a
    row lacks one of the columns `needed`, or there are no rows and `empty` does not allow that."""
    if not isinstance(file, str | Path):
        yield from file
        return
    if Path(file).exists() and not Path(file).is_file():
        raise ValueError(f"{file} is not a file, but a folder, a pipe or a device")
    try:
        with open(file, newline="", encoding="utf-8") as f:
            row = None
            for row in csv.DictReader(f):
                missing = [c for c in needed if row.get(c) is None]
                if missing:
                    raise ValueError(f"{file} has no column {', '.join(missing)}, or a row is cut off")
                yield row
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise ValueError(f"{file} is not a run's CSV ({getattr(e, 'strerror', None) or e})") from e
    if row is None and not empty:
        raise ValueError(f"{file} has no rows")


def read(file, needed):
    """The same as a list."""
    return list(rows(file, needed))


def distinct(file, column):
    """The values of a column, each once, in the order in which they come."""
    return list(dict.fromkeys(row[column] for row in rows(file, (column,))))


def number(file, row, column, whole=False, least=-1e30):
    """A cell as a float; whole: as an int. ValueError: it is no number, below `least`, or beyond 1e30."""
    try:
        value = float(row[column])
    except ValueError:
        value = math.nan
    if not least <= value <= 1e30 or whole and value != int(value):
        raise ValueError(f"{file}: {column} {str(row[column])[:30]!r} is not a number that can be drawn")
    return int(value) if whole else value
