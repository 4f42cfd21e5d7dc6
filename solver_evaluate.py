"""Sample solutions to a benchmark and grade them, or grade samples that exist; or serve a solver.

torchrun --nproc_per_node 8 solver_evaluate.py --task GSM8K --ckpt_dir out --label_file dataset/GSM8K/test.json \
    --log_dir log --max_batch_size 64
python solver_evaluate.py --task GSM8K --ckpt_dir out --interactive
python solver_evaluate.py --ckpt_dir out --serve 8000
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from src import load, parallel, runlog
from src.checkpoint import storage
from src.command import cli
from src.command.config import (
    ColumnFlags,
    Count,
    CountOrOff,
    CountOrZero,
    NonNegative,
    RoundsFlags,
    Seed,
    Share,
    TopP,
    flag,
)
from src.construct.solver import SolverFlags, open_solver
from src.data.encoding import StepKind, encode_prompt
from src.data.examples import match_samples, read_prompts, read_samples
from src.errors import UserError
from src.evaluation.choices import PROMPT, ChoiceKind, choice_sampler, normalised
from src.evaluation.evaluator import (
    BackgroundGrader,
    LocalSolver,
    claim_samples,
    grade_samples,
    refuse_sampled,
    sample_prompts,
)
from src.evaluation.interactive import converse
from src.evaluation.prompting import Prompting, make_prompting, select_prompts
from src.evaluation.report import curves_of, results_table, summarize
from src.grading.tasks import INSTRUCTION, Task, find_task
from src.inference.sampling import Sampling
from src.jsonfile import write_json
from src.models.decoder import Decoder
from src.planning import plan
from src.report.page import write_report
from src.runlog import RunLog
from src.serving.jobs import ServingEngine
from src.serving.served import ServedSolver, check_flags
from src.serving.server import SolverServer


@dataclass(frozen=True, kw_only=True)
class SolverEvaluateConfig(SolverFlags, RoundsFlags, ColumnFlags):
    """Evaluation"""

    task: str = flag("", """how problems are put and answers found and compared: GSM8K, MATH, MATH-500,
        SVAMP, ASDiv, MAWPS, AQuA, AIME24, AIME25, AMC23, HMMT, Minerva, GPQA, MMLU, ARC, CommonsenseQA, choice,
        OlympiadBench, OlympicArena, BBH, AGIEval, toy, GSM8K-strict, GSM8K-weak-to-strong,
        MATH-weak-to-strong, none (sample without grading), or FILE.json with one's own""")
    label_file: str = flag("", """problems, json array or jsonl of {"instruction", "label"?, "id"?, "level"?,
        "subject"?, "split"?}""")
    log_dir: str = flag("", "directory for samples.jsonl, results.json, report.html, results.png, run.json")
    ckpt_dir: str = flag("", "solver checkpoint; not needed with samples_file or a server")
    samples_file: str = flag("", """grade these samples instead: jsonl of {"response", "id"?, "sample"?},
        matched by id or row order""")
    max_batch_size: Count = flag(64, "sequences that decode at once; requests under way at a server")
    max_new_tokens: Count = flag(512, "longest response; of a solution with code the longest block")
    tensor_parallel_size: CountOrOff = flag(-1, """ranks that share one model; the others sample other problems. -1 =
        the shards of ckpt_dir, if they divide the ranks, else all ranks""")
    num_samples: Count = flag(1, "samples of each problem")
    temperature: NonNegative = flag(0.0, "0 = greedy")
    top_p: TopP = flag(1.0, "sample from the smallest set of tokens with this probability")
    top_k: CountOrZero = flag(0, """sample from so many likeliest tokens; 0 = all. It comes before top_p, the
        temperature before both""")
    min_p: Share = flag(0.0, "sample from tokens at least this likely relative to the likeliest")
    quantize: Literal["", "int8", "int4"] = flag("", """hold weights in 8 or 4 bits, in groups of 128 or 32
        that share a scale; default: as they are computed with""")
    compile: bool = flag(False, "decode from compiled CUDA graphs; without a GPU, or with experts, it changes nothing")
    choices: Literal["", ChoiceKind] = flag("", """answer with the choice of the highest log-prob after the
        prompt, not by sampling: letter compares the letters of choices that the problem lists, text their texts
        after the question alone. acc_norm takes the highest log-prob per byte of the choice""")
    few_shot: str = flag("", """demonstrations before each problem: gsm8k8, minerva4 or a json file
        (dataset/README.md)""")
    split: str = flag("", """only problems with this `split` field, or level=4, level=1-3,
        subject=Algebra|Geometry; a comma means and""")
    limit: CountOrOff = flag(-1, "only the first so many problems; -1 = all")
    seed: Seed = flag(1, """with the problem's id and the sample's number, all that a sample's randomness
        depends on""")
    interactive: bool = flag(False, """answer problems typed on standard input instead; needs no label_file
        and no log_dir""")
    serve: str = flag("", """PORT or HOST:PORT at which to answer requests in OpenAI's protocol instead, which say how
        to sample: completions and chats, streams, token ids, adapters that come and go, as vLLM has them""")
    verifier_ckpt_dir: str = flag("", "with interactive, the verifier that scores every step of a solution")
    step: Literal["", StepKind] = flag("", """what such a step is: a paragraph, with a blank line after it,
        or a line; default: what it was in the verifier's training, which nothing else may be""")


