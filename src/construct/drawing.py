"""Builders that sample with a solver: how its problems are put, and where what it writes is kept and graded."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

from src import parallel
from src.checkpoint import storage
from src.construct.continuation import Solver
from src.construct.origin import identity_file, read_origin
from src.data.examples import Prompt, Sample, read_samples
from src.errors import UserError
from src.evaluation.evaluator import BackgroundGrader, Sampler, claim_samples, grade_samples, sample_prompts
from src.evaluation.prompting import Prompting, make_prompting
from src.evaluation.report import summarize
from src.evaluation.served import AT_SERVER, ServedSolver, check_flags
from src.grading.answer_types import AnswerType
from src.grading.grader import Grader
from src.grading.tasks import Task, find_task
from src.jsonfile import parse
from src.runlog import RunLog


def check_solver(flags: Mapping[str, object], *, goes_on: bool = False) -> None:
    """Raise UserError unless the flags name one solver, a checkpoint's or a server's.

    goes_on: it has to go on from the beginning of a solution, which no chat protocol has a word for.
    """
    if bool(flags["ckpt_dir"]) == (flags["backend"] == "openai"):
        raise UserError("give one of --ckpt_dir, a solver's checkpoint, and --backend openai, a server")
    if check_flags(flags) and goes_on and flags["chat_template"] == AT_SERVER:
        raise UserError(
            f"with --chat_template {AT_SERVER} every answer begins anew, but here solutions are gone on with; give "
            f"--tokenizer_file with a --chat_template of this side, or neither"
        )


def asked_of(
    task: str, prompt_template: str, samples_file: str, samples: Sequence[Sample]
) -> tuple[Prompting, Task]:
    """How problems are put and graded. Raises UserError unless these samples of the file were graded by its rules.

    A file that nobody says the rules of, such as one that was filtered by hand, is taken if the task's rules give every
    sample the outcome that it has.
    """
    benchmark = find_task(task)
    if identity_file(Path(samples_file)).is_file():
        rules = read_origin(samples_file).rules
        if rules != benchmark.rules():
            raise UserError(
                f"{samples_file} was graded by {', '.join(rules.values())}, but --task {task} means "
                f"{', '.join(benchmark.rules().values())}; name the task of the samples"
            )
    elif parallel.rank() == 0:  # it would stop all
        _check_outcomes(samples, benchmark, samples_file)
    return make_prompting(benchmark, prompt_template=prompt_template), benchmark


def _check_outcomes(samples: Sequence[Sample], benchmark: Task, samples_file: str) -> None:
    with Grader(benchmark) as grader:
        for sample in samples:
            values = sample.values
            kind = AnswerType(str(values.get("answer_type") or ""), float(values.get("tolerance") or 0))
            outcome = grader.grade_one(sample.response, str(values["label"]), kind).outcome
            if outcome != sample.outcome and outcome not in ("timeout", "error"):
                raise UserError(
                    f"{samples_file} has no {identity_file(Path(samples_file)).name} beside it that says how it was "
                    f"graded, and it was not by --task {benchmark.name}: sample {sample.id!r}/{sample.sample} is "
                    f"{sample.outcome} there, but {outcome} by that task; name the task of the samples, or grade the "
                    f"file with solver_evaluate.py --samples_file"
                )


def draw(
    solver: Solver | ServedSolver,
    sampler: Sampler,
    prompts: Sequence[Prompt],
    n: int,
    *,
    flags: Mapping[str, object],
    facts: Mapping[str, object],
    grade: Task | None = None,
) -> Path:
    """Sample n times for every problem into log_dir/samples.jsonl, and grade what comes by the task given. -> the file.

    flags: the script's, --log_dir among them. facts: what the samples depend on beside the solver and its prompts; a
    directory with others is refused (UserError).
    """
    path = Path(str(flags["log_dir"])) / "samples.jsonl"
    storage.claim(path.parent)
    claim_samples(path, {**solver.source, **facts, **solver.prompting.facts()})
    with BackgroundGrader(grade, prompts) if grade and parallel.rank() == 0 else nullcontext() as grading:
        log = RunLog(str(path.parent), dict(flags))
        sample_prompts(sampler, prompts, num_samples=n, path=path, log=log, grading=grading)
        if grading:
            problems = grade_samples(grading, read_samples(str(path)), path)
            results = summarize(grade, prompts, problems)
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
