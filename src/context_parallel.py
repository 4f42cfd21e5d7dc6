"""Context parallelism: the positions of a batch cut over consecutive data-parallel ranks (DeepSpeed-Ulysses, Jacobs et
al. 2023, arXiv 2309.14509), so that each holds the activations of its part alone.

For attention the ranks of a group exchange positions for heads: each then has all positions of H / n of its heads. What
is read of a model's results, a number a token, is joined again, and all compute the same loss of the whole batch. Each
gets the part of its gradient that comes through its own positions; their sum over data-parallel ranks is the whole.

B batch, S positions, H heads, E head dim, n ranks of a group
"""

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

Item = TypeVar("Item")

_group: dist.ProcessGroup | None = None


def start(n: int, tensor_parallel_size: int) -> None:
    """Form groups of n consecutive data-parallel ranks, whose number n divides. All ranks call this."""
    global _group
    _group = None
    if n > 1:
        # [groups, n, tp]: at one place of their tensor-parallel groups ranks hold the same slices of the weights
        ranks = torch.arange(dist.get_world_size()).view(-1, n, tensor_parallel_size).transpose(1, 2)
        _group, _ = dist.new_subgroups_by_enumeration(ranks.reshape(-1, n).tolist())


def size() -> int:
    """Number of ranks that share the positions of a batch."""
    return 1 if _group is None else _group.size()


def rank() -> int:
    """This rank's place among them."""
    return 0 if _group is None else _group.rank()


def part(n_positions: int) -> range:
    """The positions of a row that this rank computes; those of the last ranks may run past its end, into padding."""
    # as many on each: all to all sends pieces of one size
    each = -(-n_positions // size())
    return range(rank() * each, (rank() + 1) * each)


def cut(x: Tensor) -> Tensor:
    """This rank's part of x [B, S], padded with 0. -> [B, ceil(S / n)]."""
    here = part(x.shape[1])
    return F.pad(x, (0, len(here) * size() - x.shape[1]))[:, here.start : here.stop]


def uncut(x: Tensor, n_positions: int) -> Tensor:
    """The whole of what cut() gave each rank its part of: x [B, ceil(S / n)] -> [B, S] on all. See join()."""
    if _group is None:
        return x
    here = part(n_positions)
    # zeros where others have theirs: one sum lays all parts side by side
    return _Sum.apply(F.pad(x, (here.start, len(here) * size() - here.stop)))[:, :n_positions]


def share(items: Sequence[Item]) -> Sequence[Item]:
    """What this rank takes of work that the ranks of a group do each by itself, such as sampling."""
    return items[rank() :: size()]


def gather(items: list[Item]) -> list[Item]:
    """The lists of all ranks of a group, joined in their order, on each. Items must be picklable."""
    if _group is None:
        return items
    found: list[list[Item]] = [[] for _ in range(size())]
    dist.all_gather_object(found, items, group=_group)
    return [item for part in found for item in part]


def exchange(x: Tensor, over: int, joined: int) -> Tensor:
    """Give each rank its n-th of dimension `over` and join what comes along dimension `joined`; differentiable.

    (x, 1, 2) gives all positions of some heads for some positions of all: [B, H, S / n, E] -> [B, H / n, S, E].
    """
    return _Exchange.apply(x, over, joined)


class _Exchange(torch.autograd.Function):
    """All to all; its gradient goes the way back."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, over: int, joined: int) -> Tensor:
        """[B, H, S / n, E] -> [B, H / n, S, E], or back."""
        ctx.dimensions = over, joined
        # what goes to a rank must lie together, along the first dimension
        sent = torch.stack(x.chunk(size(), over))
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=_group)
        return torch.cat(received.unbind(), joined)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        """[B, H / n, S, E] -> [B, H, S / n, E], or back."""
        over, joined = ctx.dimensions
        return _Exchange.apply(grad, joined, over), None, None


def join(x: Tensor, places: Tensor, total: int) -> Tensor:
    """The `total` numbers of a group from those that each rank has. x [N here], places [N here] int64, apart on all
    ranks -> [total] on each. The gradient of a number is that of the rank's own loss, which is the same on all."""
    return x if _group is None else _Sum.apply(x.new_zeros(total).index_copy(0, places.to(x.device), x))


class _Sum(torch.autograd.Function):
    """Sum over the group forwards; identity backwards."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        """[N] -> [N]."""
        total = x.clone()
        dist.all_reduce(total, group=_group)
        return total

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        """[N] -> [N]."""
        # not summed: each rank computes the same loss, so that a sum would count it n times
        return grad
