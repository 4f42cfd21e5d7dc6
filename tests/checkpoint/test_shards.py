"""src/checkpoint/shards.py: where each parameter is cut, and that cutting and joining lose nothing."""

import dataclasses

import pytest
import torch

from src.checkpoint import shards
from src.errors import UserError
from src.models.config import ModelConfig

CONFIG = ModelConfig(
    dim=16, n_layers=2, n_heads=4, n_kv_heads=4, head_dim=4, ffn_dim=24, vocab_size=32, max_seq_len=8
)


ODD = ModelConfig(
    dim=26, n_layers=1, n_heads=26, n_kv_heads=13, head_dim=4, ffn_dim=29, vocab_size=33, max_seq_len=8
)
GROUPED = dataclasses.replace(ODD, n_kv_heads=2, dim=16)
EXPERTS = dataclasses.replace(
    GROUPED, qkv_bias=True, qk_norm=True, post_norms=True, n_experts=3, n_active_experts=2
)


@pytest.mark.parametrize("config", [CONFIG, ODD, GROUPED, EXPERTS], ids=["even", "odd", "grouped", "experts"])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 16])
def test_cut_and_join_are_inverse_for_every_parameter(n: int, config: ModelConfig) -> None:
    for name, shape in shards.expected_shapes(config).items():
        whole, how = torch.randn(shape), shards.cut_of(name, config, n)
        pieces = [shards.cut(whole, how, index) for index in range(n)]
        assert torch.equal(shards.join(pieces, how), whole)


def test_parameter_that_the_config_lacks_is_refused() -> None:
    with pytest.raises(UserError, match=r"unknown parameter 'layers\.0\.attention\.wk\.bias'; the config"):
        shards.cut_of("layers.0.attention.wk.bias", CONFIG, 2)


def test_experts_with_biases_are_refused() -> None:
    with pytest.raises(UserError, match="mlp_bias=True is not implemented with n_experts=3; expected false"):
        dataclasses.replace(EXPERTS, mlp_bias=True)


def test_a_cut_holds_no_more_memory_than_it_shows() -> None:
    piece = shards.cut(torch.randn(8, 6), shards.Cut(1, 6, (range(3), range(3, 6))), 1)
    assert piece.is_contiguous()
    assert piece.untyped_storage().nbytes() == 8 * 3 * 4


@pytest.mark.parametrize(
    "name", ["layers.0.attention.wk.weight", "output.weight", "layers.0.feed_forward.w2.weight"]
)
def test_resharding_through_any_numbers_is_bit_exact(name: str) -> None:
    whole = pieces = torch.randn(shards.expected_shapes(GROUPED)[name])
    pieces, n = [whole], 1
    for m in (5, 16, 3, 8, 1):
        joined = shards.join(pieces, shards.cut_of(name, GROUPED, n))
        pieces, n = [shards.cut(joined, shards.cut_of(name, GROUPED, m), index) for index in range(m)], m
    assert torch.equal(pieces[0], whole)


def test_kv_heads_fewer_than_shards_are_copied_and_query_heads_follow_them() -> None:
    heads = [GROUPED.heads_on(4, index) for index in range(4)]
    assert [kv for _, kv in heads] == [range(1), range(1), range(1, 2), range(1, 2)]
    assert [queries for queries, _ in heads] == [range(7), range(7, 13), range(13, 20), range(20, 26)]
    how = shards.cut_of("layers.0.attention.wk.weight", GROUPED, 4)
    assert [shards.copies(how, index) for index in range(4)] == [2, 2, 2, 2]
    assert [len(dataclasses.replace(ODD, n_heads=52, n_kv_heads=52).heads_on(8, i)[0]) for i in (0, 7)] == [
        7,
        6,
    ]


def test_copies_that_disagree_are_refused() -> None:
    how = shards.cut_of("layers.0.attention.wk.weight", GROUPED, 4)
    whole = torch.randn(8, 16)
    pieces = [shards.cut(whole, how, index) for index in range(4)]
    pieces[1][0, 0] += 1
    with pytest.raises(UserError, match="different values of the same rows"):
        shards.join(pieces, how)
    pieces[1] = pieces[0].bfloat16()  # another save's: whichever is first would round the others, or not
    with pytest.raises(UserError, match="different types: float32, bfloat16, float32, float32;"):
        shards.join(pieces, how)


def test_width_that_does_not_divide_gives_way_to_the_vocabulary() -> None:
    assert shards.cut_of("tok_embeddings.weight", ODD, 2).dim == 1
    how = shards.cut_of("tok_embeddings.weight", ODD, 4)
    assert how == shards.Cut(0, 33, (range(9), range(9, 18), range(18, 27), range(27, 36)))


@pytest.mark.parametrize(
    ("name", "dim"),
    [
        ("layers.1.attention.wq.weight", 0),
        ("layers.1.attention.wo.weight", 1),
        ("layers.1.feed_forward.w2.weight", 1),
        ("layers.1.feed_forward.w3.weight", 0),
        ("layers.1.feed_forward.gate.weight", None),
        ("layers.1.feed_forward.experts.7.w1.weight", 0),
        ("layers.1.feed_forward.experts.7.w2.weight", 1),
        ("layers.1.attention.wk.bias", 0),
        ("layers.1.attention.q_norm.weight", None),
        ("layers.1.attention_norm.weight", None),
        ("layers.1.ffn_post_norm.weight", None),
        ("norm.weight", None),
        ("output.weight", 0),
        ("v_head.weight", None),
        ("tok_embeddings.weight", 1),
        # under an adapter: the base keeps its dimension, of A and B one is whole
        ("layers.1.attention.wq.base.weight", 0),
        ("layers.1.attention.wq.base.bias", 0),
        ("layers.1.attention.wo.base.weight", 1),
        ("layers.1.attention.wq.lora_a.weight", None),
        ("layers.1.attention.wq.lora_b.weight", 0),
        ("layers.1.attention.wo.lora_a.weight", 1),
        ("layers.1.attention.wo.lora_b.weight", None),
    ],
)
def test_split_dimension(name: str, dim: int | None) -> None:
    assert shards.split_dim(name, CONFIG) == dim


@pytest.mark.parametrize("name", ["layers.0.attention.wx.weight", "layers.0.attention.wx.bias", "wq.scales"])
def test_name_outside_the_table_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"unknown parameter '{name}'"):
        shards.split_dim(name, CONFIG)
