"""Supervised fine-tuning: the loss is on the response and its EOS only."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from src import parallel
from src.data import collate
from src.data.batches import Batching, Sample, Step
from src.data.collate import Batch, Truncation
from src.data.encoding import Encoded, encode_conversation, encode_response, learn_all
from src.data.examples import Chat, Instruction
from src.errors import UserError
from src.models.decoder import Decoder
from src.models.forward import response_logprobs
from src.text.blocks import Learnt
from src.text.tokenizer import Tokenizer


class SolverData:
    """Instruction rows as the batches of optimizer steps."""

    def __init__(
        self,
        rows: Sequence[Instruction | Chat],
        tokenizer: Tokenizer,
        *,
        max_seq_len: int,
        source: str,
        truncation: Truncation = "drop",
        loss_on: Learnt = "assistant_no_execution",
    ) -> None:
        """collate.fit() says what becomes of rows that are too long. loss_on: the tokens to learn."""
        options = [sample for row in rows for sample in _encode(tokenizer, row, loss_on)]
        self.rows, self.report = collate.fit(options, max_seq_len, source, truncation)

    def steps(
        self, batching: Batching, *, packing: bool, epochs: int, done: int = 0, stop: int | None = None
    ) -> Iterator[Step]:
        """The optimizer steps of `epochs` epochs behind number `done` and up to `stop`.

        A row with several outputs shows one of them in each epoch.
        """

        def encode(epoch: int, row: int) -> Sample:
            return (collate.pick(self.rows[row], batching.seed, epoch, row),)

        def lay_out(samples: Sequence[Sample]) -> Batch:
            return collate.lay_out([encoded for (encoded,) in samples], packing=packing)

        return batching.steps(len(self.rows), encode, lay_out, epochs=epochs, done=done, stop=stop)


def _encode(tokenizer: Tokenizer, row: Instruction | Chat, loss_on: Learnt) -> list[tuple[Encoded, ...]]:
    """A row's samples, each with its alternatives: one with one for each output, or those of its conversation."""
    if isinstance(row, Instruction):
        outputs = (encode_response(tokenizer, row.instruction, output) for output in row.outputs)
        return [tuple(learn_all(encoded) if loss_on == "all" else encoded for encoded in outputs)]
    try:
        found = encode_conversation(tokenizer, row.messages, loss_on)
    except UserError as problem:
        raise UserError(f"{row.where}: {problem}") from None
    return [(Encoded(tokens, mask.index(True), answer_mask=mask),) for tokens, mask in found]


def n_supervised(batches: Sequence[Batch]) -> int:
    """Response tokens in this rank's micro-batches of one step. The loss is a mean over all ranks' tokens."""
    return sum(int(batch.response_mask.sum()) for batch in batches)


def sft_loss(model: Decoder, batch: Batch, normaliser: float) -> Tensor:
    """Negative log-likelihood of the response tokens, summed and divided by the step's token count. -> scalar."""
    return -response_logprobs(model, *batch).sum() / normaliser


@torch.no_grad()
def validation_loss(model: Decoder, held: SolverData, batching: Batching, *, packing: bool) -> float:
    """Mean negative log-likelihood of the response tokens of held-out rows, over all ranks."""
    was_training = model.training
    model.eval()
    total, n_tokens = 0.0, 0
    for step in held.steps(batching, packing=packing, epochs=1):
        for batch in step.batches:
            total += sft_loss(model, batch.to(parallel.device()), 1.0).item()
            n_tokens += n_supervised([batch])
    model.train(was_training)
    parallel.free_gathered(model)
    return parallel.sum_over_data_parallel(total) / parallel.sum_over_data_parallel(n_tokens)
