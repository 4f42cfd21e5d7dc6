"""Which beginnings of solutions to go on from, and what is learnt of them: step labels, step-controlled pairs."""

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from src.construct.continuation import Begun, Schedule, begun, whole_steps
from src.construct.problems import by_problem
from src.data.encoding import STEP_END, split_steps
from src.data.examples import Sample
from src.errors import UserError
from src.text.blocks import Marker

Row = dict[str, object]


class Branched(NamedTuple):
    """Step-controlled pairs, and what became of every branch."""

    pairs: list[Row]
    counts: Counter[str]


def solutions_to_judge(samples: Sequence[Sample], solutions_a_problem: int, limit: int = -1) -> list[Sample]:
    """The first different solutions of each problem, or of the first so many, in turns as the file has them.

    Those without an answer are among them: a verifier that never saw one may well prefer it. Raises UserError for a
    sample without its label.
    """
    chosen = []
    for problem in list(by_problem(samples).values())[: None if limit == -1 else limit]:
        solutions = (*problem.right, *problem.wrong, *problem.unparsed)
        ordered = sorted(solutions, key=lambda sample: sample.sample)
        chosen += ordered[:solutions_a_problem]
    for sample in chosen:
        if not sample.values.get("label"):
            raise UserError(
                f"sample {sample.id!r}/{sample.sample} has no key 'label'; grade the file with solver_evaluate.py"
            )
    return chosen


def beginnings(solutions: Sequence[Sample], step_end: str = STEP_END) -> dict[tuple[str, str], Begun]:
    """Every beginning of every solution: its first step, its first two, ... all but the last.

    Solutions of one problem that begin alike share it, under (problem, prefix): it is judged once.
    """
    found: dict[tuple[str, str], Begun] = {}
    for sample in solutions:
        for k in range(1, len(split_steps(sample.response, step_end))):
            item = begun(sample, k, step_end)
            found.setdefault((sample.id, item.prefix), item)
    return found


def judged_steps(
    solutions: Sequence[Sample], rollouts: Sequence[Sample], step_end: str = STEP_END, *, hard: bool
) -> list[Row]:
    """Rows `{"instruction", "steps", "labels"}` from graded rollouts (Wang et al. 2024, Math-Shepherd, section 3.2).

    A step's label says whether a way on from behind it is known that comes out right (hard), or the share of its
    rollouts that do (soft). The known ways are its rollouts, those from behind later steps, and the solutions
    themselves: a problem's beginnings share what they lead to. The last step's label is the solution's own outcome; a
    step of which nothing is known is not judged.
    """
    outcomes = defaultdict(list)
    for rollout in rollouts:
        outcomes[rollout.id].append(rollout.outcome == "right")
    judged = {key: outcomes[item.prompt.id] for key, item in beginnings(solutions, step_end).items()}
    on_the_way = _on_the_way(solutions, judged, step_end)
    rows = []
    for sample in solutions:
        steps = split_steps(sample.response, step_end)
        labels: list[float | None] = []
        for k in range(1, len(steps)):
            key = sample.id, begun(sample, k, step_end).prefix
            found = judged[key]
            if hard and key in on_the_way:
                labels.append(1.0)
            else:
                labels.append(sum(found) / len(found) if found else None)
        labels.append(float(sample.outcome == "right"))
        rows.append({"id": sample.id, "instruction": sample.prompt, "steps": steps, "labels": labels})
    return rows


def _on_the_way(
    solutions: Sequence[Sample], judged: Mapping[tuple[str, str], Sequence[bool]], step_end: str
) -> set[tuple[str, str]]:
    """The beginnings, as (problem, prefix), from which a solution or a rollout is known to come out right."""
    found = set()
    for sample in solutions:
        n_steps = len(split_steps(sample.response, step_end))
        prefixes = [begun(sample, k, step_end).prefix for k in range(1, n_steps)]
        lengths = [n for n, prefix in enumerate(prefixes, start=1) if any(judged[sample.id, prefix])]
        if sample.outcome == "right":
            lengths.append(len(prefixes))
        found |= {(sample.id, prefix) for prefix in prefixes[: max(lengths, default=0)]}
    return found


def branch_points(steps: Sequence[str]) -> list[int]:
    """After how many steps of a solution a branch may leave it: one at least, and two at least are left out.

    A block of code is not left before its output (the released jobs of Step-Controlled DPO end at text or execution).
    """
    return [k for k in range(1, len(steps) - 1) if not steps[k - 1].startswith(Marker.CODE)]


def branches(
    samples: Sequence[Sample], pairs_a_problem: int, seed: int, step_end: str = STEP_END
) -> list[Begun]:
    """Where to leave the first right solution of each problem: at most so many points, drawn by the seed."""
    generator = random.Random(seed)
    chosen = []
    for problem in by_problem(samples).values():
        if problem.right:
            points = branch_points(whole_steps(problem.right[0].response, step_end))
            drawn = sorted(generator.sample(points, min(pairs_a_problem, len(points))))
            chosen += [begun(problem.right[0], k, step_end) for k in drawn]
    if any(not item.prompt.label for item in chosen):
        raise UserError("the samples have no key 'label'; grade the file with solver_evaluate.py")
    return chosen


def step_controlled_pairs(
    jobs: Sequence[Begun],
    found: Sequence[Sample],
    schedule: Schedule,
    *,
    max_steps: int,
    max_step_characters: int,
) -> Branched:
    """Rows `{"instruction", "prefix", "chosen", "rejected"}`: a right and a wrong way on from the same first steps.

    found: the wrong solutions that came, by the id of their job.
    Solutions of more steps, or with a longer step, are left out as noise (section 3.2, filters of the released code).
    """
    texts = {sample.id: sample for sample in found}
    counts: Counter[str] = Counter()
    pairs = []
    for job in jobs:
        sample = texts.get(job.prompt.id)
        if sample is None:
            counts["never wrong"] += 1
            continue
        wrong = whole_steps(sample.response.removeprefix(job.prefix), job.step_end)
        if max(len(job.steps), job.k + len(wrong)) > max_steps:
            counts["with too many steps"] += 1
        elif max(len(step.strip()) for step in (*job.steps, *wrong)) > max_step_characters:
            counts["with too long a step"] += 1
        else:
            counts["kept"] += 1
            pairs.append(_pair(job, sample.response.removeprefix(job.prefix), len(wrong), schedule))
    return Branched(pairs, counts)


def _pair(job: Begun, rejected: str, n_wrong: int, schedule: Schedule) -> Row:
    return {
        "id": job.prompt.id,
        "instruction": job.prompt.instruction,
        "prefix": job.prefix,
        "chosen": job.rest,
        "rejected": rejected,
        "start_steps": job.k,
        "temperatures": [round(schedule.at(step), 6) for step in range(n_wrong)],
    }
