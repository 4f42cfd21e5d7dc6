"""Rotary positions in a Hugging Face config.json: how they are stretched, and with which base, to ModelConfig and back.

transformers 5 keeps all of it in `rope_parameters`, older files in `rope_scaling` and keys of their own; both are read,
and the older form, which all versions read, is written.
"""

from src.checkpoint.families import LOCAL_THETA, ROPE_TYPES, Family
from src.checkpoint.params import above_zero
from src.errors import UserError
from src.models.config import FIELDS, ModelConfig

CONTEXT = "original_max_position_embeddings"
# They may be in rope_parameters or on their own.
BESIDE_ROPE = ("rope_theta", "partial_rotary_factor", CONTEXT)


def read_rope(values: dict[str, object], family: Family, source: str) -> dict[str, object]:
    """`rope_scaling`, the keys of BESIDE_ROPE and, where layers with a window have one, their base: wherever they are.

    transformers 5 nests them all in `rope_parameters`, and where `rope_scaling` is there too it reads that alone.
    Raises UserError where two places say different things.
    """
    local, values = _by_kind_of_layer(values, family, source)
    said = []
    for key in ("rope_scaling", "rope_parameters"):
        rope = values.get(key) or {}
        if not isinstance(rope, dict):
            raise UserError(f"{source}: {key}={rope!r} is not implemented; expected an object or null")
        if any(isinstance(value, dict) for value in rope.values()):
            raise UserError(f"{source}: {key} differ between layers, which is not implemented")
        outside = {name: values[name] for name in BESIDE_ROPE if values.get(name) is not None}
        for name in outside.keys() & rope.keys():
            if outside[name] != rope[name]:
                raise UserError(f"{source}: {name}={outside[name]!r}, but {rope[name]!r} in {key}; remove one of them")
        _check_context(rope, outside, family, source)
        if rope:
            inside = {name: rope[name] for name in BESIDE_ROPE if name in rope}
            said.append(outside | inside | {"rope_scaling": outside | rope})
    if len(said) == 2:
        first, second = (each | {"rope_scaling": rope_facts(each["rope_scaling"], source)} for each in said)
        if first != second:
            raise UserError(f"{source}: rope_scaling={values['rope_scaling']!r} and "
                            f"rope_parameters={values['rope_parameters']!r} differ; remove the one that is not meant "
                            "(transformers reads rope_scaling alone)")
    return local | (said[0] if said else {"rope_scaling": {}})


def _check_context(rope: dict[str, object], outside: dict[str, object], family: Family, source: str) -> None:
    """Raise UserError where transformers takes another original context than the one that is stated."""
    kind = rope.get("rope_type", rope.get("type"))
    if not isinstance(kind, str) or CONTEXT not in ROPE_TYPES.get(kind, ("", {}))[1]:
        return
    if family.original_context and CONTEXT not in outside and rope.get(CONTEXT) not in (None, family.original_context):
        raise UserError(f"{source}: {CONTEXT}={rope[CONTEXT]!r} stands with the rope alone, where transformers takes "
                        f"{family.original_context} for this family; state it on its own too")
    if LOCAL_THETA in family.fields | family.fixed and CONTEXT in outside and CONTEXT not in rope:
        raise UserError(f"{source}: {CONTEXT}={outside[CONTEXT]!r} stands on its own, where transformers does not read "
                        "it for this family; state it with the rope")


def _by_kind_of_layer(
    values: dict[str, object], family: Family, source: str
) -> tuple[dict[str, object], dict[str, object]]:
    """The base of layers with a window, and the values with the `rope_parameters` of all other layers alone. Raises
    UserError where layers with a window are stretched."""
    nested = values.get("rope_parameters")
    has_two = LOCAL_THETA in family.fields | family.fixed
    if not has_two or not isinstance(nested, dict) or not nested:
        return {}, values
    if "full_attention" not in nested:
        raise UserError(f"{source}: rope_parameters={nested!r} do not say which layers they are of; expected an object "
                        "under full_attention, and one under sliding_attention (transformers reads nothing else there)")
    local = nested.get("sliding_attention") or {}
    if not isinstance(local, dict) or local.get("rope_type", "default") != "default":
        raise UserError(f"{source}: rope_parameters.sliding_attention={local!r} is not implemented; expected 'default'")
    base = {LOCAL_THETA: local["rope_theta"]} if "rope_theta" in local else {}
    return base, values | {"rope_parameters": nested["full_attention"]}


def rope_facts(rope: dict[str, object], source: str) -> dict[str, object]:
    """The ModelConfig fields of a stretched rope. Raises UserError for a type that is not implemented."""
    kinds = [rope[key] for key in ("rope_type", "type") if key in rope]
    if not kinds and not rope.keys() - set(BESIDE_ROPE):
        return {}
    if kinds and kinds[0] == kinds[-1] == "default":
        return {}
    if not kinds or kinds[0] != kinds[-1] or not isinstance(kinds[0], str) or kinds[0] not in ROPE_TYPES:
        raise UserError(f"{source}: rope_scaling={rope!r} is not implemented; supported: {', '.join(ROPE_TYPES)}")
    rope_type, keys = ROPE_TYPES[kinds[0]]
    rope = {key: value for key, value in rope.items() if value is not None and (key, value) != ("truncate", True)}
    missing = [key for key, (_, default) in keys.items() if default is None and key not in rope]
    if missing:
        raise UserError(f"{source}: rope_scaling of type {kinds[0]} lacks {missing[0]!r}")
    unknown = sorted(rope.keys() - keys.keys() - {"rope_type", "type", *BESIDE_ROPE})
    if unknown and any(default is not None for _, default in keys.values()):  # these types have further keys
        raise UserError(f"{source}: rope_scaling.{unknown[0]}={rope[unknown[0]]!r} is not implemented")
    return {"rope_type": rope_type} | {field: _parameter(rope[key], key, FIELDS[field].type, source)
                                       if key in rope else default for key, (field, default) in keys.items()}


def _parameter(value: object, key: str, kind: object, source: str) -> float | tuple[float, ...]:
    """A number above 0, or a list of them. Raises UserError."""
    if kind in (int, float):
        return above_zero(value, f"rope_scaling.{key}", kind, source)
    if not isinstance(value, list):
        raise UserError(f"{source}: rope_scaling.{key}={value!r}; expected a list of numbers")
    return tuple(above_zero(each, f"rope_scaling.{key}", float, source) for each in value)


def rope_to_hf(config: ModelConfig, family: Family) -> dict[str, object]:
    """`rope_scaling`, null where frequencies are not stretched; nothing where a flag of the family says it."""
    if any(field == "rope_type" for field, _ in family.flags.values()):
        return {}
    for kind, (rope_type, keys) in ROPE_TYPES.items():
        if config.rope_type == rope_type:
            # code of remote families knows the older name alone
            scaling: dict[str, object] = {"type" if family.remote else "rope_type": kind}
            for key, (field, default) in keys.items():
                value = getattr(config, field)
                if value != default:
                    scaling[key] = list(value) if isinstance(value, tuple) else value
            said: dict[str, object] = {"rope_scaling": scaling}
            if rope_type == "longrope":  # the context of its short factors, and the whole, which its scale is made of
                original = config.rope_original_max_seq_len
                whole = round(original * config.rope_factor)
                said |= {"max_position_embeddings": whole, CONTEXT: original}
            return said
    return {"rope_scaling": None}
