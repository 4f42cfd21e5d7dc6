"""Ranks, groups and what is sent between them: with context_parallel.py the only door to torch.distributed.

V vocabulary, P vocabulary rows on this rank
"""

import atexit
import contextlib
import datetime
import io
import os
import random
import socket
import timeit
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as groups
from fairscale.nn.model_parallel import mappings
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from src import context_parallel
from src.errors import UserError
from src.processes import heap, watchdog

Item = TypeVar("Item")

JOIN_TIME = datetime.timedelta(minutes=10)  # between the starts of the first and the last rank; torchrun's own limit
ANSWER_TIME = datetime.timedelta(seconds=30)  # of the store that they met in, to the watchdog's own connection

_mesh: DeviceMesh | None = None  # of several data-parallel ranks: [ranks], or [replicas, ranks that share one]


def start(seed: int = 1, tensor_parallel_size: int = -1, replicas: int = 1, context_parallel_size: int = 1) -> None:
    """Join the process group that torchrun describes (or a group of one) and seed every generator alike.
    Consecutive ranks form tensor-parallel groups of the given size (-1: one group of all ranks); ranks at the same
    place in theirs form a data-parallel group, whose consecutive ranks share each of `replicas` copies of a model that
    learns (HSDP), and `context_parallel_size` a batch. gloo on the CPU, NCCL where CUDA is. Raises UserError."""
    if not dist.is_initialized():
        heap.keep_large_blocks()  # before anything large is allocated
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if torch.cuda.is_available():
            number, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
            if number >= gpus:
                raise UserError(f"process {number} of this machine finds {gpus} GPUs; start at most one for each GPU")
            torch.cuda.set_device(number)
        if "RANK" in os.environ:
            _join(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        with contextlib.redirect_stdout(io.StringIO()):  # fairscale prints its group sizes; nothing else runs here
            size = dist.get_world_size() if tensor_parallel_size == -1 else tensor_parallel_size
            groups.initialize_model_parallel(size)
        context_parallel.start(context_parallel_size, size)
        divided(groups.get_data_parallel_world_size(), "replicas", replicas)
        global _mesh
        _mesh = _data_parallel_mesh(replicas) if groups.get_data_parallel_world_size() > 1 else None
        atexit.register(stop)  # gloo's threads abort a process that exits while its groups are alive
    seed_all(seed)


def divided(n: int, flag: str, value: int, what: str = "data-parallel ranks") -> int:
    """How many of n ranks each part has of as many as a flag says. Raises UserError."""
    if n % value:
        raise UserError(f"--{flag} {value} does not divide the {n} {what} that run; start a multiple of it")
    return n // value


def _data_parallel_mesh(replicas: int) -> DeviceMesh:
    """The data-parallel ranks of this one, by replica and place in it; of one replica by place."""
    ranks = torch.arange(world_size()).view(-1, tensor_parallel_size())
    if replicas == 1:
        both = [groups.get_data_parallel_group(), groups.get_model_parallel_group()]
        return DeviceMesh.from_group(both, device().type, mesh=ranks, mesh_dim_names=("dp", "tp"))["dp"]
    mesh = DeviceMesh(device().type, ranks.unflatten(0, (replicas, -1)), mesh_dim_names=("replica", "shard", "tp"))
    return mesh["replica", "shard"]


def _join(backend: str) -> None:
    """Meet the ranks that the environment describes, and watch them from then on. Raises UserError."""
    found = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR")}
    *numbers, host = found.values()
    if not (all(map(str.isdecimal, numbers)) and host and int(numbers[0]) < int(numbers[1])):
        raise UserError(f"the environment says {found}, expected what torchrun sets; use torchrun, or unset RANK")
    number, size, port = map(int, numbers)
    try:
        socket.getaddrinfo(host, port)
        store, *_ = next(dist.rendezvous("env://", timeout=JOIN_TIME))
        talk = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=ANSWER_TIME)
        watching = watchdog.Watchdog(talk, number, size, device().type)
        if size > 1:
            watching.start()
            atexit.register(watching.leave)
        dist.init_process_group(backend, store=store, rank=number, world_size=size)
    except (RuntimeError, ValueError, OSError, OverflowError) as error:
        why = str(error).partition("\n")[0]
        raise UserError(
            f"port {port} is in use; choose another with --master_port, or let torchrun --standalone choose"
            if "EADDRINUSE" in why
            else f"rank {number} of {size} does not meet the others at {host}:{port} ({why}); is that the machine of "
            f"rank 0, and may this one reach it? {backend.upper()}_SOCKET_IFNAME names a network interface"
        ) from None