def main(config: SolverEvaluateConfig) -> None:
    """Decode and grade. Writes samples.jsonl, results.json and report.html to log_dir; a rerun continues."""
    if config.serve:
        serve(config)
        return
    benchmark = find_task(config.task)
    if config.choices and benchmark.prompt == INSTRUCTION:
        benchmark = replace(benchmark, prompt=PROMPT)
    refuse_contradictions(config, benchmark)
    for folder, kind in ((config.ckpt_dir, "solver"), (config.verifier_ckpt_dir, "verifier")):
        if folder:
            load.load_config(folder, kind=kind)
    prompting = make_prompting(benchmark, config.few_shot, config.prompt_template)
    sampling = Sampling(temperature=config.temperature, top_p=config.top_p, top_k=config.top_k, min_p=config.min_p,
                        max_new_tokens=config.max_new_tokens, stop=prompting.stop, seed=config.seed)
    if config.interactive:
        answer_typed(config, prompting, sampling, benchmark)
        return
    problems = read_prompts(config.label_file, config.renamed, need_label=benchmark.graded)
    prompts = select_prompts(problems, config.split)[: config.limit if config.limit >= 0 else None]
    if config.dry_run and not config.ckpt_dir:
        served = ServedSolver(config, prompting, config.max_batch_size) if config.backend == "openai" else None
        shown = (served.shown if served else prompting.text)(prompts[0].instruction)
        runlog.table(plan.report({"problems": len(prompts), "a prompt": shown}, {}))
        return
    if config.dry_run:
        model_config = load.load_config(config.ckpt_dir, config.model_type)
        tokenizer = load.load_tokenizer(config.ckpt_dir, config)
        n = load.scoring_ranks({config.ckpt_dir: model_config}, 1, planned=True) if config.choices else (
            load.tensor_parallel_size(config.ckpt_dir, config.tensor_parallel_size, planned=True))
        encoded = [encode_prompt(tokenizer, prompting.text(prompt.instruction), where=prompt.where)
                   for prompt in prompts]
        if config.choices:  # each a few tokens after its prompt
            runlog.table(plan.scoring(config, model_config, n, [*map(len, encoded)], config.max_batch_size,
                                      quantize=config.quantize))
            return
        runlog.table(plan.decoding(
            model_config, n, encoded, samples=config.num_samples, max_new_tokens=config.max_new_tokens,
            n_rows=config.max_batch_size, quantize=config.quantize, half=plan.is_half(config)))
        return
    if not config.samples_file:
        alone = not config.ckpt_dir or config.choices  # all ranks measure the choices of a problem together
        solver = open_solver(
            config, prompting, seed=config.seed, max_rounds=config.max_rounds, code=config, quantize=config.quantize,
            compiled=config.compile, tensor_parallel_size=-1 if alone else load.tensor_parallel_size(
                config.ckpt_dir, config.tensor_parallel_size))
    storage.claim(Path(config.log_dir))
    path, speed = Path(config.log_dir) / "samples.jsonl", None
    if config.samples_file:
        samples = match_samples(read_samples(config.samples_file), problems, config.samples_file)
        refuse_sampled(path)
    grades = parallel.rank() == 0 and benchmark.graded
    with BackgroundGrader(benchmark, prompts) if grades else nullcontext() as grading:
        if not config.samples_file:
            identity = {name: getattr(config, name) for name in (*SAMPLED_BY, "quantize", "seed")}
            identity["choices"] = config.choices or None
            claim_samples(path, {**solver.source, **identity, **prompting.facts()})
            sampler = choice_sampler(solver, config.choices, prompts) if config.choices else solver.sampler(sampling)
            speed = sample_prompts(sampler, prompts, num_samples=config.num_samples, path=path,
                                   log=RunLog(config.log_dir, config.flags()), grading=grading)
        if grading:
            if not config.samples_file:
                samples = match_samples(read_samples(str(path)), problems, "")
            asked = {} if config.samples_file else prompting._asdict() | {"few_shot": config.few_shot}
            results = summarize(benchmark, prompts, grade_samples(grading, samples, path)) | asked
            results |= normalised(prompts, samples)
            write_json(Path(config.log_dir) / "results.json", results)
            from src.plot import plot_results  # matplotlib costs half a second: not for every start

            plot_results(results, curves_of(results), Path(config.log_dir) / "results.png")
            report = write_report(Path(config.log_dir), prompts=problems)
            runlog.table(f"{results_table(results, speed)}\nlook at     {report}")


