"""The parity certificate of a checkpoint: every layout and every number of ranks computes what a plain forward does.

`certify()` starts real processes on the CPU, a job for each tensor-parallel size. The job of one rank first writes the
reference: float32 logits, log-probs and gradients of each row by itself, its softmax taken over whole logits. Every job
then measures how far each way of computing the same lies from that.

B batch, S sequence, D width, V vocabulary, N response tokens of all rows, row by row
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from src import load, parallel
from src.checkpoint import shards, storage
from src.checkpoint.tensor_files import TensorSpec, open_tensor_file
from src.command import cli
from src.errors import UserError
from src.models import forward
from src.models.cache import KVCache, PromptCache
from src.models.decoder import Decoder
from src.models.forward import response_logprobs

# Rows of random tokens; the longest outgrows a bucket of the cache while it is decoded. The first third is a prompt.
LENGTHS = (70, 17, 40)
CHUNK_BYTES = {"cpu": 1, "cuda": 1}  # the chunked loss makes the logits of one position at once

# What float32 may differ by: logits as a share of the largest, log-probs in nats, gradients as a share of their
# parameter's largest entry. Models of the tests stay below a fiftieth of it.
LIMITS = {"logits": 1e-4, "logprobs": 1e-3, "gradients": 1e-3}
# A gradient that is nought but rounding (a key's bias moves no softmax) is measured against this share of the largest.
FLOOR = 1e-3


class Row(NamedTuple):
    """The largest differences of one way of computing on so many ranks; None = that way has no such result."""

    ranks: int
    way: str
    logits: float | None
    logprobs: float | None
    gradients: float | None

    @property
    def passed(self) -> bool:
        """Whether every difference is a number within its limit."""
        found = [(getattr(self, name), limit) for name, limit in LIMITS.items()]
        return all(value is None or value <= limit for value, limit in found)  # nan is not


class Certificate(NamedTuple):
    """What was measured; `skipped` are numbers of ranks that the model cannot be cut into, with the reason."""

    folder: str
    n_layers: int
    all_layers: int
    rows: list[Row]
    skipped: dict[int, str]

    @property
    def passed(self) -> bool:
        """The verdict."""
        return all(row.passed for row in self.rows)

    def __str__(self) -> str:
        return "\n".join([
            f"{self.folder}: the first {self.n_layers} of {self.all_layers} layers in float32 on the CPU, "
            "against each row by itself on 1 rank",
            _line("ranks", "way", "logits", "log-probs", "gradients", ""),
            *(_line(*row, "ok" if row.passed else "DIFFERS") for row in self.rows),
            _line("", "largest allowed", *LIMITS.values(), ""),
            *(f"not on {ranks} ranks: {reason}" for ranks, reason in self.skipped.items()),
            "PASSED" if self.passed else "FAILED"])


def _line(ranks: object, way: str, *cells: object) -> str:
    shown = ["-" if cell is None else f"{cell:.1e}" if isinstance(cell, float) else str(cell) for cell in cells]
    return f"{ranks:<7}{way:18}{''.join(f'{cell:12}' for cell in shown)}".rstrip()


def certify(ckpt_dir: str, ranks: Sequence[int], n_layers: int) -> Certificate:
    """Compare every way of computing with a plain forward, on the first n_layers layers (-1: all of them).

    Rows are padded on the right only: nothing here pads on the left. Raises UserError when the checkpoint cannot be
    read, is a verifier, or its shards contradict each other.
    """
    config = load.load_config(ckpt_dir, kind="solver")
    kept = config.n_layers if n_layers == -1 else min(n_layers, config.n_layers)
    rows, skipped = [], {}
    with tempfile.TemporaryDirectory(prefix="certificate-") as scratch:
        for n in sorted({1, *ranks}):
            try:
                config.check_divides(n, "this checkpoint")
            except UserError as problem:
                skipped[n] = str(problem)
                continue
            rows += _run_job(Path(ckpt_dir).resolve(), kept, n, Path(scratch))
    return Certificate(ckpt_dir, kept, config.n_layers, rows, skipped)


def _run_job(folder: Path, n_layers: int, n: int, scratch: Path) -> list[Row]:
    """One number of ranks as processes of their own; of several ranks the one that is farthest off counts."""
    root, threads = Path(__file__).parents[1], max(1, (os.cpu_count() or 1) // n)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
    flags = [f"--ckpt_dir={folder}", f"--scratch={scratch}", f"--n_layers={n_layers}"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *launcher, "-m", "tools.certify", *flags], cwd=root, env=environment,
                          capture_output=True, text=True, check=False)
    if done.returncode:
        told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        reason = told[0].removeprefix("error: ") if told else done.stderr[-2000:]
        raise UserError(f"no certificate: on {n} ranks {reason}")
    found = [json.loads((scratch / f"{n}-{rank}.json").read_text(encoding="utf-8")) for rank in range(n)]

    def worst(values: Sequence[float | None]) -> float | None:
        """The largest difference of a kind; nan is larger than any number."""
        return None if None in values else math.nan if any(map(math.isnan, values)) else max(values)

    return [Row(n, way, *map(worst, zip(*(each[way] for each in found), strict=True))) for way in found[0]]


def rank(ckpt_dir: str, scratch: str, n_layers: int) -> None:
    """One rank of a job: write what certify() reads.

    ckpt_dir: the checkpoint directory
    scratch: directory of the reference and the results
    n_layers: layers to keep
    """
    parallel.start()
    model = load.load_solver(ckpt_dir, precision="float32", n_layers=n_layers)
    draw = torch.Generator().manual_seed(0)  # the same rows in every process
    rows = [torch.randint(model.config.vocab_size, (min(length, model.config.max_seq_len),), generator=draw)
            for length in LENGTHS]
    reference = Path(scratch) / "reference.pth"
    if parallel.world_size() == 1:
        _write_reference(model, rows, reference)
    expected = storage.read_shard(reference)
    path = Path(scratch) / f"{parallel.world_size()}-{parallel.rank()}.json"
    path.write_text(json.dumps(dict(_differences(model, rows, expected))), encoding="utf-8")


def _response_mask(row: Tensor) -> Tensor:
    """True behind the first third of a row."""
    return torch.arange(len(row)) >= max(1, len(row) // 3)


def _write_reference(model: Decoder, rows: Sequence[Tensor], path: Path) -> None:
    """Logits, log-probs and gradients of each row by itself on one rank."""
    logits = [model.logits(model(row[None]))[0] for row in rows]
    logprobs = torch.cat([_of_responses(logits, row) for logits, row in zip(logits, rows, strict=True)])
    tensors = {"logits": torch.cat(logits).detach(), "logprobs": logprobs.detach()}
    tensors |= _gradients(model, logprobs)
    layout = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    with open_tensor_file(path, layout) as file:
        for name, tensor in tensors.items():
            file.write(name, tensor)


def _of_responses(logits: Tensor, row: Tensor) -> Tensor:
    """Log-probs of a row's response tokens from its whole logits [S, V]."""
    every = logits[:-1].log_softmax(-1).gather(-1, row[1:, None])[:, 0]
    return every[_response_mask(row)[1:]]


