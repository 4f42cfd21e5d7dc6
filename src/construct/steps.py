"""Continuations from the steps of solutions: step labels (Math-Shepherd) and step-controlled pairs.

Both commands choose where to cut solutions, let a solver continue from there, and make rows of what comes.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from src import jsonfile, load, parallel, runlog
from src.command.config import CodeFlags, Count, CountOrOff, NonNegative, Seed, flag
from src.construct.continuation import (
    StepSampling,
    TemperatureSchedule,
    Truncated,
    branching_sampler,
    replayable,
    rollout_sampler,
    split_into_steps,
    truncate_at_step,
)
from src.construct.samples import (
    SAMPLE_MORE,
    BuildConfig,
    ErrorFlags,
    Row,
    by_problem,
    log_counts,
    read_graded,
    read_without_errors,
    save,
)
from src.construct.solver import (
    ContinuationFlags,
    check_samples_differ,
    check_solver,
    open_solver,
    open_task,
    sample_and_grade,
)
from src.data.encoding import STEP_END, STEP_ENDS, split_steps
from src.data.examples import UNDECIDED, Sample, read_samples
from src.errors import UserError
from src.evaluation.report import type_of
from src.grading.grader import Grader
from src.inference.sampling import Sampling
from src.text.blocks import CODE_FORM, Marker


@dataclass(frozen=True, kw_only=True)
class ProcessConfig(ContinuationFlags, BuildConfig):
    """Rollouts and labels"""

    rollouts: Count = flag(8, "samples that continue from the end of each step")
    label: Literal["hard", "soft"] = flag("hard", """hard = is a way on known that comes out right: a rollout
        from here or a later step, or a solution; soft = the share of the step's own rollouts that do""")
    solutions_a_problem: Count = flag(4, "most solutions of one problem")
    limit: CountOrOff = flag(-1, "only the first so many problems; -1 = all")
    temperature: NonNegative = flag(0.7, "of the rollouts")
    max_new_tokens: Count = flag(512, "longest rollout")
    seed: Seed = flag(1, "seed of the rollouts")


def process(config: ProcessConfig) -> None:
    """Label every step of solutions by rollouts from its end, for verifier_train.py --objective process.

    Needs a solver: start it with torchrun, or give a server. A rerun continues.
    """
    check_solver(config, from_prefix=True)
    check_samples_differ(config.temperature, config.rollouts, "rollouts")
    step_end, source = STEP_ENDS[config.step], config.samples_file
    solutions = choose_solutions(read_graded(source), config.solutions_a_problem, config.limit)
    prompting, task = open_task(config, solutions)
    jobs = list(truncate_everywhere(solutions, step_end).values())
    if not jobs:
        raise UserError(f"{source} has no solution of two steps or more to judge; with --step {config.step} a step is "
                        f"a {config.step}")
    runlog.logger().info("%d beginnings of %d solutions to go on from, %d times each", len(jobs), len(solutions),
                         config.rollouts)
    if config.dry_run:
        return
    solver = open_solver(config, prompting, seed=config.seed)
    if solver.coding:
        raise UserError("process judges the paragraphs of a solution; it has no labels for blocks of code")
    sampling = Sampling(temperature=config.temperature, max_new_tokens=config.max_new_tokens, stop=prompting.stop,
                        seed=config.seed)
    sampler = rollout_sampler(solver, beginnings(jobs, config.log_dir), sampling)
    identity = {name: getattr(config, name) for name in ("temperature", "max_new_tokens", "seed", "step")}
    path = sample_and_grade(solver, sampler, [job.prompt for job in jobs], config.rollouts, config=config,
                            log_dir=config.log_dir, identity=identity, task=task)
    if parallel.rank() == 0:
        rows = label_steps(solutions, read_samples(str(path)), step_end, hard=config.label == "hard")
        save(rows, "judged solutions", "no sample is graded", source, config.save_file, config.dry_run)


def beginnings(jobs: Sequence[Truncated], log_dir: str) -> dict[str, str]:
    """The prefixes to go on from, by the ids of their prompts. Raises UserError where log_dir holds continuations of
    other ones: solutions of another file may have the same ids."""
    found, path = {job.prompt.id: job.prefix for job in jobs}, Path(log_dir) / "samples.jsonl"
    # of a line that is none, such as a torn last one, sample_prompts() takes care
    for _, row in jsonfile.read_rows(path, refuse=lambda problem: None) if path.is_file() else ():
        if not str(row.get("response")).startswith(found.get(str(row.get("id")), "")):
            raise UserError(f"{path} holds {row['id']!r} of another solution than is given, or with another --step; "
                            "choose another --log_dir or delete that file")
    return found


