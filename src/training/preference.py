"""Preference optimisation: a policy learns to find chosen responses likelier than rejected ones, without a verifier.

B pairs of a batch; its 2 B samples are chosen and rejected sides in turns
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from src import losses, parallel
from src.data import collate
from src.data.batches import Batching, Sample
from src.data.collate import Batch, Truncation
from src.data.examples import Pair, read_pairs
from src.errors import UserError
from src.models.decoder import Decoder
from src.text.tokenizer import Tokenizer
from src.training.pairs import encode_pairs
from src.training.reference import Reference, response_sums
from src.training.verifier import last_problems

Objective = Literal["dpo", "cdpo", "ipo", "orpo", "simpo"]


class PreferenceBatch(NamedTuple):
    """Pairs with what the reference says of them: reference [2 B] float32, summed log-probs, 0 without a reference."""

    batch: Batch
    reference: Tensor

    @property
    def tokens(self) -> Tensor:
        """The batch's tokens."""
        return self.batch.tokens

    def to(self, device: torch.device) -> "PreferenceBatch":
        """The same batch on a device."""
        return PreferenceBatch(self.batch.to(device), self.reference.to(device))


class PreferenceStep(NamedTuple):
    """One optimizer step, as data.batches.Step."""

    epoch: int
    number: int
    batches: list[PreferenceBatch]


class PreferenceReport(NamedTuple):
    """Means over pairs: the loss, how often and by how many nats chosen is ahead, and log-probs a token.

    The margin is the one that the loss sees, before beta: beyond the reference where there is one, of means a token
    where the objective takes means.
    """

    loss: float
    accuracy: float
    margin: float
    chosen_logprob: float
    rejected_logprob: float


class PreferenceData:
    """Pairs as token batches, with the reference's log-probs where the objective has a reference."""

    def __init__(
        self,
        rows: Sequence[Pair],
        tokenizer: Tokenizer,
        *,
        max_seq_len: int,
        source: str,
        truncation: Truncation = "drop",
    ) -> None:
        """collate.fit() says what becomes of pairs with a text that is too long."""
        pairs = [pair for row in rows for pair in encode_pairs(row, tokenizer)]
        self.samples, self.report = collate.fit(pairs, max_seq_len, source, truncation)

    def steps(
        self,
        batching: Batching,
        reference: Reference | None,
        *,
        packing: bool,
        epochs: int,
        done: int = 0,
        stop: int | None = None,
    ) -> Iterator[PreferenceStep]:
        """The optimizer steps of `epochs` epochs behind number `done` and up to `stop`.

        packing: pairs end to end in one row, the prompt of each only once.
        """

        def lay_out(pairs: Sequence[Sample]) -> PreferenceBatch:
            sides = [encoded for pair in pairs for encoded in pair]
            said = [reference.of(encoded) if reference else 0.0 for encoded in sides]
            batch = collate.pack_forked(pairs) if packing else collate.collate(sides)
            return PreferenceBatch(batch, torch.tensor(said))

        for step in batching.steps(
            len(self.samples),
            lambda epoch, row: self.samples[row],
            lay_out,
            epochs=epochs,
            done=done,
            stop=stop,
        ):
            yield PreferenceStep(*step)


def open_preferences(
    train_file: str, label_file: str, held_out: float, tokenizer: Tokenizer, **options: object
) -> tuple[PreferenceData, PreferenceData]:
    """The pairs to train on and to test on; `options` are those of PreferenceData. Raises UserError.

    Without a label_file the last `held_out` of the problems are kept.
    """
    rows = read_pairs(train_file)
    held = read_pairs(label_file) if label_file else []
    if not label_file:
        problems = last_problems(rows, held_out)
        held = [row for row in rows if row.instruction in problems]
        rows = [row for row in rows if row.instruction not in problems]
    return (
        PreferenceData(rows, tokenizer, source=train_file, **options),
        PreferenceData(held, tokenizer, source=label_file or train_file, **options),
    )


def n_pairs(batches: Sequence[PreferenceBatch]) -> int:
    """Pairs in this rank's micro-batches of one step. Unsupervised ones do not count."""
    return sum(int((batch.response_counts() > 0).sum()) for batch, _ in batches) // 2


