"""Reward modelling: a verifier learns to score right solutions, or right steps, above wrong ones.

Pairwise: the chosen solution of a pair should score above the rejected one. Outcome and process: a score at a token is
the logit of the solution, or of the step that ends there, being right.
"""

import hashlib
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from src import parallel
from src.data.batch import Batch, BatchSampler, Dataset, make_batch
from src.data.encoded_rows import Keep, Sample, Truncation, fit, in_temporary_file
from src.data.encoding import (
    STEP_ENDS,
    StepKind,
    encode_response,
    encode_steps,
    label_everywhere,
    split_steps,
)
from src.data.examples import Pair, StepLabels, read_pairs, read_step_labels
from src.errors import UserError
from src.evaluation.metrics import auc
from src.losses import bradley_terry_loss, label_loss
from src.models.decoder import Decoder
from src.models.forward import response_scores, token_scores
from src.text.tokenizer import Tokenizer
from src.training.sft import collate
from src.training.trainer import evaluating

Objective = Literal["pairwise", "outcome", "process"]
LabelTokens = Literal["all", "last"]
SEPARATION_BY_CHANCE = 2.0  # deviations; scores that know nothing are above it once in 44 runs
Row = TypeVar("Row", Pair, StepLabels)
Rows = Callable[[], Iterable[Row]]  # reads them anew


class PairReport(NamedTuple):
    """A verifier on pairs it was not trained on: how often chosen wins, how many deviations of a coin's wins that is
    above one half, and the scores' mean and deviation."""

    held_out_accuracy: float
    separation: float
    score_mean: float
    score_std: float


class LabelReport(NamedTuple):
    """A verifier on solutions it was not trained on: its loss, how often score and label fall on the same side, the
    same for right and for wrong labels alone (nan where there are none), the chance that a right one scores above a
    wrong one, how many deviations of chance that is above one half, and the scores' mean and deviation."""

    held_out_loss: float
    held_out_accuracy: float
    accuracy_on_right: float
    accuracy_on_wrong: float
    held_out_auc: float
    separation: float
    score_mean: float
    score_std: float


