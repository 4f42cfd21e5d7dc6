"""A trained model written as a checkpoint directory by all ranks of a run, at once or while training goes on.

One that training can be resumed from holds optimizer.NN.pth and state.json too, resharded at will. The former has, for
each trainable parameter, PARAMETER/exp_avg, PARAMETER/exp_avg_sq and PARAMETER/master (its float32 value), cut over
tensor-parallel ranks as the parameter is and whole over data-parallel ones; the latter counts. Both are covered by the
directory's manifest: a checkpoint whose save was interrupted does not count.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from src import parallel
from src.checkpoint import adapters, shards, storage
from src.checkpoint.sources import local_tensors
from src.checkpoint.tensor_files import check_range
from src.errors import UserError
from src.jsonfile import read_json
from src.models.config import ModelConfig
from src.models.decoder import Decoder
from src.models.lora import LoraConfig

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW (Loshchilov and Hutter 2019)
MASTER = "master"
STATE = "state.json"


class TrainerState(NamedTuple):
    """A trainer's tensors by name (PARAMETER/WHAT, parts of this rank) and its counts; when it is saved, facts of its
    run besides, json values for state.json."""

    tensors: Mapping[str, Tensor]
    counts: Mapping[str, int]
    facts: Mapping[str, object] = {}


class TensorGroup(NamedTuple):
    """Tensors of a save that go into files of one kind, and the type they are stored in."""

    kind: str
    tensors: Mapping[str, Tensor]
    dtype: torch.dtype


class Save:
    """A save that is under way: each tensor-parallel rank writes a shard, and complete() makes the directory count.

    At once: complete() writes a tensor as it is gathered, and no second copy of the model exists. In the background:
    the tensors are copied to main memory when the save is made, and a thread writes the copies. The thread sends
    nothing to other ranks and leaves the end to complete(), so a kill before that leaves what was there before.
    """

    def __init__(
        self, folder: Path, groups: Sequence[TensorGroup], documents: Mapping[str, Mapping[str, object]],
        tokenizer_files: Sequence[Path], facts: Mapping[str, object], *, background: bool,
    ) -> None:
        """documents, tokenizer_files, facts: as storage.finish() takes them. Every rank makes the save."""
        self._folder = folder
        self._finish = lambda: storage.finish(
            folder, parallel.tensor_parallel_size(), documents, tokenizer_files, facts)
        self._held = contextlib.ExitStack()
        if parallel.rank() == 0:
            self._held.enter_context(storage.writing(folder))
        parallel.barrier()  # now the directory to write into is there
        self._thread: Future[None] | None = None
        self._write: Callable[[], None] = lambda: _write(folder, groups)
        if background:
            executor = ThreadPoolExecutor(1, "writer")
            self._thread = executor.submit(_write, folder, [_copied(group) for group in groups])
            executor.shutdown(wait=False)  # it ends with this one task
            self._write = self._thread.result

    def is_written(self) -> bool:
        """Whether complete() has no thread of this rank to wait for."""
        return self._thread is None or self._thread.done()

    def complete(self) -> None:
        """Move the checkpoint into place once all ranks have written theirs; every rank calls this. Raises UserError or
        OSError, on the rank whose writing failed."""
        with self._held:
            self._write()
            parallel.barrier()
            if parallel.rank() == 0:
                self._finish()
        parallel.barrier()


def begin_save(
    model: Decoder, save_dir: str, ckpt_dir: str, dtype: str = "", lora: LoraConfig | None = None,
    tokenizer_file: str = "", state: TrainerState | None = None, background: bool = False,
) -> Save:
    """A save of the model as it is now, for all ranks to complete.

    ckpt_dir is where training started: it gives the tokenizer unless tokenizer_file does and, with LoRA, the base
    that the adapter directory will name. dtype of the stored weights: empty = stored_dtype(); adapters are always
    float32. With a state the directory is one that training can be resumed from. In the background the model may
    change before complete() is called.
    """
    parallel.free_gathered(model)
    source = Path(ckpt_dir)
    dtype = dtype or (model.config.dtype if lora else stored_dtype(model.config, model.dtype))
    tensors = {name: own for name, own in model.named_parameters() if lora is None or own.requires_grad}
    kind, stored = (storage.ADAPTER, torch.float32) if lora else (storage.WEIGHTS, getattr(torch, dtype))
    groups = [TensorGroup(kind, tensors, stored)]
    documents = {"adapter.json": adapters.document(source, lora)} if lora else {}
    if state:
        groups.append(TensorGroup(storage.OPTIMIZER, state.tensors, torch.float32))
        documents[STATE] = {"loop": dict(state.counts), **state.facts}
    documents["params.json"] = model.config.to_dict() | {"dtype": dtype}
    n = parallel.tensor_parallel_size()
    facts = {"source": str(source), "rotary_layout": "interleaved", "tied": model.config.tied,
             "split": {name: shards.split_dim(name, model.config, n) for name in tensors}}
    tokenizer = storage.tokenizer_files(Path(tokenizer_file) if tokenizer_file else source)
    return Save(Path(save_dir), groups, documents, tokenizer, facts, background=background)


def stored_dtype(config: ModelConfig, computed: torch.dtype) -> str:
    """What weights are stored in unless a type is named: as in the checkpoint they come from, or as they are computed
    in if that is finer. What was learnt in float32 from weights that fit into bfloat16 would be rounded back to them
    wherever it is less than half a step, 0.2 to 0.4% of a weight: most of what a learning rate of 1e-6 does."""
    finer = min(getattr(torch, config.dtype), computed, key=lambda dtype: torch.finfo(dtype).eps)
    return str(finer).removeprefix("torch.")


def _copied(group: TensorGroup) -> TensorGroup:
    """The same tensors apart from the model, in main memory; empty on ranks that will not write."""
    copies = {}
    for name, tensor in group.tensors.items():
        whole = parallel.gather_on_first(tensor)
        if whole is not None:
            check_range(name, whole, group.dtype)
            copies[name] = whole.detach().to("cpu", group.dtype, copy=True)
    return group._replace(tensors=copies)


def _write(folder: Path, groups: Sequence[TensorGroup]) -> None:
    """Write this tensor-parallel rank's shards, a tensor at a time; data-parallel rank 0 gathers from the others."""
    for kind, tensors, dtype in groups:
        if parallel.holds_whole():
            storage.write_shard(folder, kind, parallel.tensor_parallel_rank(), tensors, dtype)
        else:
            for tensor in tensors.values():
                parallel.gather_on_first(tensor)


