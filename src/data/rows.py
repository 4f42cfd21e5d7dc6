"""Rows of data files: what stands under a key, and what of other formats is refused. Complaints name file, row and key.

null, and NaN, with which pandas marks it, mean that a key is absent, at every depth. The one file that opens parquet
and the directories of Hugging Face `datasets`.
"""

import math
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pyarrow.parquet

from src import jsonfile
from src.errors import UserError
from src.jsonfile import MAX_ROW, check_file

BATCH_ROWS, BUFFER = 1024, 2**16  # rows of a parquet file, and bytes of each of its columns, that are held at once
_SHARD = re.compile(r"(.*)-\d+-of-(\d+)(?:-[0-9a-f]+)?")  # a data file's name: its split, and how many files that has
_MEDIA = "a picture or sound cannot be read"
_TOOLS = "calls of tools are not supported; solutions with code are blocks (dataset/README.md)"
_SYSTEM = "give conversations, whose first message may be the system's, or one for all rows with --system_prompt"
_THINKING = "put the thinking into the solution, as <think> ... </think>"
# Keys that change what a row means where other tools read them, and what to do about each
FOREIGN: dict[str, str] = {
    **dict.fromkeys(("system", "system_prompt", "system_message"), _SYSTEM),
    "history": "give conversations, where earlier turns are messages",
    **dict.fromkeys(("conversations", "conversation"), "rename it to 'messages', with 'role' and 'content' in each"),
    **dict.fromkeys(("tools", "functions", "tool_calls", "function_call"), _TOOLS),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _MEDIA),
    **dict.fromkeys(("reasoning_content", "thinking", "reasoning"), _THINKING),
    **dict.fromkeys(("context", "options", "choices"), "write it into the instruction, or rename it to 'input'"),
    "weight": "rows count alike; repeat a row, or mix files with --weights",
    "margin": "pairs count alike; give --margin where a trainer has it",
}
FOREIGN_IN_MESSAGE: dict[str, str] = {
    **dict.fromkeys(("tool_calls", "function_call", "tool_call_id", "tools", "functions"), _TOOLS),
    "name": "speakers have no names here; put it into the text",
    **dict.fromkeys(("reasoning", "thinking"), "rename it to 'reasoning_content'"),
    **dict.fromkeys(("prefix", "prefill"), "whole answers are learnt; give pairs with a 'prefix' instead"),
    "refusal": "put it into 'content'",
    **dict.fromkeys(("loss", "train", "masked"), "use 'weight': 0 for a message that is not to be learnt"),
    **dict.fromkeys(("image", "images", "audio", "videos"), _MEDIA),
}
# Keys by which a row says whether its solution is right, which who learns every solution would not hear
VERDICTS: dict[str, str] = dict.fromkeys(
    ("correct", "is_correct", "outcome"), "every 'output' is learnt; leave out such rows, as data_build.py reject does"
)
_WITHOUT_EFFECT = {"weight": 1, "train": True, "loss": True, "masked": False, "prefix": False, "correct": True,
                   "is_correct": True, "outcome": "right"}  # says what we do anyway


class Schema(NamedTuple):
    """A kind of row: what to do for rows of this kind, and the keys that are refused in them, with the advice."""

    source: str = ""
    foreign: Mapping[str, str] = FOREIGN


ANY = Schema(foreign={})


