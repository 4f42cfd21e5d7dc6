"""What PEFT computes with an adapter, beside the merge: the measure that --verify holds a merged adapter against.

Nothing is merged and no weight is changed: each adapted linear's output is corrected as it leaves the linear, from the
stored factors. What PEFT takes from a matrix W for some starting values is P W, P projecting onto some directions.

N positions, I and O width of the input and output, R rank
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from src.checkpoint.convert import rotary_from_hf
from src.checkpoint.peft_layout import PeftAdapter, module_name
from src.models.config import ModelConfig

Hook = Callable[[nn.Module, tuple[Tensor], Tensor], Tensor]


def put_on(base: nn.Module, adapter: PeftAdapter, config: ModelConfig) -> None:
    """Let a base in our layout compute what it computes under PEFT with this adapter."""
    for stem in adapter.linears():
        base.get_submodule(stem).register_forward_hook(_forward_hook(adapter, stem, config))


def _forward_hook(adapter: PeftAdapter, stem: str, config: ModelConfig) -> Hook:
    """For a linear of the base, under our name: its input [..., I] and output [..., O] -> the output under PEFT."""
    lora_a, lora_b = (adapter.tensors[f"{stem}.lora_{which}.weight"].load().float() for which in "ab")
    lora_b = rotary_from_hf(f"{stem}.weight", lora_b, config)
    scale = adapter.config.scaled(module_name(stem)).scale

    def corrected(linear: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        (x,) = inputs
        down, up = lora_a.to(x), lora_b.to(x)  # [R, I], [O, R]
        basis = _taken_directions(adapter.config.init, linear.weight, len(down)).to(x)  # [O, R]
        taken = (x @ linear.weight.T @ basis) @ basis.T
        if adapter.config.init == "olora":  # PiSSA divides its factors by the scale, OLoRA does not
            taken = scale * taken
        return output + scale * (x @ down.T) @ up.T - taken

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
