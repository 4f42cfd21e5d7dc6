"""What GGUF files of llama.cpp's architectures say of a model, in config.json's words and under our names, and back.

llama.cpp reads a few keys of each architecture and fixes the rest in its code; what follows from that code is said
here once, and whatever else a file says under its architecture is refused.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from src import runlog
from src.checkpoint import convert, storage
from src.checkpoint.foreign_config import OWN_FACTS, config_from_hf, config_to_hf
from src.checkpoint.gguf import open_gguf
from src.checkpoint.tensor_files import StoredTensor
from src.checkpoint.weight_files import Source, check_counts, check_shapes
from src.errors import UserError
from src.models.config import FIELDS, ModelConfig
from src.models.rope import rope_frequencies
from src.text.gguf_tokenizer import special_ids, write_tokenizer


class Architecture(NamedTuple):
    """One of llama.cpp's architectures.

    families: ours that it computes; files are read as the first. interleaved: rotary pairs are neighbouring rows of
    wq and wk, as in our own layout; else the halves of a head. keys: further keys of the metadata -> config.json's.
    """

    families: tuple[str, ...]
    interleaved: bool = False
    keys: dict[str, str] = {}


ARCHITECTURES = {
    "llama": Architecture(("llama", "mistral", "ministral"), interleaved=True),
    "qwen2": Architecture(("qwen2",)),
    "qwen3": Architecture(("qwen3",)),
    "gemma": Architecture(("gemma",)),
    "gemma2": Architecture(("gemma2",), keys={"attention.sliding_window": "sliding_window"} | {
        name: name for name in ("attn_logit_softcapping", "final_logit_softcapping")}),
}
_KEYS = {
    "block_count": "num_hidden_layers", "context_length": "max_position_embeddings", "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads", "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps", "rope.freq_base": "rope_theta",
}
_FLOATS = {"attention.layer_norm_rms_epsilon", "rope.freq_base", "attn_logit_softcapping", "final_logit_softcapping"}
_REQUIRED = {"block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
             "attention.layer_norm_rms_epsilon"}
# What llama.cpp takes for keys of gemma2 that are not there.
_GEMMA_2 = {"sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
# Keys that must say nothing else, since their other values are not computed here.
_NEUTRAL: dict[str, object] = {
    "attention.causal": True, "expert_count": 0, "expert_used_count": 0, "rope.scaling.attn_factor": 1.0,
    "use_parallel_residual": False,
}
# Keys that change nothing here: the size of the vocabulary is the embedding's, and the others are of YaRN or history.
_UNREAD = {"vocab_size", "rope.scaling.finetuned", "tensor_data_layout"}
# Numbers that are read apart from the tables, and the kind of stretching.
_SHAPED = {"attention.value_length", "rope.dimension_count", "rope.scaling.factor", "rope.scale_linear",
           "rope.scaling.original_context_length"}
_SCALING = "rope.scaling.type"
_QUANTIZATION = "general.quantization_version"

_NAMES = {"token_embd": "tok_embeddings", "output_norm": "norm", "output": "output"} | {
    f"blk.#.{theirs}": f"layers.#.{ours}" for theirs, ours in (
        ("attn_norm", "attention_norm"), ("attn_q", "attention.wq"), ("attn_k", "attention.wk"),
        ("attn_v", "attention.wv"), ("attn_output", "attention.wo"), ("attn_q_norm", "attention.q_norm"),
        ("attn_k_norm", "attention.k_norm"), ("post_attention_norm", "attention_post_norm"),
        ("ffn_norm", "ffn_norm"), ("ffn_gate", "feed_forward.w1"), ("ffn_down", "feed_forward.w2"),
        ("ffn_up", "feed_forward.w3"), ("post_ffw_norm", "ffn_post_norm"))}
_OURS = {ours: theirs for theirs, ours in _NAMES.items()}
# How much slower each rotary pair turns than without stretching, [E / 2]; the one trace of Llama 3.1's rope.
_ROPE_FACTORS = "rope_freqs.weight"
_WAVELENGTH = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}  # of every Llama from 3.1 on; no file says them
_WAVELENGTH_CONTEXT = 8192


def open_model(path: Path, own_tokenizer: bool) -> Source:
    """Open a GGUF file and put the tokenizer that it holds into files, which are gone when the process ends. Raises
    UserError that names what is wrong. own_tokenizer False leaves it unread, where another takes its place."""
    files, metadata, tensors = open_gguf(path)
    config = config_of(metadata, tensors, str(path))
    _, arch = architecture_of(metadata, str(path))
    ours = _our_tensors(tensors, str(path))
    ours = ours if arch.interleaved else convert.as_ours(ours, config)
    for name in ours:
        if config.norm_offset and name.endswith("norm.weight"):
            ours[name] = ours[name].then(lambda weight: weight.float() - 1.0)  # gemma stores one less
    check_shapes(ours, config, str(path))
    folder = storage.temporary_folder()
    if own_tokenizer:
        write_tokenizer(metadata, folder, config.vocab_size, str(path))
    return Source(config, ours, storage.tokenizer_files(folder), files)


def _our_tensors(tensors: Mapping[str, StoredTensor], source: str) -> dict[str, StoredTensor]:
    """A file's tensors under our names, the rotary factors left out. Raises UserError that lists unknown names."""
    renamed = {name: convert.rename(name, _NAMES) for name in tensors if name != _ROPE_FACTORS}
    if unknown := [name for name, ours in renamed.items() if ours is None]:
        raise UserError(f"{source}: {len(unknown)} unknown tensors: {', '.join(unknown[:8])}")
    return {ours: tensors[name] for name, ours in renamed.items()}


