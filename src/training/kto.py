"""KTO: a policy learns from single responses, right or wrong, how likely each should be beside a reference.

B responses of a batch
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from src import losses, parallel
from src.data.batch import Batch, Dataset, make_batch
from src.data.encoded_rows import Keep, Sample, fit, in_temporary_file
from src.data.encoding import Encoded, encode_response, label_everywhere
from src.data.examples import StepLabels, read_step_labels
from src.errors import UserError
from src.models.decoder import Decoder
from src.text.tokenizer import Tokenizer
from src.training.reference import Reference, response_sums
from src.training.trainer import evaluating


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
            raise UserError(f"{path} holds judged steps, or labels between 0 and 1; --objective kto learns from whole "
                            f'responses: {{"instruction", "output", "correct": true or false}}')
        yield row


def outcome_dataset(
    rows: Iterable[StepLabels], tokenizer: Tokenizer, *, max_seq_len: int, source: str, truncation: str = "drop",
    keep: Keep = in_temporary_file,
) -> Dataset:
    """Pairs of a response, with its label as the target of each token, and another problem's response to its prompt.
    The latter, of which the reference point is made, are cut to max_seq_len. Raises UserError for a single problem."""
    encoded = ((label_everywhere(encode_response(tokenizer, row.instruction, row.steps[0]), row.labels[0]),)
               for row in rows)
    kept, report = fit(encoded, max_seq_len, source, truncation, keep)
    own = [sample for (sample,) in kept]
    n_right = sum(sample.targets[0] == 1 for sample in own)
    return Dataset(
        [(sample, other) for sample, other in zip(own, _mismatched(own, max_seq_len, source), strict=True)],
        f"{report}; {n_right} right and {len(own) - n_right} wrong", collate)


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
        tokens = [*prompt, *other.tokens[other.response_start :]][:max_seq_len]
        found.append(Encoded(tokens, len(prompt)))
    return found


def collate(samples: Sequence[Sample], packing: bool, reference: Reference | None = None) -> Batch:
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
        return replace(self, reference_point=max(0.0, mean))

    def count(self, batches: Sequence[Batch]) -> int:
        """Responses in this rank's micro-batches of one step."""
        return sum(int((batch.response_counts() > 0).sum()) for batch in batches)

    def loss(self, policy: Decoder, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss summed over a batch's responses, and the sums of all that report() shows. -> [], [9] float64."""
        counts = batch.response_counts()
        taken = (counts > 0).nonzero()[:, 0]  # a rank without responses left runs along with one that has no tokens
        right = parallel.to_device(batch.targets[batch.response_mask][counts[taken].cumsum(0) - 1] == 1)
        sums, rows = response_sums(policy, batch), parallel.to_device(taken)
        ratios, means = (
            each.index_select(0, rows)  # [B]
            for each in (sums - parallel.to_device(batch.reference), sums / parallel.to_device(counts.clamp_min(1)))
        )
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
        total = parallel.sum_over_all(torch.stack(list(tallies)).sum(0)) / parallel.ranks_per_batch()
        n, loss, agree, point, n_right, right, right_mean, wrong, wrong_mean = total.tolist()
        n_right, n_wrong = max(1.0, n_right), max(1.0, n - n_right)
        return KTOReport(loss / n, agree / n, right / n_right - wrong / n_wrong, point / n, right_mean / n_right,
                         wrong_mean / n_wrong)
