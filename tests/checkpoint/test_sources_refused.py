"""src/checkpoint/sources.py: every kind of checkpoint that is refused, and what is said of it."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from src.checkpoint import shards
from src.checkpoint.sources import open_source
from src.errors import UserError
from tests.checkpoint.weights import CONFIG, HF, META, Tensors, as_hf, parts, random_weights, write_json


def test_parameter_in_two_part_files_is_refused(tmp_path: Path) -> None:
    first, second, third = parts(random_weights())
    torch.save(first, tmp_path / "a.pth")
    torch.save(second | third | {"norm.weight": torch.ones(32)}, tmp_path / "b.pth")
    write_json(tmp_path / "params.json", META)
    with pytest.raises(UserError, match=r"b\.pth: parameter 'norm\.weight' is in an earlier file too"):
        open_source([str(tmp_path / "a.pth"), str(tmp_path / "b.pth")])


@pytest.mark.parametrize("names", [["a.pth", "a.pth"], ["all.pth", "all.pth"]])
def test_file_given_twice_is_refused(tmp_path: Path, names: list[str]) -> None:
    weights = random_weights()
    torch.save({"norm.weight": weights["norm.weight"]}, tmp_path / "a.pth")
    torch.save(weights, tmp_path / "all.pth")
    write_json(tmp_path / "params.json", META)
    with pytest.raises(UserError):
        open_source([str(tmp_path / name) for name in names])


@pytest.mark.parametrize("key", ["model", "state_dict"])
def test_a_tensor_beside_the_dictionary_of_the_weights_is_refused(tmp_path: Path, key: str) -> None:
    """Left out, it would leave a tied model where a head of its own is meant."""
    weights = random_weights()
    head = weights.pop("output.weight")
    write_json(tmp_path / "params.json", META)
    others = {"best_val_loss": torch.tensor(1.5), "step": 3, "rng_state": torch.get_rng_state()}
    torch.save({key: weights} | others, tmp_path / "weights.pth")
    assert open_source(str(tmp_path / "weights.pth")).config.tied
    torch.save({key: weights, "output.weight": head}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=f"'output.weight' lies beside the dictionary '{key}'"):
        open_source(str(tmp_path / "weights.pth"))


def test_shards_of_different_splits_are_refused(tmp_path: Path) -> None:
    weights = random_weights()
    for index, n in enumerate((2, 4)):
        shard = {
            name: shards.cut(tensor, shards.cut_of(name, CONFIG, n), 0) for name, tensor in weights.items()
        }
        torch.save(shard, tmp_path / f"consolidated.{index:02d}.pth")
    write_json(tmp_path / "params.json", META)
    with pytest.raises(
        UserError, match="in shard 1, expected .* in shard 0; the shards are not of one split"
    ):
        open_source(str(tmp_path))


def test_tied_pair_that_diverged_is_refused(tmp_path: Path) -> None:
    save_file(as_hf(random_weights()), tmp_path / "model.safetensors")
    write_json(tmp_path / "config.json", HF | {"tie_word_embeddings": True})
    with pytest.raises(UserError, match="output and tok_embeddings differ; set tie_word_embeddings to false"):
        open_source(str(tmp_path))


def without(weights: Tensors, *names: str) -> Tensors:
    return {name: tensor for name, tensor in weights.items() if name not in names}


WRONG_WEIGHTS: dict[str, tuple[Callable[[Tensors], dict[object, object]], str]] = {
    "unknown names are listed": (
        lambda weights: weights | {"layers.0.attention.wq.bias": torch.ones(1), "lm.weight": torch.ones(1)},
        r"2 unknown parameters: layers\.0\.attention\.wq\.bias, lm\.weight",
    ),
    "unknown Hugging Face names are listed": (
        lambda weights: as_hf(weights) | {"model.layers.0.self_attn.qkv_proj.bias": torch.ones(1)},
        r"1 unknown parameters: model\.layers\.0\.self_attn\.qkv_proj\.bias",
    ),
    "missing parameter": (
        lambda weights: without(weights, "layers.1.feed_forward.w2.weight"),
        r"parameter 'layers\.1\.feed_forward\.w2\.weight' is missing",
    ),
    "missing first layer": (
        lambda weights: without(weights, "layers.0.feed_forward.w1.weight"),
        r"lack parameter 'layers\.0\.feed_forward\.w1\.weight'",
    ),
    "missing embeddings": (
        lambda weights: without(weights, "tok_embeddings.weight"),
        r"lack parameter 'tok_embeddings\.weight'",
    ),
    "wrong shape": (
        lambda weights: weights | {"layers.0.attention.wk.weight": torch.ones(12, 32)},
        r"layers\.0\.attention\.wk\.weight has shape \[12, 32\], but .*params\.json means \[16, 32\]",
    ),
    "wrong number of dimensions": (
        lambda weights: weights | {"layers.0.attention.wk.weight": torch.ones(16)},
        r"has shape \[16\]",
    ),
    "no tensors": (lambda weights: {"epoch": 3, "model": {"name": "x"}}, "holds no tensors"),
    "one parameter under two prefixes": (
        lambda weights: weights | {"module.norm.weight": torch.ones(32)},
        r"'norm\.weight' is stored twice",
    ),
}


@pytest.mark.parametrize("case", WRONG_WEIGHTS)
def test_wrong_weights_are_refused(tmp_path: Path, case: str) -> None:
    change, message = WRONG_WEIGHTS[case]
    torch.save(change(random_weights()), tmp_path / "weights.pth")
    write_json(tmp_path / "params.json", META)
    with pytest.raises(UserError, match=message):
        open_source(str(tmp_path / "weights.pth"))


def test_shards_without_embeddings_are_refused(tmp_path: Path) -> None:
    for index in range(2):
        norms = {f"layers.{layer}.ffn_norm.weight": torch.ones(32) for layer in range(2)}
        torch.save(norms, tmp_path / f"consolidated.{index:02d}.pth")
    write_json(tmp_path / "params.json", META)
    with pytest.raises(UserError, match=r"lack parameter 'tok_embeddings\.weight'"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("name", ["tok_embeddings.weight", "layers.0.feed_forward.w1.weight"])
def test_a_matrix_that_is_none_is_refused_where_sizes_are_read_from_it(tmp_path: Path, name: str, n: int) -> None:
    write_json(tmp_path / "params.json", META)
    for shape in ((), (3,), (2, 2, 2)):
        for index in range(n):
            torch.save(random_weights() | {name: torch.ones(shape)}, tmp_path / f"consolidated.{index:02d}.pth")
        with pytest.raises(UserError, match=rf"{name} has shape .*; expected a matrix"):
            open_source(str(tmp_path))


WRONG_PARAMS: dict[str, tuple[dict[str, object], str]] = {
    "multiple_of": (META | {"multiple_of": 64}, "means an FFN width of 64, but w1 has 48 rows"),
    "vocab_size": (META | {"vocab_size": 100}, "vocab_size=100, but tok_embeddings has 64 rows"),
    "hidden_dim": (META | {"hidden_dim": 47}, "means an FFN width of 47, but w1 has 48 rows"),
    "moe": (META | {"moe": {"num_experts": 2, "num_experts_per_tok": 1}}, "num_experts=2, but the weights hold 0 "),
    "no dim": ({"n_layers": 2, "n_heads": 8}, "key 'dim' is missing"),
    "heads": (META | {"n_kv_heads": 3}, "n_heads=8 is not a multiple of n_kv_heads=3"),
    "rope_scaling": (HF | {"rope_scaling": {"type": "ntk", "factor": 2.0}}, "rope_scaling=.* not implemented"),
    "rope_parameters": (
        HF | {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5}},
        "rope_scaling of type llama3 lacks 'low_freq_factor'",
    ),
    "attention_bias": (HF | {"attention_bias": True}, "parameter 'layers.0.attention.wq.bias' is missing"),
    "mlp_bias": (HF | {"mlp_bias": True}, "parameter 'layers.0.feed_forward.w1.bias' is missing"),
    "hidden_act": (HF | {"hidden_act": "gelu"}, "hidden_act='gelu' is not implemented; supported: 'silu'"),
    "model_type": (HF | {"model_type": "mamba"}, "model_type 'mamba' is not supported"),
    "no intermediate_size": (
        {key: value for key, value in HF.items() if key != "intermediate_size"},
        "key 'intermediate_size' is missing",
    ),
    "text for a number": (HF | {"intermediate_size": "48"}, "intermediate_size='48'; expected a number above 0"),
    "fraction for a number": (HF | {"num_hidden_layers": 2.5}, "num_hidden_layers=2.5; expected an integer"),
    "no heads": (HF | {"num_attention_heads": 0}, "num_attention_heads=0; expected a number above 0"),
}


@pytest.mark.parametrize("case", WRONG_PARAMS)
def test_description_we_cannot_honour_is_refused(tmp_path: Path, case: str) -> None:
    values, message = WRONG_PARAMS[case]
    hf = "hidden_size" in values
    torch.save(as_hf(random_weights()) if hf else random_weights(), tmp_path / "pytorch_model.bin")
    write_json(tmp_path / ("config.json" if hf else "params.json"), values)
    with pytest.raises(UserError, match=message):
        open_source(str(tmp_path / "pytorch_model.bin"))


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"norm.weight": "../outside.safetensors"}, r"weight_map names '\.\./outside\.safetensors', which is outside"),
        ({"norm.weight": "/etc/passwd"}, "names '/etc/passwd', which is outside"),
        ({"norm.weight": "gone.safetensors"}, r"gone\.safetensors does not exist"),
        ({"norm.weight": 3}, "weight_map gives 3 for norm.weight; expected a file's name"),
        ({}, "weight_map"),
        (["model.safetensors"], "weight_map"),
    ],
)
def test_index_that_names_no_files_beside_it_is_refused(
    tmp_path: Path, weight_map: object, message: str
) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    save_file(as_hf(random_weights()), tmp_path / "outside.safetensors")
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    write_json(folder / "config.json", HF)
    with pytest.raises(UserError, match=message):
        open_source(str(folder))


class Bomb:
    """Unpickling this runs a command."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.path}",)


