"""Turn published files into the data files that the scripts read (dataset/README.md has their schemas).

python dataset/prepare.py gsm8k --raw_file train.jsonl --save_file dataset/GSM8K/train.json
python dataset/prepare.py math --raw_file train.jsonl --save_file dataset/MATH/easy.json --levels 1,2,3
python dataset/prepare.py prm800k --raw_file phase2_train.jsonl --save_file prm.json \
    --levels 1,2,3 --level_file dataset/MATH/train.json
"""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

# python puts the folder of this script on the path, not the repository root that holds src
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.benchmarks import (  # noqa: E402
    abel_row,
    aqua_row,
    asdiv_row,
    gsm8k_row,
    math_row,
    mawps_row,
    olympiad_row,
    svamp_row,
    with_answer_said,
)
from dataset.raw import LeftOut, RawRow, Row, read_raw  # noqa: E402
from dataset.readers import READERS, table_row  # noqa: E402
from dataset.verifier_data import (  # noqa: E402
    hh_rlhf_rows,
    math_shepherd_rows,
    metamath_rows,
    metamath_steps,
    prm800k_rows,
    prm800k_solutions,
    processbench_rows,
)
from src.command import cli  # noqa: E402
from src.data.examples import read_prompts  # noqa: E402
from src.errors import UserError  # noqa: E402
from src.jsonfile import write_text  # noqa: E402

# every problem of a benchmark counts, also one that stands there twice
BENCHMARKS: dict[str, Callable[[RawRow], Row]] = {
    "gsm8k": gsm8k_row,
    "math": math_row,
    "svamp": svamp_row,
    "asdiv": asdiv_row,
    "mawps": mawps_row,
    "aqua": aqua_row,
    "olympiadbench": olympiad_row,
    **{name: partial(table_row, reader) for name, reader in READERS.items()},
}
BUILDERS: dict[str, Callable[[RawRow], Iterable[Row]]] = {
    **{task: lambda raw, make_row=make_row: [make_row(raw)] for task, make_row in BENCHMARKS.items()},
    "abel": lambda raw: [abel_row(raw)],
    "metamath": metamath_rows,
    "metamath_steps": metamath_steps,
    "prm800k": prm800k_rows,
    "prm800k_solutions": prm800k_solutions,
    "math_shepherd": math_shepherd_rows,
    "processbench": processbench_rows,
    "hh_rlhf": hh_rlhf_rows,
}


class Report(NamedTuple):
    """What was kept, how many rows were left out for which reason, and the complaints about rows that are wrong."""

    rows: list[Row]
    left_out: Counter[str]
    wrong: list[UserError]

    def counts(self) -> str:
        """What was left out, in words."""
        parts = [f"{count} {why} left out" for why, count in self.left_out.items()]
        if self.wrong:
            parts.append(f"{len(self.wrong)} that cannot be read left out (the first is {self.wrong[0]})")
        return ", ".join(parts)


def build(path: Path, task: str, levels: list[int], level_of: dict[str, int], *, strict: bool,
          hide_answers: bool = False) -> Report:
    """All rows of a file, each once (a benchmark's as they are); of the wanted levels alone where some are named.

    A row's level is its own, or that of its problem (the original of a rephrased one) in level_of. Rows whose
    problem has no known level are left out too, and counted: nothing hard slips in as easy. A row that is wrong is
    counted, or with strict raises UserError. hide_answers: problems of other known levels stay, without solution and
    label.
    """
    report, seen = Report([], Counter(), []), set()

    def refuse(problem: UserError) -> None:
        report.wrong.append(problem)
        if strict:
            raise problem

    for raw in read_raw(path, refuse):
        try:
            rows = list(BUILDERS[task](raw))
        except LeftOut as reason:
            report.left_out[str(reason)] += 1
            continue
        except UserError as problem:
            refuse(problem)
            continue
        for row in rows:
            problem = row.pop("original", row["instruction"])
            level = row.get("level", level_of.get(" ".join(str(problem).split())))
            if hide_answers and levels and level is not None and level not in levels:
                row = {name: value for name, value in row.items() if name not in ("output", "label")} | {"level": level}
                report.left_out["answers of other levels"] += 1
                level = levels[0]
            key = json.dumps(row, sort_keys=True)  # the problem is part of it: equal steps of two problems are two rows
            if levels and level not in levels:
                report.left_out["of unknown level" if level is None else "of other levels"] += 1
            elif key in seen and task not in BENCHMARKS:
                report.left_out["repeated"] += 1
            else:
                seen.add(key)
                report.rows.append(row)
    return report


