"""Builders that sample with a solver: how its problems are put, and where what it writes is kept and graded."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

from src import parallel
from src.checkpoint import storage
from src.construct.origin import read_origin
from src.data.examples import Prompt, read_samples
from src.errors import UserError
from src.evaluation.evaluator import Marking, Sampler, claim_samples, grade_samples, sample_prompts
from src.evaluation.grade import Grader
from src.evaluation.prompting import Prompting, make_prompting
from src.evaluation.tasks import Task, find_task
from src.jsonfile import parse
from src.runlog import RunLog


def asked_of(task: str, prompt_template: str, samples_file: str) -> tuple[Prompting, Task]:
    """How problems are put and graded. Raises UserError unless the samples were graded by the task's rules."""
    benchmark = find_task(task)
    rules = read_origin(samples_file).rules
    if rules != benchmark.rules():
        raise UserError(
            f"{samples_file} was graded by {', '.join(rules.values())}, but --task {task} means "
            f"{', '.join(benchmark.rules().values())}; name the task of the samples"
        )
    return make_prompting(benchmark, prompt_template=prompt_template), benchmark


def draw(
    sampler: Sampler,
    prompts: Sequence[Prompt],
    n: int,
    *,
    ckpt_dir: str,
    log_dir: str,
    flags: Mapping[str, object],
    facts: Mapping[str, object],
    grade: Task | None = None,
) -> Path:
    """Sample n times for every problem into log_dir/samples.jsonl, and grade what comes by the task given. -> the file.

    facts: what the samples depend on beside the checkpoint; a directory with others is refused (UserError).
    """
    path = Path(log_dir) / "samples.jsonl"
    storage.claim(path.parent)
    claim_samples(path, {"checkpoint": storage.fingerprint(Path(ckpt_dir)), **facts})
    with Marking(grade, prompts) if grade and parallel.rank() == 0 else nullcontext() as marking:
        log = RunLog(log_dir, dict(flags))
        sample_prompts(sampler, prompts, num_samples=n, path=path, log=log, marking=marking)
        if marking:
            results = grade_samples(marking, read_samples(str(path)), path)
            storage.write_json(path.with_name("results.json"), results)
    return path


def drawn_before(log_dir: str) -> dict[tuple[str, int], str]:
    """(id, sample) -> response of what an earlier run left in a directory, empty where it was cut off.

    A torn last line does not count.
    """
    path = Path(log_dir) / "samples.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    rows = [parse(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]
    return {(row["id"], row["sample"]): row["response"] if row["finish"] == "stop" else "" for row in rows}


def grader_of(rules: Mapping[str, str]) -> Grader:
    """What says whether two answers that these rules found are the same."""
    return Grader(Task(name="samples", **rules))
