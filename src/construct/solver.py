"""Samples of a solver: its flags, how problems are put, how samples are kept and graded, and where they come from."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from src import load, parallel
from src.checkpoint import storage
from src.code_solutions.tool_hook import Coding, block_limits
from src.command.config import AskedFlags, CodeFlags, Config, Count, flag
from src.data.encoding import StepKind
from src.data.examples import UNDECIDED, Prompt, Sample, read_samples
from src.errors import UserError
from src.evaluation.evaluator import (
    BackgroundGrader,
    LocalSolver,
    Sampler,
    claim_samples,
    grade_samples,
    identity_file,
    sample_prompts,
)
from src.evaluation.prompting import Prompting, make_prompting
from src.evaluation.report import summarize, type_of
from src.grading.grader import Grader
from src.grading.tasks import Task, find_task
from src.jsonfile import read_json, write_json
from src.runlog import RunLog
from src.serving.served import AT_SERVER, ServedSolver, check_flags


@dataclass(frozen=True, kw_only=True)
class SolverFlags(AskedFlags):
    """How the solver is asked"""

    ckpt_dir: str = flag("", "checkpoint of the solver that samples; not with a server")
    max_batch_size: Count = flag(64, "sequences that decode at once")


@dataclass(frozen=True, kw_only=True)
class ContinuationFlags(SolverFlags):
    """Solutions to go on with"""

    task: str = flag(help="how answers are found and compared; the samples must have been graded by the same rules")
    samples_file: str = flag(help="graded samples.jsonl with solutions")
    log_dir: str = flag(help="""directory for the continuations, samples.jsonl, results.json and run.json, and
        failures.jsonl for those that did not come to what was looked for""")
    save_file: str = flag(help="the json file to write")
    step: StepKind = flag("paragraph", """what a step is: a paragraph, with a blank line after it, or a line, as in
        GSM8K and MetaMath, and as the verifier is trained with --step; of solutions with code it is a block""")


def check_solver(config: SolverFlags, *, from_prefix: bool = False) -> None:
    """Raise UserError unless the flags name one solver, a checkpoint's or a server's.

    from_prefix: it has to continue the beginning of a solution, which no chat protocol has a word for.
    """
    if bool(config.ckpt_dir) == (config.backend == "openai"):
        raise UserError("give one of --ckpt_dir, a solver's checkpoint, and --backend openai, a server")
    if check_flags(config) and from_prefix and config.chat_template == AT_SERVER:
        raise UserError(f"with --chat_template {AT_SERVER} every answer begins anew, but here solutions are gone on "
                        "with; give --tokenizer_file with a --chat_template of this side, or neither")


def check_samples_differ(temperature: float, n: int, name: str) -> None:
    """Raise UserError for several samples of one prompt that would all be the greedy one. name: of the flag of n."""
    if not temperature and n > 1:
        raise UserError(f"--temperature 0 would make all of --{name} {n} alike; give more than 0, or --{name} 1")


def open_solver(
    config: SolverFlags, prompting: Prompting, *, seed: int, max_rounds: int = 24,
    code: CodeFlags | None = None, quantize: str = "", compiled: bool = False, tensor_parallel_size: int = -1,
) -> LocalSolver | ServedSolver:
    """Open what the flags name: a server, or the model of a checkpoint on this rank, with what runs its code.
    tensor_parallel_size: ranks that share it; -1 = all."""
    parallel.start(seed, tensor_parallel_size)
    if config.backend == "openai":
        return ServedSolver(config, prompting, config.max_batch_size)
    tokenizer, code = load.load_tokenizer(config.ckpt_dir, config), code or CodeFlags()
    if not tokenizer.code:
        code.refuse(("isolation", "code_seconds", "max_rounds"), f"{config.ckpt_dir} answers in text alone")
    model = load.load_solver(config.ckpt_dir, model_type=config.model_type, precision=config.precision,
                             quantize=quantize)
    source = {"checkpoint": storage.fingerprint(Path(config.ckpt_dir)), "config": model.config.identity(),
              "chat_template": tokenizer.chat_template,
              "tokenizer": tokenizer.form() if config.tokenizer_file else None,  # else the checkpoint's own
              "template_args": tokenizer.template_args or None, "system_prompt": tokenizer.system_prompt or None,
              "precision": str(model.dtype).removeprefix("torch.").replace("float32", "") or None}
    coding = None
    if tokenizer.code:
        coding = Coding(tokenizer, max_rounds, code.isolation or None, block_limits(code.code_seconds))
        seconds = code.code_seconds if code.code_seconds != CodeFlags().code_seconds else None
        source |= {"max_rounds": max_rounds, "code_seconds": seconds}
    return LocalSolver(model, tokenizer, prompting, config.max_batch_size, coding, source, compiled)


def open_task(config: ContinuationFlags, samples: Sequence[Sample]) -> tuple[Prompting, Task]:
    """Find how problems are put and graded. Raises UserError unless the samples were graded by the task's rules.

    A file without a record of its rules, such as one filtered by hand, is taken if the task's rules give every sample
    the outcome that it has.
    """
    samples_file, task = config.samples_file, find_task(config.task)
    if identity_file(Path(samples_file)).is_file():
        rules = read_provenance(samples_file).rules
        if rules != task.rules():
            raise UserError(f"{samples_file} was graded by {', '.join(rules.values())}, but --task {config.task} means "
                            f"{', '.join(task.rules().values())}; name the task of the samples")
    elif parallel.rank() == 0:  # an error on one rank stops all
        with Grader(task) as grader:
            for sample in samples:
                problem = sample.problem
                outcome = grader.grade_one(sample.response, problem.label, type_of(problem)).outcome
                if outcome not in (sample.outcome, *UNDECIDED):
                    raise UserError(f"{samples_file} has no {identity_file(Path(samples_file)).name} beside it that "
                                    f"says how it was graded, and it was not by --task {task.name}: sample "
                                    f"{sample.id!r}/{sample.sample} is {sample.outcome} there, but {outcome} by that "
                                    "task; name the task of the samples, or grade the file with solver_evaluate.py "
                                    "--samples_file")
    return make_prompting(task, prompt_template=config.prompt_template), task


def sample_and_grade(
    solver: LocalSolver | ServedSolver, sampler: Sampler, prompts: Sequence[Prompt], n: int, *,
    config: Config, log_dir: str, identity: Mapping[str, object], task: Task | None = None,
) -> Path:
    """Sample n times for every problem into log_dir/samples.jsonl, grading with the task meanwhile. -> the file.

    identity: what the samples depend on besides the solver and its prompts; a directory with samples of another one is
    refused (UserError).
    """
    path = Path(log_dir) / "samples.jsonl"
    storage.claim(path.parent)
    claim_samples(path, {**solver.source, **identity, **solver.prompting.facts()})
    with BackgroundGrader(task, prompts) if task and parallel.rank() == 0 else nullcontext() as grading:
        log = RunLog(log_dir, config.flags())
        sample_prompts(sampler, prompts, num_samples=n, path=path, log=log, grading=grading)
        if grading:
            results = summarize(task, prompts, grade_samples(grading, read_samples(str(path)), path))
            write_json(path.with_name("results.json"), results)
    return path


def grader_of(rules: Mapping[str, str]) -> Grader:
    """Make what compares answers that were found by these rules."""
    return Grader(Task(name="samples", **rules))


class Provenance(NamedTuple):
    """The model's fingerprint, or its name at a server, and the rules of results.json."""

    model: str
    rules: dict[str, str]


