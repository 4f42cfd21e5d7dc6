"""Sample solutions to a benchmark and grade them, or grade samples that exist.

torchrun --nproc_per_node 8 solver_evaluate.py --task GSM8K --ckpt_dir out --label_file dataset/GSM8K/test.json \
    --log_dir log --max_batch_size 64
python solver_evaluate.py --task GSM8K --ckpt_dir out --interactive
"""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

from src import assemble, cli, parallel, plan, runlog
from src.checkpoint import storage
from src.config import Count, CountOrOff, CountOrZero, NonNegative, Seed, Share, TopP
from src.data.encoding import StepKind, encode_prompt
from src.data.examples import match_samples, read_prompts, read_samples
from src.errors import UserError
from src.evaluation.coding import Coding
from src.evaluation.evaluator import (
    Marking,
    claim_samples,
    grade_samples,
    local_sampler,
    refuse_sampled,
    sample_prompts,
)
from src.evaluation.interactive import Solver, converse
from src.evaluation.prompting import make_prompting, select_prompts
from src.evaluation.report import CURVES, results_table
from src.evaluation.served import Backend, ServedSolver, check_flags
from src.evaluation.tasks import Task, find_task
from src.inference.sampling import Sampling
from src.plot import plot_results
from src.runlog import RunLog


def main(
    task: str, label_file: str = "", log_dir: str = "", ckpt_dir: str = "", samples_file: str = "",
    model_type: str = "", tokenizer_file: str = "", chat_template: str = "",
    max_batch_size: Count = 64, max_new_tokens: Count = 512,
    num_samples: Count = 1, temperature: NonNegative = 0.0, top_p: TopP = 1.0, top_k: CountOrZero = 0,
    min_p: Share = 0.0,
    quantize: Literal["", "int8", "int4"] = "", compile: bool = False, few_shot: str = "", prompt_template: str = "",
    split: str = "", limit: CountOrOff = -1, seed: Seed = 1, backend: Backend = "engine",
    max_rounds: Count = 24, isolation: Literal["", "bubblewrap", "namespaces", "none"] = "",
    base_url: str = "", model_name: str = "", api_key_env: str = "", interactive: bool = False,
    verifier_ckpt_dir: str = "", step: Literal["", StepKind] = "", dry_run: bool = False,
) -> None:
    """Batched decoding and grading. Writes samples.jsonl, results.json and results.png to log_dir; a rerun continues.

    task: how problems are put and answers found and compared: GSM8K, MATH, MATH-500, SVAMP, ASDiv, MAWPS, AQuA, choice,
        OlympiadBench, toy, GSM8K-strict, GSM8K-weak-to-strong, MATH-weak-to-strong, none (sample without grading), or
        FILE.json with one's own
    label_file: problems, json array or jsonl of {"instruction", "label"?, "id"?, "level"?, "subject"?, "split"?}
    log_dir: directory for samples.jsonl, results.json, results.png, run.json
    ckpt_dir: solver checkpoint; not needed with samples_file or a server
    samples_file: grade these samples instead: jsonl of {"response", "id"?, "sample"?}, matched by id or row order
    model_type: a family or released size the checkpoint must agree with; default: what params.json says
    max_batch_size: sequences that decode at once; requests under way at a server
    max_new_tokens: longest response
    num_samples: samples of each problem
    temperature: 0 = greedy
    top_p: sample from the smallest set of tokens with this probability
    top_k: sample from so many likeliest tokens; 0 = all. It comes before top_p, the temperature before both
    min_p: sample from tokens at least this likely relative to the likeliest
    quantize: hold weights in 8 or 4 bits, in groups of 128 or 32 that share a scale; default: as they are computed with
    compile: decode from compiled CUDA graphs; without a GPU it changes nothing
    few_shot: demonstrations before each problem: gsm8k8, minerva4 or a json file (dataset/README.md)
    split: only problems with this `split` field, or level=4, level=1-3, subject=Algebra|Geometry; a comma means and
    limit: only the first so many problems; -1 = all
    seed: with the problem's id and the sample's number, all that a sample's randomness depends on
    max_rounds: of a model that writes solutions with code (--chat_template code): blocks of text and code at most
    interactive: answer problems typed on standard input instead; needs no label_file and no log_dir
    verifier_ckpt_dir: with interactive, the verifier that scores every step of a solution
    step: what such a step is: a paragraph, with a blank line behind it, or a line; default: what it was in the
        verifier's training, which nothing else may be
    dry_run: print the plan - prompts, memory of each rank - and stop
    """
    flags = locals().copy()
    benchmark = find_task(task)
    refuse_contradictions(flags, benchmark)
    for folder, kind in ((ckpt_dir, "solver"), (verifier_ckpt_dir, "verifier")):
        if folder:
            assemble.load_config(folder, kind=kind)
    prompting = make_prompting(benchmark, few_shot, prompt_template)
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p,
                        max_new_tokens=max_new_tokens, stop=prompting.stop, seed=seed)
    solver = {"model_type": model_type, "quantize": quantize}
    if interactive:
        parallel.start(seed=seed)
        tokenizer = assemble.load_tokenizer(ckpt_dir, tokenizer_file, chat_template)
        assemble.check_tokenizer(tokenizer, verifier_ckpt_dir)
        if verifier_ckpt_dir:
            assemble.check_step(verifier_ckpt_dir, assemble.load_config(verifier_ckpt_dir), step)
        verifier = assemble.load_verifier(verifier_ckpt_dir, quantize=quantize) if verifier_ckpt_dir else None
        converse(Solver(assemble.load_solver(ckpt_dir, **solver), tokenizer, prompting, sampling, benchmark, verifier))
        return
    problems = read_prompts(label_file, need_label=benchmark.graded)
    prompts = select_prompts(problems, split)[: limit if limit >= 0 else None]
    served = ServedSolver(flags, prompting) if backend == "openai" else None
    if dry_run and not ckpt_dir:
        shown = (served.shown if served else prompting.text)(prompts[0].instruction)
        runlog.table(plan.report({"problems": len(prompts), "a prompt": shown}, {}))
        return
    if dry_run:
        tokenizer = assemble.load_tokenizer(ckpt_dir, tokenizer_file, chat_template)
        texts = [prompting.text(prompt.instruction) for prompt in prompts]
        runlog.table(plan.decoding(assemble.load_config(ckpt_dir, model_type), assemble.n_shards(ckpt_dir),
                                   [encode_prompt(tokenizer, text) for text in texts],
                                   samples=num_samples, max_new_tokens=max_new_tokens, n_rows=max_batch_size,
                                   quantize=quantize))
        return
    storage.claim(Path(log_dir))
    path, speed = Path(log_dir) / "samples.jsonl", None
    if samples_file:
        refuse_sampled(path, samples_file)
    marks = parallel.rank() == 0 and benchmark.graded
    with Marking(benchmark, prompts) if marks else nullcontext() as marking:
        if not samples_file:
            parallel.start(seed=seed)
            if served:
                source, sampler = served.source, served.sampler(sampling)
            else:
                model = assemble.load_solver(ckpt_dir, **solver)
                tokenizer = assemble.load_tokenizer(ckpt_dir, tokenizer_file, chat_template)
                source = {"checkpoint": storage.fingerprint(Path(ckpt_dir)), "chat_template": tokenizer.chat_template}
                coding = Coding(tokenizer, max_rounds, isolation or None) if tokenizer.code else None
                source |= {"max_rounds": max_rounds} if coding else {}
                sampler = local_sampler(model, tokenizer, prompting, sampling, max_batch_size, compiled=compile,
                                        coding=coding)
            claim_samples(path, source | {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p,
                                          "max_new_tokens": max_new_tokens, "quantize": quantize,
                                          "seed": seed} | prompting.facts())
            speed = sample_prompts(sampler, prompts, num_samples=num_samples, path=path, log=RunLog(log_dir, flags),
                                   marking=marking)
        if marking:
            samples = match_samples(read_samples(samples_file or str(path)), problems, samples_file)
            asked = {} if samples_file else prompting._asdict() | {"few_shot": few_shot}
            results = grade_samples(marking, samples, path) | asked
            storage.write_json(Path(log_dir) / "results.json", results)
            plot_results(results, CURVES, Path(log_dir) / "results.png")
            runlog.table(results_table(results, speed))


