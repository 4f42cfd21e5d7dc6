"""One tiny random checkpoint for every kind of model that is read, as Hugging Face directories.

transformers writes them. Where it has no such class (their code is remote), an equal model of a family that it has is
written with its tensors rearranged here, by hand, from the published layout - and that model is the reference.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,  # large enough that every part of the model shows in the logits
}
_EXPERTS = {"num_experts_per_tok": 2, "num_hidden_layers": 2}
_GROUPS = {"num_attention_heads": 8, "num_key_value_heads": 4}


class Tiny(NamedTuple):
    """A model to make: transformers' model_type, what its config says beyond _SIZES, how its files are rearranged.

    stated: what its config.json says in place of what transformers wrote there.
    """

    model_type: str
    settings: dict[str, object]
    layout: str = ""
    stated: dict[str, object] = {}


def _rope(theta: float, rope_type: str = "default", **parameters: float) -> dict[str, object]:
    return {"rope_parameters": {"rope_theta": theta, "rope_type": rope_type, **parameters}}


# With theta 10 the four pairs of a head of 8 turn 5.1, 2.9, 1.6 and 0.9 times in 32 positions: all three branches.
_WAVELENGTH = _rope(
    10.0, "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)

_YARN = _rope(10.0, "yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=4.0, attention_factor=1.25)

MODELS: dict[str, Tiny] = {
    "llama-1": Tiny("llama", {"num_key_value_heads": 4}),
    "llama-2-70b": Tiny("llama", _GROUPS),
    "llama-3.1": Tiny("llama", _GROUPS | _WAVELENGTH),
    "llama-3.2": Tiny("llama", _WAVELENGTH | {"tie_word_embeddings": True}),
    "codellama": Tiny("llama", _rope(1e6)),
    "deepseek-coder": Tiny("llama", _rope(1e5, "linear", factor=4.0)),
    "one kv head": Tiny("llama", {"num_key_value_heads": 1}),
    # 13 heads on 2 or 4 ranks, and neither the FFN width nor the vocabulary divides
    "uneven": Tiny(
        "llama",
        {
            "hidden_size": 52,
            "num_attention_heads": 13,
            "num_key_value_heads": 13,
            "intermediate_size": 45,
            "vocab_size": 61,
        },
    ),
    "mistral-window": Tiny("mistral", {"sliding_window": 4}),
    "mistral": Tiny("mistral", {"sliding_window": None} | _rope(1e6)),
    "mixtral": Tiny("mixtral", _EXPERTS | {"num_local_experts": 4, "sliding_window": None}),
    "qwen": Tiny("qwen2", {"num_key_value_heads": 4}, layout="qwen"),
    "qwen-1.5": Tiny("qwen2", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "qwen-2": Tiny("qwen2", _GROUPS | _rope(1e6)),
    "qwen-2-window": Tiny("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen-3": Tiny("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen-3-moe": Tiny(
        "qwen3_moe",
        _EXPERTS | {"num_experts": 6, "moe_intermediate_size": 20, "norm_topk_prob": True, "head_dim": 16},
    ),
    "experts not renormalised": Tiny(
        "qwen3_moe",
        _EXPERTS | {"num_experts": 4, "moe_intermediate_size": 12, "norm_topk_prob": False, "head_dim": 16},
    ),
    "gemma-2b": Tiny("gemma", {"num_key_value_heads": 1, "head_dim": 16}),
    "gemma-7b": Tiny("gemma", {"num_key_value_heads": 4, "head_dim": 16}),
    "gemma-2": Tiny(
        "gemma2",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": 4,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "internlm2": Tiny("llama", _GROUPS | _rope(1e6), layout="internlm2"),
    "biases": Tiny("llama", _GROUPS | {"attention_bias": True, "mlp_bias": True}),
    "smollm3": Tiny("smollm3", _GROUPS | _rope(1e4) | {"no_rope_layer_interval": 2, "pad_token_id": None}),
    "phi-3": Tiny("phi3", {"sliding_window": 4, "pad_token_id": None}),
    "phi-4-mini": Tiny(
        "phi3",
        _rope(10.0, "longrope", short_factor=[1.0, 1.5, 2.0], long_factor=[1.0, 3.0, 4.0], partial_rotary_factor=0.75)
        | {"max_position_embeddings": 512, "original_max_position_embeddings": 128, "pad_token_id": None},
    ),
    "olmo-2": Tiny("olmo2", _GROUPS | {"pad_token_id": None}),
    "olmo-3": Tiny(
        "olmo3",
        {
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_theta": 5e5, "rope_type": "default"},
                "full_attention": _YARN["rope_parameters"],
            },
            "pad_token_id": None,
        },
    ),
    "granite": Tiny(
        "granite",
        {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.25,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
            "tie_word_embeddings": True,
        },
    ),
    "gemma-3": Tiny(
        "gemma3_text",
        {
            "num_key_value_heads": 1,
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": 4,
            "sliding_window_pattern": 6,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
                "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
            },
        },
    ),
    "glm-4": Tiny("glm4", {"head_dim": 16, "pad_token_id": None} | _rope(1e4, partial_rotary_factor=0.5)),
    "qwen-2-moe": Tiny(
        "qwen2_moe",
        _EXPERTS
        | {"num_experts": 4, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 20}
        | {"sliding_window": None},
    ),
}

_MIXED = ["full_attention", "sliding_attention", "full_attention"]
_ALL_FULL = ["full_attention"] * 3
_LAYERS = {"sliding_window": 4, "layer_types": _MIXED}

# Further configs of the same families, which say in other words what is computed.
VARIANTS: dict[str, Tiny] = {
    "ministral": Tiny("ministral", _LAYERS | {"head_dim": 8}),
    # transformers makes a ministral of it
    "mistral by layer": Tiny("ministral", _LAYERS | {"head_dim": 8}, stated={"model_type": "mistral"}),
    "mistral, no layer windowed": Tiny(
        "ministral", {"head_dim": 8, "sliding_window": 4, "layer_types": _ALL_FULL}, stated={"model_type": "mistral"}
    ),
    "mixtral-window": Tiny("mixtral", _EXPERTS | {"num_local_experts": 4, "sliding_window": 4}),
    "qwen-2 by layer": Tiny("qwen2", _LAYERS | {"use_sliding_window": True, "max_window_layers": 1}),
    "qwen-2, window unused": Tiny("qwen2", {"sliding_window": 4, "max_window_layers": 0}),
    "qwen-3-window": Tiny(
        "qwen3", {"head_dim": 8, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
    ),
    "qwen-3-moe-window": Tiny(
        "qwen3_moe",
        _EXPERTS
        | {"num_experts": 4, "moe_intermediate_size": 12, "head_dim": 8}
        | {"use_sliding_window": True, "sliding_window": 4},
    ),
    "gemma-2 by layer": Tiny("gemma2", _LAYERS | {"head_dim": 16, "query_pre_attn_scalar": 24}),
    "gemma-2 without window": Tiny(
        "gemma2",
        {
            "head_dim": 8,
            "layer_types": _ALL_FULL,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "tie_word_embeddings": False,
        },
    ),
    "yarn": Tiny("qwen2", _rope(1e4, "yarn", factor=4.0, original_max_position_embeddings=32)),
    "dynamic": Tiny("llama", _rope(1e4, "dynamic", factor=2.0)),
    # the forms of 4.x
    "rope_scaling": Tiny(
        "llama",
        _rope(5e5, "linear", factor=2.0),
        stated={"rope_parameters": None, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
    ),
    "theta in rope_scaling": Tiny(
        "llama",
        _rope(5e5, "linear", factor=2.0),
        stated={"rope_parameters": None, "rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}},
    ),
    "type in rope_parameters": Tiny(
        "llama",
        _rope(5e5, "linear", factor=2.0),
        stated={"rope_parameters": {"type": "linear", "factor": 2.0, "rope_theta": 5e5}},
    ),
    "original context beside rope_parameters": Tiny(
        "llama",
        _WAVELENGTH,
        stated={
            "rope_parameters": {
                key: value for key, value in _WAVELENGTH["rope_parameters"].items() if not key.startswith("original")
            },
            "original_max_position_embeddings": 32,
        },
    ),
    "odds and ends": Tiny(
        "llama",
        {
            "head_dim": 16, "attention_dropout": 0.1, "initializer_range": 0.2, "pad_token_id": 7, "bos_token_id": None,
            "eos_token_id": [3, 5], "rms_norm_eps": 1e-3,
        },
    ),
}


def make(folder: Path, name: str) -> Path:
    """Save a model of MODELS or VARIANTS. Returns the directory."""
    return write(folder, (MODELS | VARIANTS)[name])


def write(folder: Path, tiny: Tiny) -> Path:
    """Save a random float32 model as a Hugging Face directory. Returns the directory."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(tiny.model_type, **_SIZES | tiny.settings)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name or parameter_name.endswith("bias"):
            parameter.data.uniform_(
                0.5, 1.5
            )  # they begin at 0 or 1, where a wrong order of operations can hide
    model.save_pretrained(folder)
    if tiny.stated:
        path = folder / "config.json"
        values = json.loads(path.read_text(encoding="utf-8")) | tiny.stated
        path.write_text(
            json.dumps({key: value for key, value in values.items() if value is not None}), encoding="utf-8"
        )
    if tiny.layout:
        reference = reference_folder(folder)
        folder.rename(reference)
        _rearrange(model, folder, tiny.layout)
    return folder


