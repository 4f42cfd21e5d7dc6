"""What a verifier says of samples and of judged steps. A score is a number from 0 to 1, whatever the verifier.

outcome and process: the probability of being right. pairwise: sigmoid of the score in deviations from its mean, which
orders samples as the score does and lets a vote weigh them.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from src import parallel
from src.data import collate
from src.data.encoding import Encoded, encode_response, encode_steps, split_steps
from src.data.examples import Judged, Sample, read_rows
from src.errors import UserError
from src.evaluation.step_scores import AGGREGATIONS, sigmoid
from src.inference.scoring import response_scores, token_scores
from src.models.config import ModelConfig
from src.models.decoder import Decoder
from src.runlog import RunLog
from src.text.tokenizer import Tokenizer


class Scored(NamedTuple):
    """One sample's score and, of outcome and process verifiers, the probability that each step is right."""

    score: float
    step_scores: list[float] | None


def score_samples(
    verifier: Decoder,
    tokenizer: Tokenizer,
    samples: Sequence[Sample],
    *,
    aggregation: str,
    max_batch_size: int,
    path: Path,
    log: RunLog,
) -> list[Scored]:
    """Score every sample, in their order. `aggregation` makes one score of a process verifier's steps.

    Raw scores go to `path` as they come; what is there of the same texts is not scored again. All ranks call this.
    Raises UserError for a sample longer than the model's context, and for a score that is not a finite number.
    """
    config = verifier.config
    by_steps = config.objective != "pairwise"
    encoded = [_encode(tokenizer, sample, config.max_seq_len, by_steps) for sample in samples]
    keys = [_key(sample) for sample in samples]
    raw = _read_scores(path)
    parallel.barrier()  # nobody writes before all have read
    waiting = sorted({key: index for index, key in enumerate(keys) if key not in raw}.values(),
                     key=lambda index: len(encoded[index].tokens))  # fmt: skip
    read = _read_steps if by_steps else _read_response
    log.progress(len(waiting), "sample")
    with path.open("a", encoding="utf-8") as file:
        for rows in collate.chunks(waiting, max_batch_size):
            for index, scores in zip(rows, read(verifier, [encoded[index] for index in rows]), strict=True):
                _check_finite(samples[index], scores)
                raw[keys[index]] = scores
                if parallel.rank() == 0:
                    file.write(json.dumps({"text": keys[index], "scores": scores}) + "\n")
            file.flush()
            log.advance(len(rows), tokens=sum(len(encoded[index].tokens) for index in rows))
    log.close_progress()
    return [_scored(raw[key], config, aggregation) for key in keys]


def score_one(verifier: Decoder, tokenizer: Tokenizer, sample: Sample) -> Scored:
    """Score a single sample; a process verifier's steps are multiplied. Raises UserError as score_samples() does."""
    by_steps = verifier.config.objective != "pairwise"
    read = _read_steps if by_steps else _read_response
    (raw,) = read(verifier, [_encode(tokenizer, sample, verifier.config.max_seq_len, by_steps)])
    return _scored(raw, verifier.config, "prod")


def _encode(tokenizer: Tokenizer, sample: Sample, max_seq_len: int, by_steps: bool) -> Encoded:
    """A sample as ids, laid out as its verifier was trained. One that was cut off has no EOS."""
    finished = sample.values.get("finish", "stop") == "stop" or not sample.response
    if by_steps:
        steps = split_steps(sample.response)
        row = encode_steps(tokenizer, sample.prompt, steps, [0.0] * len(steps), finished=finished)
    else:
        row = encode_response(tokenizer, sample.prompt, sample.response, finished=finished)
    too_long = len(row.tokens) > max_seq_len and (finished or by_steps)
    if too_long or row.response_start >= max_seq_len:
        raise UserError(
            f"sample {sample.id!r}/{sample.sample} has {len(row.tokens)} tokens; a verifier with context "
            f"{max_seq_len} cannot score it"
        )
    return Encoded(row.tokens[:max_seq_len], row.response_start, row.targets)


@torch.no_grad()
def _read_response(verifier: Decoder, rows: Sequence[Encoded]) -> list[list[float]]:
    verifier.eval()
    batch = collate.collate(rows).to(parallel.device())
    return [[score] for score in response_scores(verifier, *batch).tolist()]


@torch.no_grad()
def _read_steps(verifier: Decoder, rows: Sequence[Encoded]) -> list[list[float]]:
    """The logits at the ends of the judged steps of each row."""
    verifier.eval()
    batch = collate.lay_out_judged(rows, packing=False).to(parallel.device())
    scores = token_scores(verifier, *batch.batch)
    return [row[~targets.isnan()].tolist() for row, targets in zip(scores, batch.targets, strict=True)]


def _scored(raw: Sequence[float], config: ModelConfig, aggregation: str) -> Scored:
    if config.objective == "pairwise":
        return Scored(sigmoid((raw[0] - config.score_mean) / config.score_std), None)
    steps = [sigmoid(logit) for logit in raw]
    return Scored(steps[-1] if config.objective == "outcome" else AGGREGATIONS[aggregation](steps), steps)


def _check_finite(sample: Sample, scores: Sequence[float]) -> None:
    for score in scores:
        if not math.isfinite(score):
            raise UserError(
                f"the score of sample {sample.id!r}/{sample.sample} is {score}; "
                f"the verifier has diverged, train it again with a lower learning rate"
            )


def _key(sample: Sample) -> str:
    """Names what a score depends on beside the verifier."""
    text = json.dumps([sample.prompt, sample.response, sample.values.get("finish", "stop")])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _read_scores(path: Path) -> dict[str, list[float]]:
    """The scores that an earlier start left; a torn last line is cut off."""
    if parallel.rank() == 0 and path.is_file():
        data = path.read_bytes()
        with path.open("r+b") as file:
            file.truncate(data.rfind(b"\n") + 1)
    parallel.barrier()  # nobody reads before the torn line is gone
    if not path.is_file() or not path.stat().st_size:
        return {}
    return {row.values["text"]: row.values["scores"] for row in read_rows(str(path))}


def score_steps(
    verifier: Decoder, tokenizer: Tokenizer, rows: Sequence[Judged], *, max_batch_size: int
) -> Iterator[list[float]]:
    """The probability that each step is right, of all steps of each row, in order of the rows."""
    encoded = [
        encode_steps(tokenizer, row.instruction, row.steps, [0.0] * len(row.steps)) for row in rows
    ]
    longest = max(encoded, key=lambda row: len(row.tokens))
    if len(longest.tokens) > verifier.config.max_seq_len:
        raise UserError(
            f"a solution has {len(longest.tokens)} tokens; a verifier with context {verifier.config.max_seq_len} "
            f"cannot score it"
        )
    for chunk in collate.chunks(encoded, max_batch_size):
        for logits in _read_steps(verifier, chunk):
            yield [sigmoid(logit) for logit in logits]