def config_of(metadata: Mapping[str, object], tensors: Mapping[str, StoredTensor], source: str) -> ModelConfig:
    """The model that a file describes. Raises UserError that names the key which is missing or not implemented."""
    name, arch = architecture_of(metadata, source)
    said = {key.removeprefix(f"{name}."): value for key, value in metadata.items() if key.startswith(f"{name}.")}
    _check_said(said, name, arch, source)
    if "token_embd.weight" not in tensors:
        raise UserError(f"{source}: tensor 'token_embd.weight' is missing")
    if _ROPE_FACTORS in tensors and not arch.interleaved:
        raise UserError(f"{source}: unknown tensor {_ROPE_FACTORS}; files of architecture {name} have none")
    shapes = {ours: stored.shape for ours, stored in _our_tensors(tensors, source).items()}
    check_counts({"num_hidden_layers": said["block_count"]}, shapes, source)
    values: dict[str, object] = {
        "model_type": arch.families[0],
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_theta": 10000.0,
        "num_key_value_heads": said["attention.head_count"],
        "head_dim": said["embedding_length"] // said["attention.head_count"]}
    values |= {key: _GEMMA_2[key] for key in arch.keys.values()}
    values |= {theirs: said[key] for key, theirs in (_KEYS | arch.keys).items() if key in said}
    if arch.families[0] == "gemma2":  # its 27B alone scales by the width of a layer's share, and is known by its depth
        of_27b = said["block_count"] == 46
        share = values["hidden_size"] // said["attention.head_count"]
        values["query_pre_attn_scalar"] = share if of_27b else values["head_dim"]
    for key in ("attention.value_length", "rope.dimension_count"):
        if said.get(key, values["head_dim"]) != values["head_dim"]:
            found, width = said[key], values["head_dim"]
            raise UserError(f"{source}: {name}.{key}={found}, but heads are {width} wide; not implemented")
    values["rope_scaling"] = _rope_scaling(said, values, tensors, f"{source}: {name}")
    values |= special_ids({name: metadata.get(f"tokenizer.ggml.{name}_token_id")
                           for name in ("bos", "eos", "eot", "eom", "padding")})
    of_matrices = {stored.dtype for stored in tensors.values() if len(stored.shape) > 1}
    dtype = of_matrices.pop() if len(of_matrices) == 1 else torch.float32
    config = config_from_hf(values, source, str(dtype).removeprefix("torch."))
    if _ROPE_FACTORS in tensors:
        found, expected = tensors[_ROPE_FACTORS].load().float(), rope_factors(config)
        if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-4):
            raise UserError(f"{source}: {_ROPE_FACTORS} does not hold the factors of Llama 3.1's rope")
    return config


