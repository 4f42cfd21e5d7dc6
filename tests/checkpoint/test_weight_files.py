"""src/checkpoint/weight_files.py: which of several files are read, and what is refused before it is read."""

import json
import os
import resource
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from src import load, parallel
from src.checkpoint import saving, storage
from src.checkpoint.sources import describe, open_source, read_config
from src.checkpoint.split import split
from src.checkpoint.tensor_files import read_torch
from src.checkpoint.weight_files import open_file, weight_files
from src.errors import UserError
from src.models.lora import LoraConfig
from tests import reference, zoo
from tests.checkpoint.weights import HF, META, Tensors, as_hf, random_weights, write_json


def scaled(factor: float) -> Tensors:
    return {name: tensor * factor for name, tensor in as_hf(random_weights()).items()}


def write_set(folder: Path, kind: str, factor: float) -> None:
    """Weights in one of the four forms of Hugging Face, all scaled, so that it shows which were read."""
    stem, _, suffix = kind.removesuffix(".index.json").rpartition(".")
    write = save_file if suffix == "safetensors" else torch.save
    if not kind.endswith(".index.json"):
        write(scaled(factor), folder / kind)
        return
    weights = scaled(factor)
    names = sorted(weights)
    parts = {f"{stem}-0000{part}-of-00002.{suffix}": names[part - 1 :: 2] for part in (1, 2)}
    for file, own in parts.items():
        write({name: weights[name] for name in own}, folder / file)
    weight_map = {name: file for file, own in parts.items() for name in own}
    write_json(folder / kind, {"metadata": {}, "weight_map": weight_map})


KINDS = [
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
]


@pytest.mark.parametrize(("first", "second"), [(a, b) for i, a in enumerate(KINDS) for b in KINDS[i + 1 :]])
def test_of_two_sets_of_weights_the_one_that_transformers_reads_is_read_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, first: str, second: str
) -> None:
    write_json(tmp_path / "config.json", HF)
    write_set(tmp_path, second, 3.0)
    write_set(tmp_path, first, 2.0)
    embedding = open_source(str(tmp_path)).tensors["tok_embeddings.weight"].load()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(embedding, random_weights()["tok_embeddings.weight"] * 2)
    assert torch.equal(embedding, theirs.model.embed_tokens.weight)
    (line,) = [record.message for record in caplog.records if record.name == "splitrl"]
    assert f"reads {first}, as transformers does, and not {second}" in line


def test_one_set_is_read_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_json(tmp_path / "config.json", HF)
    write_set(tmp_path, KINDS[1], 2.0)
    assert len(weight_files(tmp_path)) == 2
    assert not [record for record in caplog.records if record.name == "splitrl"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_the_index_does_not_name_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """Parts of an earlier save, or another precision beside it: whoever wrote them may mean them."""
    write_json(tmp_path / "config.json", HF)
    write_set(tmp_path, kind, 2.0)
    other = "pytorch_model-00003-of-00003.bin" if "pytorch" in kind else "model-fp16.safetensors"
    (torch.save if "pytorch" in kind else save_file)(scaled(3.0), tmp_path / other)
    embedding = open_source(str(tmp_path)).tensors["tok_embeddings.weight"].load()
    assert torch.equal(embedding, random_weights()["tok_embeddings.weight"] * 2)
    (line,) = [record.message for record in caplog.records if record.name == "splitrl"]
    assert f"reads {kind}, as transformers does, and not {other}" in line


def test_shards_beside_the_files_of_hugging_face_are_refused(tmp_path: Path) -> None:
    torch.save(random_weights(), tmp_path / "consolidated.00.pth")
    write_json(tmp_path / "params.json", META)
    split(open_source(str(tmp_path)), tmp_path / "ours", 1, "meta")
    for folder in (tmp_path, tmp_path / "ours"):
        write_set(folder, KINDS[0], 1.0)
        with pytest.raises(
            UserError, match=r"both consolidated\.00\.pth and model\.safetensors.*--ckpt_file"
        ):
            open_source(str(folder))


def test_config_json_rules_over_tensors_of_hugging_face_and_params_json_over_others(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", HF | {"rms_norm_eps": 1e-3})
    write_json(tmp_path / "params.json", META | {"norm_eps": 1e-4})
    write_set(tmp_path, KINDS[0], 1.0)
    assert open_source(str(tmp_path)).config.norm_eps == 1e-3
    torch.save(random_weights(), tmp_path / "weights.pth")
    assert open_source(str(tmp_path / "weights.pth")).config.norm_eps == 1e-4


def test_weights_of_several_types_keep_theirs_and_the_type_of_most_is_the_checkpoint_s(tmp_path: Path) -> None:
    """A run on them saves in that type: the first tensor's, float16, would cut the others short."""
    weights = {name: tensor.half() if name.startswith("lm_head") else tensor for name, tensor in scaled(1.0).items()}
    save_file(weights, tmp_path / KINDS[0])
    write_json(tmp_path / "config.json", HF)
    source = open_source(str(tmp_path))
    assert source.config.dtype == "float32"
    assert source.tensors["output.weight"].dtype == torch.float16
    assert source.tensors["norm.weight"].dtype == torch.float32


def test_weights_in_64_bits_are_read_in_32(tmp_path: Path) -> None:
    save_file({name: tensor.double() / 3 for name, tensor in scaled(1.0).items()}, tmp_path / KINDS[0])
    write_json(tmp_path / "config.json", HF)
    source = open_source(str(tmp_path))
    assert source.config.dtype == "float32"
    norm = source.tensors["norm.weight"]
    assert norm.dtype == norm.load().dtype == torch.float32
    assert torch.equal(norm.load(), (random_weights()["norm.weight"].double() / 3).float())
    split(source, tmp_path / "ours", 1, "hf")


@pytest.mark.parametrize("file", [KINDS[0], KINDS[2]])
@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.bool, torch.float8_e4m3fn, torch.complex64])
def test_weights_that_are_no_floating_point_numbers_are_refused(
    tmp_path: Path, file: str, dtype: torch.dtype
) -> None:
    weights = scaled(1.0)
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = weights[name].to(dtype)
    (save_file if file.endswith("safetensors") else torch.save)(weights, tmp_path / file)
    write_json(tmp_path / "config.json", HF)
    with pytest.raises(UserError, match=rf"{file}: '{name}' is stored as .*; expected"):
        open_source(str(tmp_path))