@dataclass(frozen=True, kw_only=True)
class Preference:
    """What the loss of a pair is."""

    objective: Objective
    beta: float
    margin: float = 0.0
    label_smoothing: float = 0.0
    length_normalize: bool = False
    nll_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.objective == "cdpo" and not 0 < self.label_smoothing < 0.5:
            raise UserError(
                f"--label_smoothing is {self.label_smoothing}; --objective cdpo needs the share of wrong labels, more "
                f"than 0 and less than 0.5"
            )
        if self.objective != "cdpo" and self.label_smoothing:
            raise UserError(f"--label_smoothing is of --objective cdpo, not of {self.objective}")
        if self.objective != "simpo" and self.margin:
            raise UserError(f"--margin is of --objective simpo, not of {self.objective}")
        if self.length_normalize and self.objective not in ("dpo", "cdpo"):
            raise UserError(
                f"--length_normalize is of --objective dpo and cdpo; {self.objective} always takes means a token"
            )

    @property
    def needs_reference(self) -> bool:
        """Whether the objective measures the policy against a reference."""
        return self.objective in ("dpo", "cdpo", "ipo")

    def reference_dir(self, ckpt_dir: str, reference_ckpt_dir: str, reference_file: str) -> str:
        """The checkpoint measured against: as named, else where the policy starts; empty for an objective without.

        Raises UserError when a reference is named that the objective would not use.
        """
        if self.needs_reference:
            return reference_ckpt_dir or ckpt_dir
        for name, value in (("reference_ckpt_dir", reference_ckpt_dir), ("reference_file", reference_file)):
            if value:
                raise UserError(
                    f"--{name} is given, but --objective {self.objective} has no reference; leave it out"
                )
        return ""

    def loss(self, policy: Decoder, pairs: PreferenceBatch, normaliser: float) -> tuple[Tensor, Tensor]:
        """The loss of a batch divided by the step's pair count, and its sums for report(). -> scalar, [6] float64."""
        sums = response_sums(policy, pairs.batch)  # [2 B]
        counts = pairs.batch.response_counts()
        each, margins = self.pair_losses(sums, pairs.reference, counts)
        supervised = _sides(counts)[0] > 0
        with torch.no_grad():
            means = _sides(sums / counts.clamp_min(1))
            columns = torch.stack((torch.ones_like(each), each, (margins > 0).float(), margins, *means))
            tally = (columns * supervised).double().sum(1)
        return (each * supervised).sum() / normaliser, tally

    def pair_losses(self, logprobs: Tensor, reference: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Losses and margins of pairs from summed log-probs and token counts, each [2 B]. -> two [B] float32."""
        counts = counts.clamp_min(1)
        means = logprobs / counts
        chosen, rejected = _sides(means)
        if self.objective == "orpo":
            each = losses.orpo_loss(chosen, rejected, self.beta) - chosen
            margins = chosen - rejected
        elif self.objective == "simpo":
            each = losses.simpo_loss(chosen, rejected, self.beta, self.margin)
            margins = chosen - rejected
        else:
            of_means = self.length_normalize or self.objective == "ipo"
            policy, frozen = (means, reference / counts) if of_means else (logprobs, reference)
            margins = losses.dpo_margins(*_sides(policy), *_sides(frozen))
            if self.objective == "ipo":
                each = losses.ipo_loss(margins, self.beta)
            else:
                each = losses.dpo_loss(margins, self.beta, self.label_smoothing)
        return each - self.nll_weight * chosen, margins


def _sides(values: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen sides' values and the rejected sides'. [2 B] -> [B], [B]."""
    return values[0::2], values[1::2]


def report(tallies: Sequence[Tensor]) -> PreferenceReport:
    """The means over all ranks' pairs from the sums of their batches."""
    total = parallel.sum_over_all(torch.stack(list(tallies)).sum(0)) / parallel.tensor_parallel_size()
    return PreferenceReport(*(total[1:] / total[0]).tolist())


@torch.no_grad()
def evaluate(
    policy: Decoder,
    held: PreferenceData,
    reference: Reference | None,
    preference: Preference,
    batching: Batching,
    *,
    packing: bool,
) -> PreferenceReport:
    """The report on held-out pairs, over all ranks."""
    was_training = policy.training
    policy.eval()
    tallies = [
        preference.loss(policy, pairs.to(parallel.device()), 1.0)[1]
        for step in held.steps(batching, reference, packing=packing, epochs=1)
        for pairs in step.batches
    ]
    policy.train(was_training)
    parallel.free_gathered(policy)
    return report(tallies)