def stop() -> None:
    """Leave the process group; start() may be called again."""
    if dist.is_initialized():
        groups.destroy_model_parallel()
        dist.destroy_process_group()


def seed_all(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices). Equal on all ranks: replicated draws must agree."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # NumPy's seeds have 32 bits
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
    return groups.get_model_parallel_group().size()  # every layer asks: dist.get_world_size() takes ten times as long


def data_parallel_rank() -> int:
    """This rank's place among those that see other data; alike on ranks that share a batch."""
    return groups.get_data_parallel_rank() // context_parallel.size()


def data_parallel_size() -> int:
    """Number of batches that a step's data are dealt to at once."""
    return groups.get_data_parallel_world_size() // context_parallel.size()


def ranks_per_batch() -> int:
    """Number of ranks that compute the same losses: they share a model, and the positions of a batch."""
    return tensor_parallel_size() * context_parallel.size()


def device() -> torch.device:
    """The device this rank computes on."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def to_device(x: Tensor) -> Tensor:
    """x [...] of main memory on this rank's device. A GPU takes it in its own time: the host does not wait for it."""
    return x.pin_memory().to(device(), non_blocking=True) if device().type == "cuda" else x


def compute_dtype(precision: str = "") -> torch.dtype:
    """The type that linear layers and attention compute in, alike on every rank.
    precision: float32, bfloat16 or float16; empty = bfloat16 on a GPU, float32 on a CPU; auto = bfloat16 on a GPU, and
    on a CPU whose first rank multiplies faster in it (AMX, AVX-512 BF16), else float32."""
    if precision in ("", "auto"):
        half = device().type == "cuda" or precision == "auto" and _multiplies_faster(torch.bfloat16)
        if dist.is_initialized():  # one measurement for all: ranks that compute in two types would not agree
            half = any_rank(half and rank() == 0)
        return torch.bfloat16 if half else torch.float32
    return getattr(torch, precision)


def _multiplies_faster(dtype: torch.dtype) -> bool:
    """Whether a square product in this type takes at most two thirds of the time of float32's."""
    x = torch.ones(512, 512)
    in_it, in_float32 = (min(timeit.repeat(lambda x=x: x @ x, number=1, repeat=5)) for x in (x.to(dtype), x))
    return 1.5 * in_it < in_float32


def barrier() -> None:
    """Wait for all ranks: through the store first, for as long as one of them writes; a collective gives up."""
    watchdog.await_all()
    dist.barrier()


def sum_over_tensor_parallel(x: Tensor) -> Tensor:
    """Sum x [...] over the tensor-parallel group, in place; no gradient. Returns x."""
    if tensor_parallel_size() > 1:
        dist.all_reduce(x, group=groups.get_model_parallel_group())
    return x


def max_over_tensor_parallel(x: Tensor) -> Tensor:
    """Maximum of x [...] over the tensor-parallel group, in place; no gradient. Returns x."""
    if tensor_parallel_size() > 1:
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=groups.get_model_parallel_group())
    return x


def sum_over_data_parallel(x: float) -> float:
    """Sum of a number over the data-parallel group: a step's global count from every rank's own."""
    return x if data_parallel_size() == 1 else join_over_data_parallel(torch.tensor(x, dtype=torch.float64)).item()


