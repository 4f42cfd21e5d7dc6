"""Encoded samples in a file that is mapped into memory: cut to the length limit, written once, read by place.

The file holds int32 words. A sequence is four of them - how many tokens, where the response begins, how many targets,
whether there is an answer_mask - then its tokens, of which a mask's are stored as their complement (~token), and its
targets as float64, two words each. After the last sample stand where each ends, and their number, as int64.
"""

import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import BinaryIO, Literal, TypeVar

import numpy as np

from src.data.encoding import Encoded
from src.data.examples import Chat, Instruction, Pair, StepLabels
from src.errors import UserError, naming
from src.jsonfile import telling_full_disk

Sample = tuple[Encoded, ...]  # the sequences that stay together: one, or a chosen and a rejected one
Truncation = Literal["error", "drop", "left", "right", "keep_end"]
MAX_DROPPED_SHARE = 0.01  # more answers than this lost to the length limit is a wrong flag, not noise
PlacedRow = TypeVar("PlacedRow", Pair, StepLabels, Instruction | Chat)


class EncodedRows(Sequence[Sample]):
    """The samples in a file. Its pages belong to the system, which keeps them while there is room."""

    def __init__(self, file: Path | BinaryIO) -> None:
        words = np.asarray(np.memmap(file, np.int32, "r"))
        n = int(words[-2:].view(np.int64)[0])
        self._words, self._ends = words, words[-2 * (n + 1) : -2].view(np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, place: int | slice) -> Sample | list[Sample]:
        """A sample, or a list of several."""
        places = range(len(self))[place]
        if isinstance(places, range):
            return [self[each] for each in places]
        words = self._words[self._ends[places - 1] if places else 0 : self._ends[places]]
        sample = []
        while len(words):
            n_tokens, start, n_targets, is_masked = words[:4].tolist()
            tokens, targets, words = np.split(words[4:], (n_tokens, n_tokens + 2 * n_targets))
            mask = (tokens < 0).tolist() if is_masked else None
            tokens = np.where(tokens < 0, ~tokens, tokens) if is_masked else tokens
            sample.append(Encoded(tokens.tolist(), start, tuple(targets.view(np.float64).tolist()), mask))
        return tuple(sample)


Fill = Callable[[Callable[[Sample], None]], str]  # hands samples on one by one, and says what became of all
Keep = Callable[[Fill], tuple[Sequence[Sample], str]]


def write(file: BinaryIO, fill: Fill) -> str:
    """Write the samples that fill() hands on. In memory are 8 bytes a sample. -> what fill() says."""
    ends, size = array("q"), 0

    def add(sample: Sample) -> None:
        """Append a sample's words to the file, and where they end to `ends`."""
        nonlocal size
        for tokens, start, targets, mask in sample:
            ids = np.array(tokens, np.int32)
            if mask is not None:
                ids = np.where(mask, ~ids, ids)
            head = np.array((len(ids), start, len(targets), mask is not None), np.int32)
            file.write(head.tobytes() + ids.tobytes() + np.array(targets, np.float64).tobytes())
            size += len(head) + len(ids) + 2 * len(targets)
        ends.append(size)

    said = fill(add)
    ends.append(len(ends))
    file.write(ends)
    file.flush()
    return said


def in_temporary_file(fill: Fill) -> tuple[EncodedRows, str]:
    """The samples in a file without a name, which is gone when nobody reads it any more; and what fill() says. Raises
    UserError for a full disk."""
    advice = "the encoded rows lie there meanwhile: set TMPDIR to a larger disk"
    with tempfile.TemporaryFile() as file, telling_full_disk(Path(tempfile.gettempdir()), advice):
        said = write(file, fill)
        return EncodedRows(file), said


