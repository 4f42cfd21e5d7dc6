"""The reference's log-probs: computed once, kept in a file by what they depend on, read from there ever after."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch

from src import parallel
from src.checkpoint import storage
from src.data.batch import Batch, chunks, make_batch
from src.data.encoded_rows import Sample
from src.data.encoding import Encoded
from src.data.rows import read_rows
from src.errors import UserError
from src.evaluation.evaluator import cut_torn_line
from src.models.decoder import Decoder
from src.models.forward import response_logprobs
from src.runlog import RunLog
from src.text.tokenizer import Tokenizer


class Reference(NamedTuple):
    """What a frozen model says of responses: the sum of their tokens' log-probs, in nats, by the hash of the row.
    identity stands for the model, the tokenizer and the arithmetic, and is part of every hash."""

    identity: str
    logprobs: Mapping[str, float]

    def of(self, encoded: Encoded) -> float:
        """The log-prob of a response; 0 of one without tokens."""
        return self.logprobs[row_key(self.identity, encoded)] if encoded.n_response else 0.0


def reference_identity(contents: str, tokenizer: Tokenizer, dtype: torch.dtype, quantize: str = "") -> str:
    """What log-probs depend on besides the row: the checkpoint's contents (resuming.content_hash()), the tokenizer, the
    arithmetic's type, the weights', whose groups of a scale end where a tensor-parallel rank's columns do."""
    n = parallel.tensor_parallel_size() if quantize.startswith("int") else 1
    rounded = [str(dtype)] * (dtype != torch.float32) + [quantize] * bool(quantize) + [str(n)] * (n > 1)
    return "/".join((contents, tokenizer.fingerprint(), parallel.device().type, *rounded))


def row_key(identity: str, encoded: Encoded) -> str:
    """The hash under which the log-prob of this response to this prompt, or of what counts of it, is kept."""
    row = json.dumps([identity, encoded.response_start, encoded.tokens, encoded.answer_mask])
    return hashlib.sha256(row.encode()).hexdigest()


def response_sums(model: Decoder, batch: Batch) -> torch.Tensor:
    """The summed log-prob of each sample's response. -> [n_samples] float32, nats. Differentiable."""
    counts = batch.response_counts().tolist()
    return torch.stack([part.sum() for part in response_logprobs(model, *batch.inputs).split(counts)])


@torch.no_grad()
def reference_logprobs(
    model: Decoder, samples: Iterable[Sample], path: Path, identity: str, *, max_batch_size: int, log: RunLog
) -> Reference:
    """The log-probs of all responses. What the file holds is read; the rest is computed and appended as it comes.

    All ranks call this and get the same numbers; the model is whole on each data-parallel rank. Raises UserError for a
    file of another kind.
    """
    first = parallel.rank() == 0
    if first:
        path.parent.mkdir(parents=True, exist_ok=True)
    with storage.alone(path) if first else nullcontext():  # several runs may share the file
        known = _read(path)
        every = {row_key(identity, encoded): encoded for sample in samples for encoded in sample}
        # the longest first: what does not fit fails at once; equal lengths in an order that all ranks have
        missing = sorted(every.keys() - known.keys(), key=lambda key: (-len(every[key].tokens), key))
        model.eval()
        log.progress(len(missing), "reference")
        with path.open("a", encoding="utf-8") if first else open(os.devnull, "w") as file:
            for keys in chunks(missing, max_batch_size * parallel.data_parallel_size()):
                found = _log_probs(model, [every[key] for key in keys], max_batch_size)
                known |= zip(keys, found, strict=True)
                file.writelines(json.dumps({"key": key, "logprob": value}) + "\n"
                                for key, value in zip(keys, found, strict=True))
                file.flush()
                log.advance(len(keys))
    log.close_progress()
    log.logger.info("%s: %d reference log-probs, %d of them computed now", path, len(every), len(missing))
    return Reference(identity, {key: known[key] for key in every})


def _log_probs(model: Decoder, rows: Sequence[Encoded], max_batch_size: int) -> list[float]:
    """The log-probs of some responses, max_batch_size of them from each data-parallel rank."""
    found = torch.zeros(len(rows), dtype=torch.float64, device=parallel.device())
    first = parallel.data_parallel_rank() * max_batch_size
    if mine := rows[first : first + max_batch_size]:
        batch = make_batch(mine)
        found[first : first + len(mine)] = response_sums(model, batch).double()
    # the ranks that share a batch have each added what all of them computed
    return (parallel.sum_over_all(found) / parallel.ranks_per_batch()).float().tolist()


def _read(path: Path) -> dict[str, float]:
    """The log-probs that a file holds by hash; a last line torn by a kill is cut off. All ranks call this."""
    cut_torn_line(path, begins=b'{"key": "')  # what did not begin as one of our lines stays: a user named the file
    known = {}
    for row in read_rows(str(path)) if path.is_file() and path.stat().st_size else ():
        key, logprob = row.values.get("key"), row.values.get("logprob")
        if not isinstance(key, str) or not isinstance(logprob, float):
            raise UserError(f"{row.where}: expected the keys 'key' and 'logprob' of a reference's log-prob, found "
                            f"{', '.join(row.values) or 'none'}; choose another --reference_file")
        known[key] = logprob
    parallel.barrier()  # nobody writes before all have read
    return known
