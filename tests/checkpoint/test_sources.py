"""src/checkpoint/sources.py: every kind of checkpoint that opens; test_sources_refused.py has the others."""

import dataclasses
import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import checkpoint_split
from src import load, parallel
from src.checkpoint import shards
from src.checkpoint.sources import Source, open_source
from src.errors import UserError
from src.models.config import ModelConfig
from tests import reference
from tests.checkpoint.weights import CONFIG, HF, META, Tensors, as_hf, parts, random_weights, write_json


def assert_holds(source: Source, weights: Tensors, config: ModelConfig = CONFIG) -> None:
    """The source has exactly these tensors, bit for bit, and this config."""
    assert source.config == config
    assert set(source.tensors) == set(weights)
    for name, expected in weights.items():
        found = source.tensors[name].load()
        assert found.dtype == expected.dtype
        assert found.shape == source.tensors[name].shape
        assert torch.equal(found, expected), name


def prefixed(prefix: str, weights: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in weights.items()}


SINGLE_FILES: dict[str, Callable[[Tensors], dict[object, object]]] = {
    "plain.pth": lambda weights: weights,
    "plain.pt": lambda weights: weights,
    "plain.bin": lambda weights: weights,
    "ordered.pth": OrderedDict,
    "parameters.pth": lambda weights: {name: nn.Parameter(tensor) for name, tensor in weights.items()},
    "model.pth": lambda weights: {"model": weights, "optimizer": {"state": {}}, "step": 3},
    "state_dict.pth": lambda weights: {"state_dict": weights, "epoch": 1},
    "model_and_state_dict.pth": lambda weights: {"model": {"state_dict": weights}},
    "compiled.pth": lambda weights: {"model": prefixed("_orig_mod.", weights)},
    "ddp.pth": lambda weights: prefixed("module.", weights),
    "compiled_ddp.pth": lambda weights: prefixed("module._orig_mod.", weights),
    "with_rope.pth": lambda weights: weights | {"rope.freqs": torch.ones(2)},
    "with_int_key.pth": lambda weights: weights | {0: "a note"},
    "hf.bin": lambda weights: (
        as_hf(weights) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    ),
}


@pytest.mark.parametrize("name", SINGLE_FILES)
def test_single_torch_file_opens(tmp_path: Path, name: str) -> None:
    weights = random_weights()
    torch.save(SINGLE_FILES[name](weights), tmp_path / name)
    write_json(tmp_path / "params.json", META)
    assert_holds(open_source(str(tmp_path / name)), weights)


