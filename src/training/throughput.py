"""How fast a training step was: tokens a second, model FLOP utilisation, padding, memory, seconds.

What a step spends in collectives is for torch.profiler to say: its gloo: and nccl: events, on the CPU with the waiting
for slower ranks.
"""

import time
from collections.abc import Iterator, Sequence

import torch

from src import parallel
from src.checkpoint.shards import expected_shapes
from src.data.batch import Batch
from src.data.sampler import Step
from src.models.config import ModelConfig
from src.models.linear import linear
from src.processes import heap


class ThroughputMeter:
    """Measures steps for metrics.jsonl. Every rank makes one and calls the same methods in the same order."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        """dtype: of the products, whose best rate here counts as all there is."""
        shapes = expected_shapes(config)
        self._weights = sum(shape[0] * shape[1] for name, shape in shapes.items()
                            if len(shape) == 2 and name not in ("tok_embeddings.weight", "output.weight"))
        self._head = config.vocab_size * config.dim if not config.value_head else 0
        self._attention = 6 * config.n_layers * config.n_heads * config.head_dim
        self.peak = matrix_rate(dtype)
        self._data_seconds, self._began = 0.0, time.perf_counter()

    def timed(self, steps: Iterator[Step]) -> Iterator[Step]:
        """The steps, with the time taken to lay each of them out noted."""
        while True:
            began = time.perf_counter()
            step = next(steps, None)
            if step is None:
                return
            self._began = time.perf_counter()
            self._data_seconds = self._began - began
            yield step

    def measure(self, batches: Sequence[Batch], supervised: float) -> dict[str, float]:
        """Numbers of the step that has just ended; `supervised` tokens or pairs are counted over all ranks.

        mfu: 6 FLOP for each matrix weight and token - the output layer's only where a token is supervised - and
        6 L H E S for causal attention within samples of length S (after Chowdhery et al. 2022, appendix B), a second
        and rank, as a share of the rate at which this rank multiplied matrices before training. Recomputation and
        LoRA's smaller backward pass are not taken into account.
        data_seconds passed before the step began; step_seconds hold computation and communication.
        """
        seconds = time.perf_counter() - self._began  # step() has read the loss: the device is done
        counts = [(int(batch.sample_lengths().sum()), batch.n_attended(), batch.tokens.numel()) for batch in batches]
        own = torch.tensor(counts, dtype=torch.float64).sum(0)
        n_tokens, squares, held = parallel.join_over_data_parallel(own).tolist()  # one message
        flops = 6 * (self._weights * n_tokens + self._head * supervised) + self._attention * squares
        return {
            "tokens": n_tokens,
            "tokens_per_second": n_tokens / seconds,
            "supervised_per_second": supervised / seconds,
            "mfu": flops / (seconds * self.peak * parallel.world_size()),
            "padding_share": 1 - n_tokens / held,
            "peak_memory": heap.peak_memory(),
            "data_seconds": self._data_seconds,
            "step_seconds": seconds,
        }


def matrix_rate(dtype: torch.dtype) -> float:
    """FLOP a second of one square matrix product here in this type; the best of five."""
    size = 8192 if parallel.device().type == "cuda" else 512
    a = torch.ones(size, size, dtype=dtype, device=parallel.device())
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        linear(a, a)[0, 0].item()  # by the library that multiplies in training
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best
