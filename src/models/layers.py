"""Tensor-parallel layers, fairscale's laid out from this rank's slice alone, and RMS normalisation.

They take their own slice of the weight as an uninitialised tensor on the current default device, so that a model can
be laid out on the meta device and filled from its shard alone. (fairscale's own constructors allocate on the CPU and
draw the full weight on every rank.)
"""

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel import layers
from torch import Tensor, nn

from src.errors import UserError
from src.models.linear import linear
from src.parallel import (
    copy_to_tensor_parallel,
    gather_vocab,
    padded_share,
    reduce_from_tensor_parallel,
    share,
    sum_over_tensor_parallel,
    tensor_parallel_size,
)


class SumGradientOverReplicas(torch.autograd.Function):
    """Identity forwards; backwards the sum of the gradients of all ranks that hold the same rows."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, weight: Tensor, rows: range, total: int) -> Tensor:
        """weight [rows of this rank, ...], of `total` rows on all ranks -> itself."""
        ctx.rows, ctx.total = rows, total
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        """grad [rows of this rank, ...] -> the same, summed."""
        # over all ranks, with zeros for rows that others hold: no group for each set of copies
        whole = grad.new_zeros(ctx.total, *grad.shape[1:])
        own = slice(ctx.rows.start, ctx.rows.stop)
        whole[own] = grad
        return sum_over_tensor_parallel(whole)[own], None, None


class ColumnParallelLinear(layers.ColumnParallelLinear):
    """y = x W^T with W [out_features, in_features] split by rows: each rank holds and yields its own outputs.

    `rows` are those of this rank (default: an even share, the first ranks taking what does not divide). With
    `replicated` several ranks hold the same rows; their gradients are summed, so that copies stay equal.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rows: range | None = None,
        *,
        bias: bool = False,
        replicated: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.replicated = in_features, out_features, replicated
        self.rows = share(out_features) if rows is None else rows
        self.columns = None  # whole on every rank
        self.weight = nn.Parameter(torch.empty(len(self.rows), in_features))
        self.bias = nn.Parameter(torch.empty(len(self.rows))) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., rows of this rank]."""
        bias = None if self.bias is None else self.sum_over_replicas(self.bias)
        # each rank's outputs give a part of the input's gradient: copy_to_tensor_parallel() sums it
        return linear(copy_to_tensor_parallel(x), self.sum_over_replicas(self.weight), bias)

    def sum_over_replicas(self, x: Tensor) -> Tensor:
        """x, its gradient summed over the ranks that hold the same rows. [rows of this rank, ...], unchanged."""
        return SumGradientOverReplicas.apply(x, self.rows, self.out_features) if self.replicated else x


class RowParallelLinear(layers.RowParallelLinear):
    """y = x W^T + b with W [out_features, in_features] split by columns: inputs arrive split, outputs are summed.

    `columns` are those of this rank (default: an even share, the first ranks taking what does not divide). Every rank
    holds the whole bias.
    """

    def __init__(
        self, in_features: int, out_features: int, columns: range | None = None, *, bias: bool = False
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.columns = share(in_features) if columns is None else columns
        self.rows, self.replicated = None, False  # whole on every rank
        self.weight = nn.Parameter(torch.empty(out_features, len(self.columns)))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., columns of this rank] -> [..., out_features], summed over the ranks."""
        y = reduce_from_tensor_parallel(linear(x, self.weight))
        # once, after the sum: every rank has the whole bias
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _Rows(torch.autograd.Function):
    """Rows of an embedding, the gradients of a row summed in float32 over all the places that its id has.

    torch sums in the weight's type, which on data-parallel ranks is half precision: of a gradient that 32,768 tokens of
    three ids had in common two thirds were lost in bfloat16, of 4,096 tokens 3%.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, ids: Tensor, weight: Tensor) -> Tensor:
        """ids [...] int64, weight [V, D] -> [..., D] in the weight's type."""
        ctx.save_for_backward(ids)
        ctx.n_rows, ctx.dtype = len(weight), weight.dtype
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[None, Tensor]:
        """[..., D] -> [V, D]."""
        (ids,) = ctx.saved_tensors
        total = torch.ops.aten.embedding_dense_backward(grad.float(), ids, ctx.n_rows, -1, False)
        return None, total.to(ctx.dtype)