def sum_over_all(x: Tensor) -> Tensor:
    """Sum x [...] over every rank, in place; no gradient. Returns x."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def gather_over_data_parallel(items: list[Item]) -> list[Item]:
    """The lists of all data-parallel ranks joined in their order, alike on each. Items must be picklable."""
    if groups.get_data_parallel_world_size() == 1:
        return items
    found: list[list[Item]] = [[] for _ in range(groups.get_data_parallel_world_size())]
    dist.all_gather_object(found, items, group=groups.get_data_parallel_group())
    return [item for part in found[:: context_parallel.size()] for item in part]


def join_over_data_parallel(x: Tensor) -> Tensor:
    """Sum of CPU tensors x [...] over the data-parallel ranks, each of which has filled its own entries. -> [...]."""
    if groups.get_data_parallel_world_size() == 1:
        return x
    total = x.to(device()) * (context_parallel.rank() == 0)  # of those that share a batch the first one counts
    dist.all_reduce(total, group=groups.get_data_parallel_group())
    return total.cpu()


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank; alike on every rank."""
    return bool(sum_over_all(torch.tensor(float(flag), device=device())))


def shard_over_data_parallel(model: nn.Module, blocks: Iterable[nn.Module], dtype: torch.dtype) -> None:
    """Share every parameter, its gradient and its optimizer state over the ranks of a replica (FSDP2); a model that is
    shared stays so. `blocks` are gathered one at a time, the rest as a whole, rounded to `dtype`; under adapters, which
    are rounded where they are used, as held. Gradients are summed in float32, not averaged: losses are already divided
    by counts over all ranks. Parameters may be on the meta device, to be filled with part_like()."""
    if _mesh is None or _is_shared(model):
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    rounded = dtype if all(parameter.requires_grad for parameter in model.parameters()) else None
    # a block's input, the residual stream, stays float32
    rounding = MixedPrecisionPolicy(param_dtype=rounded, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*blocks, model):
        fully_shard(module, mesh=_mesh, mp_policy=rounding)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sums


def _is_shared(x: Tensor | nn.Module) -> bool:
    """Whether data-parallel ranks each hold a part of x: an FSDP2 module or a DTensor."""
    if _mesh is None:
        return False
    from torch.distributed.fsdp import FSDPModule  # 0.7 s, which one data-parallel rank need not spend
    from torch.distributed.tensor import DTensor

    return isinstance(x, FSDPModule | DTensor)


def replicas() -> int:
    """How many copies of what learns the data-parallel ranks hold together."""
    return _mesh.size(0) if _mesh is not None and _mesh.ndim == 2 else 1


def communicate_gradients(model: nn.Module, now: bool) -> None:
    """Whether the next backward() sums gradients over the data-parallel group, or leaves that to a later one."""
    if _is_shared(model):
        model.set_requires_gradient_sync(now)


def free_gathered(model: nn.Module) -> None:
    """Give back what an evaluation gathered, so that the parameters are the optimizer's again."""
    if _is_shared(model):
        model.reshard()


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside, each data-parallel rank holds the whole parameters: forward passes send nothing to other such ranks.
    They may then make different numbers of them, as sampling does. No backward pass inside."""
    shared = [module for module in model.modules() if _is_shared(module)]
    for module in shared:
        module.set_reshard_after_forward(False, recurse=False)  # else each pass would give its weights back
        module.unshard()
    try:
        yield
    finally:
        for module in shared:
            module.set_reshard_after_forward(module is not model, recurse=False)
            module.reshard()


def local(x: Tensor) -> Tensor:
    """This data-parallel rank's part of a tensor, sharing its memory. [n, ...] -> [n on this rank, ...]."""
    return x.to_local() if _is_shared(x) else x


def holds_whole() -> bool:
    """Whether this rank is the first of its data-parallel group, which writes what they have."""
    return _mesh is None or groups.get_data_parallel_rank() == 0


