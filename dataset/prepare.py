"""Turn the published files of a benchmark into instruction data for solver_train.py and solver_evaluate.py.

python dataset/prepare.py gsm8k --raw_file train.jsonl --save_file dataset/GSM8K/train.json
python dataset/prepare.py math --raw_file test.jsonl --save_file dataset/MATH/test.json

Raw rows are {"question", "answer"} for gsm8k (jsonl or parquet) and {"problem", "solution", "level", "type"} for math
(jsonl). Saved rows are {"instruction", "output": [solution], "label"} and, where the source has them, "level" as a
number and "subject".
"""

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

# python puts the folder of this script on the path, not the repository root that holds src
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src import cli  # noqa: E402
from src.errors import UserError  # noqa: E402
from src.evaluation.extract import last_box  # noqa: E402
from src.evaluation.normalize import rational  # noqa: E402

CALCULATOR_MARK = re.compile(r"<<[^<>\n]*>>")       # <<48/2=24>> in GSM8K: a hint for a tool we do not have
Row = dict[str, str | int | list[str]]


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


def gsm8k_row(raw: RawRow) -> Row:
    """A GSM8K row; the label is the number behind the last ####, which stays in the output."""
    solution = CALCULATOR_MARK.sub("", raw.text("answer"))
    _, mark, label = solution.rpartition("####")
    label = label.strip().replace(",", "")
    if not mark or rational(label) is None:
        raise UserError(f"{raw.place}: expected 'answer' to end in a line '#### number', found {solution[-60:]!r}")
    return {"instruction": raw.text("question"), "output": [solution], "label": label}


def math_row(raw: RawRow) -> Row:
    r"""A MATH row; the label is the content of the last \boxed."""
    solution = raw.text("solution")
    box = last_box(solution)
    if box is None or not box.text:
        raise UserError(rf"{raw.place}: expected a closed \boxed{{...}} in 'solution', found {solution[-60:]!r}")
    row: Row = {"instruction": raw.text("problem"), "output": [solution], "label": box.text}
    level = level_number(raw) if "level" in raw.fields else None
    if level is not None:
        row["level"] = level
    if "type" in raw.fields or "subject" in raw.fields:
        row["subject"] = raw.text("subject", "type")
    return row


def level_number(raw: RawRow) -> int | None:
    """4 for "Level 4" or 4; None for the few problems of the training set marked "Level ?"."""
    level = re.fullmatch(r"(?:Level )?(\d|\?)", str(raw.fields["level"]))
    if level is None:
        raise UserError(f"{raw.place}: expected a level such as 'Level 4', found {raw.fields['level']!r}")
    return None if level.group(1) == "?" else int(level.group(1))


BUILDERS = {"gsm8k": gsm8k_row, "math": math_row}


def save(rows: list[Row], path: Path) -> None:
    """Write a json array with one row a line; a stop on the way leaves an old file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    temporary.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    os.replace(temporary, path)


def main(raw_file: str, save_file: str, task: Literal["gsm8k", "math"]) -> None:
    """Convert one file.

    raw_file: the published file, .jsonl or (gsm8k) .parquet
    save_file: the json file to write
    task: the benchmark; written first and without --task
    """
    path = Path(raw_file)
    if not path.is_file():
        raise UserError(f"--raw_file {raw_file} is not a file; name the downloaded .jsonl or .parquet file")
    read = read_parquet if path.suffix == ".parquet" else read_jsonl
    rows = [BUILDERS[task](raw) for raw in read(path)]
    if not rows:
        raise UserError(f"--raw_file {raw_file} holds no rows; expected one json object a line")
    save(rows, Path(save_file))
    print(f"{len(rows)} rows written to {save_file}")


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in (*BUILDERS, "-h", "--help"):
        found = f"found {sys.argv[1]!r}" if len(sys.argv) > 1 else "found nothing"
        print(f"error: expected {' or '.join(BUILDERS)} behind dataset/prepare.py, {found}; for example: "
              "python dataset/prepare.py gsm8k --raw_file train.jsonl --save_file train.json", file=sys.stderr)
        sys.exit(2)
    if sys.argv[1] in BUILDERS:
        sys.argv[1:2] = ["--task", sys.argv[1]]
    cli.run(main)
