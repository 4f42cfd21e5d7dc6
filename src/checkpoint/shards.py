"""Which dimension of which parameter the tensor-parallel ranks share out, and how to cut and join along it."""

import functools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from src import parallel
from src.errors import UserError
from src.models.config import ModelConfig
from src.parallel import padded_share, share

# Last module name of a parameter -> the dimension that is split; None = every shard holds it whole.
SPLIT_DIM: dict[str, int | None] = {
    **dict.fromkeys(("wq", "wk", "wv", "w1", "w3", "output"), 0),  # by what they give
    **dict.fromkeys(("wo", "w2"), 1),  # by what they take: the sum over ranks is theirs to send
    **dict.fromkeys(("gate", "shared_gate", "q_norm", "k_norm", "norm", "v_head", "v_head_in", "attention_norm",
                     "attention_post_norm", "ffn_norm", "ffn_post_norm"), None),
}


def split_dim(name: str, config: ModelConfig, n: int = 1) -> int | None:
    """The dimension of a parameter that n shards share out. Raises UserError for a name not in the table."""
    parts = name.split(".")
    module = _module(name)
    if module == "tok_embeddings":
        return config.embedding_dim_on(n)
    if module not in SPLIT_DIM or parts[-1] not in ("weight", "bias"):
        raise UserError(f"unknown parameter {name!r}; a checkpoint has {', '.join(SPLIT_DIM)}")
    dim = SPLIT_DIM[module]
    if config.qk_norm_whole and module in ("q_norm", "k_norm"):
        return 0  # as the projection whose outputs it normalises
    if parts[-2] in ("lora_a", "lora_b", "lora_m"):
        # an adapter's A shares its base's inputs, its B and DoRA's lengths the base's outputs: A or they are whole
        return dim if dim == (1 if parts[-2] == "lora_a" else 0) else None
    if parts[-1] == "bias" and dim is None and not (config.two_layer_head and module.startswith("v_head")):
        raise UserError(f"unknown parameter {name!r}; only linears that are split have a bias")
    return None if parts[-1] == "bias" and dim == 1 else dim  # outputs of the sum over ranks are whole


def _base_name(name: str) -> str:
    """The parameter of the plain model whose dimensions this one shares: itself, or what an adapter adapts."""
    stem, _, kind = name.rpartition(".")
    for inner in (".base", ".lora_a", ".lora_b", ".lora_m"):
        stem = stem.removesuffix(inner)
    return f"{stem}.{kind}"


def _module(name: str) -> str:
    """The linear, norm or embedding that a parameter belongs to, adapters and adapted bases included."""
    return _base_name(name).rpartition(".")[0].split(".")[-1]


def layer_of(name: str) -> int | None:
    """The layer that a parameter belongs to; None for embeddings, the last norm and what follows it."""
    place, _, rest = name.partition(".")
    return int(rest.partition(".")[0]) if place == "layers" else None


class Cut(NamedTuple):
    """How n shards share out one parameter: the dimension, its whole size, and the rows each shard holds.

    Rows may be uneven, overlap (a KV head that several ranks hold) or run past the size (padding, zeros).
    dim None: every shard holds the whole parameter.
    """

    dim: int | None
    size: int
    rows: tuple[range, ...]


def cut_of(name: str, config: ModelConfig, n: int) -> Cut:
    """How n shards share out a parameter, adapters included. Raises UserError for one that the config lacks."""
    dim, module = split_dim(name, config, n), _module(name)
    if dim is None:
        return Cut(None, 0, (range(0),) * n)
    if _base_name(name) not in expected_shapes(config):
        raise UserError(f"unknown parameter {name!r}; the config describes no such tensor")
    size = expected_shapes(config)[_base_name(name)][dim]
    if module in ("wq", "wo", "q_norm"):
        rows = [config.rows_of(config.heads_on(n, index)[0]) for index in range(n)]
    elif module in ("wk", "wv", "k_norm"):
        rows = [config.rows_of(config.heads_on(n, index)[1]) for index in range(n)]
    elif module in ("tok_embeddings", "output"):
        rows = [padded_share(size, n, index) for index in range(n)]
    else:
        rows = [share(size, n, index) for index in range(n)]
    return Cut(dim, size, tuple(rows))


def copies(how: Cut, index: int) -> int:
    """How many of the shards hold the rows that shard `index` holds, itself included."""
    return how.rows.count(how.rows[index])


