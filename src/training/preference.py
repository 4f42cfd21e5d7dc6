"""Preference optimisation: a policy learns to find chosen responses likelier than rejected ones, without a verifier.

Of pairs, whose batch of B has chosen and rejected sides in turns, 2 B samples; or of B single responses, right or wrong
(KTO).
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from src import losses, parallel
from src.data.batch import Batch, BatchSampler, Dataset, make_batch, pack_shared
from src.data.encoded_rows import Keep, Sample, fit, in_temporary_file
from src.data.encoding import Encoded, encode_response, label_everywhere
from src.data.examples import StepLabels, read_pairs, read_step_labels
from src.errors import UserError
from src.models.decoder import Decoder
from src.text.tokenizer import Tokenizer
from src.training.reference import Reference, response_sums
from src.training.reward_model import pair_dataset, split_held_out
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
    return (train, test) if single else (train._replace(collate=collate_sides), test._replace(collate=collate_sides))


def with_reference(data: Dataset, reference: Reference | None) -> Dataset:
    """Rows of open_preferences() with what the reference says of them in every batch; None: 0."""
    return data._replace(collate=partial(data.collate, reference=reference))


def collate_sides(pairs: Sequence[Sample], packing: bool, reference: Reference | None = None) -> Batch:
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
        return sum(batch.n_learnt for batch in batches) // 2

    def loss(self, policy: Decoder, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss summed over a batch's pairs, and the sums of all that report() shows. -> [], [6] float64."""
        sums = response_sums(policy, batch)  # [2 B]
        counts = parallel.to_device(batch.response_counts())
        each, margins = self.pair_losses(sums, parallel.to_device(batch.reference), counts)
        supervised = _sides(counts)[0] > 0
        # for report() alone: nothing of it is learnt
        with torch.no_grad():
            means = _sides(sums / counts.clamp_min(1))
            columns = torch.stack((torch.ones_like(each), each, (margins > 0).float(), margins, *means))
            tally = (columns * supervised).double().sum(1)
        return (each * supervised).sum(), tally

    def pair_losses(self, logprobs: Tensor, reference: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Losses and margins of pairs from summed log-probs and token counts, each [2 B]. -> two [B] float32."""
        # a side without response tokens is one that this rank only runs along with
        counts = counts.clamp_min(1)
        means = logprobs / counts
        chosen, rejected = _sides(means)
        if self.objective == "orpo":
            # ORPO's other term is the likelihood of the chosen side, which no reference holds where it is
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
        n, *sums = _over_ranks(tallies)
        return PreferenceReport(*(each / n for each in sums))


def _over_ranks(tallies: Sequence[Tensor]) -> list[float]:
    """The sums [K] of all ranks' batches from those of this rank's, each [K] float64."""
    # ranks that share a batch have each counted the whole of it
    return (parallel.sum_over_all(torch.stack(list(tallies)).sum(0)) / parallel.ranks_per_batch()).tolist()


def _sides(values: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen sides' values and the rejected sides'. [2 B] -> [B], [B]."""
    return values[0::2], values[1::2]


class KTOReport(NamedTuple):
    """Means over responses: the loss; how often a right one is above the reference point, or a wrong one below; by how
    many nats of log(pi / pi_ref) right ones are ahead of wrong ones; the reference point, in nats; log-probs per token.
    """

    loss: float
    accuracy: float
    margin: float
    reference_point: float
    right_logprob: float
    wrong_logprob: float


def read_outcomes(path: str, columns: Mapping[str, str] = {}) -> Iterator[StepLabels]:
    """The rows of right and wrong responses. Raises UserError for judged steps."""
    for row in read_step_labels(path, columns):
        if len(row.steps) > 1 or row.labels[0] not in (0, 1):
            raise UserError(f"{row.where} holds judged steps, or a label between 0 and 1; --objective kto learns from "
                            f'whole responses: {{"instruction", "output", "correct": true or false}}')
        yield row


def outcome_dataset(
    rows: Iterable[StepLabels], tokenizer: Tokenizer, *, max_seq_len: int, source: str, truncation: str = "drop",
    keep: Keep = in_temporary_file,
) -> Dataset:
    """Pairs of a response, with its label as the target of each token, and another problem's response to its prompt.
    The latter, of which the reference point is made, are cut to max_seq_len. Raises UserError for a single problem."""
    def encode(row: StepLabels) -> list[Sample]:
        """A response with its label."""
        return [(label_everywhere(encode_response(tokenizer, row.instruction, row.steps[0]), row.labels[0]),)]

    kept, report = fit(rows, encode, max_seq_len, source, truncation, keep)
    own = [sample for (sample,) in kept]
    n_right = sum(sample.targets[0] == 1 for sample in own)
    return Dataset(
        [(sample, other) for sample, other in zip(own, _mismatched(own, max_seq_len, source), strict=True)],
        f"{report}; {n_right} right and {len(own) - n_right} wrong", collate_outcomes)


def _mismatched(samples: Sequence[Encoded], max_seq_len: int, source: str) -> list[Encoded]:
    """Each prompt with the response of the sample as many rows on as one problem has, or of the next of another's."""
    prompts = [tuple(sample.tokens[: sample.response_start]) for sample in samples]
    # as many rows on as one problem has: where a file's rows are in order of problems, that is another's
    shift, n = max(Counter(prompts).values()), len(samples)
    if shift == n:
        raise UserError(f"{source}: all responses are to one problem; --objective kto needs two or more to measure "
                        f"the reference point, also among the held-out rows (--held_out)")
    found = []
    for place, prompt in enumerate(prompts):
        other = next(samples[i % n] for i in range(place + shift, place + shift + n) if prompts[i % n] != prompt)
        tokens = [*prompt, *other.tokens[other.response_start :]]
        mask = other.answer_mask and [False] * len(prompt) + other.answer_mask[other.response_start :]
        found.append(Encoded(tokens[:max_seq_len], len(prompt), answer_mask=mask and mask[:max_seq_len]))
    return found


def collate_outcomes(samples: Sequence[Sample], packing: bool, reference: Reference | None = None) -> Batch:
    """Responses as a batch, and their mismatched ones as the batch within it, with what the reference says of each."""
    own, others = (
        make_batch(side, packing=packing, with_targets=is_own)._replace(
            reference=torch.tensor([reference.of(encoded) if reference else 0.0 for encoded in side]))
        for side, is_own in zip(zip(*samples, strict=True), (True, False), strict=True))
    return own._replace(mismatched=others)


@dataclass(frozen=True, kw_only=True)
class KTO:
    """What the loss of a response is."""

    beta: float
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    reference_point: float = 0.0  # nats; of_step() measures it

    unit: ClassVar[str] = "responses"
    needs_reference: ClassVar[bool] = True

    def of_step(self, policy: Decoder, batches: Sequence[Batch]) -> "KTO":
        """The objective with the reference point of these batches of all ranks: KL(policy, reference), at least 0.

        Its estimate is the mean of log(pi / pi_ref) of mismatched responses (Ethayarajh et al. 2024, section 4.1), over
        the whole step, so that it does not depend on how the step is cut up. No gradient.
        """
        total, n = torch.zeros((), dtype=torch.float64, device=parallel.device()), 0
        with evaluating(policy):
            for batch in batches:
                others = batch.mismatched
                total += (response_sums(policy, others) - parallel.to_device(others.reference)).double().sum()
                n += self.count([others])
        mean = parallel.sum_over_data_parallel(total.item()) / parallel.sum_over_data_parallel(n)
        # a KL is never negative; its estimate, a mean of a few log-ratios, may be
        return replace(self, reference_point=max(0.0, mean))

    def count(self, batches: Sequence[Batch]) -> int:
        """Responses in this rank's micro-batches of one step."""
        return sum(batch.n_learnt for batch in batches)

    def loss(self, policy: Decoder, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss summed over a batch's responses, and the sums of all that report() shows. -> [], [9] float64."""
        counts = batch.response_counts()
        taken = (counts > 0).nonzero()[:, 0]  # a rank without responses left runs along with one that has no tokens
        right = parallel.to_device(batch.targets[batch.response_mask][counts[taken].cumsum(0) - 1] == 1)
        sums, rows = response_sums(policy, batch), parallel.to_device(taken)
        ratios, means = (
            each.index_select(0, rows)  # [B]
            for each in (sums - parallel.to_device(batch.reference), sums / parallel.to_device(counts.clamp_min(1))))
        each = losses.kto_loss(
            ratios, right, self.reference_point, self.beta, self.desirable_weight, self.undesirable_weight)
        with torch.no_grad():
            agree = (ratios > self.reference_point) == right
            one, is_right, is_wrong = torch.ones_like(each), right.float(), (~right).float()
            columns = torch.stack((
                one, each, agree.float(), one * self.reference_point, is_right, is_right * ratios, is_right * means,
                is_wrong * ratios, is_wrong * means,
            ))
        return each.sum(), columns.double().sum(1)

    @staticmethod
    def report(tallies: Sequence[Tensor]) -> KTOReport:
        """The means over all ranks' responses from the sums [9] of their batches; 0 for a mean over none."""
        n, loss, agree, point, n_right, right, right_mean, wrong, wrong_mean = _over_ranks(tallies)
        n_right, n_wrong = max(1.0, n_right), max(1.0, n - n_right)
        return KTOReport(loss / n, agree / n, right / n_right - wrong / n_wrong, point / n, right_mean / n_right,
                         wrong_mean / n_wrong)


def evaluate(
    policy: Decoder, held_out: Dataset, objective: Preference | KTO, sampler: BatchSampler, *, packing: bool
) -> PreferenceReport | KTOReport:
    """The report on held-out rows, over all ranks."""
    batches = [batch for step in sampler.steps(held_out, packing=packing, epochs=1) for batch in step.batches]
    objective = objective.of_step(policy, batches)
    with evaluating(policy):
        tallies = [objective.loss(policy, batch)[1] for batch in batches]
    return objective.report(tallies)
