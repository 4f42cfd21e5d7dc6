"""AdamW (Loshchilov and Hutter 2019) with its moments in float32 or in 8 bits, with one interface.

The 8-bit moments are torchao's, in blocks of 256 values that share a scale (Dettmers et al. 2022); tensors of fewer
than 4096 values keep float32 ones. What goes to disk is float32 either way, so a run may be resumed on any ranks; on as
many, bit for bit.
"""

import contextlib
import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from src import parallel
from src.checkpoint.saving import MOMENTS
from src.errors import UserError

if TYPE_CHECKING:
    from torchao.optim.subclass_8bit import OptimState8bit

OptimizerName = Literal["adamw", "adamw_8bit"]
BETAS = (0.9, 0.95)  # the second as for large language models (Brown et al. 2020): 0.999 forgets outliers slowly


class LazyTensors(Mapping[str, Tensor]):
    """Tensors [...] by name, each made when it is read and not kept."""

    def __init__(self, makers: Mapping[str, Callable[[], Tensor]]) -> None:
        """makers: what returns each tensor [...]."""
        self._makers = makers

    def __getitem__(self, name: str) -> Tensor:
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


class AdamW:
    """AdamW with float32 moments: what torch.optim.AdamW does, by the function that it calls. torch's optimizers import
    its compiler when they are made, which takes as long as to import torch."""

    def __init__(self, groups: Sequence[Mapping[str, object]], eps: float = 1e-8) -> None:
        """groups: parameters with their weight_decay, as torch's optimizers take them."""
        self._groups = groups
        self._state: dict[nn.Parameter, dict[str, Tensor]] = {}
        self._eps = eps

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update from the gradients, of the parts that this data-parallel rank has, at this learning rate."""
        for group in self._groups:
            learned = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in learned:
                # as in torch's optimizers: what has had no gradient has no state, and is not decayed
                if parameter not in self._state:
                    self.load(parameter, 0, {name: torch.zeros_like(parameter) for name in MOMENTS})
            first, second, steps = (
                [parallel.local(self._state[parameter][name]) for parameter in learned] for name in (*MOMENTS, "step"))
            adamw(
                [parallel.local(parameter) for parameter in learned],
                [parallel.local(parameter.grad) for parameter in learned],
                first, second, [], steps, fused=True, amsgrad=False, maximize=False, beta1=BETAS[0], beta2=BETAS[1],
                lr=lr, weight_decay=group["weight_decay"], eps=self._eps)

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for group in self._groups:
            for parameter in group["params"]:
                parameter.grad = None

    def moment(self, parameter: nn.Parameter, name: str) -> Tensor:
        """One of MOMENTS, float32 [...] laid out as its parameter; zero before the first update."""
        return self._state[parameter][name] if parameter in self._state else torch.zeros_like(parameter)

    def load(self, parameter: nn.Parameter, updates: int, moments: Mapping[str, Tensor]) -> None:
        """Take up a parameter's MOMENTS, float32 [...] laid out as it is, after so many updates."""
        self._state[parameter] = {"step": torch.tensor(float(updates), device=parameter.device), **moments}

    def held(self) -> Iterator[Tensor]:
        """The tensors that hold the moments on this rank."""
        for state in self._state.values():
            yield from (parallel.local(state[name]) for name in MOMENTS)


class AdamWIn8Bits:
    """AdamW with moments in 8 bits, which are read and set as float32 tensors all the same: see AdamW's methods."""

    def __init__(self, groups: Sequence[Mapping[str, object]], eps: float = 1e-8) -> None:
        """groups: as AdamW takes them. Raises UserError where torchao is not installed."""
        if importlib.util.find_spec("torchao") is None:
            raise UserError("--optimizer adamw_8bit needs the package torchao, which is not installed; pip install "
                            "torchao==0.18.0, or leave --optimizer at adamw")
        # it reports libraries for other devices that it cannot load
        logging.getLogger("torchao").setLevel(logging.ERROR)
        from torchao.optim import AdamW8bit

        self._optimizer = AdamW8bit(groups, lr=0.0, betas=BETAS, eps=eps)

    def step(self, lr: float) -> None:
        """One update from the gradients at this learning rate."""
        for group in self._optimizer.param_groups:
            # a tensor: a new number would have torchao's step compiled again
            group["lr"].fill_(lr)
        # torchao compiles its arithmetic; on a CPU that would need a C++ compiler and seconds a shape
        eager = parallel.device().type == "cpu"
        with torch.compiler.set_stance("force_eager") if eager else contextlib.nullcontext():
            self._optimizer.step()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self._optimizer.zero_grad()

    def moment(self, parameter: nn.Parameter, name: str) -> Tensor:
        """One of MOMENTS, float32 [...] laid out as its parameter; zero before the first update."""
        state = self._optimizer.state.get(parameter)
        if not state:
            return torch.zeros_like(parameter)
        held = parallel.local(state[name])
        return parallel.as_part(held.dequantize(), parameter) if _has_codes(held) else state[name]

    def load(self, parameter: nn.Parameter, updates: int, moments: Mapping[str, Tensor]) -> None:
        """Take up a parameter's MOMENTS, float32 [...] laid out as it is, after so many updates."""
        state = {"step": torch.tensor(float(updates))}
        for name in MOMENTS:
            # torchao alone decides which tensors are large enough for 8 bits
            state[name] = self._optimizer._new_buffer(parameter, signed=name == "exp_avg")
            local = parallel.local(state[name])
            if _has_codes(local):
                encode(local, parallel.local(moments[name]))
            else:
                local.copy_(parallel.local(moments[name]))
        self._optimizer.state[parameter] = state

    def held(self) -> Iterator[Tensor]:
        """The tensors that hold the moments on this rank: they themselves, or codes [n] and scales [n / 256]."""
        for state in self._optimizer.state.values():
            for name in MOMENTS:
                held = parallel.local(state[name])
                yield from (held.codes, held.scale) if _has_codes(held) else (held,)


def _has_codes(x: Tensor) -> bool:
    """Whether x [...] is one of torchao's 8-bit tensors."""
    return type(x) is not Tensor and type(x).__name__ == "OptimState8bit"


@torch.no_grad()
def encode(held: "OptimState8bit", values: Tensor) -> None:
    """Put float32 values [n] into an 8-bit tensor [n]; if they came out of one of the same blocks, none changes.

    A block's scale is its largest size: what has that size gets the code of 1. But the code of -1 stands for -0.993, so
    where the largest was negative the scale was larger than what came out, and is looked for among the numbers nearby.
    """
    from torchao.optim.quant_utils import quantize_8bit_with_qmap

    held.copy_(values)
    blocks = values.reshape(-1, held.block_size)
    codes = held.codes.view(blocks.shape)
    lowest = held.qmap[0].abs()
    if not lowest:  # the second moment is not negative
        return
    for ulps in (0, 1, -1, 2, -2):
        changed = (held.dequantize().view(blocks.shape) != blocks).any(1)
        scale = (blocks[changed].abs().amax(1) / lowest).view(torch.int32).add(ulps).view(torch.float32)
        found = quantize_8bit_with_qmap(blocks[changed] / scale[:, None], held.qmap)
        same = (held.qmap[found.int()] * scale[:, None] == blocks[changed]).all(1)
        places = changed.nonzero()[:, 0][same]
        codes[places], held.scale[places] = found[same], scale[same]
