"""Which models are in memory: all of them all the time, or each only in the phases that use it.

Small machines hold one model at a time (as Llama-RLHF's PPO did); what is not in use waits in CPU memory, or, where the
models compute on the CPU, in files.
"""

import contextlib
import itertools
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from src import parallel
from src.processes import heap
from src.training.trainer import Trainer


class ModelOffloader:
    """Which models are in memory: with a folder, where files may wait, each only inside `with loaded(model)`. As a
    context manager it removes this rank's files in the end; no model can be used from then on."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder and folder / f"rank-{parallel.rank()}"
        self._numbers = itertools.count()  # of files
        # of each model its weights, then, if it learns, its optimizer's state
        self._parts: dict[nn.Module | None, list[OffloadedTensors]] = {}

    def __enter__(self) -> "ModelOffloader":
        return self

    def __exit__(self, *error: object) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def add(self, model: nn.Module, trainer: Trainer | None = None) -> None:
        """Let a model, and with its trainer the optimizer's state, leave memory now and after every use."""
        if self._folder is None:
            return
        n = next(self._numbers)
        weights = OffloadedTensors(lambda: (*model.parameters(), *model.buffers()), self._folder / f"{n}-weights")
        weights.offload()
        self._parts[model] = [weights]
        if trainer is not None:
            self._parts[model].append(OffloadedTensors(trainer.optimizer.held, self._folder / f"{n}-moments"))

    def drop(self, model: nn.Module) -> None:
        """Forget a model that is used no more, and remove its files."""
        for part in self._parts.pop(model, ()):
            part.path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def loaded(self, model: nn.Module | None, *, optimizer: bool = False) -> Iterator[None]:
        """Inside, the model's weights, and if asked for the state of its optimizer, are in memory.

        What was freed meanwhile goes back to the device, and where models wait in files to the system: phases need
        their memory at different moments. Else a CPU keeps it: the next phase would spend its time on clearing pages.
        """
        parts = self._parts.get(model, [])[: 2 if optimizer else 1]
        for part in parts:
            part.load()
        try:
            yield
        finally:
            for part in parts:  # written anew: training has changed them
                part.offload()
        if parts or parallel.device().type == "cuda":
            heap.release_memory()


class OffloadedTensors:
    """Tensors that leave memory and come back bit for bit, at other addresses. tensors() lists those that exist when
    they leave, [...] each: an optimizer has none before its first step."""

    def __init__(self, tensors: Callable[[], Iterable[Tensor]], path: Path) -> None:
        """tensors: as above, [...] each. path: the file that they wait in, of tensors in main memory."""
        self.path, self._tensors = path, tensors
        self._away: list[torch.UntypedStorage] = []
        self._sizes: list[int] = []
        self._bytes: Tensor | None = None  # in CPU memory, of tensors of another device

    def offload(self) -> None:
        """Free the memory of the tensors that exist now."""
        # of this rank's parts: what other ranks hold they free themselves
        self._away = [_resizable(parallel.local(tensor)) for tensor in self._tensors()]
        self._sizes = [storage.nbytes() for storage in self._away]
        if not self._away:
            return
        on_cpu = parallel.device().type == "cpu"
        waiting = self._file() if on_cpu else torch.empty(sum(self._sizes), dtype=torch.uint8)
        for storage, piece in zip(self._away, waiting.split(self._sizes), strict=True):
            piece.copy_(_bytes_of(storage))
            storage.resize_(0)  # the tensors keep their storages, which parameters and optimizer go on naming
        self._bytes = None if on_cpu else waiting

    def load(self) -> None:
        """Bring back what is away."""
        if self._away:
            waiting = self._file() if self._bytes is None else self._bytes
            for storage, piece in zip(self._away, waiting.split(self._sizes), strict=True):
                storage.resize_(len(piece))
                _bytes_of(storage).copy_(piece)
            self._away, self._bytes = [], None

    def _file(self) -> Tensor:
        """The file's bytes [n] uint8, mapped: the kernel may write them out and take their memory."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return torch.from_file(str(self.path), shared=True, size=sum(self._sizes), dtype=torch.uint8)


def _resizable(tensor: Tensor) -> torch.UntypedStorage:
    """The storage of a tensor [...]; a new one if NumPy has seen it, as when a checkpoint is written: PyTorch then
    keeps its size."""
    if not tensor.untyped_storage().resizable():
        tensor.data = tensor.detach().clone()
    return tensor.untyped_storage()


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    """A storage as a tensor [n] uint8 in its memory."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