def test_pickled_code_is_refused_and_never_runs(tmp_path: Path) -> None:
    write_json(tmp_path / "params.json", META)
    trace = tmp_path / "it_ran"
    for name, write in (
        ("new.pth", torch.save),
        ("raw.bin", lambda x, path: path.write_bytes(pickle.dumps(x, protocol=2))),
    ):
        write(random_weights() | {"norm.weight": Bomb(trace)}, tmp_path / name)
        with pytest.raises(UserError, match="holds pickled code"):
            open_source(str(tmp_path / name))
        assert not trace.exists()


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "params.json", META)
    torch.save(random_weights(), tmp_path / "new.pth")
    torch.save(random_weights(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(random_weights(), tmp_path / "new.safetensors")
    for name in ("new.pth", "old.pth", "new.safetensors"):
        data = (tmp_path / name).read_bytes()
        for length in (0, 1, 7, 100, len(data) // 2, len(data) - 1):
            (tmp_path / name).write_bytes(data[:length])
            with pytest.raises(UserError, match=name.replace(".", r"\.")):
                open_source(str(tmp_path / name))


@pytest.mark.parametrize("name", ["weights.pth", "weights.bin", "weights.safetensors"])
@pytest.mark.parametrize(
    "text",
    ["", ".", "a\n", "hello\n", "{}", "<html></html>", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"],
)
def test_file_that_is_no_checkpoint_is_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    write_json(tmp_path / "params.json", META)
    with pytest.raises(UserError, match=name.replace(".", r"\.") + (" is a git-lfs pointer" if "lfs" in text else "")):
        open_source(str(tmp_path / name))


def test_missing_paths_and_descriptions_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.pth does not exist"):
        open_source(str(tmp_path / "nowhere.pth"))
    with pytest.raises(UserError, match="holds no weights; expected model"):
        open_source(str(tmp_path))
    torch.save(random_weights(), tmp_path / "weights.pth")
    with pytest.raises(
        UserError, match=r"neither params\.json nor config\.json; name one with --config_file"
    ):
        open_source(str(tmp_path / "weights.pth"))
    with pytest.raises(UserError, match=r"gone\.json does not exist"):
        open_source(str(tmp_path / "weights.pth"), str(tmp_path / "gone.json"))
    (tmp_path / "params.json").write_text("{")
    with pytest.raises(UserError, match=r"params\.json: not valid json"):
        open_source(str(tmp_path / "weights.pth"))
    (tmp_path / "params.json").write_text("[]")
    with pytest.raises(UserError, match=": found a list; expected a json object"):
        open_source(str(tmp_path / "weights.pth"))
