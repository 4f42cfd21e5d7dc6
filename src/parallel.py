"""Ranks, groups and tensor-parallel layers: the only door to torch.distributed and fairscale.

The layers are fairscale's, with one change: they take their own slice of the weight as an uninitialised tensor on
the current default device, so that a model can be laid out on the meta device and filled from its shard alone.
(fairscale's own constructors allocate on the CPU and draw the full weight on every rank.)

Shape legend: B batch, S sequence, V vocabulary, P vocabulary rows on this rank.
"""

import atexit
import contextlib
import io
import os
import random
import resource
from collections.abc import Iterable

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from fairscale.nn.model_parallel import initialize as groups
from fairscale.nn.model_parallel import layers, mappings
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from src.errors import UserError


def start(seed: int = 1, tensor_parallel_size: int = -1) -> None:
    """Join the process group that torchrun describes (or a group of one) and seed every generator alike.

    Consecutive ranks form tensor-parallel groups of the given size (-1: one group of all ranks); ranks at the same
    place in theirs form a data-parallel group. gloo on the CPU, NCCL where CUDA is present.
    """
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        if "RANK" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        with contextlib.redirect_stdout(
            io.StringIO()
        ):  # fairscale prints its group sizes; nothing else runs here
            groups.initialize_model_parallel(
                dist.get_world_size() if tensor_parallel_size == -1 else tensor_parallel_size
            )
        atexit.register(stop)  # gloo's threads abort a process that exits while its groups are alive
    seed_all(seed)


def stop() -> None:
    """Leave the process group; start() may be called again."""
    if dist.is_initialized():
        groups.destroy_model_parallel()
        dist.destroy_process_group()


def seed_all(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices). Equal on all ranks: replicated draws must agree."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rank() -> int:
    """Global rank; 0 before start()."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes; 1 before start() outside torchrun."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def tensor_parallel_rank() -> int:
    """This rank's place in its tensor-parallel group."""
    return groups.get_model_parallel_rank()


def tensor_parallel_size() -> int:
    """Number of ranks that share one model."""
    return groups.get_model_parallel_world_size()


def data_parallel_rank() -> int:
    """This rank's place among those that hold the same shard of the model and see other data."""
    return groups.get_data_parallel_rank()


def data_parallel_size() -> int:
    """Number of copies of the model that share a step's data."""
    return groups.get_data_parallel_world_size()


def device() -> torch.device:
    """The device this rank computes on."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def autocast() -> contextlib.AbstractContextManager[object]:
    """bfloat16 compute over float32 weights on a GPU; plain float32 on a CPU."""
    return torch.autocast("cuda", torch.bfloat16) if torch.cuda.is_available() else contextlib.nullcontext()


def peak_memory() -> float:
    """Most bytes this process has held: on the GPU where it computes on one, else resident."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def barrier() -> None:
    """Wait for all ranks."""
    dist.barrier()


def sum_over_tensor_parallel(x: Tensor) -> Tensor:
    """Sum over the tensor-parallel group, in place; no gradient. Returns x."""
    if tensor_parallel_size() > 1:
        dist.all_reduce(x, group=groups.get_model_parallel_group())
    return x


def sum_over_data_parallel(x: float) -> float:
    """Sum of a number over the data-parallel group: a step's global count from every rank's own."""
    if data_parallel_size() == 1:
        return x
    total = torch.tensor(x, dtype=torch.float64, device=device())
    dist.all_reduce(total, group=groups.get_data_parallel_group())
    return total.item()


def sum_over_all(x: Tensor) -> Tensor:
    """Sum over every rank, in place; no gradient. Returns x."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank; alike on every rank."""
    return bool(sum_over_all(torch.tensor(float(flag), device=device())))


def shard_over_data_parallel(model: nn.Module, blocks: Iterable[nn.Module]) -> None:
    """Share every parameter, its gradient and its optimizer state over the data-parallel group (FSDP2).

    `blocks` are gathered one at a time, the rest of the model as a whole. Gradients are summed, not averaged: losses
    are already divided by counts over all ranks. Nothing happens with one data-parallel rank.
    """
    if data_parallel_size() == 1:
        return
    mesh = DeviceMesh.from_group(
        [groups.get_data_parallel_group(), groups.get_model_parallel_group()],
        device().type,
        mesh=torch.arange(world_size()).view(-1, tensor_parallel_size()),
        mesh_dim_names=("dp", "tp"),
    )
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh["dp"])
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sums