def choose_solutions(samples: Sequence[Sample], solutions_per_problem: int, limit: int = -1) -> list[Sample]:
    """Choose the first different solutions of each problem, or of the first `limit` problems.

    Those without an answer are among them: a verifier that never saw one may well prefer it. Raises UserError for a
    sample without its label.
    """
    chosen = []
    for problem in list(by_problem(samples).values())[: None if limit == -1 else limit]:
        solutions = (*problem.right, *problem.wrong, *problem.unparsed)
        chosen += sorted(solutions, key=lambda sample: sample.sample)[:solutions_per_problem]
    for sample in chosen:
        if not sample.values.get("label"):
            raise UserError(f"sample {sample.id!r}/{sample.sample} has no key 'label'; grade the file with "
                            "solver_evaluate.py")
    return chosen


def prefixes_of(sample: Sample, step_end: str) -> list[Truncated]:
    """Cut a solution after its first step, its first two, ... all but the last."""
    n_steps = len(split_steps(sample.response, step_end))
    return [truncate_at_step(sample, k, step_end) for k in range(1, n_steps)]


def truncate_everywhere(solutions: Sequence[Sample], step_end: str = STEP_END) -> dict[tuple[str, str], Truncated]:
    """Collect every prefix of every solution under (problem, prefix): what solutions share is sampled from once."""
    found: dict[tuple[str, str], Truncated] = {}
    for sample in solutions:
        for truncated in prefixes_of(sample, step_end):
            found.setdefault((sample.id, truncated.prefix), truncated)
    return found


def label_steps(
    solutions: Sequence[Sample], rollouts: Sequence[Sample], step_end: str = STEP_END, *, hard: bool
) -> list[Row]:
    """Make rows `{"instruction", "steps", "labels"}` of graded rollouts (Wang et al. 2024, Math-Shepherd, section 3.2).

    A hard label says whether a continuation is known that is right, a soft one is the share of the step's rollouts
    that are. Known continuations are its rollouts, those of later steps, and the solutions themselves: prefixes of a
    problem share what they lead to. The last step's label is the solution's own outcome; a step of which nothing is
    known has the label None.
    """
    outcomes = defaultdict(list)
    for rollout in rollouts:
        if rollout.outcome not in UNDECIDED:
            outcomes[rollout.id].append(rollout.outcome == "right")
    is_right = {key: outcomes[one.prompt.id] for key, one in truncate_everywhere(solutions, step_end).items()}
    reach_right = _prefixes_of_right_ones(solutions, is_right, step_end) if hard else set()
    rows = []
    for sample in solutions:
        labels: list[float | None] = []
        for truncated in prefixes_of(sample, step_end):
            key = sample.id, truncated.prefix
            mean = sum(is_right[key]) / len(is_right[key]) if is_right[key] else None
            labels.append(1.0 if key in reach_right else mean)
        labels.append(float(sample.outcome == "right"))
        steps = split_steps(sample.response, step_end)
        rows.append({"id": sample.id, "instruction": sample.prompt, "steps": steps, "labels": labels})
    return rows


def _prefixes_of_right_ones(
    solutions: Sequence[Sample], is_right: Mapping[tuple[str, str], Sequence[bool]], step_end: str
) -> set[tuple[str, str]]:
    """Find the prefixes, as (problem, prefix), from which a solution or a rollout is known to be right."""
    found = set()
    for sample in solutions:
        prefixes = [truncated.prefix for truncated in prefixes_of(sample, step_end)]
        lengths = [n for n, prefix in enumerate(prefixes, start=1) if any(is_right[sample.id, prefix])]
        longest = len(prefixes) if sample.outcome == "right" else max(lengths, default=0)
        found |= {(sample.id, prefix) for prefix in prefixes[:longest]}
    return found


@dataclass(frozen=True, kw_only=True)
class BranchConfig(ContinuationFlags, CodeFlags, ErrorFlags, BuildConfig):
    """Branches"""

    pairs_a_problem: Count = flag(2, "most points to leave the right solution of a problem at")
    attempts: Count = flag(100, "how often a branch is tried until it comes to a wrong answer")
    temperature: NonNegative = flag(1.1, "of the first step after the given ones")
    temperature_rise: NonNegative = flag(0.1, "added for every further step")
    temperature_cap: NonNegative = flag(1.4, "never above this")
    steps_a_solution: Count = flag(24, "longer solutions are left out")
    characters_a_step: Count = flag(3000, "solutions with a longer step are left out")
    max_new_tokens: Count = flag(512, "longest step")
    seed: Seed = flag(1, "seed of the points and of the samples")


