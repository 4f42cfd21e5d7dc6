"""Hugging Face's config.json to ModelConfig and back, and what --model_type claims.

What differs between families is data, src/checkpoint/families.py; nothing here knows a family by name.
"""

import dataclasses

from src.checkpoint.families import FAMILIES, MAX_WINDOW_LAYERS, UNSUPPORTED, Family
from src.checkpoint.foreign_rope import read_rope, rope_facts, rope_to_hf
from src.checkpoint.params import above_zero
from src.checkpoint.released import MODEL_TYPES, Released
from src.errors import UserError
from src.models.config import FIELDS, ModelConfig

# Facts that only SplitRL reads; they are under `splitrl` in a config.json.
OWN_FACTS = {
    "n_added_tokens", "objective", "score", "score_mean", "score_std", "step", "chat_template", "template_args",
    "system_prompt",
}
# What a row of MODEL_TYPES leaves open unless it states it: how a checkpoint was trained, cut, extended and stored.
_UNCLAIMED = OWN_FACTS | {
    "family", "max_seq_len", "rope_original_max_seq_len", "rope_low_freq_factor", "rope_high_freq_factor",
    "rope_attention_factor", "rope_short_factors", "rope_long_factors", "logn_attention", "renormalised_experts",
    "norm_eps", "embedding_split_dim", "value_head", "two_layer_head", "verifier_form", "dtype", "carried",
}
_SUFFIXES = ("-base", "-chat", "-instruct", "-it")

# ModelConfig fields where a foreign 0 or null has a meaning: derived from other fields, or switched off.
_MAY_BE_ZERO = {"n_kv_heads", "head_dim", "attention_softcap", "logit_softcap"}

_FULL, _SLIDING = "full_attention", "sliding_attention"

# What changes a model's arithmetic in transformers and is not implemented: key -> the values that leave it alone.
_REFUSED: dict[str, tuple[object, ...]] = {
    "quantization_config": (None,),
    "partial_rotary_factor": (None, 1.0),
    "is_causal": (None, True),
    "use_bidirectional_attention": (None, False),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "per_layer_config": (None, {}),
    "transformers_weights": (None,),  # the name of another file of weights
}
# What transformers computes in training alone, and nobody here: key -> the values that leave it out.
_IN_TRAINING: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(("attention_dropout", "resid_pdrop", "attn_dropout_prob", "emb_dropout_prob"), (None, 0)),
    "router_jitter_noise": (None, 0),
    "output_router_logits": (None, False),  # true: the loss that evens out experts is added
}
# What an export says anew, besides the keys of ModelConfig's facts.
_NOT_CARRIED = {
    "model_type", "architectures", "auto_map", "dtype", "torch_dtype", "rope_theta", "rope_scaling", "rope_parameters",
    "layer_types", "id2label", "label2id", "num_labels", "splitrl", "transformers_version", "_name_or_path",
}


def check_model_type(config: ModelConfig, model_type: str, source: str) -> None:
    """Raise UserError when --model_type contradicts the checkpoint; an empty string claims nothing."""
    if not model_type:
        return
    for name, expected in claimed_facts(released(model_type)).items():
        if name == "tied" and config.value_head:  # which has taken the output layer's place
            continue
        found = getattr(config, name)
        if name == "vocab_size":
            found -= config.n_added_tokens
        if found != expected:
            raise UserError(
                f"{source} has {name}={found}, but --model_type {model_type} means {name}={expected}; "
                f"drop --model_type (params.json knows) or give the right checkpoint")


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
    facts = claimed_facts(row)
    return ModelConfig(**facts, max_seq_len=max_seq_len, embedding_split_dim=0 if facts["tied"] else 1)


