"""Train a verifier (reward model) from a solver checkpoint on pairs of solutions, on their outcomes or on their steps.

torchrun --nproc_per_node 8 verifier_train.py --ckpt_dir out --save_dir verifier --train_file pairs.json
torchrun --nproc_per_node 8 verifier_train.py --ckpt_dir out --save_dir prm --train_file steps.json --objective process
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from src import load, parallel, runlog
from src.checkpoint import saving
from src.command import cli
from src.command.config import Bounds, HeldOutFlags, NonNegative, TrainConfig, flag
from src.data.encoding import StepKind, masked_text
from src.planning import plan
from src.runlog import RunLog
from src.training.reward_model import SEPARATION_BY_CHANCE, open_data
from src.training.run import Run

Repeats = Annotated[list[float], Bounds("more than 0 each", lambda x: all(0 < one < math.inf for one in x))]


@dataclass(frozen=True, kw_only=True)
class VerifierTrainConfig(TrainConfig, HeldOutFlags):
    """Reward modelling"""

    ckpt_dir: str = flag(help="""solver to start from (its value head starts at zero), or a verifier to train
        on""")
    train_file: list[str] = flag(help="""json array or jsonl, or several. pairwise: {"instruction", "chosen",
        "rejected"}, each side a text or a list; outcome: {"instruction", "output", "correct"}; process:
        {"instruction", "steps", "labels"}, and outcomes""")
    weights: Repeats = flag([], """how often the rows of each training file count, such as 1,0.5; default:
        once""")
    objective: Literal["pairwise", "outcome", "process"] = flag("pairwise", """pairwise = Bradley-Terry on two
        scores; outcome = is the solution right; process = is each step right""")
    score: Literal["last", "mean"] = flag("last", """pairwise: a solution's score is read at its last token,
        or is the mean over its tokens""")
    margin: NonNegative = flag(0.0, "pairwise: what a chosen score should be ahead by")
    centring: NonNegative = flag(0.0, """pairwise: weight of the squared sum of the two scores, which keeps
        scores around 0""")
    label_tokens: Literal["all", "last"] = flag("all", """outcome: a solution is scored at each of its tokens,
        or at its last. Held-out ones are scored at the last alone, and so are outcomes among the rows of
        process""")
    balance: bool = flag(False, "outcome and process: let right labels weigh as much in all as wrong ones")
    step: Literal["", StepKind] = flag("", """outcome and process: what a step is: a paragraph, with a blank
        line after it, or a line, as in GSM8K and MetaMath; later commands follow it. Default: as the
        verifier in ckpt_dir learnt it, else paragraph""")
    truncation: Literal["error", "drop", "left", "right"] = flag("drop", """for rows with a longer one,
        counted: drop them; cut the prompt's left or the solution's right; or end with an error. More than 1%
        of the rows dropped or cut on the right is an error always""")

    def __post_init__(self) -> None:
        """Raise UserError for a flag of another objective."""
        super().__post_init__()
        of_pairs, of_labels = ("score", "margin", "centring"), ("label_tokens", "balance", "step")
        others = {"pairwise": of_labels, "outcome": of_pairs, "process": (*of_pairs, "label_tokens")}[self.objective]
        self.refuse(others, f"--objective {self.objective} knows no such thing")


def main(config: VerifierTrainConfig) -> None:
    """The loss is a mean over the pairs, or the labels, of a whole step."""
    start = load.load_config(config.ckpt_dir, config.model_type)
    if start.value_head and start.objective != "pairwise":
        load.check_step(config.ckpt_dir, start, config.step)
    step_kind = config.step or start.step
    tokenizer = load.load_tokenizer(config.ckpt_dir, config)
    options = {"margin": config.margin, "centring": config.centring} if config.objective == "pairwise" else {
        "label_tokens": config.label_tokens if config.objective == "outcome" else "last", "balance": config.balance,
        "step": step_kind}
    run = Run(config, "verifier_train", tokenizer, start)
    data, held_out, objective = open_data(
        config.objective, config.train_file, config.weights, config.label_file, config.held_out, tokenizer,
        config.renamed, seed=config.seed, truncation=config.truncation, keeps=(run.keep("train"), run.keep("eval")),
        max_seq_len=load.context_limit(config.max_seq_len, config.ckpt_dir, start), **options)
    run.begin(data)
    if config.dry_run:
        runlog.table(plan.training(config, load.solver_to_verifier(start), run.planned_steps(data), data.samples,
                                   tokenizer, run.sampler.ranks))
        return
    model = load.load_verifier(config.ckpt_dir, precision=config.precision, trained=run.trained,
                               from_solver=True, quantize=config.quantize)
    score = {"pairwise": config.score, "outcome": "last", "process": "steps"}[config.objective]
    saving.record(model, objective=config.objective, score=score, step=step_kind)
    log = RunLog(config.save_dir, config.flags(), trackers=config.trackers)
    log.logger.info("%s; held out: %s", data.report, held_out.report)
    log.logger.info("first example: %s", masked_text(data.samples[0][0], tokenizer))
    run.open(model, log)

    for step in run.steps(data):
        # A mean over all micro-batches and ranks: how a step is cut up does not change its update
        n_labels = parallel.sum_over_data_parallel(objective.count(step.batches))
        for batch in step.batches:
            loss = objective.loss(model, batch) / n_labels
            run.trainer.backward(loss, last=batch is step.batches[-1])
        run.log_step(step, run.trainer.step(), n_labels, judged=n_labels)
        accuracy = None
        # epoch-N is kept too: what reads its scores needs their units
        if run.is_eval_due(step) or step.number % run.steps_per_epoch == 0:
            found = objective.evaluate(model, held_out, config.max_batch_size)
            accuracy = found.held_out_accuracy
            log.metrics(step.number, epoch=step.epoch, **found._asdict())
            log.logger.info("step %d: held-out accuracy %.3f", step.number, accuracy)
            # PPO's rewards and best-of-n are scores in these units
            saving.record(model, score_mean=found.score_mean, score_std=found.score_std)
            if step.number == run.total_steps and not found.separation >= SEPARATION_BY_CHANCE:  # or NaN
                log.logger.warning(
                    "the verifier is not shown to tell right from wrong: on held-out rows it is %.1f deviations above "
                    "chance, expected %g or more; give it more problems with right and wrong samples, more steps "
                    "(--epochs, --lr), or hold out more rows", found.separation, SEPARATION_BY_CHANCE)
        run.checkpointer.step_done(step.number, accuracy)
    run.checkpointer.finish()


if __name__ == "__main__":
    cli.run(main)
