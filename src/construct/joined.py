"""Two problems as one: longer solutions for a verifier to learn from than its problems have."""

import random
from collections.abc import Sequence
from typing import NamedTuple

from src.data.encoding import STEP_END, split_steps
from src.data.examples import Judged

Row = dict[str, object]


class Fronts(NamedTuple):
    """Judged solutions that may stand in front of another, by how they end."""

    right: list[Judged]
    wrong: list[Judged]


def fronts(rows: Sequence[Judged]) -> Fronts:
    """Those of the rows that have steps before their last one and that are right, or were lost before it.

    A label of at least one half is right.
    """
    long = [row for row in rows if len(row.steps) > 1]
    right = [row for row in long if row.labels[-1] is not None and not any(map(_is_wrong, row.labels))]
    wrong = [row for row in long if _is_wrong(row.labels[-1]) and (row.labels[-2] or 0) < 0.5]
    return Fronts(right, wrong)


def joined(rows: Sequence[Judged], share: float, wrong_share: float, seed: int) -> list[Judged]:
    """The rows, a share of them behind a solution of another problem.

    A verifier that has seen short solutions alone takes "late" for "wrong". Behind another solution, which loses its
    last step, the answer, every step comes late. Of the solutions in front wrong_share are wrong, and then all that
    comes behind is wrong, too: without these, a verifier learns to forgive what lies far back. A kind of front that
    the rows lack is left out, and so is one of the row's own problem.
    """
    generator = random.Random(seed)
    chosen = fronts(rows)
    made = []
    for row in rows:
        kind = chosen.wrong if generator.random() < wrong_share else chosen.right
        front = generator.choice(kind) if kind and generator.random() < share else row
        made.append(row if front.instruction == row.instruction else join(front, row))
    return made


def join(front: Judged, row: Judged) -> Judged:
    """Both problems as one instruction, the steps of both without the first's answer; wrong stays wrong."""
    lost = _is_wrong(front.labels[-1])
    return Judged(
        f"{front.instruction} {row.instruction}",
        [*front.steps[:-1], *row.steps],
        [*front.labels[:-1], *([0.0] * len(row.labels) if lost else row.labels)],
    )


def in_paragraphs(row: Judged) -> Judged:
    """An outcome row, whose solution is one step, with its paragraphs as steps; only the last has a label."""
    steps = split_steps(row.steps[0])
    return Judged(row.instruction, steps, [None] * (len(steps) - 1) + row.labels)


def as_outcome(row: Judged) -> Row:
    """What `in_paragraphs` took apart, as a row `{"instruction", "output", "correct"}`."""
    return {
        "instruction": row.instruction,
        "output": STEP_END.join(row.steps),
        "correct": row.labels[-1] == 1.0,
    }


def _is_wrong(label: float | None) -> bool:
    return label is not None and label < 0.5