def claimed_facts(row: Released) -> dict[str, object]:
    """Everything that a row says of a checkpoint, by ModelConfig field."""
    family, facts = FAMILIES[row.family], dict(row.facts)
    if not facts:
        return {"family": row.family} | family.facts
    window = facts.pop("window", 0)
    claimed: dict[str, object] = facts | {"family": row.family}
    claimed.setdefault("head_dim", facts["dim"] // facts["n_heads"])
    stated = {"sliding_window": window or None, "use_sliding_window": window > 0, "max_window_layers": 0}
    claimed["windows"] = _windows(stated, family, facts["n_layers"], "--model_type")
    claimed["nope_layers"] = _nope_layers({}, family, facts["n_layers"], "--model_type")
    claimed |= family.facts
    flagged = {field for field, _ in family.flags.values()}  # as each config of the family has it
    defaults = FIELDS.keys() - _UNCLAIMED - flagged - claimed.keys()
    return claimed | {name: FIELDS[name].default for name in defaults}


def family_of(values: dict[str, object], source: str) -> Family:
    """The family of a Hugging Face config. Raises UserError for one we do not know."""
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        missing = UNSUPPORTED.get(model_type) if isinstance(model_type, str) else None
        raise UserError(
            f"{source}: model_type {model_type!r} is not supported{f' ({missing})' if missing else ''}; "
            f"expected {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def config_from_hf(stated: dict[str, object], source: str, dtype: str) -> ModelConfig:
    """Read a Hugging Face config.json. Raises UserError that names the field we lack or do not implement."""
    family = family_of(stated, source)
    values = stated | _aliased(stated, family, source)
    values |= read_rope(values, family, source)
    _check_fixed(values, family, source)
    facts = {field: _field(values, key, family, source) for key, (field, _) in family.fields.items()}
    facts |= family.facts | rope_facts(values["rope_scaling"], source)
    facts |= {field: value for key, (field, value) in family.flags.items() if is_true(values, key, source)}
    if facts["ffn_dim"] % family.ffn_parts:
        raise UserError(f"{source}: intermediate_size={values['intermediate_size']}; expected an even number")
    facts["ffn_dim"] //= family.ffn_parts
    facts["n_kv_heads"] = facts.get("n_kv_heads") or facts["n_heads"]
    facts["head_dim"] = facts.get("head_dim") or facts["dim"] // facts["n_heads"]
    facts["windows"] = _windows(values, family, facts["n_layers"], source)
    facts["nope_layers"] = _nope_layers(values, family, facts["n_layers"], source)
    if facts.get("rope_type") == "longrope":
        original = facts["rope_original_max_seq_len"]
        facts["rope_factor"] = facts["max_seq_len"] / original
        facts["max_seq_len"] = min(facts["max_seq_len"], original)
    facts["embedding_split_dim"] = 0 if facts["tied"] else 1
    try:
        config = ModelConfig(family=values["model_type"], dtype=dtype, **facts)
    except UserError as problem:
        raise UserError(f"{source}: {problem}") from None
    own = stated.get("splitrl", {})
    if not isinstance(own, dict) or own.keys() - OWN_FACTS:
        raise UserError(f"{source}: splitrl={own!r}; expected an object with some of {', '.join(sorted(OWN_FACTS))}")
    return dataclasses.replace(config, carried=_carried(stated, config, source), **own)


def _carried(stated: dict[str, object], config: ModelConfig, source: str) -> dict[str, object]:
    """What a config.json says beyond what ModelConfig holds. Raises UserError for ids that are none."""
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = stated.get(key)
        several = key == "eos_token_id" and isinstance(ids, list)
        for index in ids if several else [] if ids is None else [ids]:
            if type(index) is not int:
                raise UserError(f"{source}: {key}={ids!r}; expected a token's id, or several for an end")
    family = FAMILIES[config.family]
    said = _hf_values(config).keys() | _REFUSED.keys() | family.aliases.keys() | _NOT_CARRIED
    return {key: value for key, value in stated.items() if key not in said}


def left_out_in_training(config: ModelConfig) -> list[str]:
    """What config.json has transformers compute in training, such as dropout, which nobody does here: KEY=VALUE."""
    said = {key: config.carried.get(key) for key in _IN_TRAINING}
    return [f"{key}={value!r}" for key, value in said.items() if value not in _IN_TRAINING[key]]


def _aliased(values: dict[str, object], family: Family, source: str) -> dict[str, object]:
    """The values of keys under other writers' names for them. Raises UserError where both are there and differ."""
    for other, key in family.aliases.items():
        if other in values and values.get(key, values[other]) != values[other]:
            raise UserError(f"{source}: {key}={values[key]!r} but {other}={values[other]!r}; remove one of them")
    return {key: values[other] for other, key in family.aliases.items() if other in values}


def is_true(values: dict[str, object], key: str, source: str) -> bool:
    """A switch, off where it is absent or null. Raises UserError for what is neither true nor false."""
    if not isinstance(values.get(key) or False, bool):
        raise UserError(f"{source}: {key}={values[key]!r}; expected true or false")
    return bool(values.get(key))


def _field(values: dict[str, object], key: str, family: Family, source: str) -> object:
    field, default = family.fields[key]
    if key not in values and default is None:
        raise UserError(f"{source}: key {key!r} is missing")
    value = values.get(key, default)
    if FIELDS[field].type is bool:
        return is_true({key: value}, key, source)
    if field in _MAY_BE_ZERO and (value is None or key not in values):
        return 0
    return above_zero(value, key, FIELDS[field].type, source)


def _check_fixed(values: dict[str, object], family: Family, source: str) -> None:
    """Raise UserError for a config that asks for arithmetic we do not implement."""
    refused = _REFUSED | ({} if family.window else {"sliding_window": (None,)})
    refused = {key: allowed for key, allowed in refused.items() if key not in family.fields}
    if "hidden_act" in family.fixed and "hidden_activation" in values:
        # the newer key rules; its null means the family's own activation, whatever the older one says
        values = values | {"hidden_act": values["hidden_activation"] or family.fixed["hidden_act"][0]}
    for key, allowed in (refused | family.fixed).items():
        if values.get(key, allowed[0]) not in allowed:
            raise UserError(f"{source}: {key}={values[key]!r} is not implemented; supported: {allowed[0]!r}")


def _windows(values: dict[str, object], family: Family, n_layers: int, source: str) -> tuple[int, ...]:
    """The sliding window of each layer; empty where none has one.

    Raises UserError where layer_types says what the family's models in transformers do not compute.
    """
    which = family.window.removesuffix("-if-used")
    window = values.get("sliding_window", family.window_default)
    if which == family.window:
        used = bool(which)
    else:
        used = is_true(values, "use_sliding_window", source)
    slides = used and window is not None
    if slides:
        above_zero(window, "sliding_window", int, source)
    first = 0
    if which == "late" and slides:
        first = values.get("max_window_layers", MAX_WINDOW_LAYERS)
        if type(first) is not int:
            raise UserError(f"{source}: max_window_layers={first!r}; expected an integer")
    period = family.window_period
    own = [
        _SLIDING if slides and index >= first and not (period and (index + 1) % period == 0) else _FULL
        for index in range(n_layers)]
    kinds = own if values.get("layer_types") is None else values["layer_types"]
    if not isinstance(kinds, list) or len(kinds) != n_layers or any(k not in (_SLIDING, _FULL) for k in kinds):
        raise UserError(
            f"{source}: layer_types={kinds!r}; expected {_FULL} or {_SLIDING} for each of {n_layers} layers")
    if kinds != own and not family.layer_types:
        raise UserError(
            f"{source}: layer_types={kinds!r}, which transformers does not read for this family: its layers are "
            f"{own!r} by the other keys; remove layer_types, or make it say the same")
    if _SLIDING in kinds and not slides:
        raise UserError(
            f"{source}: layer_types={kinds!r}, but no window is in use (sliding_window={window!r}); give the "
            f"sliding_window, or make all layers {_FULL}")
    return tuple(window if kind == _SLIDING else 0 for kind in kinds) if _SLIDING in kinds else ()


def _nope_layers(values: dict[str, object], family: Family, n_layers: int, source: str) -> tuple[int, ...]:
    """The layers without rotary positions. Raises UserError."""
    if not family.nope_period:
        return ()
    if (turns := values.get("no_rope_layers")) is None:
        period = above_zero(
            values.get("no_rope_layer_interval", family.nope_period), "no_rope_layer_interval", int, source)
        return tuple(range(period - 1, n_layers, period))
    if not isinstance(turns, list) or len(turns) != n_layers or any(turn not in (0, 1) for turn in turns):
        raise UserError(f"{source}: no_rope_layers={turns!r}; expected 0 or 1 for each of {n_layers} layers")
    return tuple(layer for layer, turn in enumerate(turns) if not turn)


def config_to_hf(config: ModelConfig) -> dict[str, object]:
    """The config.json of a solver, as transformers reads it. Raises UserError for what no config of its family says."""
    own = {name: getattr(config, name) for name in sorted(OWN_FACTS)}
    own = {name: value for name, value in own.items() if value not in ({}, FIELDS[name].default)}
    values = config.carried | _hf_values(config) | ({"splitrl": own} if own or config.value_head else {})
    back = config_from_hf(values, "the exported config.json", config.dtype)
    for name in FIELDS.keys() - {"embedding_split_dim", "value_head"}:  # said by the tensors
        if getattr(back, name) != getattr(config, name):
            raise UserError(
                f"{name}={getattr(config, name)!r} has no form in a config.json of family {config.family}, where it "
                f"would be read as {getattr(back, name)!r}; keep the checkpoint in SplitRL's own format")
    return values


def _hf_values(config: ModelConfig) -> dict[str, object]:
    """What a config.json says of ModelConfig's facts."""
    family = FAMILIES[config.family]
    values: dict[str, object] = {"architectures": [family.architecture], "model_type": config.family}
    values |= {key: getattr(config, field) for key, (field, _) in family.fields.items()}
    values |= {key: values[key] or None for key, (field, _) in family.fields.items() if field.endswith("softcap")}
    values |= {key: getattr(config, field) == value for key, (field, value) in family.flags.items()}
    values |= {key: allowed[0] for key, allowed in family.fixed.items()}
    if family.nope_period:
        values["no_rope_layers"] = [int(layer not in config.nope_layers) for layer in range(config.n_layers)]
    if family.ffn_parts > 1:
        values["intermediate_size"] = family.ffn_parts * config.ffn_dim
    if family.remote:
        repository, config_class, model_class = family.remote
        classes = {"AutoConfig": config_class, "AutoModelForCausalLM": model_class}
        values["auto_map"] = {auto: f"{repository}--{name}" for auto, name in classes.items()}
    return (values | rope_to_hf(config, family) | _windows_to_hf(config, family) | {"torch_dtype": config.dtype})


def _windows_to_hf(config: ModelConfig, family: Family) -> dict[str, object]:
    """The keys that describe sliding windows in this family's config."""
    if not family.window:
        return {}
    window = max(config.windows, default=0)
    values: dict[str, object] = {}
    if family.window.endswith("-if-used"):
        values["use_sliding_window"] = window > 0
    if window and family.window.startswith("late"):
        values["max_window_layers"] = config.windows.index(window)
    # layer_types makes another model of one whose layers are alike by family: it is said where they differ
    if family.layer_types and (family.window != "all" or len(set(config.windows)) > 1):
        values["layer_types"] = [_SLIDING if config.window_of(layer) else _FULL for layer in range(config.n_layers)]
    if window or "layer_types" not in values:  # else no layer reads it
        values["sliding_window"] = window or None
    return values
