"""Rows of published files, each with the words that name it in an error."""

import csv
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from src import jsonfile
from src.data import rows
from src.errors import UserError

Row = dict[str, object]


class LeftOut(Exception):
    """A row that gives none of ours, though nothing is wrong with it; the message says which rows these are."""


class RawRow(NamedTuple):
    """One row of a raw file and the words that name it in an error. Fields that are null or NaN are not there."""

    place: str
    fields: dict[str, object]

    def text(self, *names: str) -> str:
        """The first of the named fields that is there, as text. Raises UserError if none is, or it is no text."""
        name = next((name for name in names if self.fields.get(name) is not None), None)
        value = self.fields[name] if name else None
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{self.place}: expected text under {' or '.join(map(repr, names))}, found {value!r}; "
                            f"the row has the keys {', '.join(self.fields)}")
        return value


def read_raw(path: Path, refuse: Callable[[UserError], None]) -> Iterator[RawRow]:
    """Rows of a .jsonl, .json (one array), .parquet, .csv or .xml file, or of a directory of `datasets`.

    refuse: called with the complaint about a row that cannot be read. Raises UserError for a file that cannot be.
    """
    if rows.is_table(path):
        found: Iterable[tuple[str, Row]] = (
            (f"{path}, row {number}", fields) for number, fields in enumerate(rows.read_table(path), start=1)
        )
    else:
        others = {".xml": read_problems, ".csv": read_csv}
        found = others[path.suffix](path) if path.suffix in others else jsonfile.read_rows(path, refuse)
    for place, fields in found:
        there = rows.Row(place, fields)
        yield RawRow(place, {name: fields[name] for name in fields if there.get(name) is not None})


def read_csv(path: Path) -> Iterator[tuple[str, Row]]:
    """The rows of a comma-separated file whose first line names the columns; an empty field is not there."""
    jsonfile.check_file(path)
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            reader = csv.DictReader(file, strict=True)
            names = reader.fieldnames or []
            if twice := [name for name in names if names.count(name) > 1]:
                raise UserError(f"{path} has the column {twice[0]!r} twice, of which any reader would lose one")
            for number, row in enumerate(reader, start=1):
                if None in row or None in row.values():
                    raise UserError(f"{path}, row {number}: other columns than the first line names")
                yield f"{path}, row {number}", {name: text or None for name, text in row.items()}
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not comma-separated UTF-8 ({error})") from error


def read_problems(path: Path) -> Iterator[tuple[str, Row]]:
    """The <Problem> elements of an XML file (ASDiv): attributes and children by name."""
    try:
        problems = list(ElementTree.parse(path).iter("Problem"))
    except (ElementTree.ParseError, LookupError, ValueError) as error:  # the last two: encodings
        raise UserError(f"{path}: not XML ({error})") from error
    for number, problem in enumerate(problems, start=1):
        fields: dict[str, object] = dict(problem.attrib)
        yield f"{path}, problem {number}", fields | {child.tag: child.text for child in problem}