def _gradients(model: Decoder, logprobs: Tensor) -> dict[str, Tensor]:
    """This rank's gradients of the mean negative log-likelihood; an expert that no token met has none: zeros."""
    model.zero_grad(set_to_none=True)
    (-logprobs.mean()).backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


def _differences(
    model: Decoder, rows: Sequence[Tensor], expected: Mapping[str, Tensor]
) -> Iterator[tuple[str, tuple[float | None, float | None, float | None]]]:
    """Each way of computing, and how far its logits, log-probs and gradients lie from the reference."""
    tokens, mask = (pad_sequence(parts, batch_first=True) for parts in (rows, [_response_mask(row) for row in rows]))
    samples = tuple((0, len(row)) for row in rows)
    one_row = torch.cat(rows)[None], torch.cat([_response_mask(row) for row in rows])[None]

    def trained(logprobs: Tensor) -> tuple[float, float]:
        return _farthest(logprobs, expected["logprobs"]), _gradient_difference(model, logprobs, expected)

    padded = torch.cat([part[: len(row)] for part, row in zip(_logits(model, tokens), rows, strict=True)])
    packed = _logits(model, one_row[0], samples)[0]
    cached = _decoded_logits(model, rows)
    yield "padded", (_of(padded, expected), *trained(response_logprobs(model, tokens, mask)))
    yield "packed", (_of(packed, expected), *trained(response_logprobs(model, *one_row, samples)))
    with patch.dict(forward.CHUNK_BYTES, CHUNK_BYTES):
        yield "chunked loss", (None, *trained(response_logprobs(model, tokens, mask)))
    logprobs = torch.cat([_of_responses(part, row) for part, row in zip(cached, rows, strict=True)])
    yield "cached decode", (_of(torch.cat(cached), expected), _farthest(logprobs, expected["logprobs"]), None)