class Row(NamedTuple):
    """One object and where it stands: `where` is `FILE, row N` (or `line N`), counted from 1."""

    where: str
    values: dict[str, object]
    schema: Schema = ANY

    def get(self, key: str) -> object:
        """What stands under a key, None where it is absent."""
        value = self.values.get(key)
        return None if isinstance(value, float) and math.isnan(value) else value

    def text(self, key: str) -> str:
        """A string; an empty one is allowed. Raises UserError."""
        value = self.get(key)
        advice = f"; {self.schema.source}" if self.schema.source else ""
        if value is None:
            found = ", ".join(key for key in self.values if self.get(key) is not None) or "no keys"
            raise UserError(f"{self.where}: key {key!r} is missing; found {found}{advice}")
        if not isinstance(value, str):
            raise UserError(f"{self.where}: {key!r} is a {type(value).__name__}; expected a string{advice}")
        return value

    def texts(self, key: str) -> list[str]:
        """A string or a list of strings, as a list of at least one; none may be blank. Raises UserError."""
        value = self.get(key)
        values = value if isinstance(value, list) else [self.text(key)]
        if not values or not all(isinstance(text, str) and text.strip() for text in values):
            found = "; found messages" if values and isinstance(values[0], dict) else ""
            raise UserError(f"{self.where}: {key!r} must be a non-empty string or a list of them{found}")
        return values

    def instruction(self) -> str:
        """The problem: 'instruction', and after it, on a line of its own, the 'input' of Alpaca's format."""
        extra = self.text("input") if self.get("input") is not None else ""
        if not extra.strip():
            return self.text("instruction")
        return "\n".join(part for part in (self.text("instruction"), extra) if part.strip())

    def optional_text(self, key: str) -> str | None:
        """A string, or a number as text; None where the key is absent. Raises UserError."""
        value = self.get(key)
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
            raise UserError(f"{self.where}: {key!r} is a {type(value).__name__}; expected a string")
        return number_text(value, f"{self.where}: {key!r}")

    def check_foreign(self) -> None:
        """Raise UserError for a key that says something which nobody here would hear."""
        for key, advice in self.schema.foreign.items():
            value = self.get(key)
            if key == "choices" and isinstance(value, list) and all(
                    str(choice) in str(self.get("instruction")) for choice in value):
                continue  # they are told there
            if value is not None and value not in ("", [], {}) and value != _WITHOUT_EFFECT.get(key):
                raise UserError(f"{self.where}: {key!r} is {repr(value)[:60]}, which would be lost; {advice}")


def read_rows(path: str, schema: Schema = ANY, columns: Mapping[str, str] = {}) -> Iterator[Row]:
    """The objects of a json array, a jsonl or parquet file, or a saved `datasets` directory, one after another: what
    is held of a file does not grow with it.

    columns: keys of the file by ours, which they become. Raises UserError if the file is missing, torn or empty, for
    keys that the schema refuses, and for a column that is not there or would take another one's place.
    """
    row = None
    if is_table(Path(path)) and Path(path).exists():
        found = ((f"{path}, row {n}", values) for n, values in enumerate(read_table(Path(path)), 1))
    else:
        found = jsonfile.read_rows(path)
    for where, values in found:
        row = Row(where, values, schema)
        row = row._replace(values=_renamed(row, columns)) if columns else row
        row.check_foreign()
        yield row
    if row is None:
        raise UserError(f"{path} holds no rows; expected a json array or one json object a line")


def _renamed(row: Row, columns: Mapping[str, str]) -> dict[str, object]:
    """The values of a row with the columns under our names. Raises UserError."""
    missing = [theirs for theirs in columns.values() if theirs not in row.values]
    if missing:
        raise UserError(f"{row.where}: --columns names {missing[0]!r}, which is not there; found "
                        f"{', '.join(row.values)}")
    rest = {key: value for key, value in row.values.items() if key not in columns.values()}
    twice = [ours for ours in columns if ours in rest]
    if twice:
        raise UserError(f"{row.where}: --columns makes {columns[twice[0]]!r} {twice[0]!r}, which is there already; "
                        f"rename that one too")
    return rest | {ours: row.values[theirs] for ours, theirs in columns.items()}


def number_text(value: int | float | Decimal, where: str) -> str:
    """A number as people write it, and as the grader reads it: without exponent, and 4 for 4.0. Raises UserError."""
    number = Decimal(repr(value)) if isinstance(value, float) else Decimal(value)
    if not number.is_finite():
        raise UserError(f"{where} is {value}; expected a finite number, or a text")
    text = f"{number:f}"
    text = text.rstrip("0").removesuffix(".") if "." in text else text
    return "0" if text == "-0" else text


def level_number(value: object, where: str) -> int | None:
    """5 for 5, 5.0, "5" and "Level 5"; None for null, "" and "Level ?", MATH's unknown ones. Raises UserError."""
    if value is None or value == "" or isinstance(value, float) and math.isnan(value):
        return None
    text = "" if isinstance(value, bool) else str(value).strip()
    level = re.fullmatch(r"(?:level\s*)?(\d{1,4}|\?)(?:\.0+)?", text, re.IGNORECASE | re.ASCII)
    if level is None:
        raise UserError(f"{where}: 'level' is {value!r}; expected a whole number, or a text such as 'Level 5'")
    return None if level[1] == "?" else int(level[1])