def architecture_of(metadata: Mapping[str, object], source: str) -> tuple[str, Architecture]:
    """The architecture that a file names. Raises UserError for one that is not implemented."""
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UserError(f"{source}: general.architecture={name!r} is not implemented; expected "
                        f"{', '.join(ARCHITECTURES)}")
    if metadata.get("general.type", "model") != "model":
        raise UserError(f"{source}: general.type={metadata['general.type']!r} is not implemented; expected 'model'")
    if metadata.get(_QUANTIZATION, 2) != 2:
        raise UserError(f"{source}: {_QUANTIZATION}={metadata[_QUANTIZATION]!r} is not implemented; expected 2")
    return name, ARCHITECTURES[name]


def _check_said(said: dict[str, object], name: str, arch: Architecture, source: str) -> None:
    """Check and round the values of an architecture's keys in place. Raises UserError for what changes the model."""
    for key in sorted(_REQUIRED - said.keys()):
        raise UserError(f"{source}: key '{name}.{key}' is missing")
    for key, value in said.items():
        if key in _NEUTRAL and value != _NEUTRAL[key]:
            raise UserError(f"{source}: {name}.{key}={value!r} is not implemented; expected {_NEUTRAL[key]!r}")
        if key not in _KEYS | arch.keys | _NEUTRAL and key not in _UNREAD | _SHAPED | {_SCALING}:
            raise UserError(f"{source}: {name}.{key}={str(value)[:100]} is not implemented")
        of_model = key in _KEYS | arch.keys
        is_number = type(value) in (int, float) and 0 <= value < 2**32
        if (of_model or key in _SHAPED) and not (is_number and (value or not of_model)):
            raise UserError(f"{source}: {name}.{key}={str(value)[:100]}; expected one number above 0")
        if type(value) is float:  # 1e-5 is stored in float32 as 0.00000999999974738: what was meant is the shortest
            said[key] = float(str(np.float32(value)))


def _rope_scaling(
    said: Mapping[str, object], values: Mapping[str, object], tensors: Mapping[str, StoredTensor], source: str
) -> dict[str, object] | None:
    """config.json's rope_scaling. Raises UserError for a kind that is not implemented."""
    kind = said.get(_SCALING, "linear")
    factor = said.get("rope.scaling.factor", said.get("rope.scale_linear", 0.0))
    if kind not in ("linear", "none"):
        raise UserError(f"{source}.rope.scaling.type={kind!r} is not implemented; expected 'linear' or 'none'")
    if kind == "none" and factor not in (0.0, 1.0) and "sliding_window" in values:
        raise UserError(f"{source}.rope.scaling.type='none' beside a factor of {factor} is not implemented: llama.cpp "
                        "stretches the layers with a window then, and no others")
    stretched = kind == "linear" and factor not in (0.0, 1.0)
    if _ROPE_FACTORS not in tensors:
        return {"rope_type": "linear", "factor": factor} if stretched else None
    if stretched:
        raise UserError(f"{source}.rope.scaling.factor={factor} together with {_ROPE_FACTORS} is not implemented")
    context = said.get("rope.scaling.original_context_length", _WAVELENGTH_CONTEXT)
    half = values["head_dim"] // 2
    slowest = tensors[_ROPE_FACTORS].load()[-1].item() if tensors[_ROPE_FACTORS].shape == (half,) and half else 0.0
    low, high = _WAVELENGTH.values()
    turns = context * values["rope_theta"] ** (2 / values["head_dim"] - 1) / (2 * math.pi)
    kept = min(max((turns - low) / (high - low), 0.0), 1.0)
    if kept == 1 or not 1 <= slowest < math.inf or slowest * kept >= 1:
        raise UserError(f"{source}: {_ROPE_FACTORS} does not hold the {half} factors of Llama 3.1's rope")
    factor = round((1 - kept) / (1 / slowest - kept), 4)  # 1 / slowest = kept + (1 - kept) / factor
    return {"rope_type": "llama3", "factor": factor, "original_max_position_embeddings": context} | _WAVELENGTH


