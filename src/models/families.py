"""Model families and sizes as data: what a foreign config must say, and what its fields are called here.

The sizes are public facts of the released checkpoints (their config.json and params.json files).
"""

from typing import NamedTuple

from src.errors import UserError
from src.models.config import ModelConfig


class Family(NamedTuple):
    """How a Hugging Face config of one `model_type` maps to ModelConfig.

    architecture: the class that transformers opens an export with.
    fields: config.json key -> (ModelConfig field, default; None means required).
    fixed: config.json key -> the values we implement; absent counts as the first.
    """

    architecture: str
    fields: dict[str, tuple[str, int | float | bool | None]]
    fixed: dict[str, tuple[object, ...]]


FAMILIES: dict[str, Family] = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        fields={
            "hidden_size": ("dim", None),
            "num_hidden_layers": ("n_layers", None),
            "num_attention_heads": ("n_heads", None),
            "intermediate_size": ("ffn_dim", None),
            "vocab_size": ("vocab_size", None),
            "max_position_embeddings": ("max_seq_len", 2048),
            "rms_norm_eps": ("norm_eps", 1e-6),
            "rope_theta": ("rope_theta", 10000.0),
            "tie_word_embeddings": ("tied", False),
        },
        fixed={
            "hidden_act": ("silu",),
            "rope_scaling": (None,),
            "attention_bias": (False,),
            "mlp_bias": (False,),
        },
    ),
}

_LLAMA_1 = {"norm_eps": 1e-6, "vocab_size": 32000, "rope_theta": 1e4}
_LLAMA_2 = {"norm_eps": 1e-5, "vocab_size": 32000, "rope_theta": 1e4}
_LLAMA_3 = {"norm_eps": 1e-5, "vocab_size": 128256, "rope_theta": 5e5}
_7B = {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32, "ffn_dim": 11008}
_13B = {"dim": 5120, "n_layers": 40, "n_heads": 40, "n_kv_heads": 40, "ffn_dim": 13824}
_33B = {"dim": 6656, "n_layers": 60, "n_heads": 52, "n_kv_heads": 52, "ffn_dim": 17920}
_65B = {"dim": 8192, "n_layers": 80, "n_heads": 64, "n_kv_heads": 64, "ffn_dim": 22016}
_70B = {"dim": 8192, "n_layers": 80, "n_heads": 64, "n_kv_heads": 8, "ffn_dim": 28672}
_8B = {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "ffn_dim": 14336}

# What --model_type may say: a family alone, or a released size whose facts must then hold.
MODEL_TYPES: dict[str, dict[str, int | float]] = {
    "llama": {},
    "llama-1-7b": _7B | _LLAMA_1,
    "llama-1-13b": _13B | _LLAMA_1,
    "llama-1-30b": _33B | _LLAMA_1,
    "llama-1-33b": _33B | _LLAMA_1,
    "llama-1-65b": _65B | _LLAMA_1 | {"norm_eps": 1e-5},
    "llama-2-7b": _7B | _LLAMA_2,
    "llama-2-13b": _13B | _LLAMA_2,
    "llama-2-70b": _70B | _LLAMA_2,
    "llama-3-8b": _8B | _LLAMA_3,
    "llama-3-70b": _70B | _LLAMA_3,
}


def check_model_type(config: ModelConfig, model_type: str, source: str) -> None:
    """Raise UserError when --model_type contradicts the checkpoint; an empty string claims nothing."""
    if not model_type:
        return
    if model_type not in MODEL_TYPES:
        raise UserError(f"--model_type {model_type} is unknown; expected one of {', '.join(MODEL_TYPES)}")
    for name, expected in MODEL_TYPES[model_type].items():
        found = getattr(config, name)
        if found != expected:
            raise UserError(
                f"{source} has {name}={found}, but --model_type {model_type} means {name}={expected}; "
                f"drop --model_type (params.json knows) or give the right checkpoint"
            )


