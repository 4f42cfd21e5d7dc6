"""The product of a linear layer and its gradients: in the type of its input, whatever its weight is stored in.

A float32 weight that meets rows in bfloat16 or float16 is rounded to their type, and the copy kept for the backward
pass. Its gradient is rounded likewise, and summed in float32.

In float32 on a CPU oneDNN multiplies.

torch's x86 builds multiply float32 with MKL, which leaves AVX-512 unused on processors of other makers and is slow at
two to sixteen rows; oneDNN comes with the same builds. One core of an AMD EPYC: with a weight of 2560 x 768 64 rows at
185 instead of 91 GFLOP/s, 8 rows at 67 instead of 40, one at 14 instead of 9; with 688 x 256 and 2,048 rows 232 instead
of 101 GFLOP/s, the gradient of the rows 229 instead of 99, that of the weight 154 instead of 103. Which library
multiplies a weight in training and in all that it is compared with (references, old log-probs) depends on the weight
alone, so that equal models give equal numbers; and a row of oneDNN's does not depend on how many others there are.

On Intel's processors MKL is the faster one. Gradients, of which neither is asked, are left to it there. One core of a
Xeon with AMX, MKL against oneDNN in GFLOP/s: with 688 x 256 and 2,048 rows the gradient of the rows 152 to 145, that of
the weight 134 to 67; with 768 x 2560 169 to 102 and 149 to 44; with 1024 x 1024 164 to 143 and 152 to 120.
"""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

# Row counts that a kernel is made for. Each takes 0.3 MB and half a millisecond, so others are padded to the next of
# these, or to a multiple of the last.
ROWS = (1, 4, 8, 16, 24, 32, 48, 64)

# Below this many elements a call costs more than the faster product saves, unless the rows are few as in decoding.
SMALL = 4096

# MKL chooses its kernels by the processor's maker, so this does; a run that is resumed on one machine keeps its bits
_CPU = Path("/proc/cpuinfo")
INTEL = _CPU.is_file() and "GenuineIntel" in _CPU.read_text(encoding="utf-8", errors="replace")

# Where a product of float32 with one row is left to torch, or MKL: not where oneDNN alone uses AVX-512
ONE_ROW_BY_TORCH = INTEL or torch.backends.cpu.get_cpu_capability() != "AVX512"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in], weight [out, in], bias [out] -> x W^T + b [..., out] in x's dtype. Differentiable."""
    bias = None if bias is None else bias.to(x.dtype)
    if not torch.is_grad_enabled():
        copy = getattr(weight, "prepared", None)
        if copy is not None and not copy.is_mkldnn:
            if x.is_cpu and bias is None and x.numel() == x.shape[-1]:
                return torch.mv(copy, x.flatten()).view(*x.shape[:-1], -1)
            return F.linear(x, copy, bias)
        weight = rounded(weight, x.dtype) if copy is None else copy
    if not weight.is_mkldnn and weight.dtype == x.dtype and not _by_onednn(x, weight, weight.numel()):
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    y = _Product.apply(rows, weight, bias) if torch.is_grad_enabled() else _product(rows, weight, bias)
    # no view, as in torch's own linear: the sum over tensor-parallel ranks writes into it
    return torch.ops.aten._unsafe_view.default(y, [*x.shape[:-1], len(weight)])


def rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight in this dtype, without gradient."""
    return weight if weight.dtype == dtype else weight.detach().to(dtype)


@contextlib.contextmanager
def prepared(weights: Iterable[Tensor], dtype: torch.dtype, rows: int) -> Iterator[None]:
    """Inside, linear layers read copies of these weights that are made once; the weights must not change.

    Copies are rounded, and for bfloat16 on a CPU laid out for its kernels. One core of a Xeon with AMX, a weight of
    1536 x 576: one row at 19 instead of 10 GFLOP/s, 16 at 270 instead of 156, 64 at 540 instead of 393. Where at most
    one row is multiplied at a time, a weight stays as it is on Intel's processors, and torch's or MKL's product with a
    vector reads it: 0.42 instead of 0.47 ms, 4096 x 4096 in 5.4 instead of 10.3; in float32 0.36 instead of 0.52, and
    on an AMD EPYC without AVX-512 a token of a 60M model takes 41 to 43 instead of 49 to 52.
    """
    # processors without AVX-512 have no such kernels, and oneDNN refuses the layout there
    has_kernels = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    copied = []
    for weight in weights:
        by_vector = {torch.float32: ONE_ROW_BY_TORCH, torch.bfloat16: INTEL}
        alone = rows == 1 and weight.is_cpu and by_vector.get(dtype, False)
        packs = weight.is_cpu and dtype == torch.bfloat16 and has_kernels and not alone
        if packs or alone or weight.dtype != dtype:
            copy = weight.detach().to(dtype)
            weight.prepared = torch.ops.mkldnn._reorder_linear_weight(copy, ROWS[-1]) if packs else copy
            copied.append(weight)
    try:
        yield
    finally:
        for weight in copied:
            del weight.prepared


def input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient of linear()'s rows. grad [N, out], weight [out, in] -> grad W [N, in]."""
    if INTEL or not _by_onednn(grad, weight, weight.numel()):
        return grad @ weight
    return _product(grad.contiguous(), weight.t())


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of linear()'s weight. grad [N, out], x [N, in] -> grad^T x [out, in]."""
    if INTEL or not _by_onednn(grad, x, grad.shape[1] * x.shape[1]):
        # bfloat16 on a CPU: a kernel for AMX reads its left side by rows, and transposes it slowly
        narrow = grad.is_cpu and grad.dtype == torch.bfloat16 and grad.shape[1] <= x.shape[1]
        return (grad.t().contiguous() if narrow else grad.t()) @ x
    return _multiply(_padded(grad.contiguous()).t(), _padded(x).t())


class _Product(torch.autograd.Function):
    """linear() where torch has no gradient: by oneDNN, or with a weight that is rounded first."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [N, in], weight [out, in], bias [out] -> [N, out]."""
        weight = rounded(weight, x.dtype)
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """grad [N, out] -> [N, in], [out, in], [out]."""
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (input_gradient(grad, weight) if of_x else None, weight_gradient(grad, x)
                if of_weight else None, grad.sum(0) if of_bias else None)


def _by_onednn(x: Tensor, other: Tensor, elements: int) -> bool:
    """Whether oneDNN multiplies x [..., n]: float32 on a CPU, by enough `elements` unless the engine is decoding."""
    return (
        x.device.type == "cpu"
        and x.dtype == other.dtype == torch.float32
        and x.numel() > 0
        and (elements >= SMALL or torch.is_inference_mode_enabled())  # the engine alone uses that mode
        and torch.backends.mkldnn.is_available()
        and not torch.compiler.is_compiling())


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b for any number of rows. [N, in], [out, in], [out] -> [N, out]."""
    if not weight.is_mkldnn and not _by_onednn(x, weight, weight.numel()):
        return F.linear(x, weight, bias)
    # a row of bfloat16 is summed in another order among 2 to 47
    least = 48 if weight.is_mkldnn and len(x) > 1 else 0
    return _multiply(_padded(x, least), weight, bias)[: len(x)]


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b by a kernel made for these very sizes; x [N, in] and weight [out, in] may be transposed views."""
    if not (weight.is_mkldnn or weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()  # by one with gaps between its rows oneDNN multiplies a thousand times slower
    # "none": no activation after the product
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


def _padded(x: Tensor, least: int = 0) -> Tensor:
    """x [N, D] with rows of zeros appended up to a number of rows, `least` or more, that a kernel is made for."""
    n = _row_count(max(len(x), least))
    if n == len(x):
        return x
    padded = x.new_empty(n, x.shape[1])
    padded[: len(x)], padded[len(x) :] = x, 0.0
    return padded


def _row_count(n: int) -> int:
    """The smallest number of rows, n or more, that a kernel is made for."""
    return next((rows for rows in ROWS if rows >= n), -(-n // ROWS[-1]) * ROWS[-1])
