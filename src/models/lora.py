"""Low-rank adapters (Hu et al. 2021) put on the linear layers of a finished model.

y = W x + (alpha / rank) B A dropout(x), W frozen; under DoRA (Liu et al. 2024) the rows of W + (alpha / rank) B A are
brought to lengths that are learnt. On a column-parallel layer A is whole and B is split by rows;
on a row-parallel layer A is split by columns and B is whole: each product then needs no further communication
than the layers' own, and whole factors receive the same gradient on every rank.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src import parallel
from src.errors import UserError
from src.models.config import ModelConfig
from src.models.layers import ColumnParallelLinear, RowParallelLinear
from src.models.linear import input_gradient, linear, rounded, weight_gradient
from src.models.quantize import FrozenMatrix, QuantizedLinear

LINEARS = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Shape of the adapters: rank r, scale alpha / r, the names of the linears that carry one, and whether by DoRA.

    Rank-stabilised adapters (Kalajdzievski 2023), whose scale is alpha / sqrt(r), have alpha sqrt(r) here.
    """

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    dora: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"lora_rank={self.rank}: expected at least 1, or -1 for full fine-tuning")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"lora_dropout={self.dropout}: expected 0 <= p < 1")
        for name in self.targets:
            if name not in LINEARS:
                raise UserError(f"lora_targets names {name!r}; expected some of {', '.join(LINEARS)}")
        if not self.targets:
            raise UserError(f"lora_targets is empty; expected some of {', '.join(LINEARS)}")


def check_targets(lora: LoraConfig, config: ModelConfig) -> None:
    """Raise UserError for targets that this model cannot adapt: the linears of experts."""
    experts = [name for name in lora.targets if name in ("w1", "w2", "w3")]
    if config.n_experts and experts:
        raise UserError(
            f"lora_targets names {', '.join(experts)}, but this model has experts, which carry no adapters; "
            f"give --lora_targets wq,wk,wv,wo")


Frozen = ColumnParallelLinear | RowParallelLinear | QuantizedLinear


class _AdaptedProduct(torch.autograd.Function):
    """x W^T + scale (x * kept) A^T B^T + bias on this rank, as one node of the graph.

    The low-rank part is added by the matrix product that makes it, so nothing as wide as the output is written twice;
    x is all that is kept of that width. W has no gradient and is asked for again backwards: a quantised base is then
    never dense but for the product under way.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        kept: Tensor | None,
        base: Frozen,
        bias: Tensor | None,
        scale: float,
    ) -> Tensor:
        """x [N, in], lora_a [rank, in], lora_b [out, rank], kept [N, in], bias [out] -> [N, out] in x's dtype."""
        # scaled here, where it is narrow
        low = scale * linear(x if kept is None else x * kept, lora_a)  # [N, rank]
        ctx.save_for_backward(x, lora_a, lora_b, kept, low)
        ctx.base, ctx.scale = base, scale
        quantised = isinstance(base, QuantizedLinear)
        y = base.matrix.product(x, bias) if quantised else linear(x, base.weight, bias)
        return y.addmm_(low, lora_b.type_as(x).T)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor
    ) -> tuple[Tensor | None, Tensor, Tensor, None, None, None, None]:
        """grad [N, out] -> [N, in], [rank, in], [out, rank]."""
        x, lora_a, lora_b, kept, low = ctx.saved_tensors
        grad_low = ctx.scale * input_gradient(grad, lora_b.type_as(grad))  # [N, rank]
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = input_gradient(grad, rounded(ctx.base.weight, grad.dtype))
            if kept is None:
                grad_x.addmm_(grad_low, lora_a.type_as(grad))
            else:
                grad_x.addcmul_(grad_low @ lora_a.type_as(grad), kept)
        seen = x if kept is None else x * kept
        # several times as fast as grad^T low: the rank is the smaller side. NCCL sums what lies in order alone
        grad_b = weight_gradient(low, grad).T.contiguous()
        return grad_x, weight_gradient(grad_low, seen), grad_b, None, None, None, None


