"""src/inference/step.py: what a graph would record, run without one; the graph itself needs a GPU."""


import pytest
import torch

from src import load, parallel
from src.checkpoint.sources import open_source
from src.checkpoint.split import split
from src.inference import engine
from src.inference.engine import Request, Vocabulary, generate
from src.inference.sampling import Sampling
from src.inference.step import EagerStep, GraphStep, make_step
from src.models.cache import FixedCache
from src.models.decoder import Decoder
from tests import reference

REQUESTS = [
    Request(f"p{length}", sample, [1 + (7 * place + length) % 60 for place in range(length)])
    for length in (3, 40, 5, 90)
    for sample in (0, 1)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    root = tmp_path_factory.mktemp("step")
    split(open_source(str(reference.make_llama(root / "hf", "gqa"))), root / "1", 1, "gqa")
    parallel.start()
    return load.load_solver(str(root / "1"))


class FixedStep(EagerStep):
    """GraphStep's work on its own cache, without compiler and graph: all slots are fed, those in use are read."""

    def __init__(self, model: Decoder, n_slots: int) -> None:
        self.model, self.cache = model, FixedCache(n_slots)

    def __call__(self, newest: torch.Tensor) -> torch.Tensor:
        hidden = self.model(newest[:, None], self.cache.positions, self.cache)
        return self.model.logits(hidden[:, -1])[self.cache.slots()]


def sampled(model: Decoder, max_batch_size: int, n_shared: int = 0) -> dict[tuple[str, int], list[int]]:
    sampling = Sampling(temperature=1.0, max_new_tokens=30)
    shared = [1 + place * place % 60 for place in range(n_shared)]
    requests = [request._replace(prompt=[*shared, *request.prompt][:110]) for request in REQUESTS]
    found = generate(
        model, requests, sampling, vocabulary=Vocabulary((2,), 64, str), max_batch_size=max_batch_size, compiled=True
    )
    return {(done.request.id, done.request.sample): done.tokens for done in found}


@pytest.mark.parametrize(("max_batch_size", "n_shared"), [(1, 0), (3, 0), (8, 0), (3, 64)])
def test_fixed_cache_decodes_what_buckets_decode(
    model: Decoder, monkeypatch: pytest.MonkeyPatch, max_batch_size: int, n_shared: int
) -> None:
    expected = sampled(model, max_batch_size, n_shared)
    monkeypatch.setattr(FixedCache, "SMALLEST", 16)  # it grows while rows are in flight
    monkeypatch.setattr(engine, "make_step", lambda model, n_slots, compiled: FixedStep(model, n_slots))
    assert sampled(model, max_batch_size, n_shared) == expected


def test_compiling_is_for_a_gpu(model: Decoder) -> None:
    kind = GraphStep if parallel.device().type == "cuda" else EagerStep
    assert type(make_step(model, 2, compiled=True)) is kind
    assert type(make_step(model, 2, compiled=False)) is EagerStep


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphs_decode_what_eager_steps_decode(model: Decoder) -> None:
    for n_shared in (0, 64):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "make_step", lambda model, n_slots, compiled: EagerStep(model, n_slots))
            expected = sampled(model, 8, n_shared)
        assert sampled(model, 8, n_shared) == expected
