"""python -m src.report RUN_DIR [OTHER_DIR]: write a page of what a run or an evaluation left, or of two compared."""

import sys
from pathlib import Path

from src.command import cli
from src.errors import UserError
from src.report.page import write_report
from src.runlog import table


def main(arguments: list[str]) -> None:
    """Write the page and say where it is."""
    if len(arguments) not in (1, 2):
        raise UserError(f"found {len(arguments)} arguments; expected one or two: python -m src.report DIR [OTHER_DIR]")
    table(f"wrote {write_report(*map(Path, arguments))}")


cli.guarded(lambda: main(sys.argv[1:]))