@dataclass(frozen=True, kw_only=True)
class PairwiseObjective:
    """The loss of pairs. A batch holds the chosen sides of its pairs first, then the rejected ones."""

    margin: float = 0.0  # what chosen should be ahead by
    centring: float = 0.0

    def count(self, batches: Sequence[Batch]) -> int:
        """Pairs in the micro-batches of one step: what the loss is a mean over."""
        return sum(batch.n_learnt for batch in batches) // 2

    def loss(self, verifier: Decoder, batch: Batch) -> Tensor:
        """Bradley-Terry loss, summed over a batch's pairs. -> []. centring adds its weight times the squared sum of the
        two scores (Eisenstein et al. 2023, eq. 2), which keeps scores around 0 and changes no difference."""
        chosen, rejected = response_scores(verifier, *batch.inputs).chunk(2)
        # a rank without pairs left runs along with none
        supervised = parallel.to_device(batch.response_counts().chunk(2)[0] > 0)
        losses = bradley_terry_loss(chosen - self.margin, rejected) + self.centring * (chosen + rejected) ** 2
        return (losses * supervised).sum()

    def evaluate(self, verifier: Decoder, data: Dataset, max_batch_size: int) -> PairReport:
        """Score every pair; a tie counts as wrong. The statistics are over chosen and rejected scores together."""
        def sides(batch: Batch) -> Tensor:
            """The scores of a batch's pairs that a rank does not only run along with, [n, 2]."""
            return torch.stack(response_scores(verifier, *batch.inputs).chunk(2), 1)[: batch.n_learnt // 2]

        chosen, rejected = _over_held_out(sides, verifier, data, max_batch_size)
        won = (chosen > rejected).double().mean().item()
        # 0.25 / n: the variance of the mean of n fair coins
        separation = (won - 0.5) / math.sqrt(0.25 / len(chosen))
        return PairReport(won, separation, *_mean_and_deviation(torch.cat((chosen, rejected))))


@dataclass(frozen=True, kw_only=True)
class LabelObjective:
    """The loss of labelled solutions and steps; right labels weigh right_weight times as much as wrong ones."""

    right_weight: float = 1.0

    def count(self, batches: Sequence[Batch]) -> int:
        """Scores read in the micro-batches of one step: what the loss is a mean over."""
        return sum(batch.n_targets for batch in batches)

    def loss(self, verifier: Decoder, batch: Batch) -> Tensor:
        """Cross-entropy of the scores that are read, summed. -> []."""
        scores, labels = read_scores(verifier, batch)
        return label_loss(scores, labels, self.right_weight).sum()

    def evaluate(self, verifier: Decoder, data: Dataset, max_batch_size: int) -> LabelReport:
        """Score every label. A label of one half or more counts as right, a score above 0 as the claim of it."""
        def read(batch: Batch) -> Tensor:
            """Scores and labels of a batch, [n, 2]."""
            return torch.stack(read_scores(verifier, batch), 1)

        scores, labels = _over_held_out(read, verifier, data, max_batch_size)
        right = labels >= 0.5
        agree = (right == (scores > 0)).double()
        shares = (agree.mean().item(), agree[right].mean().item(), agree[~right].mean().item())  # of nothing: nan
        area, n, n_right = auc(scores.numpy(), right.numpy()), len(right), int(right.sum())
        # the deviation of the area where scores know nothing (Mann and Whitney 1947)
        separation = (area - 0.5) / math.sqrt((n + 1) / (12 * (n_right * (n - n_right) or 1)))
        return LabelReport(label_loss(scores, labels).mean().item(), *shares, area, separation,
                           *_mean_and_deviation(scores))


def read_scores(verifier: Decoder, batch: Batch) -> tuple[Tensor, Tensor]:
    """The scores of a batch where they are read, and what they should be. -> two [N] float32. Differentiable."""
    targets = batch.targets.flatten()
    places = (~targets.isnan()).nonzero()[:, 0]
    scores = token_scores(verifier, *batch.inputs).flatten().index_select(0, parallel.to_device(places))
    return scores, parallel.to_device(targets[places])


def _over_held_out(
    read: Callable[[Batch], Tensor], verifier: Decoder, data: Dataset, max_batch_size: int
) -> tuple[Tensor, ...]:
    """The columns of what is read of each batch of held-out rows, [n, K], by all ranks together and alike on each: who
    finds a new best saves, and all ranks must. -> K of [N] float64."""
    sampler = BatchSampler(max_batch_size=max_batch_size, accumulation_steps=1, seed=0,
                           rank=parallel.data_parallel_rank(), ranks=parallel.data_parallel_size())
    with evaluating(verifier):
        # by the sampler, so that each rank makes as many passes as the others: FSDP gathers the weights in each
        steps = sampler.steps(data, packing=False, epochs=1)
        found = torch.cat([read(batch) for step in steps for batch in step.batches])
    return torch.tensor(parallel.gather_over_data_parallel(found.tolist()), dtype=torch.float64).unbind(1)


def _mean_and_deviation(scores: Tensor) -> tuple[float, float]:
    """[N] -> mean and deviation; 1 for the deviation of equal scores, so that what divides by it gives 0."""
    return scores.mean().item(), scores.std(unbiased=False).item() or 1.0


def pair_dataset(
    rows: Iterable[Pair], tokenizer: Tokenizer, *, max_seq_len: int, source: str, truncation: Truncation = "drop",
    keep: Keep = in_temporary_file,
) -> Dataset:
    """Encode pairs. fit() says what becomes of those with a text that is too long, and `keep` where they lie."""
    return Dataset(*fit(rows, partial(encode_pairs, tokenizer), max_seq_len, source, truncation, keep), collate_pairs)


def encode_pairs(tokenizer: Tokenizer, row: Pair) -> list[Sample]:
    """The pairs of a row: as many as its longer side has texts; the shorter side repeats."""
    sides = [[encode_response(tokenizer, row.instruction, text, prefix=row.prefix) for text in side]
             for side in (row.chosen, row.rejected)]
    return [tuple(side[index % len(side)] for side in sides) for index in range(max(map(len, sides)))]


def collate_pairs(pairs: Sequence[Sample], packing: bool) -> Batch:
    """All chosen sides, then all rejected ones, as a batch."""
    chosen, rejected = zip(*pairs, strict=True)
    return make_batch(chosen + rejected, packing=packing)


def label_dataset(
    rows: Iterable[StepLabels],
    tokenizer: Tokenizer,
    *,
    max_seq_len: int,
    source: str,
    truncation: Truncation = "drop",
    label_tokens: LabelTokens = "last",
    balance: bool = False,
    step: StepKind = "paragraph",
    keep: Keep = in_temporary_file,
) -> tuple[Dataset, LabelObjective]:
    """Encode labelled solutions; their objective, which with `balance` lets right labels count as much as wrong ones.

    Every label is read once, at the last token of its step or of its solution; label_tokens `all`, which is for
    outcomes, reads it at each of a solution's tokens instead. step says what parts the steps.
    """
    encode = partial(_encode_labels, tokenizer, label_tokens, STEP_ENDS[step])
    samples, report = fit(rows, encode, max_seq_len, source, truncation, keep)
    n_labels, right = 0, 0.0
    for (sample,) in samples:
        for label in sample.targets:
            if not math.isnan(label):
                n_labels, right = n_labels + 1, right + label
    right /= n_labels
    # then right and wrong labels weigh the same in all
    weight = (1 - right) / right if balance and 0 < right < 1 else 1.0
    report += f"; {n_labels} labels, {right:.1%} right, each of these weighs {weight:.2f}"
    return Dataset(samples, report, partial(collate, with_targets=True)), LabelObjective(right_weight=weight)


def _encode_labels(tokenizer: Tokenizer, label_tokens: LabelTokens, step_end: str, row: StepLabels) -> list[Sample]:
    """A row with its targets, as the only sequence of one sample."""
    steps, labels = row.steps, row.labels
    if len(steps) == 1:  # a solution labelled as a whole is laid out in steps too, as when it is scored
        steps = split_steps(steps[0], step_end)
        labels = [None] * (len(steps) - 1) + labels
    encoded = encode_steps(tokenizer, row.instruction, steps, labels, step_end=step_end)
    everywhere = label_tokens == "all" and len(row.steps) == 1
    return [(label_everywhere(encoded, row.labels[0]) if everywhere else encoded,)]


def open_data(
    objective: Objective,
    train_files: Sequence[str],
    weights: Sequence[float],
    label_file: str,
    held_out: float,
    tokenizer: Tokenizer,
    columns: Mapping[str, str] = {},
    *,
    seed: int,
    max_seq_len: int,
    truncation: Truncation = "drop",
    keeps: Sequence[Keep] = (in_temporary_file, in_temporary_file),
    **options: object,
) -> tuple[Dataset, Dataset, PairwiseObjective | LabelObjective]:
    """The data to train on and to test on, and keeps where fit() writes each; `options` are those of the objective.
    Raises UserError.

    Without a label_file the last `held_out` of the problems are kept. Several files are mixed by their weights only
    then, so that no row is on both sides. A held-out outcome is one label, read where a score is read: at the end.
    """
    parts, held = split_held_out(
        [partial(read_rows, objective, path, columns) for path in train_files],
        partial(read_rows, objective, label_file, columns) if label_file else None, held_out)
    rows, source = mix(parts, weights, seed), ", ".join(train_files)
    lengths = {"max_seq_len": max_seq_len, "truncation": truncation}
    if objective == "pairwise":
        data = pair_dataset(rows, tokenizer, source=source, keep=keeps[0], **lengths)
        test = pair_dataset(held(), tokenizer, source=label_file or source, keep=keeps[1], **lengths)
        return data, test, PairwiseObjective(**options)
    data, labelled = label_dataset(rows, tokenizer, source=source, keep=keeps[0], **lengths, **options)
    # Later commands read an outcome's score at the end alone, so that is where it is tested
    options |= {"label_tokens": "last"}
    test, _ = label_dataset(held(), tokenizer, source=label_file or source, keep=keeps[1], **lengths, **options)
    return data, test, labelled


def split_held_out(files: Sequence[Rows], held_out: Rows | None, share: float) -> tuple[list[Rows], Rows]:
    """The rows of each file to train on, and those to test on: held_out, or else the last `share` of the problems. Rows
    of one problem stay together. Raises UserError, when they are read, if a side would be empty."""
    if held_out is not None:
        return list(files), held_out
    # found when a side is first read, and once for both
    last = cache(partial(_last_problems, files, share))

    def side(rows: Rows, is_held: bool) -> Iterator[Row]:
        """The rows of a file whose problems are held out, or those whose problems are not, read anew."""
        return (row for row in rows() if (_problem(row) in last()) is is_held)

    return [partial(side, rows, False) for rows in files], lambda: (row for rows in files for row in side(rows, True))


def _last_problems(files: Sequence[Rows], share: float) -> set[int]:
    """The last `share` of the problems, one or more, by their hashes. Raises UserError."""
    # By problem, not by row: a verifier that saw another solution of a problem would look better on it than it is
    problems = np.fromiter((_problem(row) for rows in files for row in rows()), np.uint64)
    problems = problems[np.sort(np.unique(problems, return_index=True)[1])]  # each where it comes first
    n_held = max(int(share * len(problems)), share > 0)
    if not 0 < n_held < len(problems):
        raise UserError(f"--held_out {share} of {len(problems)} problems leaves nothing to train or test on; give more "
                        "problems or a --label_file")
    return set(problems[-n_held:].tolist())


def _problem(row: Row) -> int:
    """64 bits for a problem: texts of all would not fit where rows do not."""
    return int.from_bytes(hashlib.blake2b(row.instruction.encode(), digest_size=8).digest())


def mix(files: Sequence[Rows], weights: Sequence[float], seed: int) -> Iterator[Row]:
    """The rows of several files one after another, each file `weight` times: whole copies and a part taken at random,
    which is held in memory meanwhile.

    No weights: each file once. Raises UserError for another number of weights than files.
    """
    weights = weights or [1.0] * len(files)
    if len(files) != len(weights):
        raise UserError(f"--weights has {len(weights)} numbers for {len(files)} training files; give one a file")
    generator = random.Random(seed)
    for rows, weight in zip(files, weights, strict=True):
        for _ in range(int(weight)):
            yield from rows()
        if weight % 1:
            n = sum(1 for _ in rows())
            places = generator.sample(range(n), round(n * (weight % 1)))
            # keeps the order in which they were drawn, whatever the file's
            taken = dict.fromkeys(places)
            taken |= ((place, row) for place, row in enumerate(rows()) if place in taken)
            yield from map(taken.__getitem__, places)


def read_rows(objective: Objective, path: str, columns: Mapping[str, str] = {}) -> Iterator[Pair | StepLabels]:
    """The rows of a file, which must hold what the objective learns from. Raises UserError."""
    if objective == "pairwise":
        yield from read_pairs(path, columns)
        return
    for row in read_step_labels(path, columns):
        if objective == "outcome" and len(row.steps) > 1:
            raise UserError(f"{row.where} holds judged steps; train on them with --objective process")
        yield row
