"""src/checkpoint/shards.py: where each parameter is cut, and that cutting and joining lose nothing."""

import pytest
import torch

from src.checkpoint import shards
from src.errors import UserError
from src.models.config import ModelConfig

CONFIG = ModelConfig(
    dim=16, n_layers=2, n_heads=4, n_kv_heads=4, head_dim=4, ffn_dim=24, vocab_size=32, max_seq_len=8
)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_cut_and_join_are_inverse_for_every_parameter(n: int) -> None:
    for name, shape in shards.expected_shapes(CONFIG).items():
        whole, dim = torch.randn(shape), shards.split_dim(name, CONFIG)
        pieces = [shards.cut(whole, dim, n, index) for index in range(n)]
        assert torch.equal(shards.join(pieces, dim), whole)


def test_a_cut_holds_no_more_memory_than_it_shows() -> None:
    piece = shards.cut(torch.randn(8, 6), 1, 2, 1)
    assert piece.is_contiguous()
    assert piece.untyped_storage().nbytes() == 8 * 3 * 4


def test_resharding_through_any_number_is_bit_exact() -> None:
    whole = torch.randn(8, 8)
    two = [shards.cut(whole, 1, 2, index) for index in range(2)]
    four = [shards.cut(shards.join(two, 1), 1, 4, index) for index in range(4)]
    assert torch.equal(shards.join(four, 1), whole)


@pytest.mark.parametrize(
    ("name", "dim"),
    [
        ("layers.1.attention.wq.weight", 0),
        ("layers.1.attention.wo.weight", 1),
        ("layers.1.feed_forward.w2.weight", 1),
        ("layers.1.feed_forward.w3.weight", 0),
        ("layers.1.attention_norm.weight", None),
        ("norm.weight", None),
        ("output.weight", 0),
        ("v_head.weight", None),
        ("tok_embeddings.weight", 1),
        # under an adapter: the base keeps its dimension, of A and B one is whole
        ("layers.1.attention.wq.base.weight", 0),
        ("layers.1.attention.wo.base.weight", 1),
        ("layers.1.attention.wq.lora_a.weight", None),
        ("layers.1.attention.wq.lora_b.weight", 0),
        ("layers.1.attention.wo.lora_a.weight", 1),
        ("layers.1.attention.wo.lora_b.weight", None),
    ],
)
def test_split_dimension(name: str, dim: int | None) -> None:
    assert shards.split_dim(name, CONFIG) == dim


@pytest.mark.parametrize("name", ["layers.0.attention.wx.weight", "layers.0.attention.wq.bias", "wq.scales"])
def test_name_outside_the_table_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"unknown parameter '{name}'"):
        shards.split_dim(name, CONFIG)
