"""Train a solver on preferences: DPO, conservative DPO, IPO, ORPO or SimPO on pairs, KTO on single responses.

torchrun --nproc_per_node 8 preference_train.py --ckpt_dir out --save_dir preferred --train_file pairs.json
torchrun --nproc_per_node 8 preference_train.py --ckpt_dir out --save_dir preferred --train_file pairs.json \\
    --objective orpo --lora_rank 8 --lr 3e-5
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from src import load, parallel, runlog
from src.checkpoint import saving, storage
from src.command import cli
from src.command.config import Bounds, HeldOutFlags, NonNegative, Positive, Share, TrainConfig, flag
from src.data.encoding import masked_text
from src.errors import UserError
from src.planning import plan
from src.runlog import RunLog
from src.training.preference import KTO, Preference, evaluate, open_preferences, with_reference
from src.training.reference import reference_identity, reference_logprobs
from src.training.resuming import content_hash
from src.training.run import Run
from src.training.sft import n_supervised

Smoothing = Annotated[float, Bounds("0 or more and less than 0.5", lambda x: 0 <= x < 0.5)]


@dataclass(frozen=True, kw_only=True)
class PreferenceTrainConfig(TrainConfig, HeldOutFlags):
    """Preference optimisation"""

    ckpt_dir: str = flag(help="solver to start from")
    train_file: str = flag(help="""{"instruction", "chosen", "rejected", "prefix"?} as json array or jsonl,
        each side a text or a list; prefix is a partial answer that both sides go on from, and carries no
        loss. kto: {"instruction", "output", "correct"}, as data_build.py outcome writes them""")
    objective: Literal["dpo", "cdpo", "ipo", "orpo", "simpo", "kto"] = flag("dpo", """dpo; cdpo = DPO for
        labels of which some are wrong; ipo, orpo and simpo take means a token; orpo and simpo have no reference;
        kto learns from single responses, right or wrong""")
    beta: Positive = flag(0.1, """how hard the policy is held to the reference, or weight of ORPO's preference
        term, or SimPO's scale (2 to 10)""")
    margin: NonNegative = flag(0.0, "simpo: beta times what chosen should be ahead by (the paper's gamma)")
    label_smoothing: Smoothing = flag(0.0, "cdpo: the share of labels taken to be wrong")
    length_normalize: bool = flag(False, "dpo and cdpo: mean log-probs a token instead of their sums")
    nll_weight: NonNegative = flag(0.0, """weight of the chosen response's negative log-likelihood a token,
        added to the loss (orpo has its own)""")
    desirable_weight: Positive = flag(1.0, """kto: what a right response weighs (lambda_D); the paper lets it, times
        their number, be 1 to 4/3 of the same of wrong ones""")
    undesirable_weight: Positive = flag(1.0, "kto: what a wrong response weighs (lambda_U)")
    reference_ckpt_dir: str = flag("", """frozen solver to measure against; default: ckpt_dir, also with
        adapters on it""")
    reference_file: str = flag("", """file that keeps the reference's log-probs, also for other runs; default:
        reference.jsonl in save_dir""")
    truncation: Literal["error", "drop", "left", "right", "keep_end"] = flag("drop", """for pairs with a
        longer one, counted: drop them; cut the prompt's left or the response's right; or end with an error;
        keep_end, as trl 0.7.10, keeps half of max_seq_len of the prompt's end, even where that cuts the
        question. More than 1% of the pairs dropped or short of response tokens is an error always""")
    packing: bool = flag(True, """lay the pairs of a forward pass end to end, the prompt of each only once,
        instead of padding both texts; the update is the same. On a GPU false may be faster for many short
        pairs: attention takes them in turn""")
    lr: NonNegative = 5e-7
    warmup_ratio: Share = 0.1

    def loss(self) -> Preference | KTO:
        """The loss that the flags ask for. Raises UserError for flags of another objective."""
        of_pairs = {"margin": self.margin, "label_smoothing": self.label_smoothing,
                    "length_normalize": self.length_normalize, "nll_weight": self.nll_weight}
        of_kto = {"desirable_weight": self.desirable_weight, "undesirable_weight": self.undesirable_weight}
        others = of_pairs if self.objective == "kto" else of_kto
        self.refuse(others, f"--objective {self.objective} knows no such thing")
        if self.objective == "kto":
            return KTO(beta=self.beta, **of_kto)
        return Preference(objective=self.objective, beta=self.beta, **of_pairs)

    def reference_dir(self, needed: bool) -> str:
        """The checkpoint measured against: as named, else where the policy starts; empty for an objective without.
        Raises UserError when a reference is named that the objective would not use."""
        for name in ("reference_ckpt_dir", "reference_file"):
            if getattr(self, name) and not needed:
                raise UserError(f"--{name} is given, but --objective {self.objective} has no reference; leave it out")
        return (self.reference_ckpt_dir or self.ckpt_dir) if needed else ""