def refuse_contradictions(flags: Mapping[str, object], benchmark: Task) -> None:
    """Raise UserError for flags that do not go together: one run samples, asks a server, grades or converses."""
    on = {name for name, value in flags.items() if value} | ({"server"} if flags["backend"] == "openai" else set())
    if "interactive" in on:
        if "ckpt_dir" not in on or on & {"label_file", "log_dir"}:
            raise UserError("--interactive needs --ckpt_dir, and neither --label_file nor --log_dir")
    elif not {"label_file", "log_dir"} <= on:
        raise UserError("give --label_file and --log_dir, or --interactive with --ckpt_dir")
    elif "verifier_ckpt_dir" in on:
        raise UserError("--verifier_ckpt_dir goes with --interactive; verifier_evaluate.py scores samples.jsonl")
    if "step" in on and "verifier_ckpt_dir" not in on:
        raise UserError("--step says what a verifier judges; give --interactive and --verifier_ckpt_dir with it")
    if len(on & {"ckpt_dir", "samples_file", "server"}) != 1:
        raise UserError("give one of --ckpt_dir, to sample, --samples_file, to grade what exists, or --backend openai")
    if "samples_file" in on and not benchmark.graded:
        raise UserError("--task none grades nothing; name the task of --samples_file")
    if "samples_file" in on:
        if parallel.world_size() > 1:
            raise UserError("--samples_file needs one process; start it with python, not torchrun")
        if unused := on & {"chat_template", "tokenizer_file", "model_type", "quantize", "compile"}:
            raise UserError(f"--{min(unused)} has no effect on samples that exist; leave it or --samples_file out")
    check_flags(flags)


if __name__ == "__main__":
    cli.run(main)
