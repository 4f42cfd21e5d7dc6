"""src/checkpoint/convert.py: names and rotary layouts, there and back."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from src.checkpoint import convert, peft_layout
from src.checkpoint.shards import expected_shapes
from src.checkpoint.sources import open_source
from src.errors import UserError
from src.models.config import ModelConfig
from tests import zoo


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


@pytest.mark.parametrize("name", zoo.MODELS)
def test_hf_to_ours_to_hf_gives_identical_tensors(tmp_path: Path, name: str) -> None:
    original = load_file(zoo.make(tmp_path / name, name) / "model.safetensors")
    source = open_source(str(tmp_path / name))
    back = convert.as_hf(source.tensors, source.config)
    assert set(back) == set(original)
    for key, stored in back.items():
        assert stored.shape == tuple(original[key].shape)
        assert stored.dtype == original[key].dtype
        assert torch.equal(stored.load(), original[key]), key


@pytest.mark.parametrize("name", ["mixtral", "qwen-3-moe"])
def test_experts_stacked_by_transformers_are_read(tmp_path: Path, name: str) -> None:
    folder = zoo.make(tmp_path / name, name)
    single = open_source(str(folder)).tensors
    model = zoo.reference_model(folder)
    stacked = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    assert any(key.endswith("experts.gate_up_proj") for key in stacked)
    (folder / "model.safetensors").unlink()
    torch.save(stacked, folder / "pytorch_model.bin")
    read = open_source(str(folder)).tensors
    assert set(read) == set(single)
    assert all(torch.equal(read[key].load(), single[key].load()) for key in single)


def test_fused_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    folder = zoo.make(tmp_path / "internlm2", "internlm2")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.attention.wqkv.weight"
    save_file(tensors | {name: tensors[name][:-1].clone()}, folder / "model.safetensors")
    with pytest.raises(
        UserError, match=r"layers.0.attention.wqkv_grouped.weight has shape \[63, 32\], but .* \[64, 32\]"
    ):
        open_source(str(folder))


def test_parts_of_a_fused_linear_have_no_adapter_in_peft(tmp_path: Path) -> None:
    source = open_source(str(zoo.make(tmp_path / "glm-4", "glm-4")))
    name = "layers.0.{}.lora_a.weight"
    assert peft_layout.as_peft({name.format("attention.wq"): source.tensors["norm.weight"]}, source.config)
    with pytest.raises(UserError, match="an adapter of a glm4 model has no form in PEFT"):
        peft_layout.as_peft({name.format("feed_forward.w1"): source.tensors["norm.weight"]}, source.config)


def test_every_parameter_has_one_hf_name() -> None:
    config = ModelConfig(
        dim=8, n_layers=12, n_heads=2, n_kv_heads=1, head_dim=4, ffn_dim=8, vocab_size=8, max_seq_len=8
    )
    for name in expected_shapes(config):
        assert convert.from_hf_name(convert.to_hf_name(name)) == name


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.qkv_proj.bias", "model.layers.x.mlp.up_proj.weight", "head.weight"]
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