def communicate_gradients(model: nn.Module, now: bool) -> None:
    """Whether the next backward() sums gradients over the data-parallel group, or leaves that to a later one."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)


def free_gathered(model: nn.Module) -> None:
    """Give back what an evaluation gathered, so that the parameters are the optimizer's again."""
    if isinstance(model, FSDPModule):
        model.reshard()


def local(x: Tensor) -> Tensor:
    """This data-parallel rank's part of a tensor, sharing its memory."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole(x: Tensor) -> Tensor:
    """A tensor gathered from the data-parallel group, all of whose ranks call this."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def part_like(x: Tensor, like: Tensor) -> Tensor:
    """This data-parallel rank's part of a whole tensor x, laid out and typed as `like` is; nothing is sent."""
    x = x.to(like.device, like.dtype)
    if isinstance(like, DTensor):
        return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)
    return x.clone()


def broadcast_from_first(x: Tensor) -> Tensor:
    """Give every tensor-parallel rank the first one's values, in place. Returns x."""
    if tensor_parallel_size() > 1:
        dist.broadcast(x, groups.get_model_parallel_src_rank(), group=groups.get_model_parallel_group())
    return x


def broadcast_text(text: str | None) -> str | None:
    """The first rank's text on every rank."""
    texts = [text]
    dist.broadcast_object_list(texts)
    return texts[0]


def gather_vocab(local_logits: Tensor) -> Tensor:
    """Join vocabulary slices. [..., P] -> [..., V] on every rank; differentiable."""
    return mappings.gather_from_model_parallel_region(local_logits)


class _VocabLogprobs(torch.autograd.Function):
    """log softmax at one id a row, computed from vocabulary slices: two small all-reduces, nothing gathered."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, local_logits: Tensor, targets: Tensor) -> Tensor:
        local = local_logits.log_softmax(-1)  # [N, P], over this rank's slice; one fused pass
        index = targets - tensor_parallel_rank() * local.shape[-1]
        here = (index >= 0) & (index < local.shape[-1])
        index = index.clamp(0, local.shape[-1] - 1)
        of_slice = _slice_logprob(local_logits[:, 0] - local[:, 0])  # log of this slice's probability
        logprobs = sum_over_tensor_parallel(
            (local.gather(-1, index[:, None])[:, 0] + of_slice).masked_fill(~here, 0.0)  # -inf in padding
        )
        ctx.save_for_backward(local, of_slice, index, here)
        return logprobs

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        local, of_slice, index, here = ctx.saved_tensors
        grad_logits = (local + of_slice[:, None]).exp_().mul_(-grad[:, None])
        grad_logits.scatter_add_(-1, index[:, None], (grad * here)[:, None])
        return grad_logits, None


def _slice_logprob(log_normaliser: Tensor) -> Tensor:
    """log of the probability that lies in this rank's vocabulary slice, from its own log-sum-exp. [N] -> [N]."""
    if tensor_parallel_size() == 1:
        return torch.zeros_like(log_normaliser)
    highest = log_normaliser.clone()
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=groups.get_model_parallel_group())
    total = sum_over_tensor_parallel((log_normaliser - highest).exp())
    return log_normaliser - highest - total.log()