def fit(
    rows: Iterable[PlacedRow], encode: Callable[[PlacedRow], Sequence[Sample]], max_seq_len: int, source: str,
    truncation: Truncation = "drop", keep: Keep = in_temporary_file,
) -> tuple[Sequence[Sample], str]:
    """Encode rows, and drop or cut samples with a sequence longer than max_seq_len. -> the others, and a sentence on
    what became of all.

    `left` cuts the prompt after its first token and leaves the response whole (conversations, whose prompts are
    turns, are not cut): that of all sequences of a sample alike, which are compared. `right` cuts the end of each
    response; where that leaves no response, or none of a verifier's targets, the sample is dropped.
    `keep_end` is what the published preference runs did (_keep_end()).
    keep: where the samples are written to; the rows are not looked at if they lie there already.
    Raises UserError when more than 1% of the samples lose response tokens or are dropped - of fewer than 100, when one
    does - and for any long one under `error`; and with its place for a row that cannot be encoded.
    """
    return keep(partial(_fill, rows, encode, max_seq_len, source, truncation))


def _fill(
    rows: Iterable[PlacedRow], encode: Callable[[PlacedRow], Sequence[Sample]], max_seq_len: int, source: str,
    truncation: Truncation, add: Callable[[Sample], None],
) -> str:
    """fit(), whose samples add() takes."""

    def samples() -> Iterator[tuple[str, Sample]]:
        """All samples, each with the place of its row."""
        for row in rows:
            with naming(row.where):
                encoded = encode(row)
            yield from ((row.where, sample) for sample in encoded)

    n = kept = cut = lost = 0
    longest = 0, ""
    for where, row in samples():
        length = max(len(encoded.tokens) for encoded in row)
        n, longest = n + 1, max(longest, (length, where), key=itemgetter(0))
        if length <= max_seq_len:
            kept += 1
            add(row)
            continue
        if truncation == "keep_end":
            shorter = _keep_end(row, max_seq_len)
        else:
            shorter = tuple(_cut(encoded, max_seq_len, truncation, length - max_seq_len) for encoded in row)
        fits = all(one.n_response > 0 and len(one.tokens) <= max_seq_len and one.is_labelled for one in shorter)
        cut += fits
        lost += not fits or any(short.n_response < whole.n_response for short, whole in zip(shorter, row, strict=True))
        if fits:
            kept += 1
            add(shorter)
    if not n:
        raise UserError(f"{source}: no row is left to be encoded; give more of them, or a larger weight")
    long = n - kept + cut
    if lost > MAX_DROPPED_SHARE * n or not kept or (long and truncation == "error"):
        raise UserError(f"{source}: {lost or long} of {n} rows are longer than --max_seq_len {max_seq_len} "
                        f"(the longest has {longest[0]} tokens: {longest[1]}); raise it or shorten the data")
    return f"{source}: {n} samples, {long} too long: {cut} cut, {long - cut} dropped"


def _cut(encoded: Encoded, max_seq_len: int, truncation: Truncation, excess: int) -> Encoded:
    """A sequence cut to max_seq_len, or as it is where the policy cannot cut it. excess: tokens that the longest one of
    its sample has too many."""
    if truncation == "left" and excess < encoded.response_start and not encoded.answer_mask:
        return _without(encoded, range(1, 1 + excess), len(encoded.tokens))  # BOS stays, where there is one
    return _without(encoded, range(0), max_seq_len) if truncation == "right" else encoded


def _keep_end(row: tuple[Encoded, ...], max_seq_len: int) -> tuple[Encoded, ...]:
    """A sample cut as trl 0.7.10 cuts a pair with max_prompt_length half of max_length: the prompt's last
    max_seq_len / 2 tokens stay - BOS and the question go first - and then, if need be, as many of each response."""
    half = max_seq_len // 2
    longest = max(len(encoded.tokens) - encoded.response_start for encoded in row)
    cut = []
    for encoded in row:
        first = max(0, encoded.response_start - half)
        fits = encoded.response_start - first + longest <= max_seq_len
        end = len(encoded.tokens) if fits else encoded.response_start + max_seq_len - half
        cut.append(_without(encoded, range(first), end))
    return tuple(cut)


def _without(encoded: Encoded, gone: range, end: int) -> Encoded:
    """A sequence without a part of its prompt, and without what stands from the place `end` on; what is left of it is
    learnt as before."""
    tokens, mask = ([*of[: gone.start], *of[gone.stop : end]] for of in (encoded.tokens, encoded.supervised))
    start = min(encoded.response_start, end) - len(gone)
    return Encoded(tokens, start, encoded.targets[: sum(mask)], encoded.answer_mask and mask)
