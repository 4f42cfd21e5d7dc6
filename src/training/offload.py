"""Which models are in memory: all of them all the time, or each only in the phases that use it.

Small machines hold one model at a time (as Llama-RLHF's PPO did); what is not in use waits in CPU memory, or, where the
models compute on the CPU, in files.
"""

import contextlib
import itertools
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor, nn

from src import parallel
from src.training.trainer import Trainer


class OffloadedTensors:
    """Tensors that take memory only inside `with`; they come back bit for bit, at other addresses.

    tensors() lists those that exist when they leave: an optimizer has none before its first step.
    """

    def __init__(self, tensors: Callable[[], Iterable[Tensor]], path: Path) -> None:
        self._tensors, self._path = tensors, path
        self._inside = 0
        self._away: list[torch.UntypedStorage] = []
        self._bytes: Tensor | None = None  # in CPU memory, of tensors of another device
        self._sizes: list[int] = []

    def __enter__(self) -> None:
        self._inside += 1
        if self._inside > 1 or not self._away:
            return
        waiting = self._waiting(sum(self._sizes)) if self._bytes is None else self._bytes
        for storage, piece in zip(self._away, waiting.split(self._sizes), strict=True):
            storage.resize_(len(piece))
            _bytes_of(storage).copy_(piece)
        self._away, self._bytes = [], None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._inside -= 1
        if not self._inside:
            self.leave()

    def leave(self) -> None:
        """Free the memory of the tensors that exist now."""
        self._away = [_resizable(parallel.local(tensor)) for tensor in self._tensors()]
        self._sizes = [storage.nbytes() for storage in self._away]
        if not self._away:
            return
        on_cpu = parallel.device().type == "cpu"
        waiting = (
            self._waiting(sum(self._sizes)) if on_cpu else torch.empty(sum(self._sizes), dtype=torch.uint8)
        )
        for storage, piece in zip(self._away, waiting.split(self._sizes), strict=True):
            piece.copy_(_bytes_of(storage))
            storage.resize_(0)
        self._bytes = None if on_cpu else waiting

    def discard(self) -> None:
        """Remove the file, if there is one; the tensors do not come back."""
        self._path.unlink(missing_ok=True)

    def _waiting(self, size: int) -> Tensor:
        """The file's bytes, mapped: the kernel may write them out and take their memory."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        return torch.from_file(str(self._path), shared=True, size=size, dtype=torch.uint8)


def _resizable(tensor: Tensor) -> torch.UntypedStorage:
    """The tensor's storage; a new one if NumPy has seen it, as it does when a checkpoint is written: PyTorch then
    keeps its size."""
    if not tensor.untyped_storage().resizable():
        tensor.data = tensor.detach().clone()
    return tensor.untyped_storage()


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


class ModelOffloader:
    """Which models are in memory: with a folder, where files may wait, each only inside `with using(model)`.

    As a context manager it removes this rank's files in the end; no model can be used from then on.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder, self._added = folder, 0
        self._weights: dict[nn.Module, OffloadedTensors] = {}
        self._moments: dict[nn.Module, OffloadedTensors] = {}

    def __enter__(self) -> "ModelOffloader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder / f"rank-{parallel.rank()}", ignore_errors=True)

    def add(self, model: nn.Module, trainer: Trainer | None = None) -> None:
        """Let a model, and with its trainer the optimizer's state, leave memory now and after every use."""
        if self._folder is None:
            return
        place = self._folder / f"rank-{parallel.rank()}"
        name = f"{self._added}"
        self._added += 1
        self._weights[model] = OffloadedTensors(
            lambda: itertools.chain(model.parameters(), model.buffers()), place / f"{name}-weights"
        )
        self._weights[model].leave()
        if trainer is not None:
            self._moments[model] = OffloadedTensors(trainer.moments, place / f"{name}-moments")

    def drop(self, model: nn.Module | None) -> None:
        """Forget a model that is used no more, and remove its files."""
        for kept in (self._weights, self._moments):
            if offloaded := kept.pop(model, None):
                offloaded.discard()

    @contextlib.contextmanager
    def loaded(self, model: nn.Module, *, optimizer: bool = False) -> Iterator[None]:
        """Inside, the model's weights, and if asked for the state of its optimizer, are in memory.

        What was freed meanwhile goes back to the system: phases need their memory at different moments.
        """
        nothing = contextlib.nullcontext()
        with self._weights.get(model, nothing), self._moments.get(model, nothing) if optimizer else nothing:
            yield
        parallel.release_memory()
