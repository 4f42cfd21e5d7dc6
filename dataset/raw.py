"""Rows of published files, each with the words that name it in an error."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from src.errors import UserError
from src.jsonfile import read_rows

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
    return (RawRow(where, fields) for where, fields in read_rows(path))


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
