"""Adapters in PEFT's layout: adapter_model.safetensors beside adapter_config.json, read and described.

PEFT puts lora_A and lora_B under the module's Hugging Face name; B's rows have that module's rotary layout.
"""

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from src.checkpoint import adapters, convert, storage
from src.checkpoint.tensor_files import StoredTensor, as_stored, read_safetensors, read_torch
from src.errors import UserError
from src.models.config import ModelConfig
from src.models.families import FAMILIES
from src.models.lora import LINEARS, LoraConfig

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.+)\.lora_([AB])\.weight")

# What PEFT can do and we cannot: key -> the values that mean it is off; absent counts as off.
_OFF: dict[str, tuple[object, ...]] = {
    "use_dora": (False, None),
    "use_rslora": (False, None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "bias": ("none",),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layers_to_transform": (None, []),
    "layer_replication": (None, []),
    "modules_to_save": (None, [], ["score"], ["classifier", "score"]),
}


class PeftAdapter(NamedTuple):
    """adapter_config.json and the tensors, under our names but in Hugging Face's rotary layout."""

    lora: LoraConfig
    base: str
    tensors: dict[str, StoredTensor]
    path: Path


def read(folder: Path) -> PeftAdapter:
    """Open an adapter directory of PEFT. Raises UserError for what it names that we do not implement."""
    path = folder / CONFIG
    values = storage.read_json(path)
    if values.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type={values.get('peft_type')!r} is not implemented; only LORA is")
    for key, allowed in _OFF.items():
        if values.get(key, allowed[0]) not in allowed:
            raise UserError(f"{path}: {key}={values[key]!r} is not implemented; expected {allowed[0]!r}")
    rank, alpha = values.get("r"), values.get("lora_alpha")
    if type(rank) is not int or type(alpha) not in (int, float):
        raise UserError(f"{path}: r={rank!r} and lora_alpha={alpha!r}; expected a whole number and a number")
    stored = _tensors(folder)
    tensors = {_our_name(name, path): tensor for name, tensor in stored.items()}
    if len(tensors) != len(stored):
        raise UserError(f"{path.parent}: two tensors mean the same parameter; remove one of them")
    targets = {name.split(".")[-3] for name in tensors if ".lora_" in name}
    lora = LoraConfig(
        rank=rank, alpha=alpha, dropout=0.0, targets=tuple(name for name in LINEARS if name in targets)
    )
    return PeftAdapter(lora, str(values.get("base_model_name_or_path")), tensors, path)


def _tensors(folder: Path) -> dict[str, StoredTensor]:
    """The stored tensors under PEFT's names."""
    if (folder / WEIGHTS).is_file():
        return read_safetensors(storage.beside(folder, folder / WEIGHTS))
    path = storage.beside(folder, folder / "adapter_model.bin")
    return {
        name: as_stored(path, name, value)
        for name, value in read_torch(path).items()
        if isinstance(value, Tensor)
    }


def _our_name(name: str, path: Path) -> str:
    """Our name of a tensor of PEFT. Raises UserError for one that adapts what we cannot adapt."""
    plain = name.removeprefix(_PREFIX)
    factor = _FACTOR.fullmatch(plain)
    if factor is None:
        if plain == "score.weight":
            return "v_head.weight"
        raise UserError(f"{path.parent}: {name!r} is no LoRA factor of a linear layer; it cannot be read")
    ours = convert.from_hf_name(f"{factor[1]}.weight").removesuffix(".weight")
    if ours.split(".")[-1] not in LINEARS:
        raise UserError(f"{path.parent}: {name!r} adapts {ours}; expected only {', '.join(LINEARS)}")
    return f"{ours}.lora_{factor[2].lower()}.weight"


def as_ours(adapter: PeftAdapter, config: ModelConfig) -> dict[str, StoredTensor]:
    """The adapter's tensors in our rotary layout. Raises UserError unless they are exactly those of the config."""
    expected = adapters.expected_shapes(config, adapter.lora)
    for name in sorted(expected.keys() ^ adapter.tensors.keys()):
        what = "missing" if name in expected else "one too many"
        raise UserError(
            f"{adapter.path.parent}: {name} is {what}; adapters of some layers only are not implemented"
        )
    tensors = {}
    for name, stored in adapter.tensors.items():
        if stored.shape != expected[name]:
            raise UserError(
                f"{adapter.path.parent}: {name} is {list(stored.shape)}, but r={adapter.lora.rank} and the base mean "
                f"{list(expected[name])}"
            )
        load = functools.partial(_reordered, convert.rotary_from_hf, name, stored, config)
        tensors[name] = stored._replace(load=load)
    return tensors


def _reordered(reorder: convert.Reorder, name: str, stored: StoredTensor, config: ModelConfig) -> Tensor:
    """A factor with the rows of B reordered as the rows of the weight that it adapts."""
    if not name.endswith(".lora_b.weight"):
        return stored.load()
    return reorder(name.replace(".lora_b.", "."), stored.load(), config)


def as_peft(tensors: Mapping[str, StoredTensor], config: ModelConfig) -> dict[str, StoredTensor]:
    """Our adapter's tensors under PEFT's names and in Hugging Face's rotary layout.

    Raises UserError for a family whose code is remote: PEFT adapts its fused linears, we adapt their parts.
    """
    if FAMILIES[config.family].remote:
        raise UserError(
            f"an adapter of a {config.family} model has no form in PEFT; merge it with --merge_lora"
        )
    theirs = {}
    for name, stored in tensors.items():
        load = functools.partial(_reordered, convert.rotary_to_hf, name, stored, config)
        plain = name.replace(".lora_a.", ".").replace(".lora_b.", ".")
        hf = convert.to_hf_name(plain)
        for ours, factor in ((".lora_a.", "lora_A"), (".lora_b.", "lora_B")):
            if ours in name:
                hf = f"{hf.removesuffix('.weight')}.{factor}.weight"
        theirs[_PREFIX + hf] = stored._replace(load=load)
    return theirs


def config_json(config: ModelConfig, lora: LoraConfig, base: str) -> dict[str, object]:
    """adapter_config.json as PEFT reads it. Raises UserError for a verifier that has no form there."""
    if config.value_head and config.score != "last":
        raise UserError(
            f"a verifier with score={config.score} has no form in PEFT: its sequence classifiers read the last "
            f"token; merge it with --merge_lora and --format hf instead"
        )
    modules = [
        convert.to_hf_name(f"layers.0.{_parent(name)}.{name}.weight").split(".")[-2] for name in lora.targets
    ]
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if config.value_head else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": modules,
        "modules_to_save": ["score"] if config.value_head else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _parent(linear: str) -> str:
    return "attention" if linear in ("wq", "wk", "wv", "wo") else "feed_forward"