def test_torch_file_in_the_format_before_1_6_opens(tmp_path: Path) -> None:
    weights = random_weights()
    torch.save(weights, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    write_json(tmp_path / "params.json", META)
    assert_holds(open_source(str(tmp_path / "old.pth")), weights)


@pytest.mark.parametrize("hf", [True, False])
def test_safetensors_file_opens(tmp_path: Path, hf: bool) -> None:
    weights = random_weights()
    save_file(as_hf(weights) if hf else weights, tmp_path / "weights.safetensors")
    write_json(tmp_path / "any_name.json", HF if hf else META)
    source = open_source(str(tmp_path / "weights.safetensors"), str(tmp_path / "any_name.json"))
    assert_holds(source, weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = random_weights(dtype=dtype)
    torch.save(weights, tmp_path / "weights.pth")
    write_json(tmp_path / "params.json", META)
    source = open_source(str(tmp_path / "weights.pth"))
    assert source.config.dtype == str(dtype).removeprefix("torch.")
    assert all(stored.load().dtype == dtype for stored in source.tensors.values())


def test_list_of_part_files_opens_in_any_order(tmp_path: Path) -> None:
    weights = random_weights()
    first, second, third = parts(weights)
    torch.save(first, tmp_path / "a.pth")
    save_file(second, tmp_path / "b.safetensors")
    torch.save({"model": third}, tmp_path / "c.pt")
    write_json(tmp_path / "params.json", META)
    for names in (("a.pth", "b.safetensors", "c.pt"), ("c.pt", "a.pth", "b.safetensors")):
        assert_holds(open_source([str(tmp_path / name) for name in names]), weights)


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_hf_directory_opens(tmp_path: Path, ending: str, index: bool) -> None:
    weights, stem = random_weights(), "model" if ending == "safetensors" else "pytorch_model"
    write = save_file if ending == "safetensors" else torch.save
    weight_map = {}
    for number, part in enumerate(parts(as_hf(weights)), 1):
        name = f"{stem}-{number:05d}-of-00003.{ending}"
        write(part, tmp_path / name)
        weight_map |= dict.fromkeys(part, name)
    if index:
        write_json(tmp_path / f"{stem}.{ending}.index.json", {"metadata": {}, "weight_map": weight_map})
    write_json(tmp_path / "config.json", HF)
    assert_holds(open_source(str(tmp_path)), weights)


def test_hf_config_of_transformers_5_is_read(tmp_path: Path) -> None:
    folder = reference.make_llama(tmp_path, "gqa")
    written = json.loads((folder / "config.json").read_text())
    assert written["rope_parameters"]["rope_theta"] == 5e5
    assert "rope_theta" not in written
    assert open_source(str(folder)).config.rope_theta == 5e5


@pytest.mark.parametrize("embedding_dim", [0, 1])
@pytest.mark.parametrize("n", [2, 4])
def test_meta_directory_of_shards_opens(tmp_path: Path, n: int, embedding_dim: int) -> None:
    weights, config = random_weights(), dataclasses.replace(CONFIG, embedding_split_dim=embedding_dim)
    for index in range(n):
        shard = {
            name: shards.cut(tensor, shards.cut_of(name, config, n), index)
            for name, tensor in weights.items()
        }
        torch.save(shard | {"rope.freqs": torch.ones(2)}, tmp_path / f"consolidated.{index:02d}.pth")
    write_json(tmp_path / "params.json", META)
    source = open_source(str(tmp_path))
    assert source.config.embedding_split_dim == embedding_dim
    assert all(torch.equal(source.tensors[name].load(), tensor) for name, tensor in weights.items())
    listed = [str(tmp_path / f"consolidated.{index:02d}.pth") for index in range(n)]
    assert all(
        torch.equal(open_source(listed).tensors[name].load(), tensor) for name, tensor in weights.items()
    )


def write_shards(folder: Path, paths: list[str]) -> tuple[list[str], Tensors]:
    """Shards of one checkpoint in files of these names. -> their paths as a shell lists them, the whole tensors."""
    config = dataclasses.replace(CONFIG, n_heads=2 * len(paths), n_kv_heads=len(paths), ffn_dim=4 * len(paths))
    weights = random_weights(config)
    for index, name in enumerate(paths):
        cuts = {name: shards.cut_of(name, config, len(paths)) for name in weights}
        torch.save({name: shards.cut(weights[name], cut, index) for name, cut in cuts.items()}, folder / name)
    write_json(folder / "params.json", config.to_dict())
    return sorted(str(folder / name) for name in paths), weights


@pytest.mark.parametrize("name, first", [("consolidated.{}.pth", 0), ("model_{}.pt", 0), ("a1-{:03d}-of-011.bin", 1)])
def test_listed_shards_are_joined_by_the_numbers_in_their_names(tmp_path: Path, name: str, first: int) -> None:
    """A shell lists consolidated.10.pth before consolidated.2.pth, and no shard says which rows it holds."""
    listed, weights = write_shards(tmp_path, [name.format(index + first) for index in range(11)])
    for order in (listed, listed[::-1], listed[5:] + listed[:5]):
        source = open_source(order)
        assert all(torch.equal(source.tensors[name].load(), tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("names", [["first.pth", "second.pth"], ["a2.pth", "a3.pth"], ["a0.pth", "b0.pth"]])
def test_listed_shards_without_numbers_are_refused(tmp_path: Path, names: list[str]) -> None:
    listed, _ = write_shards(tmp_path, names)
    with pytest.raises(UserError, match=f"{names[0]}, {names[1]} hold the same parameters: .* must number them"):
        open_source(listed)


def test_meta_directory_of_one_shard_opens_and_loads_as_it_is(tmp_path: Path) -> None:
    weights = random_weights()
    torch.save(weights | {"rope.freqs": torch.ones(2)}, tmp_path / "consolidated.00.pth")
    write_json(tmp_path / "params.json", META)
    assert_holds(open_source(str(tmp_path)), weights)
    parallel.start()
    model = load.load_solver(str(tmp_path))
    assert model.config == CONFIG
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())


def test_shards_behind_the_tenth_keep_their_place(tmp_path: Path) -> None:
    n, config = 12, ModelConfig(
        dim=48, n_layers=1, n_heads=12, n_kv_heads=12, head_dim=4, ffn_dim=132, vocab_size=48, max_seq_len=2048
    )
    weights = random_weights(config)
    for index in range(n):
        shard = {
            name: shards.cut(tensor, shards.cut_of(name, config, n), index)
            for name, tensor in weights.items()
        }
        torch.save(shard, tmp_path / f"consolidated.{index:02d}.pth")
    write_json(
        tmp_path / "params.json",
        {"dim": 48, "n_layers": 1, "n_heads": 12, "multiple_of": 12, "vocab_size": 48},
    )
    assert_holds(open_source(str(tmp_path)), weights, config)


def test_model_args_inside_the_file_describe_stories260k() -> None:
    source = open_source(str(reference.shared("weights/stories260K/stories260K.pt")))
    config = source.config
    assert (config.dim, config.n_layers, config.n_heads, config.n_kv_heads) == (64, 5, 8, 4)
    assert (config.ffn_dim, config.vocab_size, config.max_seq_len) == (172, 512, 512)
    assert (config.norm_eps, config.rope_theta, config.tied) == (1e-5, 1e4, True)
    assert "output.weight" not in source.tensors


def test_third_party_bfloat16_hf_directory_opens() -> None:
    source = open_source(str(reference.shared("weights/hf_tiny_llama_bf16")))
    assert source.config.dtype == "bfloat16"
    assert source.tensors["layers.3.feed_forward.w1.weight"].load().shape == (344, 128)


def test_tied_checkpoint_that_stores_its_embedding_twice_opens(tmp_path: Path) -> None:
    weights = random_weights()
    weights["output.weight"] = weights["tok_embeddings.weight"].clone()
    save_file(as_hf(weights), tmp_path / "model.safetensors")
    write_json(tmp_path / "config.json", HF | {"tie_word_embeddings": True})
    source = open_source(str(tmp_path))
    assert source.config.tied
    assert "output.weight" not in source.tensors


@pytest.mark.parametrize("n", [1, 3])
def test_added_tokens_are_the_mean_of_the_old(tmp_path: Path, n: int) -> None:
    weights = random_weights()
    torch.save(weights, tmp_path / "weights.pth")
    write_json(tmp_path / "params.json", META)
    checkpoint_split.main(
        checkpoint_split.SplitConfig(
            ckpt_file=str(tmp_path / "weights.pth"), save_path=str(tmp_path / "out"), n=n, num_added_tokens=3
        )
    )
    source = open_source(str(tmp_path / "out"))
    assert source.config.vocab_size == CONFIG.vocab_size + 3
    for name in ("tok_embeddings.weight", "output.weight"):
        rows = source.tensors[name].load()
        assert torch.equal(rows[:-3], weights[name])
        assert torch.equal(rows[-3:], weights[name].mean(0).expand(3, -1))
    assert torch.equal(source.tensors["norm.weight"].load(), weights["norm.weight"])
