"""Two problems as one: longer solutions for a process verifier to learn from than its problems have."""

import random
from collections.abc import Sequence
from typing import NamedTuple

from src.data.examples import Judged

Row = dict[str, object]


class Fronts(NamedTuple):
    """Judged solutions that may stand in front of another: right to their end, or wrong before it."""

    right: list[Judged]
    wrong: list[Judged]


def fronts(rows: Sequence[Judged]) -> Fronts:
    """Those of the rows that have steps before their answer and whose end is known. A label of one half is right."""
    ended = [row for row in rows if len(row.steps) > 1 and row.labels[-1] is not None]
    wrong = [row for row in ended if any(_is_wrong(label) for label in row.labels[:-1])]
    right = [row for row in ended if not any(_is_wrong(label) for label in row.labels)]
    return Fronts(right, wrong)


def joined(rows: Sequence[Judged], share: float, wrong_share: float, seed: int) -> list[Row]:
    """The rows as `{"instruction", "steps", "labels"}`, a share of them behind a solution of another problem.

    A verifier that has seen short solutions alone takes "late" for "wrong". Behind another solution, which loses its
    last step, the answer, every step comes late. Of the solutions in front wrong_share are wrong, and then all that
    comes behind is wrong, too: without these, a verifier learns to forgive what lies far back. A kind of front that
    the rows lack is left out, and so is one of the row's own problem.
    """
    generator = random.Random(seed)
    chosen = fronts(rows)
    made: list[Row] = []
    for row in rows:
        kind = chosen.wrong if generator.random() < wrong_share else chosen.right
        front = generator.choice(kind) if kind and generator.random() < share else row
        made.append((row if front.instruction == row.instruction else join(front, row))._asdict())
    return made


def join(front: Judged, row: Judged) -> Judged:
    """Both problems as one instruction, the steps of both without the first's answer; wrong stays wrong."""
    labels = front.labels[:-1]
    lost = any(_is_wrong(label) for label in labels)
    return Judged(
        f"{front.instruction} {row.instruction}",
        [*front.steps[:-1], *row.steps],
        [*labels, *([0.0] * len(row.labels) if lost else row.labels)],
    )


def _is_wrong(label: float | None) -> bool:
    return label is not None and label < 0.5
