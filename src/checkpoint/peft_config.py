"""adapter_config.json of PEFT: which keys change what an adapter computes, and the few that we compute.

The table has every key of PEFT 0.21 and of older writers. A value that is not known to be right is refused by name.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from src.errors import UserError
from src.jsonfile import read_json

CONFIG = "adapter_config.json"
# Starting values that change the base when PEFT opens the adapter, in a way that the base alone decides.
CHANGE_BASE = ("pissa", "olora")
_OFF: tuple[object, ...] = (None, False, [], {}, "")  # a key that we do not know is not in use
_ANY: tuple[object, ...] = ()

# Key -> the values under which we compute what PEFT does; _ANY = every value does, or it is read below.
_KEYS: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "task_type": (None, "CAUSAL_LM", "SEQ_CLS"),
    **dict.fromkeys(("use_rslora", "use_dora"), (None, False, True)),
    "init_lora_weights": (None, False, True, "gaussian", "orthogonal", "eva", "mica", *CHANGE_BASE),
    # off, or another computation
    "bias": (None, "none"),
    "layers_pattern": (None, [], "", "layers", ["layers"]),
    "trainable_token_indices": (None, [], {}),
    **dict.fromkeys(("lora_bias", "fan_in_fan_out", "use_qalora", "use_bdlora"), (None, False)),
    **dict.fromkeys(("layer_replication", "target_parameters"), (None, [])),
    **dict.fromkeys(("alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config",
                     "velora_config", "megatron_config", "enable_lora"), (None,)),
    # read below
    **dict.fromkeys(("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules",
                     "layers_to_transform", "modules_to_save", "base_model_name_or_path"), _ANY),
    # about training, files or starting values that PEFT replaces by those of the adapter; ensure_weight_tying is of
    # embeddings and the output layer, which carry no adapter here
    **dict.fromkeys((
        "auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "inference_mode", "lora_dropout",
        "lora_ga_config", "loftq_config", "megatron_core", "merge_weights", "peft_version", "qalora_group_size",
        "revision", "runtime_config",
    ), _ANY),
}


class Scaled(NamedTuple):
    """What one linear's adapter is multiplied with: W + alpha / rank B A."""

    rank: int
    alpha: float

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank


