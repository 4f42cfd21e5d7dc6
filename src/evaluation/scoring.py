"""Scores of samples and of labelled steps by a verifier. A score is a number from 0 to 1, whatever the verifier.

outcome and process: the probability of being right. pairwise: sigmoid of the score in deviations from its mean, which
orders samples as the score does and lets a vote weigh them.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from src import parallel, runlog
from src.data.batch import chunks, make_batch
from src.data.encoding import STEP_ENDS, Encoded, encode_response, encode_steps, split_steps
from src.data.examples import Sample, StepLabels, read_rows
from src.errors import UserError, naming
from src.evaluation.evaluator import cut_torn_line
from src.evaluation.metrics import AGGREGATIONS, sigmoid
from src.models.config import ModelConfig
from src.models.decoder import Decoder
from src.models.forward import response_scores, token_scores
from src.runlog import RunLog
from src.text.tokenizer import Tokenizer


class Scored(NamedTuple):
    """One sample's score and, of outcome and process verifiers, the probability that each step is right."""

    score: float
    step_scores: list[float] | None


def score_samples(
    verifier: Decoder, tokenizer: Tokenizer, samples: Sequence[Sample], *, aggregation: str,
    max_batch_size: int, path: Path, log: RunLog,
) -> list[Scored | None]:
    """Score every sample, in their order. `aggregation` makes one score of a process verifier's steps.

    A sample longer than the model's context has none, and the log says how many there are.
    Raw scores go to `path` as they come; what is there of the same texts is not scored again. All ranks call this.
    Raises UserError where no sample fits, and for a score that is not a finite number.
    """
    config = verifier.config
    by_steps = config.objective != "pairwise"
    encoded = encode_samples(tokenizer, samples, config)
    _tell_uncut(samples, config)
    # what a score depends on apart from the verifier: texts, and whether the response was cut
    texts = (json.dumps([one.prompt, one.response, one.values.get("finish") or "stop"]) for one in samples)
    keys = [hashlib.sha256(text.encode()).hexdigest()[:24] for text in texts]
    cut_torn_line(path)
    earlier = read_rows(str(path)) if path.is_file() and path.stat().st_size else ()
    raw = {row.values["text"]: row.values["scores"] for row in earlier}
    parallel.barrier()  # nobody writes before all have read
    waiting = {key: index for index, key in enumerate(keys) if encoded[index] and key not in raw}
    waiting = sorted(waiting.values(), key=lambda index: len(encoded[index].tokens))
    read = read_steps if by_steps else _read_response
    log.progress(len(waiting), "sample")
    with path.open("a", encoding="utf-8") as file:
        for rows in chunks(waiting, max_batch_size):
            for index, scores in zip(rows, read(verifier, [encoded[index] for index in rows]), strict=True):
                if odd := [score for score in scores if not math.isfinite(score)]:
                    raise UserError(f"the score of sample {samples[index].id!r}/{samples[index].sample} is {odd[0]}; "
                                    "the verifier has diverged, train it again with a lower learning rate")
                raw[keys[index]] = scores
                if parallel.rank() == 0:
                    file.write(json.dumps({"text": keys[index], "scores": scores}) + "\n")
            file.flush()
            log.advance(len(rows), tokens=sum(len(encoded[index].tokens) for index in rows))
    log.close_progress()
    return [_scored(raw[key], config, aggregation) if row else None for key, row in zip(keys, encoded, strict=True)]


def encode_samples(tokenizer: Tokenizer, samples: Sequence[Sample], config: ModelConfig) -> list[Encoded | None]:
    """The samples as ids; None for one longer than the verifier's context. Raises UserError where no sample fits."""
    encoded = []
    for sample in samples:
        with naming(f"sample {sample.id!r}/{sample.sample}"):
            encoded.append(_encode(tokenizer, sample, config))
    tell_too_long(encoded, "samples", config.max_seq_len)
    return encoded


def with_score(sample: Sample, scored: Scored | None) -> Sample:
    """The sample as samples.jsonl keeps it, without what another verifier has said of it."""
    values = {key: value for key, value in sample.values.items() if key not in Scored._fields}
    said = {} if scored is None else scored._asdict()
    return sample._replace(values=values | {key: value for key, value in said.items() if value is not None})


def score_one(verifier: Decoder, tokenizer: Tokenizer, sample: Sample) -> Scored | None:
    """Score a single sample; a process verifier's steps are multiplied. None for one longer than the context."""
    read = _read_response if verifier.config.objective == "pairwise" else read_steps
    row = _encode(tokenizer, sample, verifier.config)
    return _scored(read(verifier, [row])[0], verifier.config, "prod") if row else None


