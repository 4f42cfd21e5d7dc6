"""A decoding step: a plain forward, or one compiled and replayed from a CUDA graph.

B rows in the batch, n slots, P vocabulary rows on this rank
"""

from collections.abc import Callable

import torch
from torch import Tensor

from src import parallel
from src.models.cache import FixedCache, KVCache
from src.models.decoder import Decoder


class EagerStep:
    """A plain forward over the rows in use, which the cache holds."""

    def __init__(self, model: Decoder, n_slots: int) -> None:
        self.model, self.cache = model, KVCache(n_slots)

    def __call__(self, newest: Tensor) -> Tensor:
        """Feed every row its newest token, after cache.advance(). newest [n] int64 by slot -> this rank's logits of the
        next [B, P], in cache.slots() order."""
        tokens = newest.index_select(0, parallel.to_device(torch.tensor(self.cache.slots())))
        hidden = self.model(tokens[:, None], self.cache.positions, self.cache)  # [B, 1, D]
        return self.model.logits(hidden[:, -1])


class GraphStep:
    """A compiled forward over all n slots, replayed from a CUDA graph that is captured anew when the cache grows. At
    few rows a decoding step is bound by launching kernels; a graph launches them at once and Inductor fuses them."""

    def __init__(self, model: Decoder, n_slots: int) -> None:
        self.model, self.cache = model, FixedCache(n_slots)
        self.tokens = torch.zeros(n_slots, 1, dtype=torch.int64, device=parallel.device())
        self.forward = torch.compile(self._forward, dynamic=False)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.generation = -1  # of the cache that the graph reads
        self.logits: Tensor | None = None  # [n, P], where the graph leaves its result

    def _forward(self) -> Tensor:
        """Logits after every slot's newest token. -> [n, P]."""
        return self.model.logits(self.model(self.tokens, self.cache.positions, self.cache)[:, -1])

    def __call__(self, newest: Tensor) -> Tensor:
        """As EagerStep: [n] int64 -> [B, P]."""
        self.tokens.copy_(newest[:, None])
        if self.generation != self.cache.generation:
            self._capture()
        self.graph.replay()
        return self.logits.index_select(0, parallel.to_device(torch.tensor(self.cache.slots())))

    def _capture(self) -> None:
        """Compile for the cache's new shape, then record one step. A step may run twice: it writes the same keys."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # compilation and the libraries' lazy set-up must not be recorded
                self.forward()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self.forward()
        self.generation = self.cache.generation


def make_step(model: Decoder, n_slots: int, *, compiled: bool) -> EagerStep | GraphStep:
    """A step of this many slots; `compiled` takes effect on a GPU alone, and without experts or longrope.

    Which rows an expert takes must be known before it is called. While a graph is recorded nothing can be asked, nor
    longrope's factors be sent.
    """
    able = not model.config.n_experts and not model.config.rope_short_factors
    graphs = compiled and parallel.device().type == "cuda" and able
    return (GraphStep if graphs else EagerStep)(model, n_slots)


def to_host(x: Tensor) -> Callable[[], Tensor]:
    """Begin to copy x [...] of the device to main memory; what is returned waits for it. -> [...]."""
    if x.is_cpu:
        return lambda: x
    copy = x.to("cpu", non_blocking=True)
    done = torch.cuda.Event()
    done.record()

    def wait() -> Tensor:
        """The copy, once all that was asked of the device before it is done."""
        done.synchronize()
        return copy

    return wait