def cut(tensor: Tensor, how: Cut, index: int) -> Tensor:
    """Shard `index` of a whole tensor [..., size, ...], as a copy with its own memory; padding rows are zeros.

    -> [..., len(how.rows[index]), ...], how.dim being the dimension that is cut.
    """
    piece = view_of(tensor, how, index)
    shares = piece.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    return piece.clone(memory_format=torch.contiguous_format) if shares else piece


def view_of(tensor: Tensor, how: Cut, index: int) -> Tensor:
    """cut() in the tensor's own memory, unless padding rows (zeros) must be added. [...] -> [..., rows, ...]."""
    if how.dim is None:
        return tensor
    rows = how.rows[index]
    start, stop = min(rows.start, how.size), min(rows.stop, how.size)
    return _padded(tensor.narrow(how.dim, start, stop - start), how.dim, len(rows))


def join(pieces: Sequence[Tensor], how: Cut, wanted: range | None = None) -> Tensor:
    """The whole tensor [..., size, ...] from its shards, padding dropped and copies taken once; or its rows `wanted`
    alone, and nothing else of the shards is read. Raises UserError when two shards disagree about what both hold, or
    about its type."""
    if len(set(dtypes := [str(piece.dtype).removeprefix("torch.") for piece in pieces])) > 1:
        raise UserError(f"shards hold a parameter in different types: {', '.join(dtypes)}; they are not of one "
                        "checkpoint")
    if how.dim is None:
        _check_copies(pieces[1:], pieces[0])
        return pieces[0]
    wanted = range(how.size) if wanted is None else wanted
    shape = list(pieces[0].shape)
    shape[how.dim] = len(wanted)
    whole, filled = pieces[0].new_empty(shape), wanted.start
    for piece, rows in zip(pieces, how.rows, strict=True):
        start, stop = max(rows.start, wanted.start), min(rows.stop, wanted.stop)
        if start >= stop:
            continue
        own = piece.narrow(how.dim, start - rows.start, stop - start)
        target = whole.narrow(how.dim, start - wanted.start, stop - start)
        # rows come in order: what is filled already, these are copies of
        twice = max(0, min(filled, stop) - start)
        _check_copies([own.narrow(how.dim, 0, twice)], target.narrow(how.dim, 0, twice))
        target.narrow(how.dim, twice, stop - start - twice).copy_(own.narrow(how.dim, twice, stop - start - twice))
        filled = max(filled, stop)
    assert filled == max(wanted.start, wanted.stop), f"the shards hold rows up to {filled} of {wanted}"
    return whole


def reshard(pieces: Sequence[Tensor], how: Cut, other: Cut, index: int) -> Tensor:
    """Shard `index` of the cut `other` from the shards of the cut `how`, reading only what it holds. [..., rows, ...]
    each. Also for optimizer state, whose tensors have their parameter's shape. Raises UserError as join() does."""
    if how.dim is None:
        _check_copies(pieces[1:], pieces[0])
        return cut(pieces[0], other, index)
    if other.dim is None:
        return join(pieces, how)
    rows = other.rows[index]
    held = range(min(rows.start, other.size), min(rows.stop, other.size))
    if how.dim == other.dim:
        piece = join(pieces, how, held)
    else:  # the embedding, by its width in one and by its vocabulary in the other
        piece = join([part.narrow(other.dim, held.start, len(held)) for part in pieces], how)
    return _padded(piece, other.dim, len(rows))


def _padded(piece: Tensor, dim: int, length: int) -> Tensor:
    """A piece with zeros appended along `dim`, up to `length`. [..., n, ...] -> [..., length, ...]."""
    if piece.shape[dim] == length:
        return piece
    shape = list(piece.shape)
    shape[dim] = length - piece.shape[dim]
    return torch.cat([piece, piece.new_zeros(shape)], dim)


def check_pieces(name: str, shapes: Sequence[tuple[int, ...]], how: Cut, where: str) -> None:
    """Raise UserError unless the shapes of a parameter's shards are those of this cut."""
    for index, shape in enumerate(shapes):
        expected = tuple(len(how.rows[index]) if axis == how.dim else size for axis, size in enumerate(shapes[0]))
        if shape != expected:
            raise UserError(f"{where}: {name} is {list(shape)} in shard {index}, expected {list(expected)} beside "
                            f"{list(shapes[0])} in shard 0; the shards are not of one split")


