"""Our params.json to ModelConfig, and the checks of numbers in what describes a model, whoever wrote it."""

import dataclasses
import math

from src.checkpoint.families import FAMILIES
from src.errors import UserError
from src.models.config import FIELDS, ModelConfig, is_number


def above_zero(value: object, key: str, kind: object, source: str) -> int | float:
    """A number of a foreign description. kind: int where it must be whole. Raises UserError that names the key."""
    if not is_number(value) or value <= 0:
        raise UserError(f"{source}: {key}={value!r}; expected a number above 0")
    if kind is int and type(value) is not int:
        raise UserError(f"{source}: {key}={value!r}; expected an integer")
    return value


def refuse_infinities(values: object, source: str, key: str = "") -> None:
    """Raise UserError, by key and value, for NaN or an infinity anywhere in what a json file said."""
    if isinstance(values, dict):
        for name, value in values.items():
            refuse_infinities(value, source, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list):
        for index, value in enumerate(values):
            refuse_infinities(value, source, f"{key}[{index}]")
    elif type(values) is float and not math.isfinite(values):
        raise UserError(f"{source}: {key}={values}; expected a finite number")


def config_from_dict(values: dict[str, object], source: str) -> ModelConfig:
    """Rebuild a config from params.json; `source` names the file. Raises UserError on a missing or unknown key."""
    unknown = sorted(set(values) - set(FIELDS))
    if unknown:
        raise UserError(f"{source}: unknown key {unknown[0]!r}; a newer version of SplitRL may have written it")
    missing = [name for name, field in FIELDS.items()
               if field.default is field.default_factory is dataclasses.MISSING and name not in values]
    if missing:
        raise UserError(f"{source}: key {missing[0]!r} is missing")
    lists = [name for name, field in FIELDS.items() if field.default == ()]
    for name in (*lists, "carried"):
        if name in values and not isinstance(values[name], list if name in lists else dict):
            what = "a list of numbers" if name in lists else "an object"
            raise UserError(f"{source}: {name}={values[name]!r}; expected {what}")
    try:
        # tuples, not json's lists: a config is hashed, as the key of caches
        config = ModelConfig(**values | {name: tuple(values[name]) for name in lists if name in values})
    except UserError as problem:
        raise UserError(f"{source}: {problem}") from None
    if config.family not in FAMILIES:
        *others, last = FAMILIES
        raise UserError(f"{source}: family={config.family!r}: expected {', '.join(others)} or {last}")
    return config
