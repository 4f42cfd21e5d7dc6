"""Score samples with a verifier and report what choosing by score is worth.

torchrun --nproc_per_node 8 verifier_evaluate.py --task GSM8K --ckpt_dir verifier --samples_file log/samples.jsonl \
    --label_file dataset/GSM8K/test.json --log_dir log/verified
"""

from pathlib import Path
from typing import Literal

from src import assemble, cli, parallel, plan, runlog
from src.checkpoint import storage
from src.data.examples import match_samples, read_prompts, read_samples
from src.evaluation.evaluator import Marking, disclaim_samples, grade_samples, score_samples
from src.evaluation.plot import plot_results
from src.evaluation.report import results_table
from src.evaluation.tasks import find_task
from src.runlog import RunLog


def main(
    task: str, ckpt_dir: str, samples_file: str, label_file: str, log_dir: str,
    model_type: str = "", tokenizer_file: str = "", max_batch_size: int = 64,
    quantize: Literal["", "int8", "int4"] = "", dry_run: bool = False,
) -> None:
    """Add a score to every sample; best-of-n and weighted voting beside majority voting.

    task: how answers are found and compared: a name that solver_evaluate.py --help lists, or FILE.json
    ckpt_dir: verifier checkpoint
    samples_file: samples.jsonl of solver_evaluate.py, several samples a problem
    label_file: the problems that were sampled, with labels
    log_dir: directory for the scored samples.jsonl, results.json, run.json
    model_type: a family or released size the checkpoint must agree with; default: what params.json says
    tokenizer_file: tokenizer file of any kind; default: the one in ckpt_dir
    max_batch_size: samples in one forward pass
    quantize: hold weights in 8 or 4 bits, in groups of 128 or 32 that share a scale; default: as they are computed with
    dry_run: print the plan - samples, memory of each rank - and stop
    """
    flags = locals().copy()
    cli.check_numbers(flags)
    benchmark = find_task(task)
    prompts = read_prompts(label_file, need_label=True)
    samples = match_samples(read_samples(samples_file), prompts, samples_file)
    if dry_run:
        config = assemble.load_config(ckpt_dir, model_type)
        runlog.table(plan.scoring(config, assemble.n_shards(ckpt_dir), len(samples), quantize))
        return
    storage.check_writable(Path(log_dir))
    parallel.start()
    verifier = assemble.load_verifier(ckpt_dir, model_type=model_type, quantize=quantize)
    tokenizer = assemble.load_tokenizer(ckpt_dir, tokenizer_file)
    scores = score_samples(verifier, tokenizer, samples, max_batch_size=max_batch_size, log=RunLog(log_dir, flags))
    if parallel.rank() == 0:
        scored = [sample._replace(values=sample.values | {"score": score})
                  for sample, score in zip(samples, scores, strict=True)]
        path = Path(log_dir) / "samples.jsonl"
        disclaim_samples(path, samples_file)
        with Marking(benchmark, prompts) as marking:
            results = grade_samples(marking, scored, path)
        storage.write_json(Path(log_dir) / "results.json", results)
        plot_results(results, Path(log_dir) / "results.png")
        runlog.table(results_table(results))


if __name__ == "__main__":
    cli.run(main)
