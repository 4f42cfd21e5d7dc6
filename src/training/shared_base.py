"""Several models of PPO on one base: actor, critic and verifier that are adapters on the same full weights."""

from pathlib import Path

import torch
from torch import Tensor

from src import load, parallel
from src.checkpoint import adapters, shards, sources
from src.errors import UserError
from src.models.decoder import Decoder
from src.models.lora import AdaptedMatrix, Factors
from src.models.quantize import QuantizedLinear


class SharedBase:
    """The weights below a checkpoint directory's adapters, held once for every model made of them."""

    def __init__(self, ckpt_dir: str, precision: str = "") -> None:
        """ckpt_dir: full weights, or an adapter whose base (or its base's base) is meant. Held in --precision."""
        self.folder = base_of(ckpt_dir)
        self.dtype = parallel.compute_dtype(precision)
        self._tensors = load.local_tensors(self.folder, self.dtype)

    def model(self, ckpt_dir: str, *, value_head: bool = False, from_solver: bool = False) -> Decoder:
        """The model of a directory: this base, and its adapters, which stay apart from it.

        Their product is added whenever a matrix is used; a gradient passes through to adapters put on top.
        from_solver: where a value head is wanted, a solver will do, with a head that starts at zero. Raises UserError
        for another base, and for a solver or verifier where the other is needed.
        """
        kind = "solver" if not value_head else "" if from_solver else "verifier"
        config, chain = load.load_config(ckpt_dir, kind=kind), _chain(Path(ckpt_dir))
        if base_of(ckpt_dir) != self.folder:
            raise UserError(f"--share_base: {ckpt_dir} stands on {chain[-1]} and not on {self.folder}; train it from "
                            f"there with --lora_rank")
        whole, factors = dict(self._tensors), {}
        # from the base outwards: what a later adapter holds whole, such as a value head, replaces an earlier one's
        for folder in reversed(chain[:-1]):
            self._lay_on(folder, whole, factors)
        if config.value_head != value_head:
            config = load.solver_to_verifier(config)
            whole["v_head.weight"] = torch.zeros(1, config.dim, device=parallel.device())
        if value_head:
            whole.pop("output.weight", None)
        # assigned, not copied: models made of one base hold the same storages
        with torch.device("meta"):
            model = Decoder(config, self.dtype)
        shards.assign(model, whole, ckpt_dir)
        for name, chained in factors.items():
            parent, _, child = name.rpartition(".")
            matrix, module = AdaptedMatrix(whole[f"{name}.weight"], chained), model.get_submodule(parent)
            setattr(module, child, QuantizedLinear(getattr(module, child), matrix))
        return model

    def _lay_on(self, folder: Path, whole: dict[str, Tensor], factors: dict[str, list[Factors]]) -> None:
        """Add an adapter's factors, [R, in] and [out, R], to those of each linear; its whole tensors replace others."""
        lora = adapters.read_adapter(folder).lora
        if lora.dora:
            raise UserError(f"--share_base: {folder} holds DoRA's adapters, which change the base's rows as a whole; "
                            f"merge it with checkpoint_split.py and leave --share_base out")
        n, rank = parallel.tensor_parallel_size(), parallel.tensor_parallel_rank()
        own = {
            name: read().to(parallel.device(), torch.float32, copy=True)
            for name, read in sources.adapter_tensors(folder, lora, sources.read_config(folder), n, rank).items()}
        for name, tensor in own.items():
            stem = name.removesuffix(".lora_a.weight")
            if stem != name:
                pair = Factors(tensor, own[f"{stem}.lora_b.weight"], lora.alpha / lora.rank)
                factors.setdefault(stem, []).append(pair)
            elif not name.endswith(".lora_b.weight"):
                whole[name] = tensor


def base_of(ckpt_dir: str) -> Path:
    """The directory of the full weights below all adapters of this one."""
    return _chain(Path(ckpt_dir))[-1].resolve()


def _chain(folder: Path) -> list[Path]:
    """A directory, the base of its adapter, that one's base, down to full weights."""
    adapter = adapters.read_adapter(folder)
    return [folder, *_chain(adapter.base)] if adapter else [folder]
