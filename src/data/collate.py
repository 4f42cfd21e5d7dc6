"""Examples to token batches: the only code that tokenises, drops, pads and masks for training and scoring.

A prompt is BOS + instruction, a response is output + EOS. The two are tokenised apart and joined, so the border
between them is known by construction, and the same in training, sampling and scoring.

B batch, S sequence
"""

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from src.errors import UserError
from src.text.tokenizer import Tokenizer

Item = TypeVar("Item")

MAX_DROPPED_SHARE = 0.01  # more rows than this over the length limit is a wrong flag, not noise


class Encoded(NamedTuple):
    """One prompt and response as ids; response_start is where the response begins."""

    tokens: list[int]
    response_start: int

    @property
    def n_response(self) -> int:
        """Number of response tokens, EOS included: the supervised ones."""
        return len(self.tokens) - self.response_start


class Batch(NamedTuple):
    """Samples for one forward pass. tokens [B, S] int64; response_mask [B, S] bool, True on response tokens.

    Rows padded on the right, one sample each; or, packed, one row with samples of these `lengths` end to end.
    """

    tokens: Tensor
    response_mask: Tensor
    lengths: tuple[int, ...] | None = None

    @property
    def n_samples(self) -> int:
        """Samples in the batch, whichever way they lie."""
        return len(self.lengths or self.tokens)

    def response_counts(self) -> Tensor:
        """Response tokens of each sample. -> [n_samples] int64."""
        if self.lengths is None:
            return self.response_mask.sum(1)
        return torch.stack([sample.sum() for sample in self.response_mask[0].split(self.lengths)])

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        return Batch(self.tokens.to(device), self.response_mask.to(device), self.lengths)


def encode_prompt(tokenizer: Tokenizer, instruction: str) -> list[int]:
    """BOS and the instruction's ids."""
    return [tokenizer.bos_id, *tokenizer.encode(instruction)]


def encode_response(tokenizer: Tokenizer, instruction: str, output: str, *, finished: bool = True) -> Encoded:
    """A prompt with its response; EOS ends a finished one."""
    prompt = encode_prompt(tokenizer, instruction)
    ending = [tokenizer.eos_id] if finished else []
    return Encoded(prompt + tokenizer.encode(output) + ending, len(prompt))


def drop_long(
    rows: Sequence[tuple[Encoded, ...]], max_seq_len: int, source: str
) -> list[tuple[Encoded, ...]]:
    """The rows all of whose sequences fit. Raises UserError when more than 1% do not.

    An answer is never cut. One long row alone is dropped however few there are.
    """
    kept = [row for row in rows if all(len(encoded.tokens) <= max_seq_len for encoded in row)]
    dropped = len(rows) - len(kept)
    if dropped > max(1, MAX_DROPPED_SHARE * len(rows)) or not kept:
        longest = max(len(encoded.tokens) for row in rows for encoded in row)
        raise UserError(
            f"{source}: {dropped} of {len(rows)} rows are longer than --max_seq_len {max_seq_len} "
            f"(the longest has {longest} tokens); raise it or shorten the data"
        )
    return kept


def collate(rows: Sequence[Encoded]) -> Batch:
    """Pad rows on the right to the longest. Padding ids are 0 and mean nothing: masks come from lengths."""
    longest = max(len(row.tokens) for row in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
    response_mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for index, row in enumerate(rows):
        tokens[index, : len(row.tokens)] = torch.tensor(row.tokens)
        response_mask[index, row.response_start : len(row.tokens)] = True
    return Batch(tokens, response_mask)


def pack(rows: Sequence[Encoded]) -> Batch:
    """Lay samples end to end in one row [1, sum of lengths]: no padding, and attention stays within each."""
    return Batch(
        torch.tensor([[token for row in rows for token in row.tokens]]),
        torch.tensor([[place >= row.response_start for row in rows for place in range(len(row.tokens))]]),
        tuple(len(row.tokens) for row in rows),
    )


def lay_out(samples: Sequence[Encoded], *, packing: bool) -> Batch:
    """Samples as a batch, packed or padded."""
    return pack(samples) if packing else collate(samples)


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """The order of n rows in an epoch: a pure function of (seed, epoch)."""
    order = list(range(n))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def pick(options: Sequence[Item], seed: int, epoch: int, row: int) -> Item:
    """One of a row's options for an epoch: a pure function of (seed, epoch, row)."""
    return options[0] if len(options) == 1 else random.Random(f"{seed}/{epoch}/{row}").choice(options)


def chunks(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    """Consecutive pieces of at most `size`."""
    return (list(items[start : start + size]) for start in range(0, len(items), size))
