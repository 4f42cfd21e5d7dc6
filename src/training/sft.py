"""Supervised fine-tuning: the loss is on the response and its EOS only."""

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from src import parallel
from src.data.batch import Batch, BatchSampler, Dataset, make_batch
from src.data.encoded_rows import Keep, Sample, Truncation, fit, in_temporary_file
from src.data.encoding import encode_conversation, encode_response, learn_all
from src.data.examples import Chat, Instruction
from src.models.decoder import Decoder
from src.models.forward import summed_logprobs
from src.text.blocks import Learnt
from src.text.tokenizer import Tokenizer
from src.training.trainer import evaluating


def sft_loss(model: Decoder, batch: Batch) -> Tensor:
    """Sum the negative log-likelihood of the batch's response tokens; divide it by the step's count of them. -> []."""
    # the log-probs' sum, not they themselves: its gradient is known while the logits are at hand
    return -summed_logprobs(model, *batch.inputs)


def n_supervised(batches: Sequence[Batch]) -> int:
    """Count response tokens in this rank's micro-batches of one step."""
    return sum(int(batch.response_mask.sum()) for batch in batches)


def validation_loss(model: Decoder, held_out: Dataset, sampler: BatchSampler, *, packing: bool) -> float:
    """Mean negative log-likelihood of the response tokens of held-out rows, over all ranks, in nats."""
    total, n_tokens = torch.zeros((), dtype=torch.float64, device=parallel.device()), 0
    with evaluating(model):
        # by the sampler, so that each rank makes as many passes as the others: FSDP gathers the weights in each
        for step in sampler.steps(held_out, packing=packing, epochs=1):
            for batch in step.batches:
                total += sft_loss(model, batch)
                n_tokens += n_supervised([batch])
    # Ranks hold unequal numbers of tokens: the mean of their means would not be the mean
    return parallel.sum_over_data_parallel(total.item()) / parallel.sum_over_data_parallel(n_tokens)


def sft_dataset(
    rows: Iterable[Instruction | Chat], tokenizer: Tokenizer, *, max_seq_len: int, source: str,
    truncation: Truncation = "drop", loss_on: Learnt = "assistant_no_execution", keep: Keep = in_temporary_file,
) -> Dataset:
    """Encode rows; a row with several outputs shows one of them in each epoch. fit() says what becomes of rows that are
    too long, and `keep` where they lie. loss_on: the tokens to learn."""
    encode = partial(_encode, tokenizer, loss_on)
    return Dataset(*fit(rows, encode, max_seq_len, source, truncation, keep), collate, one_of_each=True)


def collate(samples: Sequence[Sample], packing: bool, with_targets: bool = False) -> Batch:
    """Samples of one sequence each as a batch."""
    return make_batch([encoded for (encoded,) in samples], packing=packing, with_targets=with_targets)


def _encode(tokenizer: Tokenizer, loss_on: Learnt, row: Instruction | Chat) -> list[Sample]:
    """A row's samples, each with its alternatives: one with one for each output, or those of its conversation."""
    if isinstance(row, Instruction):
        outputs = (encode_response(tokenizer, row.instruction, output) for output in row.outputs)
        return [tuple(learn_all(encoded) if loss_on == "all" else encoded for encoded in outputs)]
    return [(encoded,) for encoded in encode_conversation(tokenizer, row.messages, loss_on)]
