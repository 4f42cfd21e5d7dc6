"""Score samples with a verifier and report what choosing by score is worth; or score judged steps.

torchrun --nproc_per_node 8 verifier_evaluate.py --task GSM8K --ckpt_dir verifier --samples_file log/samples.jsonl \
    --label_file dataset/GSM8K/test.json --log_dir log/verified
torchrun --nproc_per_node 8 verifier_evaluate.py --ckpt_dir prm --steps_file processbench.json --log_dir log/steps
"""

from pathlib import Path
from typing import Literal

from src import assemble, cli, parallel, plan, runlog
from src.checkpoint import storage
from src.config import Count
from src.data.encoding import StepKind
from src.data.examples import match_samples, read_judged, read_prompts, read_samples
from src.errors import UserError
from src.evaluation.evaluator import Marking, grade_samples, refuse_sampled
from src.evaluation.judging import score_samples, score_steps, with_score
from src.evaluation.prompting import select_prompts
from src.evaluation.tasks import find_task
from src.evaluation.verifier_report import (
    choose_threshold,
    judged_samples,
    report_samples,
    report_steps,
    report_table,
    steps_table,
)
from src.plot import plot_verifier
from src.runlog import RunLog


def main(
    ckpt_dir: str, log_dir: str, task: str = "", samples_file: str = "", label_file: str = "", split: str = "",
    steps_file: str = "", threshold_file: str = "", aggregation: Literal["prod", "min", "last", "mean", "max"] = "prod",
    step: Literal["", StepKind] = "", model_type: str = "", tokenizer_file: str = "", max_batch_size: Count = 64,
    quantize: Literal["", "int8", "int4"] = "", dry_run: bool = False,
) -> None:
    """Add scores to samples: best-of-n and weighted voting over n beside majority voting; or judge steps.

    ckpt_dir: verifier checkpoint
    log_dir: directory for the scored samples.jsonl, results.json, verifier.png, run.json; a rerun continues
    task: how answers are found and compared: a name that solver_evaluate.py --help lists, or FILE.json
    samples_file: samples.jsonl of solver_evaluate.py, several samples a problem
    label_file: the problems that were sampled, with labels
    split: only problems with this `split` field, or level=4-5, subject=Algebra, as for solver_evaluate.py
    steps_file: instead of samples, solutions with judged steps: {"instruction", "steps", "labels"}
    threshold_file: solutions with judged steps on which the threshold of the first-error F1 is chosen; default: 0.5
    aggregation: what makes one score of the steps of a solution (process verifiers)
    step: what a step is: a paragraph, with a blank line behind it, or a line; default: what it was in the verifier's
        training, which nothing else may be
    model_type: a family or released size the checkpoint must agree with; default: what params.json says
    tokenizer_file: tokenizer file of any kind; default: the one in ckpt_dir
    max_batch_size: samples in one forward pass
    quantize: hold weights in 8 or 4 bits, in groups of 128 or 32 that share a scale; default: as they are computed with
    dry_run: print the plan - samples, memory of each rank - and stop
    """
    flags = locals().copy()
    if bool(steps_file) == bool(samples_file) or (samples_file and not (task and label_file)):
        raise UserError("give either --samples_file with --task and --label_file, or --steps_file")
    config = assemble.load_config(ckpt_dir, model_type, "verifier")
    problems = read_prompts(label_file, need_label=True) if samples_file else []
    prompts = select_prompts(problems, split) if samples_file else []
    asked = {prompt.id for prompt in prompts}
    matched = match_samples(read_samples(samples_file), problems, samples_file) if samples_file else []
    samples = [sample for sample in matched if sample.id in asked]
    judged = read_judged(steps_file) if steps_file else []
    if steps_file and config.objective == "pairwise":
        raise UserError(f"{ckpt_dir} is a pairwise verifier and cannot judge steps; give an outcome or process one")
    assemble.check_step(ckpt_dir, config, step)
    if dry_run:
        runlog.table(plan.scoring(config, assemble.n_shards(ckpt_dir), len(samples or judged), quantize))
        return
    storage.claim(Path(log_dir))
    if samples_file:
        refuse_sampled(Path(log_dir) / "samples.jsonl", samples_file)
    parallel.start()
    verifier = assemble.load_verifier(ckpt_dir, quantize=quantize)
    tokenizer = assemble.load_tokenizer(ckpt_dir, tokenizer_file)
    log, folder = RunLog(log_dir, flags), Path(log_dir)
    if steps_file:
        threshold = None
        if threshold_file:
            rows = read_judged(threshold_file)
            found = score_steps(verifier, tokenizer, rows, max_batch_size=max_batch_size)
            threshold = choose_threshold(rows, found)
        found = score_steps(verifier, tokenizer, judged, max_batch_size=max_batch_size)
        if parallel.rank() == 0:
            report = report_steps(judged, found, threshold)
            storage.write_json(folder / "results.json", report)
            runlog.table(steps_table(report))
        return
    scores = score_samples(verifier, tokenizer, samples, aggregation=aggregation, max_batch_size=max_batch_size,
                           path=folder / f"scores.{storage.fingerprint(Path(ckpt_dir))[:12]}{quantize}.jsonl", log=log)
    if parallel.rank() == 0:
        scored = [with_score(sample, found) for sample, found in zip(samples, scores, strict=True)]
        with Marking(find_task(task), prompts) as marking:
            results = grade_samples(marking, scored, folder / "samples.jsonl")
            report = report_samples(judged_samples(marking, scored))
        storage.write_json(folder / "results.json", results | {"verifier": report})
        plot_verifier(report, folder / "verifier.png")
        runlog.table(report_table(report))


if __name__ == "__main__":
    cli.run(main)
