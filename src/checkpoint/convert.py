"""Foreign parameter names and rotary layouts, to ours and back. Ours are Meta's."""

import re
from collections.abc import Callable, Iterable

from torch import Tensor

from src.errors import UserError
from src.models.config import ModelConfig

Reorder = Callable[[str, Tensor, ModelConfig], Tensor]

_WRAPPERS = ("_orig_mod.", "module.")  # left by torch.compile and DistributedDataParallel

# Tensors that some writers store although they follow from the config.
_DERIVED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|rope\.freqs|freqs_cos|freqs_sin)$")

_HF_TOP = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
    "score.weight": "v_head.weight",  # transformers' classifiers with one label
    "score.bias": "v_head.bias",
}
_HF_LAYER = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
_OUR_LAYER = {ours: theirs for theirs, ours in _HF_LAYER.items()}
_OUR_TOP = {ours: theirs for theirs, ours in _HF_TOP.items()}


def strip_wrappers(name: str) -> str:
    """Remove the prefixes that module wrappers put before a parameter's name."""
    while name.startswith(_WRAPPERS):
        name = name.split(".", 1)[1]
    return name


def is_derived(name: str) -> bool:
    """Whether a stored tensor follows from the config and is left out."""
    return _DERIVED.search(name) is not None


def uses_hf_names(names: Iterable[str]) -> bool:
    """Whether a checkpoint speaks Hugging Face's names rather than Meta's."""
    return any(strip_wrappers(name).startswith("model.") for name in names)


def from_hf_name(name: str) -> str:
    """Our name of a Hugging Face parameter. Raises UserError for one we do not know."""
    if name in _HF_TOP:
        return _HF_TOP[name]
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
    if not match or match[2] not in _HF_LAYER:
        raise UserError(f"unknown parameter {name!r}; this Llama-family importer knows no place for it")
    return f"layers.{match[1]}.{_HF_LAYER[match[2]]}.weight"


def to_hf_name(name: str) -> str:
    """The Hugging Face name of one of our parameters."""
    if name in _OUR_TOP:
        return _OUR_TOP[name]
    _, index, rest = name.removesuffix(".weight").split(".", 2)
    return f"model.layers.{index}.{_OUR_LAYER[rest]}.weight"


def _rotary_heads(name: str, config: ModelConfig) -> int | None:
    """How many rotary heads lie in a projection's rows; None for every other parameter."""
    if name.endswith("attention.wq.weight"):
        return config.n_heads
    return config.n_kv_heads if name.endswith("attention.wk.weight") else None


def rotary_from_hf(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """Reorder a whole wq or wk from Hugging Face's rotary layout to ours; other tensors pass through.

    Hugging Face pairs row i of a head with row i + E/2; ours (Meta's) pairs rows 2i and 2i + 1.
    """
    heads = _rotary_heads(name, config)
    if heads is None:
        return tensor
    halves = tensor.unflatten(0, (heads, 2, config.head_dim // 2))  # [heads, half, pair, in]
    return halves.transpose(1, 2).flatten(0, 2)


def rotary_to_hf(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """The inverse of rotary_from_hf()."""
    heads = _rotary_heads(name, config)
    if heads is None:
        return tensor
    pairs = tensor.unflatten(0, (heads, config.head_dim // 2, 2))
    return pairs.transpose(1, 2).flatten(0, 2)