def reference_folder(folder: Path) -> Path:
    """Where transformers' own form of a rearranged model lies."""
    return folder.with_name(f"{folder.name}-reference")


def reference_model(folder: Path) -> transformers.PreTrainedModel:
    """transformers' model that a directory made here must equal, float32."""
    reference = reference_folder(folder)
    source = reference if reference.is_dir() else folder
    return transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)


def _rearrange(model: transformers.PreTrainedModel, folder: Path, layout: str) -> None:
    """Write a model of transformers in the layout of a family whose code is remote."""
    folder.mkdir()
    rearranged, config = {"qwen": (_as_qwen, _qwen_config), "internlm2": (_as_internlm2, _internlm2_config)}[
        layout
    ]
    save_file(rearranged(model), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config(model.config)), encoding="utf-8")


def _as_qwen(model: transformers.PreTrainedModel) -> dict[str, Tensor]:
    """Qwen v1: c_attn stacks queries, keys and values; the MLP is c_proj(w1(x) * silu(w2(x)))."""
    theirs = model.state_dict()
    tensors = {
        "transformer.wte.weight": theirs["model.embed_tokens.weight"],
        "transformer.ln_f.weight": theirs["model.norm.weight"],
        "lm_head.weight": theirs["lm_head.weight"],
    }
    for index in range(model.config.num_hidden_layers):
        old, new = f"model.layers.{index}", f"transformer.h.{index}"
        for kind in ("weight", "bias"):
            parts = [theirs[f"{old}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            tensors[f"{new}.attn.c_attn.{kind}"] = torch.cat(parts)
        for ours, other in {
            "attn.c_proj": "self_attn.o_proj", "mlp.w1": "mlp.up_proj", "mlp.w2": "mlp.gate_proj",
            "mlp.c_proj": "mlp.down_proj", "ln_1": "input_layernorm", "ln_2": "post_attention_layernorm",
        }.items():
            tensors[f"{new}.{ours}.weight"] = theirs[f"{old}.{other}.weight"]
    return tensors


def _qwen_config(config: transformers.PreTrainedConfig) -> dict[str, object]:
    return {
        "architectures": ["QWenLMHeadModel"], "model_type": "qwen", "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers, "num_attention_heads": config.num_attention_heads,
        "kv_channels": config.hidden_size // config.num_attention_heads,
        "intermediate_size": 2 * config.intermediate_size, "vocab_size": config.vocab_size, "seq_length": 128,
        "max_position_embeddings": 8192, "layer_norm_epsilon": config.rms_norm_eps, "rotary_emb_base": 10000,
        "rotary_pct": 1.0, "use_logn_attn": True, "use_dynamic_ntk": True, "no_bias": True,
        "tie_word_embeddings": False, "scale_attn_weights": True,
    }


def _as_internlm2(model: transformers.PreTrainedModel) -> dict[str, Tensor]:
    """InternLM2: wqkv has, for each kv head in turn, its query heads, its key and its value."""
    theirs, config = model.state_dict(), model.config
    group = config.num_attention_heads // config.num_key_value_heads
    width = config.hidden_size // config.num_attention_heads
    tensors = {
        "model.tok_embeddings.weight": theirs["model.embed_tokens.weight"],
        "model.norm.weight": theirs["model.norm.weight"],
        "output.weight": theirs["lm_head.weight"],
    }
    for index in range(config.num_hidden_layers):
        name = f"model.layers.{index}"
        queries, keys, values = (theirs[f"{name}.self_attn.{part}_proj.weight"] for part in "qkv")
        rows = []
        for head in range(config.num_key_value_heads):
            rows.append(queries[head * group * width : (head + 1) * group * width])
            rows.append(keys[head * width : (head + 1) * width])
            rows.append(values[head * width : (head + 1) * width])
        tensors[f"{name}.attention.wqkv.weight"] = torch.cat(rows)
        for ours, other in {
            "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
            "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm",
            "ffn_norm": "post_attention_layernorm",
        }.items():
            tensors[f"{name}.{ours}.weight"] = theirs[f"{name}.{other}.weight"]
    return tensors


def _internlm2_config(config: transformers.PreTrainedConfig) -> dict[str, object]:
    return {
        "architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers, "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads, "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size, "max_position_embeddings": 128, "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": 1000000, "rope_scaling": {"type": "dynamic", "factor": 2.0}, "hidden_act": "silu",
        "bias": False, "tie_word_embeddings": False,
    }
