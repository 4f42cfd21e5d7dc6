"""Adapters in PEFT's layout: adapter_model.safetensors with adapter_config.json, read and written.

PEFT puts lora_A and lora_B under the module's Hugging Face name, and DoRA's lengths as lora_magnitude_vector; B's rows
and these have that module's rotary layout. Ours have
one rank and one scale, and adapt the base as it is: what PEFT does by module or to the base goes into the factors.
"""

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from src.checkpoint import adapters, convert, peft_config, storage
from src.checkpoint.families import FAMILIES
from src.checkpoint.peft_config import PeftConfig, Scaled
from src.checkpoint.tensor_files import StoredTensor
from src.checkpoint.weight_files import as_float, open_file
from src.errors import UserError
from src.models.config import ModelConfig
from src.models.lora import LINEARS, LoraConfig

CONFIG = peft_config.CONFIG
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# PEFT's name of a factor after its module's, and ours
_FACTORS = {"lora_A.weight": "lora_a", "lora_B.weight": "lora_b", "lora_magnitude_vector": "lora_m"}
_FACTOR = re.compile(rf"(.+)\.({'|'.join(map(re.escape, _FACTORS))})")


class PeftAdapter(NamedTuple):
    """adapter_config.json and the tensors, under our names but in Hugging Face's rotary layout."""

    config: PeftConfig
    tensors: dict[str, StoredTensor]
    folder: Path

    def linears(self) -> dict[str, Scaled]:
        """Our names of the linears that carry an adapter, and what theirs are multiplied with."""
        stems = sorted({name.rpartition(".lora_")[0] for name in self.tensors if ".lora_" in name})
        return {stem: self.config.scaled(module_name(stem)) for stem in stems}


def read(folder: Path) -> PeftAdapter:
    """Open an adapter directory of PEFT. Raises UserError for what it names that we do not implement."""
    config = peft_config.read(folder)
    path = storage.inside(folder, weights_path(folder))
    stored = open_file(path).tensors
    tensors = {_our_name(name, folder): as_float(path, name, tensor) for name, tensor in stored.items()}
    if len(tensors) != len(stored):
        raise UserError(f"{folder}: two tensors mean the same parameter; remove one of them")
    if config.has_score != ("v_head.weight" in tensors):
        raise UserError(f"{config.path}: task_type and modules_to_save {'name' if config.has_score else 'lack'} the "
                        f"score layer of a classifier, but the tensors {'lack' if config.has_score else 'hold'} it")
    return PeftAdapter(config, tensors, folder)


def weights_path(folder: Path) -> Path:
    """The tensors of an adapter directory: where both forms lie, those that PEFT reads."""
    return folder / (WEIGHTS if (folder / WEIGHTS).is_file() else "adapter_model.bin")


def module_name(stem: str) -> str:
    """Hugging Face's name of one of our linears."""
    return convert.to_hf_name(f"{stem}.weight").removesuffix(".weight")


def _our_name(name: str, folder: Path) -> str:
    """Our name of a tensor of PEFT. Raises UserError for one that adapts what we cannot adapt."""
    plain = name.removeprefix(_PREFIX)
    factor = _FACTOR.fullmatch(plain)
    if factor is None:
        if plain == "score.weight":
            return "v_head.weight"
        raise UserError(f"{folder}: {name!r} is no LoRA factor of a linear layer; it cannot be read")
    ours = convert.from_hf_name(f"{factor[1]}.weight").removesuffix(".weight")
    if ours.split(".")[-1] not in LINEARS:
        raise UserError(f"{folder}: {name!r} adapts {ours}; expected only {', '.join(LINEARS)}")
    return f"{ours}.{_FACTORS[factor[2]]}.weight"


