"""Adapter directories (LoRA): adapter.NN.pth, and adapter.json that names the base they belong to."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from src import runlog
from src.checkpoint import shards, storage
from src.errors import UserError
from src.jsonfile import read_json
from src.models.config import ModelConfig
from src.models.lora import LoraConfig, at_length, merged_weight

Load = Callable[[], Tensor]
Total = Callable[[str, Tensor], Tensor]  # a parameter's name and its rows' squares here [out] -> those of whole rows


SPEAKING = 8  # matrices that tell what rounding does to all
LEAST_KEPT = 0.8  # of an adapter's update; less is told


class Adapter(NamedTuple):
    """What adapter.json says: the base directory and the shape of the adapters."""

    base: Path
    lora: LoraConfig


def document(base: Path, lora: LoraConfig) -> dict[str, object]:
    """The contents of adapter.json; the base's weights are pinned by their fingerprint."""
    return {"base": str(base.resolve()), "base_fingerprint": storage.fingerprint(base), "rank": lora.rank,
            "alpha": lora.alpha, "targets": list(lora.targets), **({"dora": True} if lora.dora else {})}


def read_adapter(folder: Path, base_dir: str = "") -> Adapter | None:
    """adapter.json of a directory, its base (or base_dir) checked; None for full weights. Raises UserError."""
    path = folder / "adapter.json"
    if not path.is_file():
        return None
    values = read_json(path)
    for key in sorted({"base", "base_fingerprint", "rank", "alpha", "targets"} ^ (values.keys() - {"dora"})):
        what = "unknown; a newer version may have written it" if key in values else "missing"
        raise UserError(f"{path}: key {key!r} is {what}")
    base = Path(base_dir or str(values["base"]))
    storage.check_complete(base)
    if storage.fingerprint(base) != values["base_fingerprint"]:
        raise UserError(f"{path}: the base {base} has changed since this adapter was trained; restore it")
    rank, alpha, targets = values["rank"], values["alpha"], values["targets"]
    is_number = type(alpha) in (int, float) and abs(alpha) < 1e30  # nan is not
    if type(rank) is not int or not is_number or not isinstance(targets, list) or values.get("dora", True) is not True:
        raise UserError(f"{path}: rank, alpha and targets must be a whole number, a number and a list of names, and "
                        f"dora true where it is there")
    lora = LoraConfig(rank=rank, alpha=alpha, dropout=0.0, targets=tuple(map(str, targets)), dora="dora" in values)
    return Adapter(base, lora)


def expected_shapes(config: ModelConfig, lora: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Name and whole shape of every tensor of an adapter, a verifier's value head included."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in shards.expected_shapes(config).items():
        stem = name.removesuffix(".weight")
        if stem.split(".")[-1] in lora.targets:
            shapes[f"{stem}.lora_a.weight"] = (lora.rank, shape[1])
            shapes[f"{stem}.lora_b.weight"] = (shape[0], lora.rank)
            if lora.dora:
                shapes[f"{stem}.lora_m.weight"] = (shape[0],)
    if config.value_head:
        shapes["v_head.weight"] = (1, config.dim)
    return shapes


def fold(
    base: Mapping[str, Load], own: Mapping[str, Load], lora: LoraConfig, total: Total = lambda name, squares: squares
) -> dict[str, Load]:
    """A base's tensors with an adapter's products added in float32, each when it is read.

    The adapter's whole tensors (a value head) take their place. Works on whole tensors and on one rank's shards
    alike: a shard's product needs that shard's factors only, and DoRA's rows what `total` makes of a shard's squares.
    """
    merged = dict(base)
    if "v_head.weight" in own:
        merged.pop("output.weight", None)
    for name, load in own.items():
        if name.endswith(".lora_a.weight"):
            stem = name.removesuffix(".lora_a.weight")
            if f"{stem}.weight" not in base or f"{stem}.lora_b.weight" not in own:
                raise UserError(f"{name} adapts nothing: the base lacks {stem}.weight, or the adapter "
                                f"{stem}.lora_b.weight")
            merged[f"{stem}.weight"] = partial(_merged, stem, base, own, lora.alpha / lora.rank, total)
        elif not name.endswith((".lora_b.weight", ".lora_m.weight")):
            merged[name] = load
    return merged


def tell_of_rounding(
    folder: Path, base: Mapping[str, Load], own: Mapping[str, Load], lora: LoraConfig, dtype: torch.dtype, advice: str,
    total: Total = lambda name, squares: squares,
) -> None:
    """Warn where merged weights that are rounded to dtype keep little of an adapter: a base that has been rounded to it
    already stays as it is wherever the adapter adds less than half a step. A few matrices speak for all."""
    stems = [name.removesuffix(".lora_a.weight") for name in own if name.endswith(".lora_a.weight")]
    added = kept = 0.0
    for stem in stems[:: -(-len(stems) // SPEAKING)] if dtype != torch.float32 else ():
        weight, merged = base[f"{stem}.weight"](), _merged(stem, base, own, lora.alpha / lora.rank, total)
        update = merged - weight.float()
        added += update.square().sum().item()
        kept += (update * (merged.to(dtype).float() - weight.to(dtype).float())).sum().item()
    if kept < LEAST_KEPT * added:
        runlog.logger().warning("%s: %s, to which merged weights are rounded, keeps %.0f%% of what the adapter adds to "
                                "its base: %s", folder, str(dtype).removeprefix("torch."), 100 * kept / added, advice)


def _merged(stem: str, base: Mapping[str, Load], own: Mapping[str, Load], scale: float, total: Total) -> Tensor:
    """A matrix with its adapter [out, in], float32."""
    lora_a, lora_b = own[f"{stem}.lora_a.weight"](), own[f"{stem}.lora_b.weight"]()
    weight, magnitude = merged_weight(base[f"{stem}.weight"](), lora_a, lora_b, scale), own.get(f"{stem}.lora_m.weight")
    if magnitude is None:
        return weight
    return at_length(weight, magnitude(), total(f"{stem}.weight", weight.square().sum(1)))
