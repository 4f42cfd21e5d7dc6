"""Foreign descriptions of a model - Hugging Face's config.json, Meta's params.json - to ModelConfig and back.

What differs between families stands in src/models/families.py; nothing here knows a family by name.
"""

from typing import NamedTuple

from src.errors import UserError
from src.models.config import FIELDS, ModelConfig
from src.models.families import (
    FAMILIES,
    META_EXPERTS,
    META_OWN_HEAD_DIM,
    META_ROPE_FACTOR,
    META_ROPE_FACTOR_TIED,
    MODEL_TYPES,
    PLAIN,
    ROPE_TYPES,
    Family,
    Released,
)

# What a row of MODEL_TYPES leaves open unless it states it: how a checkpoint was trained, cut, extended and stored.
_UNCLAIMED = {
    "family", "n_added_tokens", "max_seq_len", "rope_original_max_seq_len", "rope_low_freq_factor",
    "rope_high_freq_factor", "logn_attention", "renormalised_experts", "norm_eps", "embedding_split_dim",
    "value_head", "score", "score_mean", "score_std", "step", "dtype", "chat_template",
}  # fmt: skip
_SUFFIXES = ("-base", "-chat", "-instruct", "-it")

# ModelConfig fields where a foreign 0 or null has a meaning: derived from other fields, or switched off.
_MAY_BE_ZERO = {"n_kv_heads", "head_dim", "attention_softcap", "logit_softcap"}

_FULL, _SLIDING = "full_attention", "sliding_attention"


def check_model_type(config: ModelConfig, model_type: str, source: str) -> None:
    """Raise UserError when --model_type contradicts the checkpoint; an empty string claims nothing."""
    if not model_type:
        return
    for name, expected in claimed_facts(released(model_type), config).items():
        found = getattr(config, name)
        if name == "vocab_size":
            found -= config.n_added_tokens
        if found != expected:
            raise UserError(
                f"{source} has {name}={found}, but --model_type {model_type} means {name}={expected}; "
                f"drop --model_type (params.json knows) or give the right checkpoint"
            )


def released(model_type: str) -> Released:
    """The row of a --model_type. Raises UserError for a name without one."""
    for suffix in ("", *_SUFFIXES):
        if model_type.removesuffix(suffix) in MODEL_TYPES:
            return MODEL_TYPES[model_type.removesuffix(suffix)]
    raise UserError(f"--model_type {model_type} is unknown; expected one of {', '.join(MODEL_TYPES)}")


def released_config(model_type: str, max_seq_len: int) -> ModelConfig:
    """The shape of a released size, for a plan without its checkpoint. Raises UserError for a name that has none."""
    row = released(model_type)
    if "dim" not in row.facts:
        raise UserError(f"{model_type} names a family; expected a size, such as llama-2-7b")
    facts: dict[str, object] = {
        "head_dim": row.facts["dim"] // row.facts["n_heads"],
        **FAMILIES[row.family].facts,
    }
    facts |= {name: value for name, value in row.facts.items() if name in FIELDS}
    return ModelConfig(**facts | {"family": row.family, "max_seq_len": max_seq_len})


