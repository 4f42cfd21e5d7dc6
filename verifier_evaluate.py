"""Score samples with a verifier and report what choosing by score is worth; or score labelled steps.

torchrun --nproc_per_node 8 verifier_evaluate.py --task GSM8K --ckpt_dir verifier --samples_file log/samples.jsonl \
    --label_file dataset/GSM8K/test.json --log_dir log/verified
torchrun --nproc_per_node 8 verifier_evaluate.py --ckpt_dir prm --steps_file processbench.json --log_dir log/steps
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from src import load, parallel, runlog
from src.checkpoint import storage
from src.command import cli
from src.command.config import ContextFlags, Count, ModelFlags, TokenizerFlags, flag
from src.data.encoding import StepKind
from src.data.examples import match_samples, read_prompts, read_samples, read_step_labels
from src.errors import UserError
from src.evaluation.evaluator import BackgroundGrader, grade_samples, refuse_sampled
from src.evaluation.prompting import select_prompts
from src.evaluation.report import summarize
from src.evaluation.scoring import encode_samples, encode_solutions, score_samples, score_steps, with_score
from src.evaluation.verifier_report import (
    choose_threshold,
    report_samples,
    report_steps,
    report_table,
    steps_table,
)
from src.grading.tasks import find_task
from src.jsonfile import write_json
from src.planning import plan
from src.report.page import write_report
from src.runlog import RunLog


@dataclass(frozen=True, kw_only=True)
class VerifierEvaluateConfig(ModelFlags, TokenizerFlags, ContextFlags):
    """Verifier evaluation"""

    ckpt_dir: str = flag(help="verifier checkpoint")
    log_dir: str = flag(help="""directory for results.json and run.json, and of samples for the scored samples.jsonl,
        report.html and verifier.png, where a rerun continues""")
    task: str = flag("", """how answers are found and compared: a name that solver_evaluate.py --help lists,
        or FILE.json""")
    samples_file: str = flag("", "samples.jsonl of solver_evaluate.py, several samples a problem")
    label_file: str = flag("", "the problems that were sampled, with labels")
    split: str = flag("", """only problems with this `split` field, or level=4-5, subject=Algebra, as for
        solver_evaluate.py""")
    steps_file: str = flag("", """instead of samples, solutions with labelled steps: {"instruction", "steps",
        "labels"}""")
    threshold_file: str = flag("", """solutions with labelled steps on which the threshold of the first-error F1
        is chosen; default: 0.5""")
    aggregation: Literal["prod", "min", "last", "mean", "max"] = flag("prod", """what makes one score of the
        steps of a solution (process verifiers)""")
    step: Literal["", StepKind] = flag("", """what a step is: a paragraph, with a blank line after it, or a
        line; default: what it was in the verifier's training, which nothing else may be""")
    max_batch_size: Count = flag(64, "samples in one forward pass")
    quantize: Literal["", "int8", "int4"] = flag("", """hold weights in 8 or 4 bits, in groups of 128 or 32
        that share a scale; default: as they are computed with""")

    def __post_init__(self) -> None:
        """Raise UserError unless samples or steps are given, with what each needs."""
        super().__post_init__()
        complete = not self.samples_file or (self.task and self.label_file)
        if bool(self.steps_file) == bool(self.samples_file) or not complete:
            raise UserError("give either --samples_file with --task and --label_file, or --steps_file")
        if self.steps_file:
            self.refuse(("task", "label_file", "split", "aggregation"),
                        "each step of each row of --steps_file is judged")
        else:
            self.refuse(("threshold_file",), "its threshold is for the steps of --steps_file")


