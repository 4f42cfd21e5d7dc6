"""Preference optimisation: a policy learns to find chosen responses likelier than rejected ones, without a verifier.

B pairs of a batch; its 2 B samples are chosen and rejected sides in turns
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from src import losses, parallel
from src.data.batch import Batch, BatchSampler, Dataset, make_batch, pack_shared
from src.data.encoded_rows import Keep, Sample, in_temporary_file
from src.data.examples import read_pairs
from src.errors import UserError
from src.models.decoder import Decoder
from src.text.tokenizer import Tokenizer
from src.training.kto import KTO, KTOReport, outcome_dataset, read_outcomes
from src.training.reference import Reference, response_sums
from src.training.reward_model import n_pairs, pair_dataset, split_held_out
from src.training.trainer import evaluating

Objective = Literal["dpo", "cdpo", "ipo", "orpo", "simpo"]


class PreferenceReport(NamedTuple):
    """Means over pairs: the loss, how often and by how many nats chosen is ahead, and log-probs per token.

    The margin is the one that the loss sees, before beta: beyond the reference where there is one, of means per token
    where the objective takes means.
    """

    loss: float
    accuracy: float
    margin: float
    chosen_logprob: float
    rejected_logprob: float


def open_preferences(
    train_file: str, label_file: str, held_out: float, tokenizer: Tokenizer, columns: Mapping[str, str] = {}, *,
    single: bool = False, keeps: Sequence[Keep] = (in_temporary_file, in_temporary_file), **options: object,
) -> tuple[Dataset, Dataset]:
    """The pairs, or the single responses of KTO, to train on and to test on; `options` are max_seq_len and truncation
    of fit(), keeps where it writes each side. Without a label_file the last `held_out` of the problems are kept. Raises
    UserError."""
    read, encode = (read_outcomes, outcome_dataset) if single else (read_pairs, pair_dataset)
    (rows,), held = split_held_out(
        [partial(read, train_file, columns)], partial(read, label_file, columns) if label_file else None, held_out)
    train = encode(rows(), tokenizer, source=train_file, keep=keeps[0], **options)
    test = encode(held(), tokenizer, source=label_file or train_file, keep=keeps[1], **options)
    return (train, test) if single else (train._replace(collate=collate), test._replace(collate=collate))


def with_reference(data: Dataset, reference: Reference | None) -> Dataset:
    """Rows of open_preferences() with what the reference says of them in every batch; None: 0."""
    return data._replace(collate=partial(data.collate, reference=reference))


def collate(pairs: Sequence[Sample], packing: bool, reference: Reference | None = None) -> Batch:
    """The sides of pairs in turns, padded, or packed with the prompt of each pair only once."""
    sides = [encoded for pair in pairs for encoded in pair]
    logprobs = [reference.of(encoded) if reference else 0.0 for encoded in sides]
    # The two sides of a pair share their prompt, mostly the longer part: packed, it is computed once
    batch = pack_shared(pairs) if packing else make_batch(sides)
    return batch._replace(reference=torch.tensor(logprobs))


@dataclass(frozen=True, kw_only=True)
class Preference:
    """What the loss of a pair is."""

    objective: Objective
    beta: float
    margin: float = 0.0
    label_smoothing: float = 0.0
    length_normalize: bool = False
    nll_weight: float = 0.0

    unit: ClassVar[str] = "pairs"

    def __post_init__(self) -> None:
        if self.objective == "cdpo" and not 0 < self.label_smoothing < 0.5:
            raise UserError(f"--label_smoothing is {self.label_smoothing}; --objective cdpo needs the share of wrong "
                            "labels, more than 0 and less than 0.5")
        if self.objective != "cdpo" and self.label_smoothing:
            raise UserError(f"--label_smoothing is of --objective cdpo, not of {self.objective}")
        if self.objective != "simpo" and self.margin:
            raise UserError(f"--margin is of --objective simpo, not of {self.objective}")
        if self.length_normalize and self.objective not in ("dpo", "cdpo"):
            raise UserError(f"--length_normalize is of --objective dpo and cdpo; {self.objective} always takes means a "
                            "token")

    @property
    def needs_reference(self) -> bool:
        """Whether the objective measures the policy against a reference."""
        return self.objective in ("dpo", "cdpo", "ipo")

    def of_step(self, policy: Decoder, batches: Sequence[Batch]) -> "Preference":
        """The objective itself: the loss of a pair depends on no other one."""
        return self

    def count(self, batches: Sequence[Batch]) -> int:
        """Pairs in this rank's micro-batches of one step."""
        return n_pairs(batches)

    def loss(self, policy: Decoder, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss summed over a batch's pairs, and the sums of all that report() shows. -> [], [6] float64."""
        sums = response_sums(policy, batch)  # [2 B]
        counts = parallel.to_device(batch.response_counts())
        each, margins = self.pair_losses(sums, parallel.to_device(batch.reference), counts)
        supervised = _sides(counts)[0] > 0
        with torch.no_grad():
            means = _sides(sums / counts.clamp_min(1))
            columns = torch.stack((torch.ones_like(each), each, (margins > 0).float(), margins, *means))
            tally = (columns * supervised).double().sum(1)
        return (each * supervised).sum(), tally

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
            margins = losses.dpo_margins(*_sides(policy), *_sides(frozen))  # [B]
            if self.objective == "ipo":
                each = losses.ipo_loss(margins, self.beta)
            else:
                each = losses.dpo_loss(margins, self.beta, self.label_smoothing)
        return each - self.nll_weight * chosen, margins

    @staticmethod
    def report(tallies: Sequence[Tensor]) -> PreferenceReport:
        """The means over all ranks' pairs from the sums [6] of their batches."""
        total = parallel.sum_over_all(torch.stack(list(tallies)).sum(0)) / parallel.ranks_per_batch()
        return PreferenceReport(*(total[1:] / total[0]).tolist())


def _sides(values: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen sides' values and the rejected sides'. [2 B] -> [B], [B]."""
    return values[0::2], values[1::2]


def evaluate(
    policy: Decoder, held_out: Dataset, objective: Preference | KTO, sampler: BatchSampler, *, packing: bool
) -> PreferenceReport | KTOReport:
    """The report on held-out rows, over all ranks."""
    batches = [batch for step in sampler.steps(held_out, packing=packing, epochs=1) for batch in step.batches]
    objective = objective.of_step(policy, batches)
    with evaluating(policy):
        tallies = [objective.loss(policy, batch)[1] for batch in batches]
    return objective.report(tallies)
