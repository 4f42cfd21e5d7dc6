"""What the three objectives of verifier_train.py have in common, and where their data come from."""

import random
from collections.abc import Iterator, Sequence
from typing import Literal, Protocol, TypeVar

from torch import Tensor

from src.data.batches import Batching, Sample, Step
from src.data.collate import Batch, JudgedBatch
from src.data.examples import Judged, Pair, read_judged, read_pairs
from src.errors import UserError
from src.models.decoder import Decoder
from src.text.tokenizer import Tokenizer
from src.training.judgement import JudgedData
from src.training.pairs import PairData

Objective = Literal["pairwise", "outcome", "process"]
Row = TypeVar("Row", Pair, Judged)


class Report(Protocol):
    """A verifier on rows it was not trained on; each objective adds numbers of its own."""

    held_out_accuracy: float
    score_mean: float
    score_std: float

    def _asdict(self) -> dict[str, float]: ...


class VerifierData(Protocol):
    """Rows of one objective as the batches of optimizer steps, and what is done with a batch."""

    samples: list[Sample]
    report: str

    def steps(
        self, batching: Batching, *, packing: bool, epochs: int, done: int = 0, stop: int | None = None
    ) -> Iterator[Step]:
        """The optimizer steps of `epochs` epochs behind number `done` and up to `stop`."""

    def n_judged(self, batches: Sequence[Batch | JudgedBatch]) -> int:
        """What the loss of one step is a mean over: pairs, or labels."""

    def loss(self, verifier: Decoder, batch: Batch | JudgedBatch, normaliser: float) -> Tensor:
        """The loss of a batch, divided by the step's count. -> scalar."""

    def evaluate(self, verifier: Decoder, max_batch_size: int) -> Report:
        """Score every row."""


def open_data(
    objective: Objective,
    train_files: Sequence[str],
    weights: Sequence[float],
    label_file: str,
    held_out: float,
    tokenizer: Tokenizer,
    *,
    seed: int,
    **options: object,
) -> tuple[VerifierData, VerifierData]:
    """The data to train on and to test on; `options` are those of the objective's data class. Raises UserError.

    Without a label_file the last `held_out` of the problems are kept. Several files are mixed by their weights only
    then, so that no row is on both sides. A held-out outcome is one label, read where a score is read: at the end.
    """
    parts = [read_rows(objective, path) for path in train_files]
    held = read_rows(objective, label_file) if label_file else []
    if not label_file:
        held_problems = last_problems([row for rows in parts for row in rows], held_out)
        held = [row for rows in parts for row in rows if row.instruction in held_problems]
        parts = [[row for row in rows if row.instruction not in held_problems] for rows in parts]
    kind = PairData if objective == "pairwise" else JudgedData
    at_the_end = {} if objective == "pairwise" else {"label_tokens": "last"}
    source = ", ".join(train_files)
    return (
        kind(mix(parts, weights, seed), tokenizer, source=source, **options),
        kind(held, tokenizer, source=label_file or source, **options | at_the_end),
    )


def mix(files: Sequence[Sequence[Row]], weights: Sequence[float], seed: int) -> list[Row]:
    """The rows of several files in one list, each file `weight` times: whole copies and a drawn part.

    No weights: each file once. Raises UserError for another number of weights than files.
    """
    weights = weights or [1.0] * len(files)
    if len(files) != len(weights):
        raise UserError(
            f"--weights has {len(weights)} numbers for {len(files)} training files; give one a file"
        )
    generator = random.Random(seed)
    mixed: list[Row] = []
    for rows, weight in zip(files, weights, strict=True):
        mixed += [*rows] * int(weight) + generator.sample(rows, round(len(rows) * (weight % 1)))
    return mixed


def read_rows(objective: Objective, path: str) -> list[Pair] | list[Judged]:
    """The rows of a file, which must hold what the objective learns from. Raises UserError."""
    if objective == "pairwise":
        return read_pairs(path)
    rows = read_judged(path)
    if objective == "outcome" and any(len(row.steps) > 1 for row in rows):
        raise UserError(f"{path} holds judged steps; train on them with --objective process")
    return rows


def last_problems(rows: Sequence[Row], share: float) -> set[str]:
    """The last `share` of the problems, to test on; rows of one problem stay together.

    Raises UserError when that leaves nothing on one side.
    """
    problems = list(dict.fromkeys(row.instruction for row in rows))
    n_held = int(share * len(problems))
    if not 0 < n_held < len(problems):
        raise UserError(
            f"--held_out {share} of {len(problems)} problems leaves nothing to train or test on; "
            f"give more problems or a --label_file"
        )
    return set(problems[-n_held:])
