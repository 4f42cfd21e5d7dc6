"""Supervised fine-tuning: the loss is on the response and its EOS only."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from src.data import collate
from src.data.collate import Batch
from src.data.examples import Instruction
from src.inference.scoring import response_logprobs
from src.models.decoder import Decoder
from src.text.tokenizer import Tokenizer


class SolverData:
    """Instruction rows as token batches, in an order that is a pure function of (seed, epoch)."""

    def __init__(
        self, rows: Sequence[Instruction], tokenizer: Tokenizer, *, max_seq_len: int, seed: int, source: str
    ) -> None:
        """Rows too long for max_seq_len are dropped; raises UserError when that is more than 1% of them."""
        options = [
            tuple(collate.encode_response(tokenizer, row.instruction, output) for output in row.outputs)
            for row in rows
        ]
        self.rows = collate.drop_long(options, max_seq_len, source)
        self.dropped = len(rows) - len(self.rows)
        self.seed = seed

    def epoch(self, epoch: int, max_batch_size: int, accumulation_steps: int) -> Iterator[list[Batch]]:
        """The micro-batches of each optimizer step."""
        order = collate.epoch_order(len(self.rows), self.seed, epoch)
        for step in collate.chunks(order, max_batch_size * accumulation_steps):
            picked = [collate.pick(self.rows[index], self.seed, epoch, index) for index in step]
            yield [collate.collate(micro) for micro in collate.chunks(picked, max_batch_size)]

    def steps_per_epoch(self, max_batch_size: int, accumulation_steps: int) -> int:
        """Optimizer steps in one epoch."""
        return -(-len(self.rows) // (max_batch_size * accumulation_steps))


def n_supervised(batches: Sequence[Batch]) -> int:
    """Response tokens in the micro-batches of one step: what the loss is a mean over."""
    return sum(int(batch.response_mask.sum()) for batch in batches)


def sft_loss(model: Decoder, batch: Batch, normaliser: int) -> Tensor:
    """Negative log-likelihood of the response tokens, summed and divided by the step's token count. -> scalar."""
    return -response_logprobs(model, batch.tokens, batch.response_mask).sum() / normaliser