def claimed_facts(row: Released, config: ModelConfig) -> dict[str, object]:
    """Everything that a row says of a checkpoint of this config, by ModelConfig field."""
    family, facts = FAMILIES[row.family], dict(row.facts)
    if not facts:
        return {"family": row.family} | family.facts
    window = facts.pop("window", 0)
    claimed: dict[str, object] = facts | {"family": row.family}
    claimed.setdefault("head_dim", facts["dim"] // facts["n_heads"])
    stated = {"sliding_window": window, "use_sliding_window": window > 0}
    claimed["windows"] = _windows(stated, family, facts["n_layers"], "--model_type")
    claimed |= family.facts
    claimed |= {name: FIELDS[name].default for name in FIELDS.keys() - _UNCLAIMED - claimed.keys()}
    if config.value_head:
        del claimed["tied"]  # a value head has taken the output layer's place
    return claimed


def family_of(values: dict[str, object], source: str) -> Family:
    """The family of a Hugging Face config. Raises UserError for one we do not know."""
    if values.get("model_type") not in FAMILIES:
        raise UserError(
            f"{source}: model_type {values.get('model_type')!r} is not supported; expected {', '.join(FAMILIES)}"
        )
    return FAMILIES[values["model_type"]]


def config_from_hf(values: dict[str, object], source: str, dtype: str) -> ModelConfig:
    """Read a Hugging Face config.json. Raises UserError that names the field we lack or do not implement."""
    family = family_of(values, source)
    values = values | {key: values[other] for other, key in family.aliases.items() if other in values}
    values = values | _rope_parameters(values, source)
    _check_fixed(values, family, source)
    facts = {field: _field(values, key, family, source) for key, (field, _) in family.fields.items() if field}
    facts |= family.facts | _rope_facts(values, source)
    facts |= {field: value for key, (field, value) in family.flags.items() if values.get(key)}
    if facts["ffn_dim"] % family.ffn_parts:
        raise UserError(f"{source}: intermediate_size={values['intermediate_size']}; expected an even number")
    facts["ffn_dim"] //= family.ffn_parts
    facts["n_kv_heads"] = facts.get("n_kv_heads") or facts["n_heads"]
    facts["head_dim"] = facts.get("head_dim") or facts["dim"] // facts["n_heads"]
    facts["windows"] = _windows(values, family, facts["n_layers"], source)
    facts["embedding_split_dim"] = 0 if facts["tied"] else 1
    return ModelConfig(family=values["model_type"], dtype=dtype, **facts)


def _field(values: dict[str, object], key: str, family: Family, source: str) -> object:
    """The value of a config key for its ModelConfig field, of that field's type. Raises UserError."""
    field, default = family.fields[key]
    if key not in values and default is None:
        raise UserError(f"{source}: key {key!r} is missing")
    value = values.get(key, default)
    if FIELDS[field].type is bool:
        return bool(value)
    value = 0 if value is None else value
    if type(value) not in (int, float) or value < 0 or (value == 0 and field not in _MAY_BE_ZERO):
        raise UserError(f"{source}: {key}={values.get(key)!r}; expected a number above 0")
    if FIELDS[field].type is int and type(value) is not int:
        raise UserError(f"{source}: {key}={value!r}; expected an integer")
    return value


def _check_fixed(values: dict[str, object], family: Family, source: str) -> None:
    """Raise UserError for a config that asks for arithmetic we do not implement."""
    refused = {"quantization_config": (None,), "partial_rotary_factor": (None, 1.0)}
    if not family.window:
        refused["sliding_window"] = (None,)
    if "hidden_act" in family.fixed and "hidden_activation" in values:
        # the newer key rules; its null stands for the family's own activation, whatever the older one says
        values = values | {"hidden_act": values["hidden_activation"] or family.fixed["hidden_act"][0]}
    for key, allowed in (refused | family.fixed).items():
        if values.get(key, allowed[0]) not in allowed:
            raise UserError(f"{source}: {key}={values[key]!r} is not implemented; supported: {allowed[0]!r}")


def _rope_parameters(values: dict[str, object], source: str) -> dict[str, object]:
    """transformers 5 nests rope_theta and the scaling in `rope_parameters`; lay them flat as 4.x did."""
    rope = values.get("rope_parameters")
    if not isinstance(rope, dict):
        return {}
    if any(isinstance(value, dict) for value in rope.values()):
        raise UserError(f"{source}: rope_parameters differ between layers, which is not implemented")
    flat: dict[str, object] = {
        key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope
    }
    if rope.get("rope_type", "default") != "default":
        flat["rope_scaling"] = rope
    return flat


def _rope_facts(values: dict[str, object], source: str) -> dict[str, object]:
    """The ModelConfig fields of `rope_scaling`. Raises UserError for a type that is not implemented."""
    scaling = values.get("rope_scaling")
    if not scaling:
        return {}
    kind = scaling.get("rope_type", scaling.get("type")) if isinstance(scaling, dict) else scaling
    if kind == "default":
        return {}
    if kind not in ROPE_TYPES:
        raise UserError(
            f"{source}: rope_scaling={scaling!r} is not implemented; supported: {', '.join(ROPE_TYPES)}"
        )
    rope_type, keys = ROPE_TYPES[kind]
    missing = [key for key in keys if key not in scaling]
    if missing:
        raise UserError(f"{source}: rope_scaling of type {kind} lacks {missing[0]!r}")
    return {"rope_type": rope_type} | {field: scaling[key] for key, field in keys.items()}


def _windows(values: dict[str, object], family: Family, n_layers: int, source: str) -> tuple[int, ...]:
    """The sliding window of each layer; empty where none has one. Raises UserError."""
    which = family.window.removesuffix("-if-used")
    window = values.get("sliding_window", family.window_default)
    if not which or not window or (which != family.window and not values.get("use_sliding_window")):
        return ()
    first = {"late": values.get("max_window_layers", n_layers)}.get(which, 0)
    windowed = [index >= first and (which != "alternate" or index % 2 == 0) for index in range(n_layers)]
    kinds = values.get("layer_types") or [_SLIDING if sliding else _FULL for sliding in windowed]
    if len(kinds) != n_layers or set(kinds) - {_SLIDING, _FULL}:
        raise UserError(
            f"{source}: layer_types={kinds!r}; expected {_FULL} or {_SLIDING} for each of {n_layers} layers"
        )
    return tuple(window if kind == _SLIDING else 0 for kind in kinds) if _SLIDING in kinds else ()


class MetaWeights(NamedTuple):
    """What Meta's params leave open and the tensors settle."""

    ffn_dim: int
    vocab_size: int
    tied: bool
    value_head: bool
    embedding_split_dim: int
    dtype: str


def config_from_meta(values: dict[str, object], source: str, weights: MetaWeights) -> ModelConfig:
    """Read a params.json or a file's model_args; the weights settle what the file leaves open.

    The FFN width and vocabulary are the tensors', because `multiple_of`, `ffn_dim_multiplier` and a
    vocab_size of -1 only describe them indirectly; values that disagree are an error.
    """
    for key in ("dim", "n_layers", "n_heads"):
        if type(values[key]) is not int or values[key] < 1:
            raise UserError(f"{source}: {key}={values[key]!r}; expected an integer of at least 1")
    dim, n_layers, n_heads = values["dim"], values["n_layers"], values["n_heads"]
    stated = values.get("hidden_dim")
    if "multiple_of" in values and not stated:
        stated = meta_ffn_dim(dim, int(values["multiple_of"]), values.get("ffn_dim_multiplier"))
    if stated not in (None, weights.ffn_dim):
        raise UserError(f"{source} means an FFN width of {stated}, but w1 has {weights.ffn_dim} rows")
    if int(values.get("vocab_size", -1)) not in (-1, weights.vocab_size):
        raise UserError(
            f"{source}: vocab_size={values['vocab_size']}, but tok_embeddings has {weights.vocab_size} rows"
        )
    experts = values.get("moe") or {}
    own_head_dim = "hidden_dim" in values and "head_dim" in values
    family = META_EXPERTS if experts else META_OWN_HEAD_DIM if own_head_dim else PLAIN
    window = values.get("sliding_window")
    return ModelConfig(
        family=family,
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=int(values.get("n_kv_heads") or n_heads),
        head_dim=int(values.get("head_dim") or dim // n_heads),
        max_seq_len=int(values.get("max_seq_len") or 2048),
        norm_eps=float(values.get("norm_eps", 1e-5)),
        rope_theta=float(values.get("rope_theta", 10000.0)),
        windows=(window,) * n_layers if window else (),
        n_experts=experts.get("num_experts", 0),
        n_active_experts=experts.get("num_experts_per_tok", 0),
        **_meta_rope(values, weights.tied),
        **weights._replace(embedding_split_dim=0 if weights.tied else weights.embedding_split_dim)._asdict(),
    )


def _meta_rope(values: dict[str, object], tied: bool) -> dict[str, object]:
    """The ModelConfig fields of Meta's `use_scaled_rope`."""
    if not values.get("use_scaled_rope"):
        return {}
    factor = values.get("rope_scaling_factor") or (META_ROPE_FACTOR_TIED if tied else META_ROPE_FACTOR)
    high = values.get("rope_high_freq_factor") or 4.0
    return {"rope_type": "wavelength", "rope_factor": float(factor), "rope_high_freq_factor": float(high)}


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
    values |= {key: getattr(config, field) if field else 0 for key, (field, _) in family.fields.items()}
    values |= {
        key: values[key] or None for key, (field, _) in family.fields.items() if field.endswith("softcap")
    }
    values |= {key: getattr(config, field) == value for key, (field, value) in family.flags.items()}
    values |= {key: allowed[0] for key, allowed in family.fixed.items()}
    values["intermediate_size"] = family.ffn_parts * config.ffn_dim
    if family.remote:
        repository, config_class, model_class = family.remote
        classes = {"AutoConfig": config_class, "AutoModelForCausalLM": model_class}
        values["auto_map"] = {auto: f"{repository}--{name}" for auto, name in classes.items()}
    return (
        values | _rope_to_hf(config, family) | _windows_to_hf(config, family) | {"torch_dtype": config.dtype}
    )


def _rope_to_hf(config: ModelConfig, family: Family) -> dict[str, object]:
    """`rope_scaling`, null where frequencies are not stretched; nothing where a flag of the family says it."""
    if any(field == "rope_type" for field, _ in family.flags.values()):
        return {}
    for kind, (rope_type, keys) in ROPE_TYPES.items():
        if config.rope_type == rope_type:
            scaling = {"rope_type": kind} | {key: getattr(config, field) for key, field in keys.items()}
            return {"rope_scaling": scaling}
    return {"rope_scaling": None}


def _windows_to_hf(config: ModelConfig, family: Family) -> dict[str, object]:
    """The keys that describe sliding windows in this family's config."""
    if not family.window:
        return {}
    window = max(config.windows, default=0)
    values: dict[str, object] = {"sliding_window": window or None}
    if family.window.endswith("-if-used"):
        values["use_sliding_window"] = window > 0
    if family.window.startswith("late"):
        values["max_window_layers"] = config.windows.index(window) if window else config.n_layers
    if window and not family.window.startswith("all"):
        values["layer_types"] = [_SLIDING if each else _FULL for each in config.windows]
    return values
