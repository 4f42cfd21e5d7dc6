"""One save of a checkpoint directory by all ranks of a run together, at once or behind training's back."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from src import parallel
from src.checkpoint import storage


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
        self,
        folder: Path,
        groups: Sequence[TensorGroup],
        documents: Mapping[str, Mapping[str, object]],
        tokenizer_files: Sequence[Path],
        facts: Mapping[str, object],
        *,
        background: bool,
    ) -> None:
        """documents, tokenizer_files, facts: as storage.finish() takes them. Every rank makes the save."""
        self._folder = folder
        self._finish = lambda: storage.finish(
            folder, parallel.tensor_parallel_size(), documents, tokenizer_files, facts
        )
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
        """Move the checkpoint into place once all ranks have written theirs; every rank calls this.

        Raises UserError or OSError, on the rank whose writing failed.
        """
        with self._held:
            self._write()
            parallel.barrier()
            if parallel.rank() == 0:
                self._finish()
        parallel.barrier()


def _copied(group: TensorGroup) -> TensorGroup:
    """The same tensors apart from the model, in main memory; empty on ranks that will not write."""
    copies = {}
    for name, tensor in group.tensors.items():
        whole = parallel.whole(tensor)
        if parallel.data_parallel_rank() == 0:
            copies[name] = whole.detach().to("cpu", group.dtype, copy=True)
    return group._replace(tensors=copies)


def _write(folder: Path, groups: Sequence[TensorGroup]) -> None:
    """Write this tensor-parallel rank's shards, a tensor at a time; data-parallel rank 0 gathers from the others."""
    for kind, tensors, dtype in groups:
        if parallel.data_parallel_rank() == 0:
            storage.write_shard(folder, kind, parallel.tensor_parallel_rank(), tensors, dtype)
        else:
            for tensor in tensors.values():
                parallel.whole(tensor)
