"""Training a pairwise verifier: the chosen solution of a pair should score above the rejected one."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from src import parallel
from src.data import collate
from src.data.batches import Batching, Sample, Step
from src.data.collate import Batch, Truncation
from src.data.encoding import Encoded, encode_response
from src.data.examples import Pair
from src.losses import bradley_terry_loss
from src.models.decoder import Decoder
from src.models.forward import response_scores
from src.text.tokenizer import Tokenizer


class PairReport(NamedTuple):
    """A verifier on pairs it was not trained on: how often chosen wins, and the scores' mean and deviation."""

    held_out_accuracy: float
    score_mean: float
    score_std: float


class PairData:
    """Pairs as token batches: the chosen rows of a micro-batch first, its rejected rows behind them.

    A row with several texts a side gives as many pairs as its longer side has texts; the shorter side repeats.
    """

    def __init__(
        self,
        rows: Sequence[Pair],
        tokenizer: Tokenizer,
        *,
        max_seq_len: int,
        source: str,
        truncation: Truncation = "drop",
        margin: float = 0.0,
        centring: float = 0.0,
    ) -> None:
        """collate.fit() says what becomes of pairs with a text that is too long."""
        pairs = [pair for row in rows for pair in encode_pairs(row, tokenizer)]
        self.samples, self.report = collate.fit(pairs, max_seq_len, source, truncation)
        self.margin, self.centring = margin, centring

    def steps(
        self, batching: Batching, *, packing: bool, epochs: int, done: int = 0, stop: int | None = None
    ) -> Iterator[Step]:
        """The optimizer steps of `epochs` epochs behind number `done` and up to `stop`."""
        return batching.steps(
            len(self.samples),
            lambda epoch, row: self.samples[row],
            lambda pairs: lay_out_pairs(pairs, packing=packing),
            epochs=epochs,
            done=done,
            stop=stop,
        )

    def in_order(self, max_batch_size: int) -> Iterator[Batch]:
        """All pairs once, in file order."""
        return (lay_out_pairs(pairs) for pairs in collate.chunks(self.samples, max_batch_size))

    def n_judged(self, batches: Sequence[Batch]) -> int:
        """Pairs in the micro-batches of one step: what the loss is a mean over. Unsupervised ones do not count."""
        return sum(int((batch.response_counts() > 0).sum()) for batch in batches) // 2

    def loss(self, verifier: Decoder, batch: Batch, normaliser: float) -> Tensor:
        """Bradley-Terry loss of a batch whose first half is chosen, divided by the step's pair count. -> scalar.

        The margin is what chosen should be ahead by; centring adds its weight times the squared sum of the two scores
        (Eisenstein et al. 2023, eq. 2), which keeps scores around 0 and changes no difference.
        """
        chosen, rejected = response_scores(verifier, *batch).chunk(2)
        supervised = batch.response_counts().chunk(2)[0] > 0
        losses = bradley_terry_loss(chosen - self.margin, rejected) + self.centring * (chosen + rejected) ** 2
        return (losses * supervised).sum() / normaliser

    @torch.no_grad()
    def evaluate(self, verifier: Decoder, max_batch_size: int) -> PairReport:
        """Score every pair; a tie counts as wrong. The statistics are over chosen and rejected scores together.

        Scores that are all equal have the deviation 1 here: what divides by it then gives 0.
        """
        verifier.eval()
        scores = [
            response_scores(verifier, *batch.to(parallel.device())) for batch in self.in_order(max_batch_size)
        ]
        verifier.train()
        parallel.free_gathered(verifier)
        sides = zip(*(score.chunk(2) for score in scores), strict=True)
        chosen, rejected = (torch.cat(side) for side in sides)
        both = torch.cat((chosen, rejected))
        won = (chosen > rejected).float().mean().item()
        return PairReport(won, both.mean().item(), both.std(unbiased=False).item() or 1.0)


def lay_out_pairs(pairs: Sequence[Sample], *, packing: bool = False) -> Batch:
    """Pairs as a batch: all chosen sides, then all rejected ones."""
    chosen, rejected = zip(*pairs, strict=True)
    return collate.lay_out(chosen + rejected, packing=packing)


def encode_pairs(row: Pair, tokenizer: Tokenizer) -> Iterator[tuple[Encoded, Encoded]]:
    """The pairs of a row: as many as its longer side has texts; the shorter side repeats."""
    sides = [
        [encode_response(tokenizer, row.instruction, text, prefix=row.prefix) for text in side]
        for side in (row.chosen, row.rejected)
    ]
    for index in range(max(map(len, sides))):
        yield tuple(side[index % len(side)] for side in sides)