def is_table(path: Path) -> bool:
    """Whether read_table() is the one to read this."""
    return path.is_dir() or path.suffix == ".parquet"


def read_table(path: Path) -> Iterator[dict[str, object]]:
    """The rows in order. Raises UserError for a damaged file, a directory that is no saved dataset, or a huge row."""
    try:
        for file in _data_files(path) if path.is_dir() else [path]:
            first = 1
            for batch in _batches(file):
                names = batch.schema.names
                if twice := [name for name in names if names.count(name) > 1]:
                    raise UserError(f"{file} has the column {twice[0]!r} twice, of which any reader would lose one")
                _check_rows(batch, file, first)
                yield from _with_short_floats(batch).to_pylist()
                first += batch.num_rows
                pyarrow.default_memory_pool().release_unused()  # else it keeps what batches have freed
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as problem:
        reason = str(problem).strip().split("\n")[0]
        raise UserError(f"{path} cannot be read as a table ({reason[:200]})") from None


def _data_files(folder: Path) -> list[Path]:
    """The data files of Dataset.save_to_disk(), or the parquet files of a downloaded split, in order. Raises UserError
    for a directory without, with those of several splits, or with some of one."""
    saved = jsonfile.read_json(folder / "state.json") if (folder / "state.json").is_file() else {}
    if saved.get("_indices_data_files"):
        raise UserError(f"{folder} says in a file of its own which of its rows are meant, as old versions of datasets "
                        "do; load it and save it again")
    if "_data_files" in saved:  # what else lies there is of map(), or of what was saved there before
        return [folder / str(one["filename"]) for one in saved["_data_files"]]
    files = sorted(folder.glob("*.arrow")) or sorted(folder.glob("*.parquet"))
    if not files:
        splits = sorted({path.parent.name for kind in ("arrow", "parquet") for path in folder.glob(f"*/*.{kind}")})
        raise UserError(f"{folder} is a directory without rows: " + (
            f"it holds the splits {', '.join(splits)}; name one of them" if splits else
            "expected *.arrow or *.parquet files, as datasets.Dataset.save_to_disk writes them"))
    shards = [_SHARD.fullmatch(file.stem) for file in files]
    kinds = {shard[1] if shard else re.sub(r"\d+", "", file.stem): file.name
             for file, shard in zip(files, shards, strict=True)}
    if len(kinds) > 1:
        raise UserError(f"{folder} holds files of several splits, {', '.join(kinds.values())}; name one file, or a "
                        "directory with those of one split alone")
    if odd := [shard for shard in shards if shard and int(shard[2]) != len(files)]:
        raise UserError(f"{folder} holds {len(files)} data files, but {odd[0][0]} is one of {int(odd[0][2])}; expected "
                        "all of one save, and no others")
    return files


def _batches(path: Path) -> Iterator[pyarrow.RecordBatch]:
    """A parquet file, or an Arrow stream, the format of Dataset.save_to_disk(), some rows at a time."""
    check_file(path)
    if path.suffix == ".parquet":
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=BUFFER) as table:
            yield from table.iter_batches(BATCH_ROWS)
    else:
        with pyarrow.memory_map(str(path)) as source:
            yield from pyarrow.ipc.open_stream(source)


def _with_short_floats(rows: pyarrow.RecordBatch) -> pyarrow.RecordBatch:
    """Columns of 16 and 32 bits as the shortest numbers that they stand for: 0.1, and not 0.10000000149011612."""
    for place, field in enumerate(rows.schema):
        if field.type in (pyarrow.float16(), pyarrow.float32()):
            kind, values = field.type.to_pandas_dtype(), rows.column(place).to_pylist()
            short = [None if value is None else float(str(kind(value))) for value in values]
            rows = rows.set_column(place, field.name, pyarrow.array(short, pyarrow.float64()))
    return rows


def _check_rows(rows: pyarrow.RecordBatch, path: Path, first: int) -> None:
    """Raise UserError for a row that is longer than any row of json may be; they are searched for by halves."""
    if rows.nbytes <= MAX_ROW:
        return
    if rows.num_rows == 1:
        raise UserError(f"{path}, row {first}: the row has more than {MAX_ROW >> 20} MiB")
    half = rows.num_rows // 2
    _check_rows(rows.slice(0, half), path, first)
    _check_rows(rows.slice(half), path, first + half)