def _check_copies(copies: Sequence[Tensor], first: Tensor) -> None:
    """Raise UserError unless these, all [...], are bit-equal (NaN equals NaN)."""
    for copy in copies:
        if not torch.equal(copy.contiguous().view(torch.uint8), first.contiguous().view(torch.uint8)):
            raise UserError("two shards hold different values of the same rows of a parameter; they are not of one "
                            "checkpoint")


@functools.lru_cache(maxsize=8)
def expected_shapes(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """Name and whole shape of every parameter that a checkpoint of this config holds.

    D width, V vocabulary, Q and K rows of queries and keys, F width of the feed-forward
    """
    D, V, F = config.dim, config.vocab_size, config.ffn_dim
    Q, K = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    attention = {"wq.weight": (Q, D), "wk.weight": (K, D), "wv.weight": (K, D), "wo.weight": (D, Q)}
    if config.qkv_bias or config.attention_bias:
        attention |= {"wq.bias": (Q,), "wk.bias": (K,), "wv.bias": (K,)}
    if config.attention_bias:
        attention["wo.bias"] = (D,)
    if config.qk_norm:
        of_q, of_k = (Q, K) if config.qk_norm_whole else (config.head_dim, config.head_dim)
        attention |= {"q_norm.weight": (of_q,), "k_norm.weight": (of_k,)}
    layer: dict[str, tuple[int, ...]] = {f"attention.{name}": shape for name, shape in attention.items()}
    widths = {f"experts.{expert}.": F for expert in range(config.n_experts)} or {"": F}
    if config.n_experts:
        layer["feed_forward.gate.weight"] = (config.n_experts, D)
    if config.shared_ffn_dim:
        layer["feed_forward.shared_gate.weight"] = (1, D)
        widths["shared."] = config.shared_ffn_dim
    for place, width in widths.items():
        for name, rows, columns in (("w1", width, D), ("w2", D, width), ("w3", width, D)):
            layer[f"feed_forward.{place}{name}.weight"] = (rows, columns)
            if config.mlp_bias:
                layer[f"feed_forward.{place}{name}.bias"] = (rows,)
    norms = ["attention_norm", "ffn_norm"] * config.pre_norms
    norms += ["attention_post_norm", "ffn_post_norm"] * config.post_norms
    layer |= {f"{norm}.weight": (D,) for norm in norms}
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (V, D)}
    for index in range(config.n_layers):
        shapes |= {f"layers.{index}.{name}": shape for name, shape in layer.items()}
    shapes["norm.weight"] = (D,)
    if config.value_head:
        if config.two_layer_head:
            shapes |= {"v_head_in.weight": (D, D), "v_head_in.bias": (D,), "v_head.bias": (1,)}
        shapes["v_head.weight"] = (1, D)
    elif not config.tied:
        shapes["output.weight"] = (V, D)
    return MappingProxyType(shapes)


def assign(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Make these tensors [...] the model's parameters, parts of this data-parallel rank where it is shared.

    Fresh adapters are left alone. Raises UserError unless all other names and shapes match exactly.
    """
    wanted = places(model)
    for name, place in wanted.items():
        shape = tuple(model.get_parameter(place).shape)
        if name not in tensors:
            raise UserError(f"{source}: parameter {name!r} is missing from its shard")
        if tuple(tensors[name].shape) != shape:
            raise UserError(f"{source}: {name} has shape {list(tensors[name].shape)} but params.json means "
                            f"{list(shape)} on each of {parallel.tensor_parallel_size()} ranks")
    unknown = sorted(set(tensors) - set(wanted))
    if unknown:
        raise UserError(f"{source}: unknown parameter {unknown[0]!r}; params.json describes no such tensor")
    for name, place in wanted.items():
        put(model, place, tensors[name])


def places(model: nn.Module) -> dict[str, str]:
    """The name in a checkpoint of every parameter that is no adapter's -> its name in the model."""
    return {_base_name(name): name for name, _ in model.named_parameters() if ".lora_" not in name}


def put(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Make a tensor [...] the parameter of this name, to be trained or not as the one that was there."""
    parent, _, child = name.rpartition(".")
    learns = model.get_parameter(name).requires_grad
    setattr(model.get_submodule(parent), child, nn.Parameter(tensor, requires_grad=learns))
