"""What models are shown: every row of token ids that a Decoder reads, kept in a file as a script runs.

As a program: `python tests/shown_ids.py FILE SCRIPT FLAGS...`, also under torchrun, where each rank has FILE.RANK.
"""

import json
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from src.models.decoder import Decoder


def keeping(path: Path) -> Callable[..., Tensor]:
    """Decoder.forward as it is, after the ids that it reads have been appended to a file."""
    forward = Decoder.forward

    def kept(self: Decoder, tokens: Tensor, *rest: object, **others: object) -> Tensor:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in tokens.tolist())
        return forward(self, tokens, *rest, **others)

    return kept


def read(folder: Path, name: str) -> list[list[int]]:
    """The rows that a run, or all ranks of one, has kept."""
    return [json.loads(line) for path in folder.glob(f"{name}*") for line in path.read_text().splitlines()]


if __name__ == "__main__":
    del sys.argv[0]
    Decoder.forward = keeping(Path(f"{sys.argv.pop(0)}.{os.environ.get('RANK', '0')}"))
    runpy.run_path(sys.argv[0], run_name="__main__")