def main(config: PreferenceTrainConfig) -> None:
    """The loss is a mean over the pairs, or the single responses, of a whole step."""
    objective = config.loss()
    against = config.reference_dir(objective.needs_reference)
    tokenizer = load.load_tokenizer(config.ckpt_dir, config)
    model_config = load.load_config(config.ckpt_dir, config.model_type, "solver")
    readers = {config.ckpt_dir: model_config}  # of every row
    if config.reference_ckpt_dir:
        readers[config.reference_ckpt_dir] = load.load_config(config.reference_ckpt_dir, kind="solver")
    run = Run(config, "preference_train", tokenizer, model_config)
    data, held_out = open_preferences(
        config.train_file, config.label_file, config.held_out, tokenizer, config.renamed,
        single=config.objective == "kto", truncation=config.truncation, keeps=(run.keep("train"), run.keep("eval")),
        max_seq_len=min(load.context_limit(config.max_seq_len, *reader) for reader in readers.items()))
    run.begin(data)
    if config.dry_run:
        steps = run.planned_steps(data)
        runlog.table(
            plan.training(config, model_config, steps, data.samples, tokenizer, run.sampler.ranks, summed=False))
        return
    saving.check_save_dir(config.save_dir, config.reference_ckpt_dir)
    load.check_tokenizer(tokenizer, config.reference_ckpt_dir)
    fingerprint = storage.fingerprint(Path(against)) if against else None
    log = RunLog(config.save_dir, config.flags(), {"reference": {"ckpt_dir": against, "fingerprint": fingerprint}},
                 trackers=config.trackers)
    log.logger.info("%s; held out: %s", data.report, held_out.report)
    log.logger.info("first example: %s", masked_text(data.samples[0][0], tokenizer))
    how = {"precision": config.precision, "quantize": config.quantize}
    if against:
        model = load.load_solver(against, **how)
        identity = reference_identity(content_hash(Path(against)), tokenizer, model.dtype, config.quantize)
        # one pass before there is a policy, kept in a file for later runs
        file = Path(config.reference_file or Path(config.save_dir) / "reference.jsonl")
        reference = reference_logprobs(model, [*data.samples, *held_out.samples], file, identity,
                                       max_batch_size=2 * config.max_batch_size, log=log)
        data, held_out = with_reference(data, reference), with_reference(held_out, reference)
        del model  # before the policy takes its place
    model = load.load_solver(config.ckpt_dir, trained=run.trained, **how)
    run.open(model, log)

    for step in run.steps(data):
        # A mean over the rows of all micro-batches and ranks: how a step is cut up does not change its update
        in_step, tallies = parallel.sum_over_data_parallel(objective.count(step.batches)), []
        measured = objective.of_step(model, step.batches)
        for batch in step.batches:
            loss, tally = measured.loss(model, batch)
            run.trainer.backward(loss / in_step, last=batch is step.batches[-1])
            tallies.append(tally)
        done, n_tokens = run.trainer.step(), parallel.sum_over_data_parallel(n_supervised(step.batches))
        run.log_step(step, done, n_tokens, measured.report(tallies)._asdict(), **{measured.unit: in_step})
        score = None
        if run.is_eval_due(step):
            found = evaluate(model, held_out, objective, run.sampler, packing=config.packing)
            log.metrics(step.number, epoch=step.epoch, **{f"eval_{name}": x for name, x in found._asdict().items()})
            log.logger.info("step %d: held-out loss %.4f, accuracy %.3f", step.number, found.loss, found.accuracy)
            score = -found.loss
        run.checkpointer.step_done(step.number, score)
    run.checkpointer.finish()


if __name__ == "__main__":
    cli.run(main)