def check_save_dir(save_dir: str, *ckpt_dirs: str) -> None:
    """Raise UserError unless a trainer can write there without touching a checkpoint that it reads. An adapter's base
    counts: without it the adapter is worth nothing. Empty names are skipped."""
    target, unsafe = Path(save_dir), [Path(folder) for folder in ckpt_dirs if folder]
    for folder in unsafe:
        is_inside = folder.resolve().parent == target.resolve()
        if folder.resolve() == target.resolve() or (
                is_inside and folder.name.startswith(("epoch-", "step-", "best", "reference"))):
            raise UserError(f"saving to {save_dir} would overwrite {folder}, which is read; choose another directory")
        if adapter := adapters.read_adapter(folder):
            unsafe.append(adapter.base)
    storage.claim(target)


def record(model: Decoder, **facts: object) -> None:
    """Put facts into the config that a save writes: how a verifier is read, its statistics, or the chat template."""
    model.config = dataclasses.replace(model.config, **facts)


def read_facts(folder: Path) -> dict[str, object]:
    """state.json of a directory. Raises UserError unless the directory is a complete training checkpoint."""
    storage.check_complete(folder)
    names = storage.manifest_files(folder)
    if not any(name.startswith(f"{storage.OPTIMIZER}.") for name in names):
        raise UserError(f"{folder} holds no optimizer state; it is a checkpoint to start from, not to resume")
    return read_json(folder / STATE)


def state_reader(folder: Path, config: ModelConfig) -> Callable[[str], Tensor]:
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
