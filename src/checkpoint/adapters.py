"""Adapter directories (LoRA): adapter.NN.pth, and adapter.json that names the base they belong to."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from src.checkpoint import shards, storage
from src.errors import UserError
from src.jsonfile import read_json
from src.models.config import ModelConfig
from src.models.lora import LoraConfig, merged_weight

Load = Callable[[], Tensor]


class Adapter(NamedTuple):
    """What adapter.json says: the base directory and the shape of the adapters."""

    base: Path
    lora: LoraConfig


def document(base: Path, lora: LoraConfig) -> dict[str, object]:
    """The contents of adapter.json; the base's weights are pinned by their fingerprint."""
    return {
        "base": str(base.resolve()),
        "base_fingerprint": storage.fingerprint(base),
        "rank": lora.rank,
        "alpha": lora.alpha,
        "targets": list(lora.targets),
    }


def read_adapter(folder: Path, base_dir: str = "") -> Adapter | None:
    """adapter.json of a directory, its base (or base_dir) checked; None for full weights. Raises UserError."""
    path = folder / "adapter.json"
    if not path.is_file():
        return None
    values = read_json(path)
    for key in sorted({"base", "base_fingerprint", "rank", "alpha", "targets"} ^ values.keys()):
        what = "unknown; a newer version may have written it" if key in values else "missing"
        raise UserError(f"{path}: key {key!r} is {what}")
    base = Path(base_dir or str(values["base"]))
    storage.check_complete(base)
    if storage.fingerprint(base) != values["base_fingerprint"]:
        raise UserError(f"{path}: the base {base} has changed since this adapter was trained; restore it")
    rank, alpha, targets = values["rank"], values["alpha"], values["targets"]
    is_number = type(alpha) in (int, float) and abs(alpha) < 1e30  # nan is not
    if type(rank) is not int or not is_number or not isinstance(targets, list):
        raise UserError(
            f"{path}: rank, alpha and targets must be a whole number, a number and a list of names"
        )
    lora = LoraConfig(rank=rank, alpha=alpha, dropout=0.0, targets=tuple(map(str, targets)))
    return Adapter(base, lora)


def expected_shapes(config: ModelConfig, lora: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Name and whole shape of every tensor of an adapter, a verifier's value head included."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in shards.expected_shapes(config).items():
        stem = name.removesuffix(".weight")
        if stem.split(".")[-1] in lora.targets:
            shapes[f"{stem}.lora_a.weight"] = (lora.rank, shape[1])
            shapes[f"{stem}.lora_b.weight"] = (shape[0], lora.rank)
    if config.value_head:
        shapes["v_head.weight"] = (1, config.dim)
    return shapes


def fold(base: Mapping[str, Load], own: Mapping[str, Load], lora: LoraConfig) -> dict[str, Load]:
    """A base's tensors with an adapter's products added in float32, each when it is read.

    The adapter's whole tensors (a value head) take their place. Works on whole tensors and on one rank's shards
    alike: a shard's product needs that shard's factors only.
    """
    merged = dict(base)
    if "v_head.weight" in own:
        merged.pop("output.weight", None)
    for name, load in own.items():
        if name.endswith(".lora_a.weight"):
            stem = name.removesuffix(".lora_a.weight")
            weight, other = f"{stem}.weight", f"{stem}.lora_b.weight"
            if weight not in base or other not in own:
                raise UserError(f"{name} adapts nothing: the base lacks {weight}, or the adapter {other}")
            merged[weight] = lambda plain=base[weight], a=load, b=own[other]: merged_weight(
                plain(), a(), b(), lora.alpha / lora.rank
            )
        elif not name.endswith(".lora_b.weight"):
            merged[name] = load
    return merged