class Magnitude(nn.Module):
    """DoRA's magnitude vector: the length of each row of a matrix. weight [rows] float32."""

    def __init__(self, n_rows: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_rows))


class LoraLinear(nn.Module):
    """A parallel linear with an adapter. The base weight keeps its place under `base`."""

    def __init__(self, base: Frozen, config: LoraConfig) -> None:
        super().__init__()
        self.base = base
        self.scale, self.dropout = config.alpha / config.rank, config.dropout
        self.adapted = True  # without_adapters() turns it off
        self.by_rows = base.columns is None
        if self.by_rows:
            self.lora_a: nn.Module = nn.Linear(base.in_features, config.rank, bias=False)
            self.lora_b: nn.Module = ColumnParallelLinear(
                config.rank, base.out_features, base.rows, replicated=base.replicated)
        else:
            self.lora_a = RowParallelLinear(base.in_features, config.rank, base.columns)
            self.lora_b = nn.Linear(config.rank, base.out_features, bias=False)
        n_rows = len(base.rows) if self.by_rows else base.out_features
        self.lora_m = Magnitude(n_rows) if config.dora else None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], both as the base layer has them on this rank."""
        if not self.adapted:
            return self.base(x)
        kept = self._draw_kept(x) if self.training and self.dropout else None
        lora_a, lora_b = self.lora_a.weight, self.lora_b.weight
        # a whole factor multiplies a part of the product on each rank: its gradient is the sum over the ranks
        if self.by_rows:
            x, lora_a = parallel.copy_to_tensor_parallel(x), parallel.copy_to_tensor_parallel(lora_a)
            lora_b = self.lora_b.sum_over_replicas(lora_b)
        else:
            lora_b = parallel.copy_to_tensor_parallel(lora_b)
        rows = x.flatten(0, -2)  # [N, in]
        kept = None if kept is None else kept.type_as(x).flatten(0, -2)
        at_once = self.by_rows and self.lora_m is None  # else the bias comes after the sum over ranks, or the lengths
        bias = self.base.bias if at_once else None
        y = _AdaptedProduct.apply(rows, lora_a, lora_b, kept, self.base, bias, self.scale)
        y = y.unflatten(0, x.shape[:-1])
        y = y if self.by_rows else parallel.reduce_from_tensor_parallel(y)
        if self.lora_m is not None:
            y = self._with_magnitude(y)
        return y if at_once or self.base.bias is None else y + self.base.bias.type_as(y)

    def _draw_kept(self, x: Tensor) -> Tensor:
        """What x [..., in on this rank] is multiplied by to drop some of it. The mask and not what it leaves of x: the
        backward pass has x anyway. Drawn whole and cut: every rank draws alike, and not what another one drops."""
        whole = F.dropout(x.new_ones(*x.shape[:-1], self.base.in_features), self.dropout)
        return whole if self.by_rows else whole[..., self.base.columns.start : self.base.columns.stop]

    def _with_magnitude(self, y: Tensor) -> Tensor:
        """m / ||W + scale B A|| times the product y [..., out], of each row that this rank yields (DoRA, Liu et al.
        2024, eq. 5). The lengths are constants in the backward pass (section 4.3 there)."""
        magnitude = self.lora_m.weight  # [out]
        if self.by_rows:
            magnitude = self.lora_b.sum_over_replicas(magnitude)
        with torch.no_grad():
            matrix = merged_weight(self.base.weight, self.lora_a.weight, self.lora_b.weight, self.scale)
            lengths = self.row_lengths(matrix)
        return y * (magnitude / lengths).type_as(y)

    def row_lengths(self, matrix: Tensor) -> Tensor:
        """The lengths of whole rows of a matrix, [out, in] float32 on this rank -> [out], shared as the base is."""
        squares = matrix.square().sum(1)  # [out]
        if not self.by_rows:
            parallel.sum_over_tensor_parallel(parallel.local(squares))
        return lengths_of(squares)


@contextlib.contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Inside, the model is the one that its adapters were put on."""
    linears = [module for module in model.modules() if isinstance(module, LoraLinear)]
    for layer in linears:
        layer.adapted = False
    try:
        yield
    finally:
        for layer in linears:
            layer.adapted = True


