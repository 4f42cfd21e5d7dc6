"""Training a pairwise verifier: the chosen solution of a pair should score above the rejected one."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from src import parallel
from src.data import collate
from src.data.collate import Batch, Encoded
from src.data.examples import Pair
from src.errors import UserError
from src.inference.scoring import response_scores
from src.losses import bradley_terry_loss
from src.models.decoder import Decoder
from src.text.tokenizer import Tokenizer


def split_by_problem(rows: Sequence[Pair], share: float) -> tuple[list[Pair], list[Pair]]:
    """Rows to train on and rows to test on: the last `share` of the problems. Pairs of one problem stay together.

    Raises UserError when that leaves nothing on one side.
    """
    problems = list(dict.fromkeys(row.instruction for row in rows))
    n_held = int(share * len(problems))
    if not 0 < n_held < len(problems):
        raise UserError(
            f"--held_out {share} of {len(problems)} problems leaves nothing to train or test on; "
            f"give more problems or a --label_file"
        )
    held = set(problems[-n_held:])
    return [row for row in rows if row.instruction not in held], [
        row for row in rows if row.instruction in held
    ]


class PairData:
    """Pairs as token batches: the chosen rows of a micro-batch first, its rejected rows behind them.

    A row with several texts a side gives as many pairs as its longer side has texts; the shorter side repeats.
    """

    def __init__(
        self, rows: Sequence[Pair], tokenizer: Tokenizer, *, max_seq_len: int, seed: int, source: str
    ) -> None:
        """Pairs too long for max_seq_len are dropped; raises UserError when that is more than 1% of them."""
        pairs = [pair for row in rows for pair in _encode_pairs(row, tokenizer)]
        self.pairs = collate.drop_long(pairs, max_seq_len, source)
        self.dropped = len(pairs) - len(self.pairs)
        self.seed = seed

    def epoch(self, epoch: int, max_batch_size: int, accumulation_steps: int) -> Iterator[list[Batch]]:
        """The micro-batches (max_batch_size pairs each) of each optimizer step, shuffled."""
        order = collate.epoch_order(len(self.pairs), self.seed, epoch)
        for step in collate.chunks(order, max_batch_size * accumulation_steps):
            yield [self._collate(micro) for micro in collate.chunks(step, max_batch_size)]

    def in_order(self, max_batch_size: int) -> Iterator[Batch]:
        """All pairs once, in file order."""
        return (self._collate(micro) for micro in collate.chunks(range(len(self.pairs)), max_batch_size))

    def steps_per_epoch(self, max_batch_size: int, accumulation_steps: int) -> int:
        """Optimizer steps in one epoch."""
        return -(-len(self.pairs) // (max_batch_size * accumulation_steps))

    def _collate(self, indices: Sequence[int]) -> Batch:
        chosen, rejected = zip(*(self.pairs[index] for index in indices), strict=True)
        return collate.collate(chosen + rejected)


def _encode_pairs(row: Pair, tokenizer: Tokenizer) -> Iterator[tuple[Encoded, Encoded]]:
    sides = [
        [collate.encode_response(tokenizer, row.instruction, text) for text in side]
        for side in (row.chosen, row.rejected)
    ]
    for index in range(max(map(len, sides))):
        yield tuple(side[index % len(side)] for side in sides)


def pairwise_loss(verifier: Decoder, batch: Batch, normaliser: int) -> Tensor:
    """Bradley-Terry loss of a batch whose first half is chosen, divided by the step's pair count. -> scalar."""
    chosen, rejected = response_scores(verifier, batch.tokens, batch.response_mask).chunk(2)
    return bradley_terry_loss(chosen, rejected).sum() / normaliser


class PairReport(NamedTuple):
    """A verifier on pairs it was not trained on: how often chosen wins, and the scores' mean and deviation."""

    held_out_accuracy: float
    score_mean: float
    score_std: float


@torch.no_grad()
def evaluate_pairs(verifier: Decoder, data: PairData, max_batch_size: int) -> PairReport:
    """Score every pair; a tie counts as wrong. The statistics are over chosen and rejected scores together.

    Scores that are all equal have the deviation 1 here: what divides by it then gives 0.
    """
    verifier.eval()
    scores = [
        response_scores(verifier, *batch.to(parallel.device())) for batch in data.in_order(max_batch_size)
    ]
    chosen, rejected = (torch.cat(side) for side in zip(*(score.chunk(2) for score in scores), strict=True))
    verifier.train()
    both = torch.cat((chosen, rejected))
    return PairReport(
        (chosen > rejected).float().mean().item(), both.mean().item(), both.std(unbiased=False).item() or 1.0
    )
