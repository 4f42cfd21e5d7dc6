"""Training outcome and process verifiers: a score at a token is the logit of the solution, or the step, being right."""

import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from src import parallel
from src.data import collate
from src.data.batches import Batching, Sample, Step
from src.data.collate import JudgedBatch, Truncation
from src.data.encoding import STEP_ENDS, Encoded, StepKind, encode_steps, judged_everywhere, split_steps
from src.data.examples import Judged
from src.losses import judgement_loss
from src.models.decoder import Decoder
from src.models.forward import token_scores
from src.text.tokenizer import Tokenizer

LabelTokens = Literal["all", "last"]


class JudgementReport(NamedTuple):
    """A verifier on solutions it was not trained on: its loss, how often score and label fall on the same side, the
    same for right and for wrong labels alone (nan where there are none), and the scores' mean and deviation."""

    held_out_loss: float
    held_out_accuracy: float
    accuracy_on_right: float
    accuracy_on_wrong: float
    score_mean: float
    score_std: float


class JudgedData:
    """Solutions with judged steps, or judged as a whole, as the batches of optimizer steps."""

    def __init__(
        self,
        rows: Sequence[Judged],
        tokenizer: Tokenizer,
        *,
        max_seq_len: int,
        source: str,
        truncation: Truncation = "drop",
        label_tokens: LabelTokens = "last",
        balance: bool = False,
        step: StepKind = "paragraph",
    ) -> None:
        """collate.fit() says what becomes of solutions that are too long.

        Every label is read once, at the last token of its step or of its solution; label_tokens `all`, which is for
        outcomes, judges a solution at each of its tokens instead. balance weighs right labels so that they count as
        much as wrong ones. step says what parts the steps.
        """
        encoded = [(_encode(row, tokenizer, label_tokens, STEP_ENDS[step]),) for row in rows]
        self.samples, report = collate.fit(encoded, max_seq_len, source, truncation)
        labels = [label for (sample,) in self.samples for label in sample.targets if not math.isnan(label)]
        right = sum(labels) / len(labels)
        self.right_weight = (1 - right) / right if balance and 0 < right < 1 else 1.0
        self.report = (
            f"{report}; {len(labels)} labels, {right:.1%} right, each of these weighs {self.right_weight:.2f}"
        )

    def steps(
        self, batching: Batching, *, packing: bool, epochs: int, done: int = 0, stop: int | None = None
    ) -> Iterator[Step]:
        """The optimizer steps of `epochs` epochs behind number `done` and up to `stop`."""
        return batching.steps(
            len(self.samples),
            lambda epoch, row: self.samples[row],
            lambda samples: _lay_out(samples, packing=packing),
            epochs=epochs,
            done=done,
            stop=stop,
        )

    def n_judged(self, batches: Sequence[JudgedBatch]) -> int:
        """Scores read in one step: what the loss is a mean over."""
        return sum(batch.n_judged for batch in batches)

    def loss(self, verifier: Decoder, batch: JudgedBatch, normaliser: float) -> Tensor:
        """Cross-entropy of the scores that are read, divided by the step's count of them. -> scalar."""
        scores, labels = read_scores(verifier, batch)
        return judgement_loss(scores, labels, self.right_weight).sum() / normaliser

    @torch.no_grad()
    def evaluate(self, verifier: Decoder, max_batch_size: int) -> JudgementReport:
        """Score every label. A label of one half or more counts as right, a score above 0 as the claim of it."""
        verifier.eval()
        batches = [_lay_out(rows, packing=False) for rows in collate.chunks(self.samples, max_batch_size)]
        read = [read_scores(verifier, batch.to(parallel.device())) for batch in batches]
        verifier.train()
        parallel.free_gathered(verifier)
        scores, labels = (torch.cat(column).cpu() for column in zip(*read, strict=True))
        agree, right = ((scores > 0) == (labels >= 0.5)).numpy(), (labels >= 0.5).numpy()
        return JudgementReport(
            judgement_loss(scores, labels).mean().item(),
            _share(agree),
            _share(agree[right]),
            _share(agree[~right]),
            scores.mean().item(),
            scores.std(unbiased=False).item() or 1.0,
        )


def _lay_out(samples: Sequence[Sample], *, packing: bool) -> JudgedBatch:
    return collate.lay_out_judged([encoded for (encoded,) in samples], packing=packing)


def _encode(row: Judged, tokenizer: Tokenizer, label_tokens: str, step_end: str) -> Encoded:
    """A row with its targets. A solution judged as a whole is laid out in steps too, as when it is scored."""
    steps, labels = row.steps, row.labels
    if len(steps) == 1:
        steps = split_steps(steps[0], step_end)
        labels = [None] * (len(steps) - 1) + labels
    encoded = encode_steps(tokenizer, row.instruction, steps, labels, step_end=step_end)
    everywhere = label_tokens == "all" and len(row.steps) == 1
    return judged_everywhere(encoded, row.labels[0]) if everywhere else encoded


def read_scores(verifier: Decoder, batch: JudgedBatch) -> tuple[Tensor, Tensor]:
    """The scores of a batch where they are read, and what they should be. -> two [N] float32. Differentiable."""
    judged = ~batch.targets.isnan()
    return token_scores(verifier, *batch.batch)[judged], batch.targets[judged]


def _share(flags: np.ndarray) -> float:
    return float(flags.mean()) if len(flags) else math.nan
