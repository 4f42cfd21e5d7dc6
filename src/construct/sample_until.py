"""Sample problems until they have what pairs are made of: right and wrong solutions (Lu et al. 2024, section 3.1)."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from src import jsonfile, parallel, runlog
from src.command.config import Count, NonNegative, RoundsFlags, Seed, flag
from src.construct.samples import BuildConfig, log_counts
from src.construct.solver import (
    SolverFlags,
    check_samples_differ,
    check_solver,
    open_solver,
    sample_and_grade,
)
from src.data.examples import Prompt, Sample, read_prompts, read_samples
from src.evaluation.evaluator import Sampler, SampleRequest, SamplerOutput
from src.evaluation.prompting import make_prompting, select_prompts
from src.evaluation.report import type_of
from src.grading.grader import Grader
from src.grading.tasks import find_task
from src.inference.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class AttemptsConfig(SolverFlags, RoundsFlags, BuildConfig):
    """Problems and samples"""

    task: str = flag(help="how problems are put, and answers found and compared")
    label_file: str = flag(help="problems with their answers")
    log_dir: str = flag(help="directory for samples.jsonl and what else an evaluation leaves")
    right: Count = flag(1, "right samples that are enough for a problem")
    wrong: Count = flag(1, "wrong samples that are enough; one that was cut off is neither right nor wrong")
    attempts: Count = flag(100, "samples of a problem at most")
    temperature: NonNegative = flag(1.0, "of the samples")
    max_new_tokens: Count = flag(512, "longest response; of a solution with code the longest block")
    split: str = flag("", "only problems of this part, as for solver_evaluate.py")
    seed: Seed = flag(1, "seed of the samples")


def attempts(config: AttemptsConfig) -> None:
    """Graded samples of each problem until it has right and wrong ones, for the commands pairs and branch.

    Needs a solver: start it with torchrun, or give a server. A rerun continues. The accuracy in log_dir/results.json
    is no measure of the solver: samples that were not needed count as misses there.
    """
    check_solver(config)
    check_samples_differ(config.temperature, config.attempts, "attempts")
    task, problems = find_task(config.task), read_prompts(config.label_file, need_label=True)
    problems = select_prompts(problems, config.split)
    runlog.logger().info("%d problems, %d attempts at most each", len(problems), config.attempts)
    if config.dry_run:
        return
    prompting = make_prompting(task, prompt_template=config.prompt_template)
    solver = open_solver(config, prompting, seed=config.seed, max_rounds=config.max_rounds, code=config)
    sampling = Sampling(temperature=config.temperature, max_new_tokens=config.max_new_tokens, stop=prompting.stop,
                        seed=config.seed)
    path = Path(config.log_dir) / "samples.jsonl"
    # what an earlier run left; of a line that is none, such as a torn last one, sample_prompts() takes care
    rows = jsonfile.read_rows(path, refuse=lambda problem: None) if path.is_file() else ()
    earlier = {(str(row.get("id")), row.get("sample")): str(row.get("response")) if row.get("finish") == "stop" else ""
               for _, row in rows}
    with Grader(task) as grader:
        sampler = sample_until(
            solver.sampler(sampling), config.right, config.wrong,
            lambda problem, response: grader.grade_one(response, problem.label, type_of(problem)).outcome, earlier)
        identity = {name: getattr(config, name)
                    for name in ("temperature", "max_new_tokens", "seed", "right", "wrong", "max_rounds")}
        path = sample_and_grade(solver, sampler, problems, config.attempts, config=config, log_dir=config.log_dir,
                                identity=identity, task=task)
    if parallel.rank() == 0:
        log_counts(count_kinds(problems, read_samples(str(path))))


def sample_until(
    sampler: Sampler, n_right: int, n_wrong: int, grade: Callable[[Prompt, str], str],
    earlier: Mapping[tuple[str, int], str],
) -> Sampler:
    """Sample each problem, one requested sample at a time, until it has so many right and so many wrong solutions.

    grade(problem, response) -> outcome is called on rank 0 alone, with responses that came to their end. earlier: the
    responses of a killed run by (id, sample), empty where cut off. These count too, so that whether a sample is taken
    depends on those with lower numbers alone, and a rerun ends with the same file.
    """

    def sample(requests: Sequence[SampleRequest]) -> Iterator[SamplerOutput]:
        """Yield the samples of number 0, then of number 1 of the problems that need one, and so on."""
        problems = {prompt.id: prompt for prompt, _ in requests}
        prompts_of_number = defaultdict(list)
        for prompt, number in requests:
            prompts_of_number[number].append(prompt)
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for number in range(1 + max(prompts_of_number, default=-1)):
            left = [prompt for prompt in prompts_of_number[number]
                    if counts[prompt.id]["right"] < n_right or counts[prompt.id]["wrong"] < n_wrong]
            responses = {name: text for (name, n), text in earlier.items() if n == number and name in problems}
            for output in sampler([(prompt, number) for prompt in left]) if left else ():
                yield output
                if not output.error:
                    responses[output.id] = output.response if output.finish == "stop" else ""
            outcomes = parallel.from_first_rank(
                lambda texts=responses: {name: grade(problems[name], text) for name, text in texts.items()})
            for name, outcome in outcomes.items():
                counts[name][outcome] += 1

    return sample


def count_kinds(problems: Sequence[Prompt], samples: Sequence[Sample]) -> Counter[str]:
    """Count the problems by which kinds of finished samples they have."""
    outcomes = {problem.id: set() for problem in problems}
    for sample in samples:
        if sample.values.get("finish") == "stop":
            outcomes[sample.id].add(sample.outcome)
    names = {(True, True): "with right and wrong samples", (True, False): "with right ones alone",
             (False, True): "with wrong ones alone", (False, False): "with neither"}
    return Counter(names["right" in found, "wrong" in found] for found in outcomes.values())
