"""Which dimension of which parameter the tensor-parallel ranks share out, and how to cut and join along it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from src.errors import UserError
from src.models.config import ModelConfig

# Last module name of a parameter -> the dimension that is split; None = every shard holds it whole.
SPLIT_DIM: dict[str, int | None] = {
    "wq": 0,
    "wk": 0,
    "wv": 0,
    "wo": 1,
    "w1": 0,
    "w2": 1,
    "w3": 0,
    "output": 0,
    "attention_norm": None,
    "ffn_norm": None,
    "norm": None,
    "v_head": None,
}


def split_dim(name: str, config: ModelConfig) -> int | None:
    """The split dimension of a parameter, adapters included. Raises UserError for a name not in the table."""
    parts = name.removesuffix(".weight").split(".")
    if parts[-1] == "tok_embeddings":
        return config.embedding_split_dim
    if parts[-1] in ("lora_a", "lora_b"):
        # an adapter's A shares its base's inputs, its B the base's outputs: one of the two is whole
        dim = SPLIT_DIM[parts[-2]]
        return dim if dim == (1 if parts[-1] == "lora_a" else 0) else None
    module = parts[-2] if parts[-1] == "base" else parts[-1]
    if module not in SPLIT_DIM or not name.endswith(".weight"):
        raise UserError(f"unknown parameter {name!r}; a Llama-family checkpoint has {', '.join(SPLIT_DIM)}")
    return SPLIT_DIM[module]


def cut(tensor: Tensor, dim: int | None, n: int, index: int) -> Tensor:
    """Slice `index` of n equal slices along `dim` (the whole tensor if None), as a copy with its own memory."""
    piece = tensor if dim is None else tensor.chunk(n, dim)[index]
    return piece.clone(memory_format=torch.contiguous_format)


def join(pieces: Sequence[Tensor], dim: int | None) -> Tensor:
    """Put the slices of one parameter together again; whole copies must agree, the first is returned."""
    return pieces[0] if dim is None else torch.cat(list(pieces), dim)


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and whole shape of every parameter that a checkpoint of this config holds."""
    queries, keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    layer = {
        "attention.wq": (queries, config.dim),
        "attention.wk": (keys, config.dim),
        "attention.wv": (keys, config.dim),
        "attention.wo": (config.dim, queries),
        "feed_forward.w1": (config.ffn_dim, config.dim),
        "feed_forward.w2": (config.dim, config.ffn_dim),
        "feed_forward.w3": (config.ffn_dim, config.dim),
        "attention_norm": (config.dim,),
        "ffn_norm": (config.dim,),
    }
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (config.vocab_size, config.dim)}
    for index in range(config.n_layers):
        shapes |= {f"layers.{index}.{name}.weight": shape for name, shape in layer.items()}
    shapes["norm.weight"] = (config.dim,)
    if config.value_head:
        shapes["v_head.weight"] = (1, config.dim)
    elif not config.tied:
        shapes["output.weight"] = (config.vocab_size, config.dim)
    return shapes
