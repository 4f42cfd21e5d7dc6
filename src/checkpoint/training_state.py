"""What a training checkpoint holds besides the weights: `optimizer.NN.pth` and state.json, resharded at will.

optimizer.NN.pth has, for each trainable parameter, PARAMETER/exp_avg, PARAMETER/exp_avg_sq and PARAMETER/master (its
float32 value), cut over tensor-parallel ranks as the parameter is and whole over data-parallel ones. state.json holds
counts. Both are covered by the directory's manifest: a checkpoint whose save was interrupted does not count.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from src import parallel
from src.checkpoint import storage
from src.checkpoint.sources import local_tensors
from src.errors import UserError
from src.jsonfile import read_json
from src.models.config import ModelConfig

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW (Loshchilov and Hutter 2019)
MASTER = "master"
STATE = "state.json"


class TrainerState(NamedTuple):
    """A trainer's tensors by name (PARAMETER/WHAT, parts of this rank), and its counts."""

    tensors: Mapping[str, Tensor]
    counts: Mapping[str, int]


class RunState(NamedTuple):
    """What is saved with one model of a run: its trainer's state and the run's facts, json values for state.json."""

    trainer: TrainerState
    facts: Mapping[str, object]


def read_facts(folder: Path) -> dict[str, object]:
    """state.json of a directory. Raises UserError unless the directory is a complete training checkpoint."""
    storage.check_complete(folder)
    names = storage.manifest_files(folder)
    if not any(name.startswith(f"{storage.OPTIMIZER}.") for name in names):
        raise UserError(f"{folder} holds no optimizer state; it is a checkpoint to start from, not to resume")
    return read_json(folder / STATE)


def reader(folder: Path, config: ModelConfig) -> Callable[[str], Tensor]:
    """How to read a tensor of optimizer.NN.pth as this tensor-parallel rank holds it, [rows on the rank, ...], whatever
    number wrote it.

    Raises UserError for a tensor that the checkpoint lacks, or bytes that are not those that were written.
    """
    n, rank = parallel.tensor_parallel_size(), parallel.tensor_parallel_rank()
    storage.verify_hashes(folder, storage.OPTIMIZER, rank, n)
    own = local_tensors(folder, storage.OPTIMIZER, config, n, rank)

    def read(name: str) -> Tensor:
        """PARAMETER/WHAT, [rows of the rank, ...]."""
        if name not in own:
            raise UserError(f"{folder}: {name!r} is missing; other parameters were trained then than now")
        return own[name]()

    return read