class VocabParallelEmbedding(nn.Module):
    """Embedding [num_embeddings, embedding_dim] split by rows; shards coincide with a tied output layer's.

    Every rank holds equally many rows; the last ones may be padding, which no id reaches.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__()
        self.ids = padded_share(num_embeddings)
        self.weight = nn.Parameter(torch.empty(len(self.ids), embedding_dim))

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, S] int64 -> [B, S, D], summed over the ranks, one of which has the row."""
        elsewhere = (tokens < self.ids.start) | (tokens >= self.ids.stop)
        rows = _Rows.apply((tokens - self.ids.start).masked_fill(elsewhere, 0), self.weight)
        return reduce_from_tensor_parallel(rows.masked_fill(elsewhere[..., None], 0.0))

    def logits(self, hidden: Tensor) -> Tensor:
        """The products with every row, where the output layer is this embedding. [..., D] -> [..., rows]."""
        return linear(hidden, self.weight)


class ParallelEmbedding(nn.Module):
    """Embedding [num_embeddings, embedding_dim] split by columns, as Meta's Llama 1 and 2 shards have it."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__()
        if embedding_dim % tensor_parallel_size():
            raise UserError(
                f"the embedding width {embedding_dim} does not divide over {tensor_parallel_size()} ranks; "
                f"split the vocabulary instead (embedding_split_dim 0)")
        self.weight = nn.Parameter(torch.empty(num_embeddings, embedding_dim // tensor_parallel_size()))

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, S] int64 -> [B, S, D], joined over the ranks."""
        return gather_vocab(_Rows.apply(tokens, self.weight))


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang and Sennrich 2019), computed in float32; with offset, * (1 + weight)."""

    def __init__(self, dim: int, eps: float, offset: bool, dtype: torch.dtype) -> None:
        """dtype: of what comes out, for the linear layers that read it."""
        super().__init__()
        self.eps, self.offset, self.dtype = eps, offset, dtype
        self.weight = nn.Parameter(torch.empty(dim))

    def scale(self) -> Tensor:
        """The factor of each dimension. -> [D] float32."""
        weight = self.weight.to(self.dtype).float()  # as FSDP2 gathers it in bfloat16
        return weight + 1 if self.offset else weight

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] of any float dtype -> [..., D] in the norm's dtype."""
        x, scale = x.float(), self.scale()
        if x.is_cpu and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _LearningNorm.apply(x, scale, self.eps).to(self.dtype)
        return F.rms_norm(x, x.shape[-1:], scale, self.eps).to(self.dtype)


class _LearningNorm(torch.autograd.Function):
    """rms_norm() with a fused gradient, which torch has on a GPU alone; on a CPU it takes a dozen passes over x."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, scale: Tensor, eps: float) -> Tensor:
        """x [..., D], scale [D] -> [..., D], all float32: the bits of F.rms_norm()."""
        y, inverse = torch.ops.aten._fused_rms_norm(x, scale.shape, scale, eps)  # inverse [..., 1]: 1 / rms(x)
        ctx.save_for_backward(x, scale, inverse)
        return y

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """[..., D] -> [..., D], [D]: layer norm's gradient at a mean of 0, but for what that mean itself adds."""
        x, scale, inverse = ctx.saved_tensors
        mean, wanted = torch.zeros_like(inverse), [True, ctx.needs_input_grad[1], False]
        of_x, of_scale, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, scale.shape, mean, inverse, scale, None, wanted)
        of_x.addcmul_(inverse, (grad @ scale)[..., None], value=1 / len(scale))
        return of_x, of_scale, None