def vocab_logprobs(local_logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of one id a row under a vocabulary-parallel softmax.

    local_logits [N, P] (any float dtype), targets [N] int64 global ids -> [N] float32, nats. Differentiable.
    """
    return _VocabLogprobs.apply(local_logits.float(), targets)


class _VocabEntropy(torch.autograd.Function):
    """Entropy of a vocabulary-parallel softmax; its gradient -p (log p + H) needs no communication."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, local_logits: Tensor) -> Tensor:
        local = local_logits.log_softmax(-1)  # [N, P]
        local += _slice_logprob(local_logits[:, 0] - local[:, 0])[:, None]
        local.clamp_min_(
            torch.finfo(local.dtype).min
        )  # -inf, an id that cannot be, times its probability 0 is 0
        entropy = -sum_over_tensor_parallel((local.exp() * local).sum(-1))
        ctx.save_for_backward(local, entropy)
        return entropy

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        local, entropy = ctx.saved_tensors
        return -grad[:, None] * local.exp() * (local + entropy[:, None])


def vocab_entropy(local_logits: Tensor) -> Tensor:
    """Entropy of the vocabulary-parallel softmax. [N, P] -> [N] float32, nats. Differentiable."""
    return _VocabEntropy.apply(local_logits.float())


def copy_to_tensor_parallel(x: Tensor) -> Tensor:
    """Identity forwards; sums the gradient over the tensor-parallel group backwards."""
    return mappings.copy_to_model_parallel_region(x)


def reduce_from_tensor_parallel(x: Tensor) -> Tensor:
    """Sum over the tensor-parallel group forwards; identity backwards."""
    return mappings.reduce_from_model_parallel_region(x)


def share(size: int, n: int | None = None, index: int | None = None) -> range:
    """The rows of a dimension that part `index` of n holds (default: this rank of its tensor-parallel group).

    Parts are contiguous and as even as they can be: the first ones take what does not divide.
    """
    n = tensor_parallel_size() if n is None else n
    index = tensor_parallel_rank() if index is None else index
    each, rest = divmod(size, n)
    start = index * each + min(index, rest)
    return range(start, start + each + (index < rest))


def padded_share(size: int, n: int | None = None, index: int | None = None) -> range:
    """Like share(), but all parts are equally long: the last ones may run past the end, into padding."""
    n = tensor_parallel_size() if n is None else n
    index = tensor_parallel_rank() if index is None else index
    each = -(-size // n)
    return range(index * each, (index + 1) * each)


class _SumGradientOverReplicas(torch.autograd.Function):
    """Identity forwards; backwards the sum of the gradients of all ranks that hold the same rows."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, weight: Tensor, rows: range, total: int) -> Tensor:
        ctx.rows, ctx.total = rows, total
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
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
        self.in_features, self.out_features, self.gather_output = in_features, out_features, False
        self.rows = share(out_features) if rows is None else rows
        self.replicated = replicated
        self.output_size_per_partition = len(self.rows)
        self.weight = nn.Parameter(torch.empty(self.output_size_per_partition, in_features))
        self.bias = nn.Parameter(torch.empty(self.output_size_per_partition)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., rows of this rank]."""
        weight, bias = self.weight, self.bias
        if self.replicated:
            weight = _SumGradientOverReplicas.apply(weight, self.rows, self.out_features)
            bias = (
                None if bias is None else _SumGradientOverReplicas.apply(bias, self.rows, self.out_features)
            )
        return F.linear(copy_to_tensor_parallel(x), weight, bias)


class RowParallelLinear(layers.RowParallelLinear):
    """y = x W^T with W [out_features, in_features] split by columns: inputs arrive split, outputs are summed.

    `columns` are those of this rank (default: an even share, the first ranks taking what does not divide).
    """

    def __init__(self, in_features: int, out_features: int, columns: range | None = None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.input_is_parallel = in_features, out_features, True
        self.columns = share(in_features) if columns is None else columns
        self.input_size_per_partition = len(self.columns)
        self.weight = nn.Parameter(torch.empty(out_features, self.input_size_per_partition))
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., columns of this rank] -> [..., out_features], summed over the ranks."""
        if (
            tensor_parallel_size() == 1
        ):  # fairscale's sum, which has nothing to add, would end a compiled graph
            return F.linear(x, self.weight, self.bias)
        return super().forward(x)


def _lookup_settings(module: nn.Module, num_embeddings: int, embedding_dim: int) -> None:
    """The attributes that both fairscale embeddings read in forward()."""
    module.num_embeddings, module.embedding_dim = num_embeddings, embedding_dim
    module.padding_idx = module.max_norm = None
    module.norm_type, module.scale_grad_by_freq, module.sparse = 2.0, False, False


class VocabParallelEmbedding(layers.VocabParallelEmbedding):
    """Embedding [num_embeddings, embedding_dim] split by rows; shards coincide with a tied output layer's.

    Every rank holds equally many rows; the last ones may be padding, which no id reaches.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        nn.Module.__init__(self)
        _lookup_settings(self, num_embeddings, embedding_dim)
        rows = padded_share(num_embeddings)
        self.num_embeddings_per_partition = len(rows)
        self.vocab_start_index, self.vocab_end_index = rows.start, rows.stop
        self.weight = nn.Parameter(torch.empty(self.num_embeddings_per_partition, embedding_dim))


class ParallelEmbedding(layers.ParallelEmbedding):
    """Embedding [num_embeddings, embedding_dim] split by columns, as Meta's Llama 1 and 2 shards have it."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        nn.Module.__init__(self)
        _lookup_settings(self, num_embeddings, embedding_dim)
        if embedding_dim % tensor_parallel_size():
            raise UserError(
                f"the embedding width {embedding_dim} does not divide over {tensor_parallel_size()} ranks; "
                f"split the vocabulary instead (embedding_split_dim 0)"
            )
        self.embedding_dim_per_partition = embedding_dim // tensor_parallel_size()
        self.weight = nn.Parameter(torch.empty(num_embeddings, self.embedding_dim_per_partition))