def config_from_hf(values: dict[str, object], source: str, dtype: str) -> ModelConfig:
    """Read a Hugging Face config.json. Raises UserError that names the field we lack or do not implement."""
    model_type = values.get("model_type")
    if model_type not in FAMILIES:
        raise UserError(
            f"{source}: model_type {model_type!r} is not supported; expected {', '.join(FAMILIES)}"
        )
    family = FAMILIES[model_type]
    values = values | _rope_parameters(values)
    for key, allowed in family.fixed.items():
        if values.get(key, allowed[0]) not in allowed:
            raise UserError(f"{source}: {key}={values[key]!r} is not implemented; supported: {allowed[0]!r}")
    facts: dict[str, object] = {}
    for key, (field, default) in family.fields.items():
        facts[field] = values.get(key, default)
        if facts[field] is None:
            raise UserError(f"{source}: key {key!r} is missing")
    _check_positive({key: values[key] for key in ("hidden_size", "num_attention_heads")}, source)
    facts["n_kv_heads"] = values.get("num_key_value_heads") or facts["n_heads"]
    facts["head_dim"] = values.get("head_dim") or facts["dim"] // facts["n_heads"]
    facts["embedding_split_dim"] = 0 if facts["tied"] else 1
    return ModelConfig(family=model_type, dtype=dtype, **facts)


def _check_positive(values: dict[str, object], source: str) -> None:
    """Raise UserError unless these sizes, which others are derived from, are integers above 0."""
    for key, value in values.items():
        if type(value) is not int or value < 1:
            raise UserError(f"{source}: {key}={value!r}; expected an integer of at least 1")


def _rope_parameters(values: dict[str, object]) -> dict[str, object]:
    """transformers 5 nests rope_theta and the scaling type in `rope_parameters`; lay them flat as 4.x did."""
    rope = values.get("rope_parameters")
    if not isinstance(rope, dict):
        return {}
    flat: dict[str, object] = {"rope_theta": rope.get("rope_theta", 10000.0)}
    if rope.get("rope_type", "default") != "default":
        flat["rope_scaling"] = rope
    return flat


def config_from_meta(
    values: dict[str, object],
    source: str,
    *,
    ffn_dim: int,
    vocab_size: int,
    tied: bool,
    value_head: bool,
    embedding_split_dim: int,
    dtype: str,
) -> ModelConfig:
    """Read Meta's (or llama2.c's) params; the weights settle what the file leaves open.

    The FFN width and vocabulary are the tensors', because `multiple_of`, `ffn_dim_multiplier` and a
    vocab_size of -1 only describe them indirectly; values that disagree are an error.
    """
    _check_positive({key: values[key] for key in ("dim", "n_layers", "n_heads")}, source)
    dim, n_layers, n_heads = values["dim"], values["n_layers"], values["n_heads"]
    if "multiple_of" in values and not values.get("hidden_dim"):
        stated = meta_ffn_dim(dim, int(values["multiple_of"]), values.get("ffn_dim_multiplier"))
        if stated != ffn_dim:
            raise UserError(
                f"{source}: multiple_of and ffn_dim_multiplier mean an FFN width of {stated}, "
                f"but feed_forward.w1 has {ffn_dim} rows"
            )
    if int(values.get("vocab_size", -1)) not in (-1, vocab_size):
        raise UserError(
            f"{source}: vocab_size={values['vocab_size']}, but tok_embeddings has {vocab_size} rows"
        )
    if values.get("use_scaled_rope"):
        raise UserError(f"{source}: use_scaled_rope is not implemented; only unscaled rotary positions are")
    return ModelConfig(
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=int(values.get("n_kv_heads") or n_heads),
        head_dim=int(values.get("head_dim") or dim // n_heads),
        ffn_dim=ffn_dim,
        vocab_size=vocab_size,
        max_seq_len=int(values.get("max_seq_len") or 2048),
        norm_eps=float(values.get("norm_eps", 1e-5)),
        rope_theta=float(values.get("rope_theta", 10000.0)),
        tied=tied,
        value_head=value_head,
        embedding_split_dim=0 if tied else embedding_split_dim,
        dtype=dtype,
    )


def meta_ffn_dim(dim: int, multiple_of: int, ffn_dim_multiplier: float | None = None) -> int:
    """FFN width as Meta's model.py derives it from params.json."""
    hidden = int(8 * dim / 3)
    if ffn_dim_multiplier:
        hidden = int(float(ffn_dim_multiplier) * hidden)
    return multiple_of * -(-hidden // multiple_of)


def config_to_hf(config: ModelConfig) -> dict[str, object]:
    """The config.json of a solver, as transformers reads it."""
    family = FAMILIES[config.family]
    values: dict[str, object] = {"architectures": [family.architecture], "model_type": config.family}
    values |= {key: getattr(config, field) for key, (field, _) in family.fields.items()}
    values |= {key: allowed[0] for key, allowed in family.fixed.items()}
    return values | {
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "torch_dtype": config.dtype,
    }