def answer_typed(config: SolverEvaluateConfig, prompting: Prompting, sampling: Sampling, benchmark: Task) -> None:
    """Answer problems that are typed. Raises UserError for a solver with code, which would show made-up outputs."""
    parallel.start(seed=config.seed)
    tokenizer = load.load_tokenizer(config.ckpt_dir, config)
    if tokenizer.code:
        raise UserError(f"{config.ckpt_dir} writes solutions with code, which --interactive does not run; evaluate it "
                        "with a --label_file")
    load.check_tokenizer(tokenizer, config.verifier_ckpt_dir)
    verifier = None
    if config.verifier_ckpt_dir:
        scoring = load.load_config(config.verifier_ckpt_dir)
        load.check_step(config.verifier_ckpt_dir, scoring, config.step)
        verifier = load.load_verifier(config.verifier_ckpt_dir, precision=config.precision, quantize=config.quantize)
    model = load.load_solver(config.ckpt_dir, model_type=config.model_type, precision=config.precision,
                             quantize=config.quantize)
    converse(LocalSolver(model, tokenizer, prompting, 1), sampling, benchmark, verifier)


SAMPLED_BY = ("temperature", "top_p", "top_k", "min_p", "max_new_tokens")
OF_SAMPLING = ("num_samples", "compile", "max_rounds", "interactive", "tensor_parallel_size")
SHOWN_BY = ("tokenizer_file", "chat_template", "template_args", "system_prompt")
HELD_BY = ("ckpt_dir", "model_type", "precision", "quantize", *SHOWN_BY)
SERVED_BY = ("serve", "max_batch_size", "compile", *HELD_BY)
ANSWERED_BY = ("interactive", "task", "few_shot", "prompt_template", "verifier_ckpt_dir", "step", "seed", *SAMPLED_BY,
               *HELD_BY)
GRADED_BY = ("samples_file", "task", "label_file", "columns", "split", "limit", "log_dir", "dry_run")