def check(adapter: PeftAdapter, config: ModelConfig) -> None:
    """Raise UserError unless the tensors are exactly those that adapter_config.json and the base mean."""
    folder, linears = adapter.folder, adapter.linears()
    if not linears:
        raise UserError(f"{folder} holds no LoRA factors; expected lora_A and lora_B of some linear layers")
    lora = LoraConfig(rank=1, alpha=1.0, dropout=0.0, targets=LINEARS, dora=adapter.config.has_dora)
    of_rank_1 = {name: shape for name, shape in adapters.expected_shapes(config, lora).items()
                 if ".experts." not in name and ".shared." not in name}  # which carry no adapters here
    for stem in linears:
        if not adapter.config.targets(module_name(stem)):
            raise UserError(f"{adapter.config.path} leaves out {module_name(stem)}, which has factors")
    for name in sorted(of_rank_1.keys() ^ adapter.tensors.keys()):
        stem, is_factor, _ = name.rpartition(".lora_")
        if name not in of_rank_1 or not is_factor or adapter.config.targets(module_name(stem)):
            raise UserError(f"{folder}: {name} is {'missing' if name in of_rank_1 else 'one too many'}; expected the "
                            f"factors of what {CONFIG} names, and of nothing else")
    expected = {name: list(of_rank_1[name]) for name in adapter.tensors}
    for stem, (rank, _) in linears.items():
        expected[f"{stem}.lora_a.weight"][0] = expected[f"{stem}.lora_b.weight"][1] = rank
    for name, shape in expected.items():
        if list(adapter.tensors[name].shape) != shape:
            stem, is_factor, _ = name.rpartition(".lora_")
            of_rank = f"r={linears[stem].rank} and " if is_factor else ""
            raise UserError(f"{folder}: {name} is {list(adapter.tensors[name].shape)}, but {of_rank}the base mean "
                            f"{shape}")


def as_ours(
    adapter: PeftAdapter, config: ModelConfig, base: Mapping[str, StoredTensor]
) -> tuple[dict[str, StoredTensor], LoraConfig]:
    """A plain adapter, of one rank and scale, that makes of the base what PEFT makes of it; in our rotary layout.
    Linears that it leaves out, of kinds that it adapts elsewhere, have factors that do nothing. Raises UserError
    unless the tensors are exactly those of the config."""
    check(adapter, config)
    linears, changes_base = adapter.linears(), adapter.config.init in peft_config.CHANGE_BASE
    rank = max(each.rank for each in linears.values()) * (2 if changes_base else 1)
    first = max(linears.values(), key=lambda each: abs(each.scale))
    alpha = first.alpha if rank == first.rank else first.alpha * rank / first.rank
    lora = LoraConfig(rank=rank, alpha=alpha, dropout=0.0,
                      targets=tuple(name for name in LINEARS if any(stem.endswith(f".{name}") for stem in linears)),
                      dora=adapter.config.has_dora)
    tensors = dict(adapter.tensors)
    for stem, each in linears.items():
        if changes_base or each != (rank, alpha):
            share = each.scale / first.scale if first.scale else 1.0
            both = functools.cache(functools.partial(_plain_factors, adapter, stem, base, config, rank, share))
            for axis, name in enumerate((f"{stem}.lora_a.weight", f"{stem}.lora_b.weight")):  # [rank, in], [out, rank]
                shape = list(tensors[name].shape)
                shape[axis] = rank
                tensors[name] = StoredTensor(tuple(shape), lambda both=both, axis=axis: both()[axis], torch.float32)
    ours = {name: _reordered(convert.rotary_from_hf, name, stored, config) for name, stored in tensors.items()}
    return {name: ours[name] if name in ours else _idle(name, shape, base)
            for name, shape in adapters.expected_shapes(config, lora).items()}, lora


def _idle(name: str, shape: tuple[int, ...], base: Mapping[str, StoredTensor]) -> StoredTensor:
    """A factor that leaves the base's matrix as it is: zeros, or for DoRA the lengths of its rows [out]."""
    stem, _, which = name.rpartition(".lora_")
    if which != "m.weight":
        return StoredTensor(shape, lambda: torch.zeros(shape), torch.float32)
    return base[f"{stem}.weight"].then(lambda whole: whole.float().norm(dim=1), shape)._replace(dtype=torch.float32)