def read_provenance(file: str, model: str = "") -> Provenance:
    """The provenance of graded samples, or of a file made from them.

    model: the checkpoint directory, or the name at a server, that it must be of; empty: any. Raises UserError for
    another model, and for samples that nobody can tell the provenance of.
    """
    path = Path(file)
    if not identity_file(path).is_file():
        raise UserError(f"{file} has no {identity_file(path).name} beside it, so its model is unknown; expected "
                        "samples in the directory where solver_evaluate.py sampled them, or a file of data_build.py")
    values = read_json(identity_file(path))
    rules = values.get("rules") or read_json(path.with_name("results.json")).get("rules")
    if not isinstance(rules, dict) or not rules.get("extraction"):
        raise UserError(f"{file} is not graded; grade it with solver_evaluate.py, so that answers can be compared")
    found = str(values.get("checkpoint") or values.get("model_name"))
    wanted = storage.fingerprint(Path(model)) if Path(model).is_dir() and model else model
    if wanted and found != wanted:
        raise UserError(f"{file} was sampled from the model {found[:16]}, but {model} is {wanted[:16]}; give the "
                        f"samples of {model}")
    return Provenance(found, rules)


def same_rules(first: str, one: Provenance, second: str, other: Provenance) -> dict[str, str]:
    """The rules that found the answers of both files. Raises UserError where they differ."""
    if one.rules != other.rules:
        named = [", ".join(each.rules.values()) for each in (one, other)]
        raise UserError(f"{first} was graded by {named[0]} and {second} by {named[1]}, so their answers cannot be "
                        "compared; grade both with one --task")
    return one.rules


def write_provenance(file: str, provenance: Provenance) -> None:
    """Write a file's provenance next to it."""
    write_json(identity_file(Path(file)), {"checkpoint": provenance.model, "rules": provenance.rules})