def make_special(path: Path, kind: str) -> None:
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a directory":
        path.mkdir()
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    else:
        socket.socket(socket.AF_UNIX).bind(
            os.path.relpath(path)
        )  # the whole path may be too long for a socket


@pytest.mark.parametrize("kind", ["a pipe", "a socket", "a directory", "a device"])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.bin", "model-00001-of-00002.safetensors"]
)
def test_what_is_no_file_of_bytes_is_refused_without_waiting(
    tmp_path: Path, name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_special(tmp_path / name, kind)
    write_json(tmp_path / "config.json", HF)
    outside = kind == "a device"  # a link that leads out of its directory
    with pytest.raises(
        UserError, match="outside its directory" if outside else f"{name} is {kind}; expected"
    ):
        open_source(str(tmp_path))
    with pytest.raises(UserError, match=f"{name} is {kind}; expected a file"):
        open_file(tmp_path / name)


def test_a_shard_that_is_a_pipe_is_refused_when_hashed(tmp_path: Path) -> None:
    folder = tmp_path / "ours"
    torch.save(random_weights(), tmp_path / "weights.pth")
    write_json(tmp_path / "params.json", META)
    split(open_source(str(tmp_path / "weights.pth")), folder, 1, "weights")
    (folder / "consolidated.00.pth").unlink()
    os.mkfifo(folder / "consolidated.00.pth")
    for read in (storage.verify_hashes, lambda folder: describe(str(folder)), read_config):
        with pytest.raises(UserError, match=r"consolidated\.00\.pth"):
            read(folder)


@pytest.fixture
def little_memory() -> Iterator[None]:
    """At most 2 GiB of address space more than now: what is without end fails at once instead of taking all."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2 * 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


ABSURD: list[tuple[str, str, int]] = [
    ("llama-1", "num_hidden_layers", 10**9),
    ("gemma-2", "num_hidden_layers", 4),
    ("qwen", "num_hidden_layers", 10**15),
    ("internlm2", "num_hidden_layers", 10**9),
    ("mixtral", "num_local_experts", 10**9),
    ("qwen-3-moe", "num_experts", 7),
    ("qwen-3-moe", "num_hidden_layers", 10**9),
    *(
        ("mistral", key, 10**12)
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
    ),
]


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize(("name", "key", "value"), ABSURD)
def test_sizes_beyond_what_the_weights_hold_are_refused_at_once(
    tmp_path: Path, name: str, key: str, value: int
) -> None:
    folder = zoo.make(tmp_path / "hf", name)
    values = json.loads((folder / "config.json").read_text())
    del values["layer_types" if "layer_types" in values else "architectures"]
    write_json(folder / "config.json", values | {key: value})
    with pytest.raises(
        UserError, match=rf"{key}={value}, but the weights hold \d+ |has shape|not a multiple|above 0"
    ):
        open_source(str(folder))


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize(("key", "value"), [("n_layers", 10**9), ("n_layers", 3), ("n_experts", 10**9)])
def test_absurd_sizes_in_our_own_and_in_metas_params_are_refused_at_once(
    tmp_path: Path, key: str, value: int
) -> None:
    split(open_source(str(zoo.make(tmp_path / "hf", "mixtral"))), tmp_path / "ours", 1, "hf")
    params = json.loads((tmp_path / "ours" / "params.json").read_text())
    write_json(tmp_path / "ours" / "params.json", params | {key: value})
    with pytest.raises(UserError, match=f"{key}={value}, but the weights hold [24] "):
        read_config(tmp_path / "ours")
    torch.save(random_weights(), tmp_path / "weights.pth")
    moe = {"moe": {"num_experts": value, "num_experts_per_tok": 1}}
    write_json(tmp_path / "params.json", META | ({"n_layers": value} if key == "n_layers" else moe))
    with pytest.raises(UserError, match=f"={value}, but the weights hold [02] "):
        open_source(str(tmp_path / "weights.pth"))


def test_an_adapter_that_leaves_experts_alone_opens(tmp_path: Path) -> None:
    parallel.start()
    ours = tmp_path / "ours"
    split(open_source(str(zoo.make(tmp_path / "hf", "mixtral"))), ours, 1, "hf")
    model = load.load_solver(str(ours))
    lora = LoraConfig(rank=2, alpha=4.0, dropout=0.0, targets=("wq",))
    load.put_lora_on(model, lora, 0)
    saving.begin_save(model, str(tmp_path / "adapter"), str(ours), lora=lora).complete()
    assert read_config(tmp_path / "adapter") == read_config(ours)
    params = json.loads((tmp_path / "adapter" / "params.json").read_text())
    write_json(tmp_path / "adapter" / "params.json", params | {"n_layers": 10**9})
    with pytest.raises(UserError, match="n_layers=1000000000, but the weights hold 2 layers"):
        read_config(tmp_path / "adapter")


@pytest.mark.parametrize("name", ["llama-3.2", "qwen-1.5", "qwen-3", "gemma-2b", "gemma-2"])
def test_a_tied_matrix_is_read_under_either_name(tmp_path: Path, name: str) -> None:
    folder = zoo.make(tmp_path / "hf", name)
    before = {key: stored.load() for key, stored in open_source(str(folder)).tensors.items()}
    tensors = {key: stored.load() for key, stored in open_file(folder / "model.safetensors").tensors.items()}
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    after = {key: stored.load() for key, stored in open_source(str(folder)).tensors.items()}
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(theirs.model.embed_tokens.weight, after["tok_embeddings.weight"])


@pytest.mark.parametrize("model_type", ["cohere", "gpt2", None, 7])
def test_an_unsupported_family_is_named_before_its_tensors(tmp_path: Path, model_type: object) -> None:
    write_json(tmp_path / "config.json", {"model_type": model_type, "n_embd": 8})
    torch.save({"transformer.h.0.attn.bias": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=rf"model_type {model_type!r} is not supported; expected llama, "):
        open_source(str(tmp_path))
    (tmp_path / "pytorch_model.bin").unlink()  # nor are they needed
    with pytest.raises(UserError, match="is not supported"):
        open_source(str(tmp_path))


def test_nan_and_infinity_in_a_description_are_refused_by_key(tmp_path: Path) -> None:
    write_set(tmp_path, KINDS[0], 1.0)
    for key, value, named in (
        ("rms_norm_eps", float("nan"), "rms_norm_eps=nan"),
        ("attention_dropout", float("inf"), "attention_dropout=inf"),
        ("rope_scaling", {"rope_type": "linear", "factor": float("-inf")}, "rope_scaling.factor=-inf"),
        ("mlp_only_layers", [1, float("nan")], r"mlp_only_layers\[1\]=nan"),
    ):
        write_json(tmp_path / "config.json", HF | {key: value})
        with pytest.raises(UserError, match=rf"config\.json: {named}; expected a finite number"):
            open_source(str(tmp_path))
    values = json.dumps(HF | {"rms_norm_eps": 1.0}).replace('"rms_norm_eps": 1.0', '"rms_norm_eps": 1e999')
    (tmp_path / "config.json").write_text(values)
    with pytest.raises(UserError, match="rms_norm_eps=inf"):
        open_source(str(tmp_path))


class Code:
    """What cannot be read as tensors alone."""


@pytest.mark.parametrize("content", [{"a": Code()}, [Code()], torch.nn.Linear(1, 1)])
def test_no_error_repeats_the_advice_to_run_what_a_file_holds(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "weights.pth")
    torch.save(content, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "cut.pth").write_bytes((tmp_path / "weights.pth").read_bytes()[:-30])
    for name in ("weights.pth", "old.pth", "cut.pth"):
        with pytest.raises(UserError, match=rf"{name} cannot be read as a checkpoint of tensors") as caught:
            read_torch(tmp_path / name)
        assert "weights_only" not in str(caught.value) and "\n" not in str(caught.value)
        assert name == "cut.pth" or "Code" in str(caught.value) or "torch.nn" in str(caught.value)


def test_reported_folders_are_read_as_transformers_reads_them_or_refused() -> None:
    folder = reference.shared("reports/CK1_tied_only_lm_head/model")
    assert open_source(str(folder)).config.tied
    stale = reference.shared("reports/CK2_stale_index/model")
    theirs = AutoModelForCausalLM.from_pretrained(stale, dtype=torch.float32)
    assert torch.equal(
        open_source(str(stale)).tensors["tok_embeddings.weight"].load(), theirs.model.embed_tokens.weight
    )
    with pytest.raises(UserError, match="rms_norm_eps=nan; expected a finite number"):
        describe(str(reference.shared("reports/CK3_nan_eps/model")))