def rope_factors(config: ModelConfig) -> Tensor:
    """How much slower each pair turns than unstretched. -> [E / 2] float32"""
    cpu = torch.device("cpu")
    plain = rope_frequencies(dataclasses.replace(config, rope_type="default"), cpu)
    return plain / rope_frequencies(config, cpu)


def as_gguf(
    source_config: ModelConfig, tensors: Mapping[str, StoredTensor], name: str, description: str
) -> tuple[dict[str, object], dict[str, StoredTensor]]:
    """Metadata and tensors of a file for llama.cpp, without a tokenizer. name: the model's, for people. Raises
    UserError for a model that no file can describe."""
    config, window = source_config, max(source_config.windows, default=0)
    if window and config.family not in ARCHITECTURES["gemma2"].families:
        runlog.logger().warning("%s has a sliding window of %d, which llama.cpp does not compute: the file's context is"
                                " as long and no longer", description, window)
        config = dataclasses.replace(config, windows=(), max_seq_len=min(config.max_seq_len, window))
    architecture = next((key for key, arch in ARCHITECTURES.items() if config.family in arch.families), None)
    if architecture is None or config.value_head:
        what = "a verifier" if config.value_head else f"of family {config.family}"
        known = ", ".join(family for arch in ARCHITECTURES.values() for family in arch.families)
        raise UserError(f"{description} is {what}; --format gguf writes solvers of {known}")
    arch = ARCHITECTURES[architecture]
    said = config_to_hf(dataclasses.replace(config, family=arch.families[0]))
    metadata: dict[str, object] = {"general.architecture": architecture, "general.name": name}
    for key, theirs in (_KEYS | arch.keys).items():
        if said[theirs] is not None:  # a value that is switched off; read again, its absence has a meaning
            metadata[f"{architecture}.{key}"] = float(said[theirs]) if key in _FLOATS else said[theirs]
    for key in ("attention.value_length", "rope.dimension_count"):
        metadata[f"{architecture}.{key}"] = config.head_dim
    metadata[f"{architecture}.vocab_size"] = config.vocab_size
    written = {}
    for ours, stored in tensors.items():
        theirs = convert.rename(ours, _OURS)
        if not arch.interleaved:
            stored = stored.then(functools.partial(convert.rotary_to_hf, ours, config=config))
        if config.norm_offset and ours.endswith("norm.weight"):
            stored = stored.then(lambda weight: weight.float() + 1.0)
        written[theirs] = stored
    if config.rope_type == "linear":
        metadata[f"{architecture}.{_SCALING}"] = "linear"
        metadata[f"{architecture}.rope.scaling.factor"] = float(config.rope_factor)
    if config.rope_type == "wavelength":
        metadata[f"{architecture}.rope.scaling.original_context_length"] = config.rope_original_max_seq_len
        factors = rope_factors(config)
        written[_ROPE_FACTORS] = StoredTensor(tuple(factors.shape), lambda: factors, torch.float32)
    _check_back(config, metadata, written, architecture, description)
    return metadata, written


def _check_back(
    config: ModelConfig, metadata: Mapping[str, object], tensors: Mapping[str, StoredTensor], architecture: str,
    description: str,
) -> None:
    """Raise UserError unless the file, read again, means this model."""
    if config.norm_offset and not config.tied:  # llama.cpp's gemma takes the embedding, whatever else is there
        raise UserError(f"{description}: tied=False has no form in a GGUF file of architecture {architecture}")
    back = config_of(metadata, tensors, description)
    free = OWN_FACTS | {"family", "dtype", "carried", "embedding_split_dim"}
    for field in (name for name in FIELDS if name not in free):
        ours, theirs = getattr(config, field), getattr(back, field)
        if ours != theirs and not (type(ours) is float and np.float32(ours) == np.float32(theirs)):
            raise UserError(f"{description}: {field}={ours!r} has no form in a GGUF file of architecture "
                            f"{architecture}, where it would be read as {theirs!r}; write it with --format hf")
