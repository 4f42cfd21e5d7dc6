"""src/checkpoint/convert.py: names and rotary layouts, there and back."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig

from src.checkpoint import convert
from src.checkpoint.shards import expected_shapes
from src.checkpoint.sources import open_source
from src.errors import UserError
from src.models.config import ModelConfig
from src.models.families import config_from_hf, config_to_hf
from tests import reference


def test_rotary_layout_by_hand() -> None:
    # two heads of 4: Hugging Face pairs rows 0 and 2, 1 and 3 of a head; ours pairs 0 and 1, 2 and 3
    config = ModelConfig(
        dim=8, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=4, ffn_dim=8, vocab_size=8, max_seq_len=8
    )
    rows = torch.arange(8.0)[:, None]
    ours = convert.rotary_from_hf("layers.0.attention.wq.weight", rows, config)
    assert ours.flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert torch.equal(convert.rotary_to_hf("layers.0.attention.wq.weight", ours, config), rows)
    keys = convert.rotary_from_hf("layers.0.attention.wk.weight", rows[:4], config)
    assert keys.flatten().tolist() == [0, 2, 1, 3]
    assert convert.rotary_from_hf("layers.0.attention.wv.weight", rows[:4], config) is not keys


@pytest.mark.parametrize("kind", reference.MODELS)
def test_hf_to_ours_to_hf_gives_identical_tensors(tmp_path: Path, kind: str) -> None:
    original = load_file(reference.make_llama(tmp_path, kind) / "model.safetensors")
    source = open_source(str(tmp_path))
    back = {
        convert.to_hf_name(name): convert.rotary_to_hf(name, stored.load(), source.config)
        for name, stored in source.tensors.items()
    }
    assert set(back) == set(original)
    assert all(torch.equal(back[name], original[name]) for name in original)
    assert all(back[name].dtype == original[name].dtype for name in original)


@pytest.mark.parametrize("kind", reference.MODELS)
def test_config_survives_the_way_to_hf_and_back(tmp_path: Path, kind: str) -> None:
    config = open_source(str(reference.make_llama(tmp_path, kind))).config
    exported = config_to_hf(config)
    assert config_from_hf(exported, "config.json", config.dtype) == config
    theirs = LlamaConfig(**exported)
    assert theirs.rope_parameters["rope_theta"] == config.rope_theta
    assert theirs.head_dim == config.head_dim
    assert theirs.num_key_value_heads == config.n_kv_heads


def test_every_parameter_has_one_hf_name() -> None:
    config = ModelConfig(
        dim=8, n_layers=12, n_heads=2, n_kv_heads=1, head_dim=4, ffn_dim=8, vocab_size=8, max_seq_len=8
    )
    for name in expected_shapes(config):
        assert convert.from_hf_name(convert.to_hf_name(name)) == name


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.x.mlp.up_proj.weight", "head.weight"]
)
def test_unknown_hf_name_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"unknown parameter '{name}'"):
        convert.from_hf_name(name)


def test_wrappers_are_stripped_in_any_order() -> None:
    assert convert.strip_wrappers("_orig_mod.module.norm.weight") == "norm.weight"
    assert convert.strip_wrappers("module._orig_mod.norm.weight") == "norm.weight"
    assert convert.strip_wrappers("norm.weight") == "norm.weight"


@pytest.mark.parametrize(
    ("name", "derived"),
    [
        ("rope.freqs", True),
        ("model.layers.3.self_attn.rotary_emb.inv_freq", True),
        ("freqs_cos", True),
        ("layers.0.attention.wq.weight", False),
        ("norm.weight", False),
    ],
)
def test_derived_tensors_are_known(name: str, derived: bool) -> None:
    assert convert.is_derived(name) is derived
