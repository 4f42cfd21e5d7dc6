"""The measure of --verify: logits of what was written against those of its source, an adapter's unmerged.

Nothing is merged and no weight is changed: under an adapter of PEFT each linear's output is corrected as it leaves the
linear, from the stored factors. What PEFT takes from a matrix W for some starting values is P W, P projecting onto
some directions.

B batch, S sequence, V vocabulary, N positions, I and O width of a linear's input and output, R rank
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from src import parallel
from src.checkpoint import shards, sources
from src.checkpoint.convert import rotary_from_hf
from src.checkpoint.peft_layout import PeftAdapter, module_name
from src.checkpoint.sources import AdapterSource, Source
from src.errors import UserError
from src.models.config import ModelConfig
from src.models.decoder import Decoder
from src.models.lora import add_lora, lengths_of

# The largest difference that rounding weights to a type explains, as a share of the largest value. Measured on random
# models of transformers, 8 and 24 layers: 0.0013 for float16, 0.011 for bfloat16, 0.036 for q8_0; for float32 1e-4, of
# adapters alone. A norm's weights halved are 0.4 to 0.7.
LIMITS = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.1, "q8_0": 0.2}


class LogitDifference(NamedTuple):
    """Largest difference, largest value, and the share of positions whose likeliest token is the same."""

    difference: float
    scale: float
    agreement: float

    def __str__(self) -> str:
        return (f"largest difference {self.difference:.3g} of values up to {self.scale:.3g}, "
                f"the same likeliest token at {self.agreement:.1%} of positions")


def check_difference(found: LogitDifference, path: str, dtype: str) -> None:
    """Raise UserError for a difference that rounding to this type does not explain, and for one that is no number."""
    if not found.difference <= LIMITS[dtype] * found.scale:
        raise UserError(f"{path}: {found}; expected at most {LIMITS[dtype]:g} of the largest value, which rounding to "
                        f"{dtype} may make; do not use what was written: the source is damaged or has another base, or "
                        "it is read or written wrongly here")


def rounded_to(before: Source | AdapterSource, after: Source | AdapterSource, dtype: str) -> str:
    """The type of LIMITS to which weights were rounded, if at all: as asked for, else the coarsest that a merged or
    rewritten adapter's result has; weights that were only copied are as exact as float32's."""
    kinds = {str(tensor.dtype).removeprefix("torch.") for tensor in after.tensors.values()}
    stored = max(kinds & LIMITS.keys(), key=[*LIMITS].index, default="float32")
    return dtype or (stored if isinstance(before, AdapterSource) else "float32")


@torch.no_grad()
def logit_difference(before: Source | AdapterSource, after: Source | AdapterSource) -> LogitDifference:
    """How far the logits (a verifier's scores) of a written checkpoint lie from those of what it was made of.

    Both compute in float32 on random tokens, an adapter unmerged, and one of PEFT's from what PEFT stored. One process;
    both models are in memory in turn.
    """
    length = min(64, before.config.max_seq_len)
    tokens = torch.randint(before.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    first, second = (_outputs(source, tokens) for source in (before, after))
    agreement = (first.argmax(-1) == second.argmax(-1)).float().mean().item()
    return LogitDifference((first - second).abs().max().item(), first.abs().max().item(), agreement)


def _outputs(source: Source | AdapterSource, tokens: Tensor) -> Tensor:
    """Logits [B, S, V] or scores [B, S] of a checkpoint on one process, float32."""
    parallel.start()
    base, own, foreign = source, {}, None
    if isinstance(source, AdapterSource):
        base, own, foreign = sources.open_source(str(source.base)), source.tensors, source.foreign
    with torch.device("meta"):
        model = Decoder(source.config)
        if own and not foreign:
            add_lora(model, source.lora)
    where = {"device": parallel.device(), "dtype": torch.float32, "copy": True}
    tensors = {name: (own.get(name) or base.tensors[name]).load().to(**where) for name in shards.places(model)}
    shards.assign(model, tensors, "this checkpoint")
    for name in [name for name, _ in model.named_parameters() if ".lora_" in name]:
        shards.put(model, name, own[name].load().to(**where))
    for stem in foreign.linears() if foreign else ():
        model.get_submodule(stem).register_forward_hook(_forward_hook(foreign, stem, source.config))
    hidden = model(tokens.to(parallel.device()))
    return model.scores(hidden) if source.config.value_head else model.logits(hidden).float()


Hook = Callable[[nn.Module, tuple[Tensor], Tensor], Tensor]


def _forward_hook(adapter: PeftAdapter, stem: str, config: ModelConfig) -> Hook:
    """For a linear of the base, under our name: its input [..., I] and output [..., O] -> the output under PEFT."""
    lora_a, lora_b = (adapter.tensors[f"{stem}.lora_{which}.weight"].load().float() for which in "ab")
    lora_b = rotary_from_hf(f"{stem}.weight", lora_b, config)
    scale = adapter.config.scaled(module_name(stem)).scale
    lengths = adapter.tensors.get(f"{stem}.lora_m.weight")
    lengths = lengths and rotary_from_hf(f"{stem}.weight", lengths.load().float(), config)

    def corrected(linear: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        """The output [..., O] plus what the adapter adds to it, less what PEFT took from the base."""
        (x,) = inputs
        down, up = lora_a.to(x), lora_b.to(x)  # [R, I], [O, R]
        basis = _taken_directions(adapter.config.init, linear.weight, len(down)).to(x)  # [O, R]
        share = scale if adapter.config.init == "olora" else 1.0  # PiSSA divides its factors by the scale
        taken = share * (x @ linear.weight.T @ basis) @ basis.T
        output = output + scale * (x @ down.T) @ up.T - taken
        if lengths is None:
            return output
        matrix = linear.weight + scale * up @ down - share * basis @ (basis.T @ linear.weight)
        bias = 0.0 if linear.bias is None else linear.bias
        return (output - bias) * lengths.to(x) / lengths_of(matrix.square().sum(1)) + bias

    return corrected


def _taken_directions(init: object, weight: Tensor, rank: int) -> Tensor:
    """Orthonormal directions of the output in which PEFT empties a matrix [O, I] as it opens the adapter. [O, R]."""
    exact = weight.double()
    if init == "pissa":  # those in which the matrix is largest
        narrow = exact if exact.shape[0] > exact.shape[1] else exact.T
        largest = torch.linalg.eigh(narrow.T @ narrow).eigenvectors[:, -rank:]
        return torch.linalg.qr(exact @ largest).Q if narrow is exact else largest
    if init == "olora":  # those of its first columns
        return torch.linalg.qr(exact[:, :rank]).Q
    return exact[:, :0]