def gather_on_first(x: Tensor) -> Tensor | None:
    """The whole tensor on data-parallel rank 0, to which the others of its replica send; all ranks call this.
    [n on this rank, ...] -> [n, ...], None on the others."""
    first = holds_whole()
    if not _is_shared(x):
        return x if first else None
    group, size = x.device_mesh.get_group(x.device_mesh.ndim - 1), x.device_mesh.size(x.device_mesh.ndim - 1)
    if groups.get_data_parallel_rank() >= size:  # another replica
        return None
    part = x.detach().to_local()
    each = -(-len(x) // size)  # rows, of the first ranks: the last ones may hold fewer
    if len(part) < each:  # gather() takes pieces of one size
        part = torch.cat([part, part.new_zeros(each - len(part), *part.shape[1:])])
    pieces = part.new_empty(size, *part.shape) if first else None
    dist.gather(part, None if pieces is None else list(pieces), dist.get_global_rank(group, 0), group)
    return None if pieces is None else pieces.flatten(0, 1)[: len(x)]


def rows_like(x: Tensor, like: Tensor) -> Tensor:
    """The rows of x [n, ...] that this data-parallel rank has of `like` [n, ...], in x's memory. -> [n here, ...]."""
    if not _is_shared(like):
        return x
    mesh, shared = like.device_mesh, like.device_mesh.ndim - 1
    rows = padded_share(len(x), mesh.size(shared), mesh.get_local_rank(shared))
    return x[rows.start : rows.stop]


def part_like(x: Tensor, like: Tensor) -> Tensor:
    """This data-parallel rank's part of x [n, ...] on its device, shared and typed as `like` [n, ...] is: a copy.
    No other part of x is read, and nothing is sent. What is a part already stays as it is."""
    if _is_shared(x):
        return x
    return as_part(rows_like(x, like).to(device(), like.dtype, copy=True), like)


def as_part(x: Tensor, like: Tensor) -> Tensor:
    """x [n on this rank, ...] as the part of a tensor laid out as `like` [n, ...] is; nothing is copied."""
    if _is_shared(like):
        place = {"device_mesh": like.device_mesh, "placements": like.placements}
        return type(like).from_local(x, **place, run_check=False, shape=like.shape, stride=like.stride())
    return x


def broadcast_from_first(x: Tensor) -> Tensor:
    """Give every tensor-parallel rank the first one's values of x [...], in place. Returns x."""
    if tensor_parallel_size() > 1:
        dist.broadcast(x, groups.get_model_parallel_src_rank(), group=groups.get_model_parallel_group())
    return x


def from_first_rank(compute: Callable[[], Item], *, of_group: bool = False) -> Item:
    """What the first rank (of_group: of each tensor-parallel group) computes, pickled, on all. It may take long."""
    first = groups.get_model_parallel_src_rank() if of_group else 0
    with watchdog.turn(first, of_group=of_group):
        found = [compute() if rank() == first else None]
    dist.broadcast_object_list(found, first, groups.get_model_parallel_group() if of_group else None)
    return found[0]


def gather_vocab(local_logits: Tensor) -> Tensor:
    """Join vocabulary slices. [..., P] -> [..., V] on every rank; differentiable."""
    return mappings.gather_from_model_parallel_region(local_logits)


def copy_to_tensor_parallel(x: Tensor) -> Tensor:
    """Identity of x [...] forwards; sums the gradient over the tensor-parallel group backwards."""
    return mappings.copy_to_model_parallel_region(x) if tensor_parallel_size() > 1 else x


def reduce_from_tensor_parallel(x: Tensor) -> Tensor:
    """Sum x [...] over the tensor-parallel group forwards; identity backwards."""
    return mappings.reduce_from_model_parallel_region(x) if tensor_parallel_size() > 1 else x


def share(size: int, n: int | None = None, index: int | None = None) -> range:
    """The rows of a dimension that part `index` of n holds (default: this rank of its tensor-parallel group).
    Parts are contiguous and as even as they can be: the first ones take what does not divide."""
    n = tensor_parallel_size() if n is None else n
    index = tensor_parallel_rank() if index is None else index
    each, rest = divmod(size, n)
    start = index * each + min(index, rest)
    return range(start, start + each + (index < rest))


def padded_share(size: int, n: int | None = None, index: int | None = None) -> range:
    """Like share(), but all parts are equally long: the last ones may run past the end, into padding."""
    index = tensor_parallel_rank() if index is None else index
    each = len(share(size, n, 0))  # where parts are uneven the first is the longest
    return range(index * each, (index + 1) * each)
