"""Rows of published files, each with the words that name it in an error."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from src.errors import UserError

Row = dict[str, object]


class RawRow(NamedTuple):
    """One row of a raw file and the words that name it in an error."""

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


def read_raw(path: Path) -> Iterator[RawRow]:
    """Rows of a .parquet, .jsonl, .json (one array) or .xml file. Raises UserError that names file and row."""
    if path.suffix == ".parquet":
        return read_parquet(path)
    if path.suffix == ".xml":
        return read_problems(path)
    with path.open("rb") as file:
        is_array = file.read(64).lstrip().startswith(b"[")
    return read_array(path) if is_array else read_jsonl(path)


def read_array(path: Path) -> Iterator[RawRow]:
    """Rows of a file that is one json array of objects."""
    try:
        rows = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: not json ({error}); expected an array of objects") from error
    for number, fields in enumerate(rows, start=1):
        if not isinstance(fields, dict):
            raise UserError(f"{path} row {number}: expected a json object, found {type(fields).__name__}")
        yield RawRow(f"{path} row {number}", fields)


def read_jsonl(path: Path) -> Iterator[RawRow]:
    """Rows of a jsonl file; blank lines are skipped."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            place = f"{path} line {number}"
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
            except ValueError as error:
                raise UserError(f"{place}: not json ({error}); expected one json object a line") from error
            if not isinstance(fields, dict):
                raise UserError(f"{place}: expected a json object, found {type(fields).__name__}")
            yield RawRow(place, fields)


def read_parquet(path: Path) -> Iterator[RawRow]:
    """Rows of a parquet file."""
    # only this format needs it, and it takes half a second to import
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not a parquet file ({error})") from error
    for number, fields in enumerate(rows, start=1):
        yield RawRow(f"{path} row {number}", fields)


def read_problems(path: Path) -> Iterator[RawRow]:
    """The <Problem> elements of an XML file (ASDiv): attributes and children by name."""
    try:
        problems = list(ElementTree.parse(path).iter("Problem"))
    except ElementTree.ParseError as error:
        raise UserError(f"{path}: not XML ({error})") from error
    for number, problem in enumerate(problems, start=1):
        fields: dict[str, object] = dict(problem.attrib)
        yield RawRow(f"{path} problem {number}", fields | {child.tag: child.text for child in problem})
