"""Frozen weights of a loaded model in fewer bits: 8 or 4 bits a weight, groups with a scale each, or bfloat16.

Codes are unsigned integers: weight = code * scale + low, with scale and low of each group of consecutive input
columns in bfloat16. A layer's matrix is made dense when it is used and dropped again; arithmetic keeps the model's
dtype. Decoding in bfloat16 multiplies by the codes themselves, see packed(). Groups are cut on each rank, so ranks
whose share of the columns is no multiple of the group round a little differently from one rank alone.
"""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src import parallel
from src.models.layers import (
    ColumnParallelLinear,
    ParallelEmbedding,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from src.models.linear import input_gradient, linear, rounded


class Precision(NamedTuple):
    """Bits of a weight and how many share a scale."""

    bits: int
    group: int


PRECISIONS = {"int8": Precision(8, 128), "int4": Precision(4, 32)}

# Up to so many rows the kernel for 4 bits beats making the matrix dense. One core of a Xeon with AMX, 1536 x 576:
# 1 row in 0.05 ms, 64 in 1.3, dense 2.2 to 2.6 and then the product. 8 bits take it twice, hence for half as many.
FEW = 128
KERNEL_GROUPS = (32, 64, 128, 256)  # columns that may share a scale in torch's kernel for 4 bits
KERNEL_ROWS = 16  # it takes a multiple of these
SLICE = 256  # rows that a CPU makes dense at a time: they are multiplied while they are in its cache


class FrozenMatrix(nn.Module):
    """A matrix [rows, columns] kept in another form than the model computes with; no gradient."""

    def dense(self) -> Tensor:
        """The whole matrix. -> [rows, columns]."""
        raise NotImplementedError

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + b. [..., columns], [rows] -> [..., rows]."""
        return linear(x, self.dense(), bias)


class QuantizedMatrix(FrozenMatrix):
    """A matrix [rows, columns] as codes [rows, groups, group] (two to a byte for 4 bits), scales and lows."""

    def __init__(self, weight: Tensor, precision: Precision, dtype: torch.dtype) -> None:
        """Round weight [rows, columns]; dense() gives it back in dtype."""
        super().__init__()
        self.columns, self.bits, self.dtype = weight.shape[1], precision.bits, dtype
        self.parts: list[tuple[Tensor, int, Tensor]] = []  # what pack() lays out: codes, group, scales and zeros
        group = min(precision.group, self.columns + self.columns % 2)
        values = weight.float()
        # what fills the last group repeats a weight: it must not widen the group's range
        padding = values[:, -1:].expand(-1, -self.columns % group)
        values = torch.cat([values, padding], 1).unflatten(1, (-1, group))  # [rows, groups, group]
        low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
        top = 2**precision.bits - 1
        scale = ((high - low) / top).clamp_min(torch.finfo(torch.bfloat16).tiny)
        self.register_buffer("scale", scale.bfloat16())
        self.register_buffer("low", low.bfloat16())
        # against the rounded scale and low, so that their rounding adds no error
        codes = ((values - self.low.float()) / self.scale.float()).round_().clamp_(0, top).to(torch.uint8)
        if precision.bits == 4:
            codes = codes[..., ::2] | codes[..., 1::2] << 4
        self.register_buffer("codes", codes)

    @torch.no_grad()
    def dense(self) -> Tensor:
        """The whole matrix. -> [rows, columns]."""
        matrix = torch.empty(len(self.codes), self.columns, dtype=self.dtype, device=self.codes.device)
        for part, weight in self._slices():
            matrix[part] = weight
        return matrix

    def rows(self, indices: Tensor) -> Tensor:
        """Some rows. indices [...] int64 -> [..., columns]."""
        codes = self._unpaired(self.codes[indices])  # [..., groups, group]
        values = torch.addcmul(self.low[indices].float(), codes.float(), self.scale[indices].float())
        return values.flatten(-2)[..., : self.columns].to(self.dtype)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + b. [..., columns], [rows] -> [..., rows]."""
        if not self.parts or x.numel() > FEW // len(self.parts) * self.columns:
            y = x.new_empty(*x.shape[:-1], len(self.codes))
            for part, weight in self._slices():
                y[..., part] = linear(x, weight, None if bias is None else bias[part])
            return y
        few = F.pad(x.reshape(-1, self.columns), (0, -self.columns % self.group))
        y, *others = (torch.ops.aten._weight_int4pack_mm_for_cpu(few, *part) for part in self.parts)
        y = sum(others, y).view(*x.shape[:-1], -1)
        return y if bias is None else y + bias.type_as(y)

    def pack(self) -> None:
        """Lay out the codes for torch's kernel for 4 bits, 8 bits as the sum of two such matrices, where it takes them.

        The kernel's weight is (code - 8) * scale + zero.
        """
        if self.dtype != torch.bfloat16 or self.group not in KERNEL_GROUPS or len(self.codes) % KERNEL_ROWS:
            return
        codes = self._unpaired(self.codes).flatten(1).int()  # [rows, groups * group]
        units = (1,) if self.bits == 4 else (1, 16)
        zero = self.low.float() + 8 * sum(units) * self.scale.float()
        self.parts = []
        for unit in units:
            laid_out = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes // unit & 15, 1)
            factors = torch.cat((self.scale * unit, zero.bfloat16()), -1).transpose(0, 1).contiguous()
            self.parts.append((laid_out, self.group, factors))
            zero = torch.zeros_like(zero)

    @property
    def group(self) -> int:
        """How many columns share a scale."""
        return self.codes.shape[-1] * (8 // self.bits)

    def _unpaired(self, codes: Tensor) -> Tensor:
        """One code an element: [..., groups, group] of codes as they are kept."""
        return codes if self.bits == 8 else torch.stack((codes & 15, codes >> 4), -1).flatten(-2)

    def _slices(self) -> Iterator[tuple[slice, Tensor]]:
        """The matrix, some rows at a time; the next ones take their place in memory. -> rows, [n, columns]."""
        # a gradient would be computed of rows that others have taken the place of
        whole = not self.codes.is_cpu or torch.is_grad_enabled() or torch.compiler.is_compiling()
        n = len(self.codes) if whole else min(SLICE, len(self.codes))
        groups, group = self.codes.shape[1], self.group
        values = torch.empty(n, groups, group, device=self.codes.device)
        for start in range(0, len(self.codes), n):
            part = slice(start, min(start + n, len(self.codes)))
            held = values[: part.stop - start].copy_(self._unpaired(self.codes[part]))
            held.mul_(self.scale[part].float()).add_(self.low[part].float())
            yield part, held.flatten(1)[:, : self.columns].to(self.dtype)


class RoundedMatrix(FrozenMatrix):
    """A matrix [rows, columns] held in bfloat16, for a model that computes in another dtype."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        """Round weight [rows, columns]; dense() gives it back in dtype."""
        super().__init__()
        self.dtype = dtype
        self.register_buffer("values", weight.bfloat16())

    def dense(self) -> Tensor:
        """The whole matrix. -> [rows, columns]."""
        return self.values.to(self.dtype)

    def rows(self, indices: Tensor) -> Tensor:
        """Some rows. indices [...] int64 -> [..., columns]."""
        return self.values[indices].to(self.dtype)


class QuantizedLinear(nn.Module):
    """A column- or row-parallel linear over a quantised matrix; no gradient."""

    def __init__(self, layer: ColumnParallelLinear | RowParallelLinear, matrix: FrozenMatrix) -> None:
        super().__init__()
        self.matrix, self.bias = matrix, layer.bias
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.rows, self.columns, self.replicated = layer.rows, layer.columns, layer.replicated

    @property
    def weight(self) -> Tensor:
        """The dense matrix [out, in] of this rank, for an expert, which sums over ranks itself, and for an adapter."""
        return self.matrix.dense()

    def forward(self, x: Tensor) -> Tensor:
        """What the layer it stands for returns: x [..., in] -> [..., out], both as this rank has them."""
        if self.columns is None:
            x = parallel.copy_to_tensor_parallel(x)
        y = _FrozenProduct.apply(x, self.matrix) if x.requires_grad else self.matrix.product(x)
        if self.columns is not None:
            y = parallel.reduce_from_tensor_parallel(y)
        return y if self.bias is None else y + self.bias


class _FrozenProduct(torch.autograd.Function):
    """x W^T, whose W is made dense again for the backward pass instead of being kept for it."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, matrix: FrozenMatrix) -> Tensor:
        """x [..., in] -> [..., out]."""
        ctx.matrix = matrix
        return linear(x, matrix.dense())

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        """[..., out] -> [..., in]."""
        weight = rounded(ctx.matrix.dense(), grad.dtype)  # of a base with adapters it is float32
        return input_gradient(grad.flatten(0, -2), weight).view(*grad.shape[:-1], -1), None


class QuantizedEmbedding(nn.Module):
    """An embedding split by rows or by width over a quantised matrix; no gradient."""

    def __init__(
        self, layer: VocabParallelEmbedding | ParallelEmbedding, matrix: QuantizedMatrix | RoundedMatrix
    ) -> None:
        super().__init__()
        self.matrix = matrix
        self.ids = layer.ids if isinstance(layer, VocabParallelEmbedding) else None

    @property
    def weight(self) -> Tensor:
        """The dense matrix [V, D] of this rank, for an output layer that shares it."""
        return self.matrix.dense()

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] -> [..., V]."""
        return self.matrix.product(hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, S] int64 -> [B, S, D]."""
        if self.ids is None:
            return parallel.gather_vocab(self.matrix.rows(tokens))
        here = (tokens >= self.ids.start) & (tokens < self.ids.stop)
        rows = self.matrix.rows((tokens - self.ids.start).clamp(0, len(self.ids) - 1))
        return parallel.sum_over_tensor_parallel(rows * here[..., None])


@torch.no_grad()
def quantize_weights(model: nn.Module, precision: str, dtype: torch.dtype) -> None:
    """Replace every linear's and embedding's weight in place, one at a time, and freeze the model.

    precision: bfloat16, or an entry of PRECISIONS. dtype is what the model computes in; norms and a value head are
    cast to it.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            embeds = isinstance(child, VocabParallelEmbedding | ParallelEmbedding)
            if embeds or isinstance(child, ColumnParallelLinear | RowParallelLinear):
                matrix: QuantizedMatrix | RoundedMatrix = (
                    RoundedMatrix(child.weight, dtype)
                    if precision == "bfloat16"
                    else QuantizedMatrix(child.weight, PRECISIONS[precision], dtype))
                setattr(parent, name, (QuantizedEmbedding if embeds else QuantizedLinear)(child, matrix))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
        parameter.requires_grad_(False)


@contextlib.contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """Inside, few rows are multiplied by the codes of a quantised model in bfloat16, where this CPU has the kernel.

    Its copy of the codes is as large as they are. In float32 the kernel is several times slower than a dense product.
    """
    matrices = [
        module.matrix
        for name, module in model.named_modules()
        if "AVX512" in torch.backends.cpu.get_cpu_capability()
        and (isinstance(module, QuantizedLinear) or (isinstance(module, QuantizedEmbedding) and model.config.tied))
        and isinstance(module.matrix, QuantizedMatrix)
        and module.matrix.codes.is_cpu
        and ".experts." not in name  # they ask for dense matrices
    ]
    try:
        for matrix in matrices:
            matrix.pack()
        yield
    finally:
        for matrix in matrices:
            matrix.parts = []
