"""Sample solutions to a benchmark and grade them, or grade samples that exist.

torchrun --nproc_per_node 8 solver_evaluate.py --task GSM8K --ckpt_dir out --label_file dataset/GSM8K/test.json \
    --log_dir log --max_batch_size 64
"""

from pathlib import Path
from typing import Literal

from src import assemble, cli, parallel, plan, runlog
from src.checkpoint import storage
from src.data.collate import encode_prompt
from src.data.examples import match_samples, read_prompts, read_samples
from src.errors import UserError
from src.evaluation.evaluator import (
    claim_samples,
    disclaim_samples,
    grade_samples,
    results_table,
    sample_prompts,
)
from src.inference.sampling import Sampling
from src.runlog import RunLog


def main(
    task: Literal["GSM8K", "MATH", "toy", "none"], label_file: str, log_dir: str, ckpt_dir: str = "",
    samples_file: str = "", model_type: str = "", tokenizer_file: str = "", max_batch_size: int = 64,
    max_new_tokens: int = 512, num_samples: int = 1, temperature: float = 0.0, top_p: float = 1.0,
    limit: int = -1, seed: int = 1, dry_run: bool = False,
) -> None:
    """Batched decoding and grading. Writes samples.jsonl and results.json to log_dir; a rerun continues.

    task: how answers are found and compared; none = sample without grading
    label_file: problems, json array or jsonl of {"instruction", "label"?, "id"?, "level"?}
    log_dir: directory for samples.jsonl, results.json, run.json
    ckpt_dir: solver checkpoint; not needed with samples_file
    samples_file: grade these samples instead: jsonl of {"response", "id"?, "sample"?}, matched by id or row order
    model_type: a family or released size the checkpoint must agree with; default: what params.json says
    tokenizer_file: sentencepiece model; default: the one in ckpt_dir
    max_batch_size: sequences that decode at once
    max_new_tokens: longest response
    num_samples: samples of each problem
    temperature: 0 = greedy
    top_p: sample from the smallest set of tokens with this probability
    limit: only the first so many problems; -1 = all
    seed: with the problem's id and the sample's number, all that a sample's randomness depends on
    dry_run: print the plan - prompts, memory of each rank - and stop
    """
    flags = locals().copy()
    cli.check_numbers(flags)
    if bool(ckpt_dir) == bool(samples_file):
        raise UserError("give either --ckpt_dir, to sample, or --samples_file, to grade what exists")
    if samples_file and task == "none":
        raise UserError("--task none grades nothing; name the task of --samples_file")
    problems = read_prompts(label_file, need_label=task != "none")
    prompts = problems[: limit if limit >= 0 else None]
    if dry_run and ckpt_dir:
        tokenizer = assemble.load_tokenizer(ckpt_dir, tokenizer_file)
        runlog.table(plan.decoding(assemble.load_config(ckpt_dir, model_type), assemble.n_shards(ckpt_dir),
                                   [encode_prompt(tokenizer, prompt.instruction) for prompt in prompts],
                                   samples=num_samples, max_new_tokens=max_new_tokens, n_rows=max_batch_size))
        return
    storage.check_writable(Path(log_dir))
    path = Path(log_dir) / "samples.jsonl"
    if samples_file and parallel.world_size() > 1:
        raise UserError("grading --samples_file needs one process; start it with python instead of torchrun")
    if ckpt_dir:
        sampling = Sampling(temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, seed=seed)
        parallel.start(seed=seed)
        model = assemble.load_solver(ckpt_dir, model_type=model_type)
        tokenizer = assemble.load_tokenizer(ckpt_dir, tokenizer_file)
        claim_samples(path, {"checkpoint": storage.fingerprint(Path(ckpt_dir)), "temperature": temperature,
                             "top_p": top_p, "max_new_tokens": max_new_tokens, "seed": seed})
        log = RunLog(log_dir, flags)
        sample_prompts(model, tokenizer, prompts, sampling, num_samples=num_samples, max_batch_size=max_batch_size,
                       path=path, log=log)
    if parallel.rank() == 0 and task != "none":
        samples = match_samples(read_samples(samples_file or str(path)), problems, samples_file)
        if samples_file:
            disclaim_samples(path, samples_file)
        results = grade_samples(task, prompts, samples, path)
        storage.write_json(Path(log_dir) / "results.json", results)
        runlog.table(results_table(results))


if __name__ == "__main__":
    cli.run(main)