def main(config: VerifierEvaluateConfig) -> None:
    """Add scores to samples: best-of-n and weighted voting over n next to majority voting; or score steps."""
    model_config = load.load_config(config.ckpt_dir, config.model_type, "verifier")
    if model_config.objective != "process":
        config.refuse(("aggregation",), f"{config.ckpt_dir} gives one score of a solution")
    n = load.scoring_ranks({config.ckpt_dir: model_config}, config.context_parallel_size, planned=config.dry_run)
    prompts, samples, labelled = [], [], []
    if config.samples_file:
        problems = read_prompts(config.label_file, need_label=True)
        prompts = select_prompts(problems, config.split)
        asked = {prompt.id for prompt in prompts}
        samples = [sample for sample in match_samples(read_samples(config.samples_file), problems, config.samples_file)
                   if sample.id in asked]
        task = find_task(config.task)
        if not task.graded:
            raise UserError("--task none grades nothing; name the task of --samples_file")
        if not samples:
            raise UserError(f"{config.samples_file} holds no sample of the {len(prompts)} problems of --split "
                            f"{config.split}; choose others")
    else:
        labelled = list(read_step_labels(config.steps_file))
        if model_config.objective == "pairwise":
            raise UserError(f"{config.ckpt_dir} is a pairwise verifier and cannot judge steps; give an outcome or "
                            f"process one")
    load.check_step(config.ckpt_dir, model_config, config.step)
    tokenizer = load.load_tokenizer(config.ckpt_dir, config)
    if config.dry_run:
        encoded = encode_samples(tokenizer, samples, model_config) or encode_solutions(
            labelled, tokenizer, model_config.max_seq_len, model_config.step, model_config.verifier_form)
        runlog.table(plan.scoring(config, model_config, n, [len(row.tokens) for row in encoded if row],
                                  config.max_batch_size, quantize=config.quantize,
                                  context_parallel=config.context_parallel_size))
        return
    storage.claim(Path(config.log_dir))
    if config.samples_file:
        refuse_sampled(Path(config.log_dir) / "samples.jsonl")
    parallel.start(tensor_parallel_size=n, context_parallel_size=config.context_parallel_size)
    verifier = load.load_verifier(config.ckpt_dir, precision=config.precision, quantize=config.quantize)
    log, folder = RunLog(config.log_dir, config.flags()), Path(config.log_dir)
    if config.steps_file:
        threshold = None
        if config.threshold_file:
            rows = list(read_step_labels(config.threshold_file))
            found = score_steps(verifier, tokenizer, rows, max_batch_size=config.max_batch_size)
            threshold = choose_threshold(rows, found)
        found = score_steps(verifier, tokenizer, labelled, max_batch_size=config.max_batch_size)
        if parallel.rank() == 0:
            report = report_steps(labelled, found, threshold)
            write_json(folder / "results.json", report)
            runlog.table(steps_table(report))
        return
    arithmetic = f"{config.quantize}{verifier.dtype}".removesuffix("torch.float32")
    facts = [*(getattr(model_config, name) for name in ("objective", "step", "verifier_form")), tokenizer.form(),
             tokenizer.chat_facts(), model_config.identity()]
    form = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]
    identity = f"{storage.fingerprint(Path(config.ckpt_dir))[:12]}{arithmetic}{form}"
    scores = score_samples(verifier, tokenizer, samples, aggregation=config.aggregation,
                           max_batch_size=config.max_batch_size, path=folder / f"scores.{identity}.jsonl", log=log)
    if parallel.rank() == 0:
        scored = [with_score(sample, found) for sample, found in zip(samples, scores, strict=True)]
        with BackgroundGrader(task, prompts) as grading:
            problems = grade_samples(grading, scored, folder / "samples.jsonl")
        results, report = summarize(task, prompts, problems), report_samples(list(problems.values()))
        write_json(folder / "results.json", results | {"verifier": report})
        from src.plot import plot_verifier  # matplotlib costs half a second: not for every start

        plot_verifier(report, folder / "verifier.png")
        runlog.table(f"{report_table(report)}\nlook at {write_report(folder)}")


if __name__ == "__main__":
    cli.run(main)
