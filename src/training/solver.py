"""Supervised fine-tuning: the loss is on the response and its EOS only."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from src.data import collate
from src.data.batches import Batching, Sample, Step
from src.data.collate import Batch
from src.data.examples import Instruction
from src.inference.scoring import response_logprobs
from src.models.decoder import Decoder
from src.text.tokenizer import Tokenizer


class SolverData:
    """Instruction rows as the batches of optimizer steps."""

    def __init__(
        self, rows: Sequence[Instruction], tokenizer: Tokenizer, *, max_seq_len: int, source: str
    ) -> None:
        """Rows too long for max_seq_len are dropped; raises UserError when that is more than 1% of them."""
        options = [
            tuple(collate.encode_response(tokenizer, row.instruction, output) for output in row.outputs)
            for row in rows
        ]
        self.rows = collate.drop_long(options, max_seq_len, source)
        self.dropped = len(rows) - len(self.rows)

    def steps(self, batching: Batching, *, packing: bool, epochs: int, done: int = 0) -> Iterator[Step]:
        """The optimizer steps of `epochs` epochs but the first `done`; a row with several outputs takes turns."""

        def encode(epoch: int, row: int) -> Sample:
            return (collate.pick(self.rows[row], batching.seed, epoch, row),)

        def lay_out(samples: Sequence[Sample]) -> Batch:
            return collate.lay_out([encoded for (encoded,) in samples], packing=packing)

        return batching.steps(len(self.rows), encode, lay_out, epochs=epochs, done=done)


def n_supervised(batches: Sequence[Batch]) -> int:
    """Response tokens in this rank's micro-batches of one step. The loss is a mean over all ranks' tokens."""
    return sum(int(batch.response_mask.sum()) for batch in batches)


def sft_loss(model: Decoder, batch: Batch, normaliser: float) -> Tensor:
    """Negative log-likelihood of the response tokens, summed and divided by the step's token count. -> scalar."""
    return -response_logprobs(model, *batch).sum() / normaliser