def _plain_factors(
    adapter: PeftAdapter, stem: str, base: Mapping[str, StoredTensor], config: ModelConfig, rank: int,
    share: float
) -> tuple[Tensor, Tensor]:
    """Factors of `rank` whose product is `share` of B A, less what PEFT took from the base. [rank, in], [out, rank]."""
    lora_a, lora_b = (adapter.tensors[f"{stem}.lora_{which}.weight"].load().float() for which in "ab")
    if adapter.config.init in peft_config.CHANGE_BASE:
        weight = f"{stem}.weight"
        whole = convert.rotary_to_hf(weight, base[weight].load(), config).float()
        taken_a, taken_b = _taken(str(adapter.config.init), whole, adapter.linears()[stem])
        lora_a, lora_b = torch.cat([lora_a, taken_a]), torch.cat([lora_b, -taken_b], 1)
    missing = rank - len(lora_a)
    return F.pad(lora_a, (0, 0, 0, missing)), F.pad(share * lora_b, (0, missing))


def _taken(init: str, weight: Tensor, scaled: Scaled) -> tuple[Tensor, Tensor]:
    """Factors [r, in] and [out, r]: PEFT subtracts their product, times the scale, from a base's matrix."""
    if init == "olora":  # Büyükakyüz 2024
        basis, rest = torch.linalg.qr(weight)
        return rest[: scaled.rank], basis[:, : scaled.rank]
    left, values, right = torch.linalg.svd(weight, full_matrices=False)  # PiSSA, Meng et al. 2024
    return right[: scaled.rank], left[:, : scaled.rank] * (values[: scaled.rank] / scaled.scale)


def _reordered(
    reorder: convert.Reorder, name: str, stored: StoredTensor, config: ModelConfig
) -> StoredTensor:
    """A factor with the rows of B, or DoRA's lengths, reordered as the rows of the weight that it adapts."""
    plain = re.sub(r"\.lora_[bm]\.", ".", name)
    return stored if plain == name else stored.then(functools.partial(reorder, plain, config=config))


def as_peft(tensors: Mapping[str, StoredTensor], config: ModelConfig) -> dict[str, StoredTensor]:
    """Our adapter's tensors under PEFT's names and in Hugging Face's rotary layout. Raises UserError for an adapter of
    parts of a linear that the family has in one: PEFT adapts the whole."""
    fused = convert.fused_linears(config.family)
    if FAMILIES[config.family].remote or any(part in fused for name in tensors for part in name.split(".")):
        raise UserError(f"an adapter of a {config.family} model has no form in PEFT; merge it with --merge_lora")
    theirs = {}
    for name, stored in tensors.items():
        hf = convert.to_hf_name(re.sub(r"\.lora_[abm]\.", ".", name))
        for factor, ours in _FACTORS.items():
            if f".{ours}." in name:
                hf = f"{hf.removesuffix('.weight')}.{factor}"
        theirs[_PREFIX + hf] = _reordered(convert.rotary_to_hf, name, stored, config)
    return theirs


def config_json(config: ModelConfig, lora: LoraConfig, base: str) -> dict[str, object]:
    """adapter_config.json as PEFT reads it. Raises UserError for a verifier that has no form there."""
    if config.value_head and config.score != "last":
        raise UserError(f"a verifier with score={config.score} has no form in PEFT: its sequence classifiers read the "
                        "last token; merge it with --merge_lora and --format hf instead")
    attention = ("wq", "wk", "wv", "wo")
    places = [f"{'attention' if name in attention else 'feed_forward'}.{name}" for name in lora.targets]
    return {
        "peft_type": "LORA", "task_type": "SEQ_CLS" if config.value_head else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout, "use_dora": lora.dora,
        "target_modules": [module_name(f"layers.0.{place}").split(".")[-1] for place in places],
        "modules_to_save": ["score"] if config.value_head else None,
        "bias": "none", "fan_in_fan_out": False, "inference_mode": True}
