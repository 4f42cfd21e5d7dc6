"""Two problems as one: longer solutions for a verifier to learn from than its problems have."""

import random
from collections.abc import Sequence
from typing import NamedTuple

from src.data.encoding import STEP_END
from src.data.examples import Judged
from src.errors import UserError

Row = dict[str, object]


class Fronts(NamedTuple):
    """Judged solutions that may stand in front of another, by whether the way they went was right."""

    right: list[Judged]
    wrong: list[Judged]


def fronts(rows: Sequence[Judged]) -> Fronts:
    """The rows that are right to their end, and those with a mistake that they did not get out of by luck.

    A label of at least one half is right.
    """
    right = [row for row in rows if not _lost(row) and row.labels[-1] is not None]
    wrong = [row for row in rows if _lost(row) and (row.labels[-1] or 0) < 0.5]
    return Fronts(right, wrong)


def joined(rows: Sequence[Judged], share: float, wrong_share: float, seed: int, source: str) -> list[Judged]:
    """The rows, a share of them behind a solution of another problem.

    A verifier that has seen short solutions alone takes "late" for "wrong". Behind another solution every step comes
    late. Of the solutions in front wrong_share are wrong, and then all that comes behind is wrong, too: without these,
    a verifier learns to forgive what lies far back. A row that meets its own problem stays as it is.

    Raises UserError where the rows, which are those of the file `source`, have none of a kind that is asked for.
    """
    generator = random.Random(seed)
    chosen = fronts(rows)
    for kind, solutions, asked in (
        ("right", chosen.right, wrong_share < 1),
        ("wrong", chosen.wrong, wrong_share > 0),
    ):
        if asked and not solutions:
            raise UserError(
                f"{source} has no {kind} solution to put in front of others; set --wrong_share {int(kind == 'right')}, "
                "or judge more"
            )
    made = []
    for row in rows:
        front = generator.choice(chosen.wrong if generator.random() < wrong_share else chosen.right)
        stays = generator.random() >= share or front.instruction == row.instruction
        made.append(row if stays else join(front, row))
    return made


def join(front: Judged, row: Judged) -> Judged:
    """Both problems as one instruction, the steps of both; wrong stays wrong."""
    before = _without_answer(front)
    return Judged(
        f"{front.instruction} {row.instruction}",
        [*before.steps, *row.steps],
        [*before.labels, *([0.0] * len(row.labels) if _lost(front) else row.labels)],
    )


def as_outcome(row: Judged) -> Row:
    """The solution, whatever steps it was joined from, as a row `{"instruction", "output", "correct"}`."""
    return {
        "instruction": row.instruction,
        "output": STEP_END.join(row.steps),
        "correct": row.labels[-1] == 1.0,
    }


def _without_answer(row: Judged) -> Judged:
    """A solution without its last step, unless that is all there is, or the first that is wrong."""
    if len(row.steps) == 1 or (_lost(row) and not any(map(_is_wrong, row.labels[:-1]))):
        return row
    return Judged(row.instruction, row.steps[:-1], row.labels[:-1])


def _lost(row: Judged) -> bool:
    """Whether a step is known to be wrong."""
    return any(map(_is_wrong, row.labels))


def _is_wrong(label: float | None) -> bool:
    return label is not None and label < 0.5
