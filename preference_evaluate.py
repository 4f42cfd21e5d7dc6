"""Where a preference-trained solver sees the mistake: the credit of every token of labelled solutions.

torchrun --nproc_per_node 8 preference_evaluate.py --ckpt_dir results/dpo --reference_ckpt_dir results/solver \\
    --steps_file steps.json --log_dir log/credit
"""

import json
from dataclasses import dataclass
from pathlib import Path

from src import load, parallel, runlog
from src.checkpoint import storage
from src.command import cli
from src.command.config import ContextFlags, Count, ModelFlags, Positive, TokenizerFlags, flag
from src.data.encoding import StepKind
from src.data.examples import read_step_labels
from src.evaluation.credit import credit, credit_table, report_credit, token_logprobs
from src.evaluation.scoring import encode_solutions
from src.jsonfile import write_json
from src.planning import plan
from src.report.page import write_report
from src.runlog import RunLog


@dataclass(frozen=True, kw_only=True)
class CreditConfig(ModelFlags, TokenizerFlags, ContextFlags):
    """Credit of tokens"""

    ckpt_dir: str = flag(help="solver that preference_train.py has trained")
    reference_ckpt_dir: str = flag(help="the solver it started from")
    steps_file: str = flag(help="""solutions with labelled steps, {"instruction", "steps", "labels"}, as
        `data_build.py process` leaves them""")
    log_dir: str = flag(help="directory for credits.jsonl, results.json, report.html and run.json")
    beta: Positive = flag(0.1, """as in training; it scales credits, and changes nothing about which is the
        least""")
    step: StepKind = flag("paragraph", """what a step is: a paragraph, with a blank line after it, or a line,
        as the solver writes them""")
    max_batch_size: Count = flag(64, "solutions in one forward pass")


def main(config: CreditConfig) -> None:
    """Credit of tokens and steps, beta times the log-ratio of a solver and its reference, and what it finds."""
    model_config = load.load_config(config.ckpt_dir, config.model_type, "solver")
    reference_config = load.load_config(config.reference_ckpt_dir, kind="solver")
    models = {config.ckpt_dir: model_config, config.reference_ckpt_dir: reference_config}
    n = load.scoring_ranks(models, config.context_parallel_size, planned=config.dry_run)
    rows = list(read_step_labels(config.steps_file))
    tokenizer = load.load_tokenizer(config.ckpt_dir, config)
    load.check_tokenizer(tokenizer, config.reference_ckpt_dir)
    longest = min(each.max_seq_len for each in models.values())
    solutions = encode_solutions(rows, tokenizer, longest, config.step)
    encoded = [solution for solution in solutions if solution]
    if config.dry_run:
        runlog.table(plan.scoring(config, model_config, n, [len(row.tokens) for row in encoded], config.max_batch_size,
                                  context_parallel=config.context_parallel_size))
        return
    rows = [row for row, solution in zip(rows, solutions, strict=True) if solution]
    storage.claim(Path(config.log_dir))
    parallel.start(tensor_parallel_size=n, context_parallel_size=config.context_parallel_size)
    RunLog(config.log_dir, config.flags())
    # each solver is gone when the next one is loaded
    policy, reference = (list(token_logprobs(load.load_solver(folder, precision=config.precision), encoded,
                                             config.max_batch_size))
                         for folder in (config.ckpt_dir, config.reference_ckpt_dir))
    if parallel.rank() == 0:
        found = [credit(*each, config.beta, tokenizer) for each in zip(encoded, policy, reference, strict=True)]
        with (Path(config.log_dir) / "credits.jsonl").open("w", encoding="utf-8") as file:
            for row, each in zip(rows, found, strict=True):
                file.write(json.dumps(row.values | each._asdict() | {"reward": each.reward}) + "\n")
        report = report_credit(rows, found) | {"too_long": len(solutions) - len(rows)}
        write_json(Path(config.log_dir) / "results.json", report)
        runlog.table(f"{credit_table(report)}\nlook at {write_report(Path(config.log_dir))}")


if __name__ == "__main__":
    cli.run(main)
