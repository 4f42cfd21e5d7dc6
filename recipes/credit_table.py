"""How often the credit of preference-trained solvers finds the first wrong step, over the seeds of a recipe.

python recipes/credit_table.py --run_dir runs/step_controlled_dpo --rows dpo scdpo --names "DPO" "step-controlled DPO"
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's own folder is on the path, the repository is not

from src import runlog  # noqa: E402
from src.command import cli  # noqa: E402
from src.errors import UserError  # noqa: E402

KINDS = {"by_sum": "step's sum", "by_lowest_token": "lowest token"}


def main(run_dir: str, rows: list[str], names: list[str]) -> None:
    """Print the share of solutions with a mistake in which the least credit lies in the first wrong step, by seed.

    run_dir: directory of the recipe, with seed-N/ROW-credit
    rows: folders to show, without -credit
    names: what to call them
    """
    if len(rows) != len(names):
        raise UserError(f"found {len(rows)} --rows and {len(names)} --names; give as many, a comma parts two")
    lines = []
    for row, name in zip(rows, names, strict=True):
        files = sorted(Path(run_dir).glob(f"seed-*/{row}-credit/results.json"))
        reports = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        if not reports:
            raise UserError(f"{run_dir} holds 0 finished seeds of {row}-credit; expected at least one")
        for kind, what in KINDS.items():
            found = [report[kind]["accuracy"] for report in reports]
            each = " ".join(f"{share:.1%}" for share in found)
            lines.append(f"{f'{name}, by the {what}':54}{sum(found) / len(found):7.1%}   seeds {each}")
    first = f"first wrong step of {reports[0]['with_a_wrong_step']} solutions, blindly {reports[0]['blindly']:.1%}"
    runlog.table("\n".join([first, *lines]))


if __name__ == "__main__":
    cli.run(main)