def add_lora(model: nn.Module, config: LoraConfig) -> None:
    """Wrap every target linear in place and freeze everything but the adapters and a value head.

    The adapters are laid out uninitialised on the current default device; fill them with init_lora() or from a file.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name in config.targets:
                setattr(parent, name, LoraLinear(child, config))
    for name, parameter in model.named_parameters():
        # new with the task, and small: it learns as a whole
        if name == "v_head.weight":
            parameter.requires_grad_(True)


def init_lora(
    model: nn.Module, seed: int, local_slice: Callable[[str, Tensor], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Starting values of every adapter tensor: A uniform as Kaiming's rule for a linear layer, B zero, m W's lengths.

    Yields (name, this rank's float32 tensor): A [rank, in], B [out, rank], of DoRA m [out]. A is sampled whole on the
    CPU from (seed, place in the model) and cut by `local_slice`, so it does not depend on the tensor-parallel size.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            rank, in_features = module.lora_a.weight.shape[0], module.base.in_features
            whole = torch.empty(rank, in_features).uniform_(-1, 1, generator=generator) / in_features**0.5
            yield f"{name}.lora_a.weight", local_slice(f"{name}.lora_a.weight", whole)
            # with B zero the adapted model starts as its base
            yield f"{name}.lora_b.weight", torch.zeros(module.lora_b.weight.shape)
            if module.lora_m is not None:
                yield f"{name}.lora_m.weight", module.row_lengths(module.base.weight.detach().float())


class Factors(NamedTuple):
    """An adapter of one linear that will not be trained: lora_a [rank, in], lora_b [out, rank], alpha / rank."""

    lora_a: Tensor
    lora_b: Tensor
    scale: float


class AdaptedMatrix(FrozenMatrix):
    """A base's matrix [out, in] with adapters added when it is used; the base may belong to several models."""

    def __init__(self, base: Tensor, chain: Sequence[Factors]) -> None:
        """base [out, in]; chain: the adapters in the order in which they were trained."""
        super().__init__()
        self.register_buffer("base", base.detach())
        self.scales = [factors.scale for factors in chain]
        for index, factors in enumerate(chain):
            self.register_buffer(f"lora_a_{index}", factors.lora_a)
            self.register_buffer(f"lora_b_{index}", factors.lora_b)

    def dense(self) -> Tensor:
        """The whole matrix. -> [out, in] float32."""
        weight = self.base
        for index, scale in enumerate(self.scales):
            lora_a, lora_b = self.get_buffer(f"lora_a_{index}"), self.get_buffer(f"lora_b_{index}")
            weight = merged_weight(weight, lora_a, lora_b, scale)
        return weight


def merged_weight(base: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """W + scale * B A in float32, whatever W's dtype: the caller rounds once, if at all. -> [out, in]."""
    return base.float() + scale * (lora_b.float() @ lora_a.float())


def at_length(weight: Tensor, magnitude: Tensor, squares: Tensor) -> Tensor:
    """DoRA's matrix: the rows of weight [out, in] at the lengths magnitude [out]. squares [out]: of whole rows."""
    return weight * (magnitude.float() / lengths_of(squares))[:, None]


def lengths_of(squares: Tensor) -> Tensor:
    """Lengths of rows from their summed squares, [out] float32. One of zeros, which no factor makes longer, has next to
    none: its quotients stay finite."""
    return squares.sqrt().clamp_min(1e-20)