def _encode(tokenizer: Tokenizer, sample: Sample, config: ModelConfig) -> Encoded | None:
    """A sample as ids, laid out as its verifier was trained. One that was cut off has no EOS. None = too long."""
    finished = sample.finished or not sample.response
    by_steps, longest = config.objective != "pairwise", config.max_seq_len
    if by_steps:
        row = encode_in_steps(tokenizer, sample.prompt, sample.response, config, finished=finished)
    else:
        row = encode_response(tokenizer, sample.prompt, sample.response, finished=finished)
    too_long = len(row.tokens) > longest and (finished or by_steps)
    if too_long or row.response_start >= longest:
        return None
    return row._replace(tokens=row.tokens[:longest], answer_mask=row.answer_mask and row.answer_mask[:longest])


def encode_in_steps(
    tokenizer: Tokenizer, instruction: str, response: str, config: ModelConfig, *, finished: bool
) -> Encoded:
    """A response laid out in steps as its verifier was trained, with a target where each one's score is read."""
    steps = split_steps(response, STEP_ENDS[config.step])
    return encode_steps(tokenizer, instruction, steps, [0.0] * len(steps), finished=finished,
                        step_end=STEP_ENDS[config.step], form=config.verifier_form)


def tell_too_long(encoded: Sequence[Encoded | None], what: str, max_seq_len: int) -> None:
    """Say how many solutions a model cannot read, None among the encoded. Raises UserError if it can read none."""
    left_out = sum(row is None for row in encoded)
    if encoded and left_out == len(encoded):
        raise UserError(f"each of the {left_out} {what} is longer than the model's context of {max_seq_len} tokens")
    if left_out:
        runlog.logger().warning("%d of %d %s are longer than the model's context of %d tokens and get no score",
                                left_out, len(encoded), what, max_seq_len)


def _tell_uncut(samples: Sequence[Sample], config: ModelConfig) -> None:
    """Say that a verifier of paragraphs reads solutions of lines, each of which is then one step to it."""
    if config.objective == "process" and config.step == "paragraph":
        lines = [sample for sample in samples if len(split_steps(sample.response, STEP_ENDS["line"])) > 1]
        uncut = sum(len(split_steps(sample.response)) == 1 for sample in lines)
        if 2 * uncut > len(lines):
            runlog.logger().warning(
                "%d of the %d samples of several lines have no blank line and are one step each to this verifier; one "
                "that is to judge their lines learns it with verifier_train.py --step line", uncut, len(lines))


@torch.no_grad()
def _read_response(verifier: Decoder, rows: Sequence[Encoded]) -> list[list[float]]:
    verifier.eval()
    batch = make_batch(rows)
    return [[score] for score in response_scores(verifier, *batch.inputs).tolist()]


@torch.no_grad()
def read_steps(verifier: Decoder, rows: Sequence[Encoded]) -> list[list[float]]:
    """Compute the logits at the targets of each row; as many numbers a row as it has steps with a label."""
    verifier.eval()
    batch = make_batch(rows, with_targets=True)
    scores = token_scores(verifier, *batch.inputs).cpu()
    return [row[~targets.isnan()].tolist() for row, targets in zip(scores, batch.targets, strict=True)]


def _scored(raw: Sequence[float], config: ModelConfig, aggregation: str) -> Scored:
    if config.objective == "pairwise":
        return Scored(sigmoid((raw[0] - config.score_mean) / config.score_std), None)
    steps = [sigmoid(logit) for logit in raw]
    return Scored(steps[-1] if config.objective == "outcome" else AGGREGATIONS[aggregation](steps), steps)


def score_steps(
    verifier: Decoder, tokenizer: Tokenizer, rows: Sequence[StepLabels], *, max_batch_size: int
) -> list[list[float] | None]:
    """The probability that each step is right, of all steps of each row, in order of the rows. A row longer than the
    model's context has none, and the log says how many there are. Raises UserError if all are."""
    config = verifier.config
    encoded = encode_solutions(rows, tokenizer, config.max_seq_len, config.step, config.verifier_form)
    fitting = [row for row in encoded if row]
    found = (logits for chunk in chunks(fitting, max_batch_size) for logits in read_steps(verifier, chunk))
    return [[sigmoid(logit) for logit in next(found)] if row else None for row in encoded]


def encode_solutions(
    rows: Sequence[StepLabels], tokenizer: Tokenizer, max_seq_len: int, step: str, form: str = ""
) -> list[Encoded | None]:
    """The solutions as ids with the ends of all their steps marked; None for one longer than max_seq_len, and the log
    says how many there are. Raises UserError if all are."""
    encoded = []
    for row in rows:
        with naming(row.where):
            encoded.append(encode_steps(tokenizer, row.instruction, row.steps, [0.0] * len(row.steps),
                                        step_end=STEP_ENDS[step], form=form))
    fitting = [row if len(row.tokens) <= max_seq_len else None for row in encoded]
    tell_too_long(fitting, "solutions", max_seq_len)
    return fitting