def read_levels(level_file: str) -> dict[str, int]:
    """Level by problem text (white space made equal) of a file of prompts; an empty name gives none."""
    prompts = read_prompts(level_file, need_label=False) if level_file else []
    return {" ".join(prompt.instruction.split()): prompt.level for prompt in prompts if prompt.level is not None}


def save(rows: list[Row], path: Path) -> None:
    """Write a json array with one row a line; a stop on the way leaves an old file as it was."""
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    write_text(path, f"[\n{lines}\n]\n")


def main(
    raw_file: str, save_file: str,
    task: Literal["gsm8k", "math", "svamp", "asdiv", "mawps", "aqua", "olympiadbench", "aime24", "aime25", "amc23",
                  "hmmt", "minerva", "gpqa", "mmlu", "arc", "commonsenseqa", "bbh", "agieval", "olympicarena",
                  "abel", "metamath", "metamath_steps", "prm800k", "prm800k_solutions", "math_shepherd", "processbench",
                  "hh_rlhf"],
    levels: list[int] = [], level_file: str = "",  # noqa: B006 (shown by --help, never changed)
    hide_answers: bool = False, say_answer: bool = False, strict: bool = False,
) -> None:
    """Convert one file.

    raw_file: the published file: .jsonl, .json, .parquet, .csv or (ASDiv) .xml, or a directory of `datasets`
    save_file: the json file to write
    task: what the file holds; written first and without --task
    levels: only problems of these levels, such as 1,2,3; default: all
    level_file: prompts with levels (such as dataset/MATH/train.json), for files whose rows carry none
    hide_answers: keep the problems of other levels than --levels, without their solutions and labels
    say_answer: end every solution of MATH with "The answer is: LABEL", where --task MATH-weak-to-strong looks for it
    strict: stop at the first row that cannot be read, instead of leaving it out and counting it
    """
    if say_answer and task != "math":
        raise UserError(f"--say_answer is for math, whose solutions end in any words; found {task}")
    if level_file and not levels:
        raise UserError("--level_file has no effect: there are no --levels to choose by; leave it out")
    if hide_answers and not levels:
        raise UserError("--hide_answers hides those of other levels than --levels names; give --levels with it")
    if hide_answers and task in ("prm800k", "math_shepherd", "processbench", "hh_rlhf"):
        raise UserError(f"--hide_answers leaves out solutions and labels, and rows of {task} hold judged ones alone; "
                        "give it with problems, such as math")
    path = Path(raw_file)
    if not path.is_file() and not path.is_dir():
        raise UserError(f"--raw_file {raw_file} is not a file; name the downloaded .jsonl, .json or .parquet file")
    report = build(path, task, levels, read_levels(level_file), strict=strict, hide_answers=hide_answers)
    if not report.rows:
        wanted = f"{task} with levels {levels}" if levels else task
        hint = f"--level_file {level_file} has no level for their problems" if level_file else "give --level_file"
        raise UserError(f"--raw_file {raw_file} gives no rows of {wanted}: {report.counts() or 'it is empty'}"
                        + f"; {hint}" * ("of unknown level" in report.left_out))
    save([with_answer_said(row) for row in report.rows] if say_answer else report.rows, Path(save_file))
    cli.show(f"{len(report.rows)} rows written to {save_file}{', ' * bool(report.counts())}{report.counts()}\n")


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in (*BUILDERS, "-h", "--help"):
        found = f"found {sys.argv[1]!r}" if len(sys.argv) > 1 else "found nothing"
        print(f"error: expected one of {', '.join(BUILDERS)} behind dataset/prepare.py, {found}; for example: "
              "python dataset/prepare.py gsm8k --raw_file train.jsonl --save_file train.json", file=sys.stderr)
        sys.exit(2)
    if sys.argv[1] in BUILDERS:
        sys.argv[1:2] = ["--task", sys.argv[1]]
    cli.run(main)
