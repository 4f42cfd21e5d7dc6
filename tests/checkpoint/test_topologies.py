"""Property: a checkpoint of any shape goes through any numbers of shards and comes back bit for bit."""

import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from src.checkpoint import export, shards, storage
from src.checkpoint.sources import local_tensors, open_source
from src.checkpoint.split import split
from src.models.config import ModelConfig
from tests.checkpoint.weights import as_hf, random_weights


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    """Multi-head, grouped and single-KV models, uneven for most numbers of shards, tied or not, verifiers too."""
    kv_heads, tied = draw(st.integers(1, 6)), draw(st.booleans())
    return ModelConfig(
        dim=draw(st.integers(1, 24)),
        n_layers=draw(st.integers(1, 2)),
        n_heads=kv_heads * draw(st.integers(1, 4)),
        n_kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 3)),
        ffn_dim=draw(st.integers(16, 40)),
        vocab_size=draw(st.integers(1, 50)),
        max_seq_len=8,
        tied=tied,
        value_head=not tied and draw(st.booleans()),
        embedding_split_dim=0 if tied else draw(st.integers(0, 1)),
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),
    )


@settings(max_examples=15, deadline=None, derandomize=True)
@given(configs(), st.data())
def test_any_number_of_shards_to_any_other_is_bit_exact(config: ModelConfig, data: st.DataObject) -> None:
    numbers = st.integers(1, min(16, config.n_heads)).filter(lambda n: divides(config, n))
    path = [*data.draw(st.lists(numbers, min_size=2, max_size=3), "shards"), 1]
    weights = random_weights(config, getattr(torch, config.dtype))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "0"
        with storage.writing(folder):
            storage.write_shard(folder, storage.WEIGHTS, 0, weights)
            storage.finish(folder, 1, {"params.json": config.to_dict()}, [], {})
        first = storage.fingerprint(folder)
        for step, n in enumerate(path, 1):
            split(open_source(str(folder)), Path(scratch) / str(step), n, "before")
            folder = Path(scratch) / str(step)
            check_ranks(folder, weights, config, data.draw(numbers, "ranks"))
        assert storage.fingerprint(folder) == first
        export.export_hf(open_source(str(folder)), Path(scratch) / "hf", "ours")
        exported = load_file(Path(scratch) / "hf" / "model.safetensors")
        expected = as_hf(weights, config)
        assert set(exported) == set(expected)
        assert all(torch.equal(exported[name], tensor) for name, tensor in expected.items())
        again = open_source(str(Path(scratch) / "hf"))
        assert all(torch.equal(again.tensors[name].load(), tensor) for name, tensor in weights.items())


def divides(config: ModelConfig, n: int) -> bool:
    return config.ffn_dim >= n and all(len(config.heads_on(n, index)[0]) for index in range(n))


def check_ranks(folder: Path, weights: dict[str, torch.Tensor], config: ModelConfig, ranks: int) -> None:
    """Every rank reads from this directory just what a split for that number of ranks would give it."""
    for rank in range(ranks):
        own = local_tensors(folder, storage.WEIGHTS, config, ranks, rank)
        assert set(own) == set(weights)
        for name, load in own.items():
            expected = shards.cut(weights[name], shards.cut_of(name, config, ranks), rank)
            assert torch.equal(load(), expected), f"{name} on rank {rank} of {ranks}"