def serve(config: SolverEvaluateConfig) -> None:
    """Answer requests until the process is ended. Raises UserError for flags that a server has no use for."""
    host, _, port = config.serve.rpartition(":")
    if not config.ckpt_dir or not port.isdecimal() or int(port) > 65535:
        raise UserError(f"--serve {config.serve} needs a port, perhaps after HOST:, and --ckpt_dir, the solver")
    for name in config.changed(config.flags().keys() - set(SERVED_BY)):
        raise UserError(f"--{name} has no effect on a server, whose requests say what they want; leave it or --serve "
                        "out")
    if parallel.world_size() > 1:
        raise UserError("--serve needs one process; start it with python, not torchrun")
    parallel.start()
    tokenizer = load.load_tokenizer(config.ckpt_dir, config)
    if tokenizer.code:
        raise UserError(f"{config.ckpt_dir} writes solutions with code, which --serve does not run; evaluate it here")
    model = load.load_solver(config.ckpt_dir, model_type=config.model_type, precision=config.precision,
                             quantize=config.quantize)

    def load_adapter(folder: str) -> Decoder:
        """The solver with an adapter."""
        if config.quantize:
            raise UserError("no adapter is put on weights in few bits; start the server without --quantize")
        return load.load_adapted(folder, config.ckpt_dir, config.precision)

    engine = ServingEngine(config.max_batch_size, compiled=config.compile)
    server = SolverServer(config.ckpt_dir, model, tokenizer, engine, load_adapter)
    server.serve(host or "127.0.0.1", int(port), partial(runlog.logger().info, "serving %s at %s", config.ckpt_dir))


def refuse_contradictions(config: SolverEvaluateConfig, benchmark: Task) -> None:
    """Raise UserError for flags that do not go together: one run samples, asks a server, grades or converses."""
    if config.interactive:
        if not config.ckpt_dir or config.label_file or config.log_dir:
            raise UserError("--interactive needs --ckpt_dir, and neither --label_file nor --log_dir")
        config.refuse(config.flags().keys() - set(ANSWERED_BY), "--interactive answers one problem at a time, once")
    elif not (config.label_file and config.log_dir):
        raise UserError("give --label_file and --log_dir, or --interactive with --ckpt_dir")
    elif config.verifier_ckpt_dir:
        raise UserError("--verifier_ckpt_dir goes with --interactive; verifier_evaluate.py scores samples.jsonl")
    if config.step and not config.verifier_ckpt_dir:
        raise UserError("--step says what a verifier judges; give --interactive and --verifier_ckpt_dir with it")
    if sum(map(bool, (config.ckpt_dir, config.samples_file, config.backend == "openai"))) != 1:
        raise UserError("give one of --ckpt_dir, to sample, --samples_file, to grade what exists, or --backend openai")
    if config.samples_file:
        if not benchmark.graded:
            raise UserError("--task none grades nothing; name the task of --samples_file")
        if parallel.world_size() > 1:
            raise UserError("--samples_file needs one process; start it with python, not torchrun")
        for name in config.changed(config.flags().keys() - set(GRADED_BY)):
            raise UserError(f"--{name} has no effect on samples that exist; leave it or --samples_file out")
    if config.choices:
        for name in config.changed((*SAMPLED_BY, *OF_SAMPLING)):
            raise UserError(f"--{name} has no effect on --choices, which samples nothing; leave it out")
        if benchmark.equality not in ("choice@5", "typed@5"):
            raise UserError(f"--choices gives the letter of a choice, but --task {config.task} compares by "
                            f"{benchmark.equality or 'nothing'}; name a task of choices, such as choice")
    served = check_flags(config)
    if not config.temperature and not config.samples_file:
        config.refuse(("top_p", "top_k", "min_p", *(() if served else ("num_samples",))),
                      "--temperature 0 takes the likeliest token, the same in every sample")


if __name__ == "__main__":
    cli.run(main)