def branch(config: BranchConfig) -> None:
    """Step-controlled pairs for preference_train.py: wrong continuations of the first steps of a right solution.

    Needs a solver: start it with torchrun, or give a server. A rerun continues.
    """
    check_solver(config, from_prefix=True)
    step_end = STEP_ENDS[config.step]
    template = config.chat_template
    if config.ckpt_dir and not template:
        template = load.load_config(config.ckpt_dir, kind="solver").chat_template
    if config.ckpt_dir and template == CODE_FORM:
        step_end = Marker.END_OF_BLOCK
    samples = read_without_errors(config.samples_file, config)
    jobs = choose_branches(samples, config.pairs_a_problem, config.seed, step_end)
    prompting, task = open_task(config, [job.sample for job in jobs])
    if not jobs:
        raise UserError(f"{config.samples_file} has no right solution of three steps or more to leave; {SAMPLE_MORE}")
    runlog.logger().info("%d branches of %d problems", len(jobs), len({job.sample.id for job in jobs}))
    if config.dry_run:
        return
    solver = open_solver(config, prompting, seed=config.seed, max_rounds=config.steps_a_solution, code=config)
    if solver.coding:
        jobs = replayable(jobs, solver.coding)
        runlog.logger().info("%d of them leave solutions whose code prints the same again", len(jobs))
    schedule = TemperatureSchedule(config.temperature, config.temperature_rise, config.temperature_cap)
    identity = schedule._asdict() | {"rules": task.rules()} | {name: getattr(config, name) for name in (
        "attempts", "steps_a_solution", "max_new_tokens", "seed", "step")}
    with Grader(task) as grader:
        sampler = branching_sampler(
            solver, beginnings(jobs, config.log_dir),
            StepSampling(schedule, config.steps_a_solution, config.max_new_tokens, config.seed, step_end),
            lambda problem, response: grader.grade_one(response, problem.label, type_of(problem)).outcome,
            config.attempts)
        path = sample_and_grade(solver, sampler, [job.prompt for job in jobs], 1, config=config,
                                log_dir=config.log_dir, identity=identity)
    if parallel.rank() == 0:
        pairs, counts = step_controlled_pairs(
            jobs, read_samples(str(path)), schedule, max_steps=config.steps_a_solution,
            max_step_characters=config.characters_a_step)
        log_counts(counts)
        save(pairs, "pairs", "no branch is kept", config.samples_file, config.save_file, config.dry_run)


def choose_branches(
    samples: Sequence[Sample], pairs_per_problem: int, seed: int, step_end: str = STEP_END
) -> list[Truncated]:
    """Choose where to leave the first right solution of each problem: at most so many random points."""
    generator = random.Random(seed)
    chosen = []
    for problem in by_problem(samples).values():
        if problem.right:
            points = branch_points(split_into_steps(problem.right[0].response, step_end))
            points = sorted(generator.sample(points, min(pairs_per_problem, len(points))))
            chosen += [truncate_at_step(problem.right[0], k, step_end) for k in points]
    if any(not one.prompt.label for one in chosen):
        raise UserError("the samples have no key 'label'; grade the file with solver_evaluate.py")
    return chosen


def branch_points(steps: Sequence[str]) -> list[int]:
    """List after how many steps a branch may leave a solution: one at least, and at least two remain. A block of code
    is not left before its output (the released jobs of Step-Controlled DPO end at text or execution)."""
    return [k for k in range(1, len(steps) - 1) if not steps[k - 1].startswith(Marker.CODE)]


def step_controlled_pairs(
    jobs: Sequence[Truncated], wrong_solutions: Sequence[Sample], schedule: TemperatureSchedule, *,
    max_steps: int, max_step_characters: int,
) -> tuple[list[Row], Counter[str]]:
    """Make rows `{"instruction", "prefix", "chosen", "rejected"}`, a right and a wrong rest; count how branches end.

    temperatures: of the steps of the wrong rest that were sampled. wrong_solutions have the ids of their jobs.
    Solutions of more steps, or with a longer step, are left out as noise (Lu et al. 2024, section 3.2, filters of the
    released code).
    """
    solution_of = {sample.id: sample.response for sample in wrong_solutions}
    counts: Counter[str] = Counter()
    pairs = []
    for job in jobs:
        if job.prompt.id not in solution_of:
            counts["never wrong"] += 1
            continue
        rejected = solution_of[job.prompt.id].removeprefix(job.prefix)
        wrong = split_into_steps(rejected, job.step_end)
        if max(len(job.steps), job.k + len(wrong)) > max_steps:
            counts["with too many steps"] += 1
        elif max(len(step.strip()) for step in (*job.steps, *wrong)) > max_step_characters:
            counts["with too long a step"] += 1
        else:
            counts["kept"] += 1
            n_sampled = sum(not step.startswith(Marker.EXECUTION) for step in wrong)  # the others its code printed
            pairs.append({"id": job.prompt.id, "instruction": job.prompt.instruction, "prefix": job.prefix,
                          "chosen": job.rest, "rejected": rejected, "start_steps": job.k,
                          "temperatures": [round(schedule.at(step), 6) for step in range(n_sampled)]})
    return pairs, counts