class PeftConfig(NamedTuple):
    """The keys of adapter_config.json that we compute."""

    path: Path
    base: str
    init: object
    has_score: bool
    has_dora: bool
    values: Mapping[str, object]

    def scaled(self, module: str) -> Scaled:
        """Rank and alpha of a module under its Hugging Face name, those of patterns included. Rank-stabilised adapters
        (Kalajdzievski 2023) are multiplied with alpha / sqrt(rank): their alpha says so here."""
        rank, alpha = (next((value for key, value in (self.values.get(name) or {}).items()
                             if re.match(rf"(.*\.)?({key})$", module)),
                            self.values[default])
                       for name, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")))
        return Scaled(rank, alpha * math.sqrt(rank) if self.values.get("use_rslora") else alpha)

    def targets(self, module: str) -> bool:
        """Whether PEFT puts an adapter on a module."""
        wanted, left_out = self.values.get("target_modules"), self.values.get("exclude_modules")
        if left_out and _names(left_out, module) or wanted != "all-linear" and not _names(wanted, module):
            return False
        layers = self.values.get("layers_to_transform")
        if layers in (None, []) or module in wanted:  # what is named whole is meant whatever its layer is
            return True
        return int(re.search(r"\.(\d+)\.", module)[1]) in (layers if isinstance(layers, list) else [layers])


def _names(wanted: str | list[str], module: str) -> bool:
    """Whether target_modules or exclude_modules, a regular expression or a list of ends of names, means a module."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, module) is not None
    return any(module == end or module.endswith(f".{end}") for end in wanted)


def read(folder: Path) -> PeftConfig:
    """adapter_config.json of a directory. Raises UserError for a key or a value that may change the result."""
    path = folder / CONFIG
    values = read_json(path)
    if values.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type={_shown(values.get('peft_type'))} is not implemented; only LORA is")
    for key, value in values.items():
        if key not in _KEYS and not _among(value, _OFF):
            raise UserError(f"{path}: key {key!r} is unknown and may change what the adapter computes: it is "
                            f"{_shown(value)}; merge the adapter with the PEFT that wrote it (merge_and_unload) and "
                            "bring the result")
        allowed = _KEYS.get(key, _ANY)
        if allowed and not _among(value, allowed):
            _refuse(path, key, value, allowed)
    _check_numbers(path, values)
    _check_modules(path, values)
    if values.get("init_lora_weights") == "pissa" and not all(
        alpha > 0 for alpha in (values["lora_alpha"], *(values.get("alpha_pattern") or {}).values())
    ):
        raise UserError(f"{path}: init_lora_weights='pissa' divides by lora_alpha; expected more than 0")
    has_score = values.get("task_type") == "SEQ_CLS" or "score" in (values.get("modules_to_save") or ())
    return PeftConfig(path, str(values.get("base_model_name_or_path")), values.get("init_lora_weights"), has_score,
                      bool(values.get("use_dora")), values)


def _refuse(path: Path, key: str, value: object, allowed: tuple[object, ...]) -> None:
    way_out = ("such an adapter was trained on another base than the one it names, which it alone does not tell; save "
               "it in PEFT with path_initial_model_for_weight_conversion, or merge it there (merge_and_unload)"
               if key == "init_lora_weights" else f"expected {' or '.join(map(repr, allowed))}")
    raise UserError(f"{path}: {key}={_shown(value)} is not implemented; {way_out}")


def _check_numbers(path: Path, values: Mapping[str, object]) -> None:
    """Raise UserError unless ranks are whole numbers from 1 on, and alphas numbers."""
    rank, alpha = values.get("r"), values.get("lora_alpha")
    if not (_is_rank(rank) and _is_number(alpha)):
        raise UserError(f"{path}: r={_shown(rank)} and lora_alpha={_shown(alpha)}; expected a whole number from 1 on "
                        "and a number")
    for name, is_right in (("rank_pattern", _is_rank), ("alpha_pattern", _is_number)):
        pattern = values.get(name) or {}
        if not isinstance(pattern, dict) or not all(map(is_right, pattern.values())):
            raise UserError(f"{path}: {name}={_shown(pattern)}; expected names of modules with their numbers")
        for key in pattern:
            _check_expression(path, name, key)


def _check_modules(path: Path, values: Mapping[str, object]) -> None:
    """Raise UserError unless it is said which modules carry an adapter, and none but a score layer is saved whole."""
    saved = values.get("modules_to_save") or []
    if not isinstance(saved, list) or any(name not in ("classifier", "score") for name in saved):
        _refuse(path, "modules_to_save", saved, (None, ["classifier", "score"]))
    for name in ("target_modules", "exclude_modules"):
        wanted = values.get(name)
        if isinstance(wanted, str):
            _check_expression(path, name, wanted)
        elif name == "target_modules" or wanted is not None:
            if not isinstance(wanted, list) or not all(isinstance(end, str) for end in wanted):
                raise UserError(f"{path}: {name}={_shown(wanted)}; expected a list of names of modules")
    layers = values.get("layers_to_transform")
    if layers not in (None, []):
        numbers = layers if isinstance(layers, list) else [layers]
        if not isinstance(values["target_modules"], list) or not all(type(number) is int for number in numbers):
            raise UserError(f"{path}: layers_to_transform={_shown(layers)}; expected numbers of layers, and a list for "
                            "target_modules")


def _check_expression(path: Path, name: str, expression: str) -> None:
    """Raise UserError for a regular expression that is none, or that may take for ever on a module's name."""
    try:
        re.compile(f"({expression})")
    except (re.error, OverflowError, RecursionError) as problem:
        raise UserError(f"{path}: {name} has {_shown(expression)}, no regular expression ({problem})") from None
    if re.search(r"\)[*+{]", expression) or len(re.findall(r"[*+{]", expression)) > 8:
        raise UserError(f"{path}: {name} has {_shown(expression)}; expected fewer repetitions, none of a group")


def _is_rank(value: object) -> bool:
    return type(value) is int and 0 < value < 2**31


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30  # nan is not


def _among(value: object, allowed: tuple[object, ...]) -> bool:
    """Whether a value is one of these, 1 being no True."""
    return any(type(value) is type(each) and value == each for each in allowed)


def _shown(value: object) -> str:
    """A value for a message, not too long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