@torch.no_grad()
def _logits(model: Decoder, tokens: Tensor, lengths: tuple[tuple[int, int], ...] | None = None) -> Tensor:
    """Whole logits [B, S, V] on every rank."""
    return _whole(model, model(tokens, lengths=lengths))


def _whole(model: Decoder, hidden: Tensor) -> Tensor:
    """Whole logits of hidden states, without the padding of the vocabulary. [..., D] -> [..., V]."""
    return parallel.gather_vocab(model.logits(hidden))[..., : model.config.vocab_size]


@torch.no_grad()
def _decoded_logits(model: Decoder, rows: Sequence[Tensor]) -> list[Tensor]:
    """Logits [S, V] of each row: its prompt read in one batch, then a token at a time until the row ends."""
    starts = [int((~_response_mask(row)).sum()) for row in rows]
    prompt, cache = PromptCache(), KVCache(len(rows))
    read = pad_sequence([row[:start] for row, start in zip(rows, starts, strict=True)], batch_first=True)
    hidden = model(read, cache=prompt)
    parts = [[hidden[index, :start]] for index, start in enumerate(starts)]
    for slot, start in enumerate(starts):
        cache.admit([slot], prompt.row(slot, start))
    while True:
        for slot in cache.slots():
            if cache.lengths[slot] == len(rows[slot]):
                cache.release(slot)
        if not cache.slots():
            return [_whole(model, torch.cat(part)) for part in parts]
        places, positions = cache.lengths.copy(), cache.advance()
        tokens = torch.stack([rows[slot][places[slot]] for slot in cache.slots()])
        hidden = model(tokens[:, None], positions, cache)
        for slot, state in zip(cache.slots(), hidden, strict=True):
            parts[slot].append(state)


def _of(logits: Tensor, expected: Mapping[str, Tensor]) -> float:
    """Largest difference of logits as a share of the largest of them."""
    return _farthest(logits, expected["logits"]) / _largest(expected["logits"])


def _gradient_difference(model: Decoder, logprobs: Tensor, expected: Mapping[str, Tensor]) -> float:
    """Largest difference of this rank's gradients, each as a share of its parameter's largest entry."""
    n, index = parallel.tensor_parallel_size(), parallel.tensor_parallel_rank()
    found = _gradients(model, logprobs)
    floor = FLOOR * max(_largest(expected[name]) for name in found)
    shares = []
    for name, gradient in found.items():
        own = shards.cut(expected[name], shards.cut_of(name, model.config, n), index)
        shares.append(_farthest(gradient, own) / max(_largest(expected[name]), floor))
    return math.nan if any(map(math.isnan, shares)) else max(shares)


def _farthest(found: Tensor, expected: Tensor) -> float:
    return (found.detach() - expected).abs().max().item()


def _largest(tensor: Tensor) -> float:
    return max(tensor.abs().max().item(), torch.finfo(torch.float32).tiny)


if __name__ == "__main__":
    cli.run(rank)
