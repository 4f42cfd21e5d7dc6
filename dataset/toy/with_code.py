"""Toy solutions with code: every step's equation becomes a line of Python, and its result what that printed.

python dataset/toy/with_code.py --in_file dataset/toy/demonstrations.json --out_file code.json
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # a script's own folder is on the path, the repository is not

from dataset.toy.generate import ANSWER, EQUATION  # noqa: E402
from src.command import cli  # noqa: E402
from src.data.encoding import split_steps  # noqa: E402
from src.data.examples import read_instruction_rows  # noqa: E402
from src.jsonfile import write_text  # noqa: E402

OPERATIONS = {"+": "+", "-": "-", "x": "*", "/": "//"}


def blocks(solution: str) -> Iterator[dict[str, str]]:
    """A solution of generate.py as blocks: words, a line of code, its output, ..., the answer."""
    for step in split_steps(solution):
        found = EQUATION.search(step)
        if ANSWER.fullmatch(step) or not found:
            yield {"type": "text", "content": step}
            continue
        left, operation, right, result = found.groups()
        yield {"type": "text", "content": step[: found.start()].strip()}
        yield {"type": "code", "content": f"print({left}{OPERATIONS[operation]}{right})"}
        yield {"type": "execution", "content": f"{result}\n"}


def main(in_file: str, out_file: str) -> None:
    """Write rows of messages for solver_train.py --chat_template code.

    in_file: rows of instruction and output, as generate.py writes them
    out_file: rows of messages
    """
    rows = [
        {
            "messages": [
                {"role": "user", "content": row["instruction"]},
                {"role": "assistant", "content": list(blocks(row["output"][0]))},
            ]
        }
        for row in read_instruction_rows(in_file)
    ]
    write_text(out_file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


if __name__ == "__main__":
    cli.run(main)
