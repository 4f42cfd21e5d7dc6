"""Foreign parameter names, rotary layouts and fused tensors, to ours and back. Ours are Meta's."""

import functools
import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from src.checkpoint.families import FAMILIES, PLAIN
from src.checkpoint.shards import expected_shapes
from src.checkpoint.tensor_files import StoredTensor
from src.errors import UserError
from src.models.config import ModelConfig

Reorder = Callable[[str, Tensor, ModelConfig], Tensor]

_WRAPPERS = ("_orig_mod.", "module.")  # left by torch.compile and DistributedDataParallel

# Tensors that some writers store although they follow from the config.
_DERIVED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|rope\.freqs|freqs_cos|freqs_sin)$")

def _mlp(theirs: str, ours: str) -> dict[str, str]:
    """The three linears of a gated feed-forward."""
    return {f"{theirs}.{name}": f"{ours}.{w}" for name, w in
            (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3"))}


# Names without their last part (weight or bias), theirs -> ours; # stands for a number. Where two of theirs mean one of
# ours, exports have the first. Ours that end in _stacked or _grouped are tensors that hold several of our parameters.
_HF = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "score": "v_head",  # transformers' classifiers with one label
    "score.0": "v_head_in",  # Qwen2.5-Math-PRM
    "score.2": "v_head",
    **{f"model.layers.#.self_attn.{letter}_proj": f"layers.#.attention.w{letter}" for letter in "qkvo"},
    **{f"model.layers.#.self_attn.{letter}_norm": f"layers.#.attention.{letter}_norm" for letter in "qk"},
    **_mlp("model.layers.#.mlp", "layers.#.feed_forward"),
    "model.layers.#.input_layernorm": "layers.#.attention_norm",
    "model.layers.#.post_attention_layernorm": "layers.#.ffn_norm",
}
_POST_NORMS = {  # what others call the norm before the feed-forward is here the one after attention
    "model.layers.#.post_attention_layernorm": "layers.#.attention_post_norm",
    "model.layers.#.pre_feedforward_layernorm": "layers.#.ffn_norm",
    "model.layers.#.post_feedforward_layernorm": "layers.#.ffn_post_norm",
}
_GATE_UP = {"model.layers.#.mlp.gate_up_proj": "layers.#.feed_forward.w13_stacked"}
_STACKED_EXPERTS = {  # in memory, and in files of transformers 5 alone
    "model.layers.#.mlp.gate": "layers.#.feed_forward.gate",
    "model.layers.#.mlp.experts.gate_up_proj": "layers.#.feed_forward.experts.w13_stacked",
    "model.layers.#.mlp.experts.down_proj": "layers.#.feed_forward.experts.w2_stacked",
}
_QWEN_EXPERTS = _mlp("model.layers.#.mlp.experts.#", "layers.#.feed_forward.experts.#") | _STACKED_EXPERTS
_NAMES: dict[str, dict[str, str]] = {
    "mixtral": _HF
    | {f"model.layers.#.block_sparse_moe.{part}": f"layers.#.feed_forward.{part}"
       for part in ("gate", "experts.#.w1", "experts.#.w2", "experts.#.w3")}
    | _STACKED_EXPERTS,
    "qwen": {
        "transformer.wte": "tok_embeddings",
        "transformer.ln_f": "norm",
        "lm_head": "output",
        "transformer.h.#.attn.c_attn": "layers.#.attention.wqkv_stacked",
        "transformer.h.#.attn.c_proj": "layers.#.attention.wo",
        "transformer.h.#.mlp.w2": "layers.#.feed_forward.w1",  # c_proj(w1(x) * silu(w2(x)))
        "transformer.h.#.mlp.w1": "layers.#.feed_forward.w3",
        "transformer.h.#.mlp.c_proj": "layers.#.feed_forward.w2",
        "transformer.h.#.ln_1": "layers.#.attention_norm",
        "transformer.h.#.ln_2": "layers.#.ffn_norm",
    },
    "qwen3_moe": _HF | _QWEN_EXPERTS,
    "qwen2_moe": _HF
    | _QWEN_EXPERTS
    | _mlp("model.layers.#.mlp.shared_expert", "layers.#.feed_forward.shared")
    | {"model.layers.#.mlp.shared_expert_gate": "layers.#.feed_forward.shared_gate"},
    **dict.fromkeys(("gemma2", "gemma3_text", "olmo2", "olmo3"), _HF | _POST_NORMS),
    "phi3": _HF | _GATE_UP | {"model.layers.#.self_attn.qkv_proj": "layers.#.attention.wqkv_stacked"},
    "glm4": _HF
    | _GATE_UP
    | {"model.layers.#.post_self_attn_layernorm": "layers.#.attention_post_norm",
       "model.layers.#.post_mlp_layernorm": "layers.#.ffn_post_norm"},
    "internlm2": {"output": "output", "model.layers.#.attention.wqkv": "layers.#.attention.wqkv_grouped"}
    | {f"model.{name}": name for name in (
        "tok_embeddings", "norm", "layers.#.attention.wo", "layers.#.attention_norm", "layers.#.ffn_norm",
        *(f"layers.#.feed_forward.w{number}" for number in (1, 2, 3)))},
}
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_FUSED = {"wqkv": ("wq", "wk", "wv"), "w13": ("w1", "w3")}


def strip_wrappers(name: str) -> str:
    """Remove the prefixes that module wrappers put before a parameter's name."""
    while name.startswith(_WRAPPERS):
        name = name.split(".", 1)[1]
    return name


def is_derived(name: str) -> bool:
    """Whether a stored tensor follows from the config and is left out."""
    return _DERIVED.search(name) is not None


def from_hf_name(name: str, family: str = PLAIN) -> str:
    """Our name of a Hugging Face parameter, or of the tensor it is fused in. Raises UserError for an unknown one."""
    ours = rename(name, _NAMES.get(family, _HF))
    if ours is None:
        raise UserError(f"unknown parameter {name!r}; the importer of {family} checkpoints knows no place for it")
    return ours


def to_hf_name(name: str, family: str = PLAIN) -> str:
    """The Hugging Face name of one of our parameters, or of a fused tensor under our name for it."""
    table = _NAMES.get(family, _HF)
    theirs = rename(name, {ours: theirs for theirs, ours in reversed(table.items())})
    assert theirs is not None, f"{name} has no place in a {family} checkpoint"
    return theirs


def rename(name: str, table: Mapping[str, str]) -> str | None:
    """A name looked up with its numbers replaced by #, which are put back; None if it is not there."""
    stem, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):  # transformers' stacked experts have bare names
        stem, kind = name, ""
    found = table.get(_NUMBER.sub("#", stem))
    if found is None:
        return None
    for number in _NUMBER.findall(stem):
        found = found.replace("#", number, 1)
    return f"{found}.{kind}" if kind else found


def as_ours(tensors: Mapping[str, StoredTensor], config: ModelConfig) -> dict[str, StoredTensor]:
    """A Hugging Face checkpoint's tensors, under our names already, as our parameters in our rotary layout. Raises
    UserError for a fused tensor whose shape does not fit the config."""
    ours: dict[str, StoredTensor] = {}
    for name, stored in tensors.items():
        parts = _parts(name, stored, config) if "_stacked" in name or "_grouped" in name else {name: stored}
        for part, piece in parts.items():
            ours[part] = piece.then(functools.partial(rotary_from_hf, part, config=config))
    return ours


def as_hf(tensors: Mapping[str, StoredTensor], config: ModelConfig) -> dict[str, StoredTensor]:
    """Our whole parameters as Hugging Face's: its names, its rotary layout, fused where the family fuses."""
    fused = fused_linears(config.family)
    theirs: dict[str, StoredTensor] = {}
    for name, stored in tensors.items():
        stem, kind = name.rsplit(".", 1)
        parent, _, module = stem.rpartition(".")
        whole = fused.get(module, "")
        modules = _FUSED.get(whole.partition("_")[0], ())
        if not whole:
            reorder = functools.partial(rotary_to_hf, name, config=config)
            theirs[to_hf_name(name, config.family)] = stored.then(reorder)
        elif module == modules[0]:
            parts = {part: tensors[part] for part in (f"{parent}.{each}.{kind}" for each in modules)}
            rows = sum(part.shape[0] for part in parts.values())
            load = functools.partial(_fuse, parts, config.n_kv_heads if whole.endswith("_grouped") else 1, config)
            name = to_hf_name(f"{parent}.{whole}.{kind}", config.family)
            theirs[name] = StoredTensor((rows, *stored.shape[1:]), load, stored.dtype)
    return theirs


def fused_linears(family: str) -> dict[str, str]:
    """Our linears that a family has in one tensor -> our name of it, such as w13_stacked; experts in memory apart."""
    wholes = {ours.rpartition(".")[2] for ours in _NAMES.get(family, _HF).values() if ".experts." not in ours}
    return {part: whole for whole in wholes for part in _FUSED.get(whole.partition("_")[0], ())}


def _fuse(parts: Mapping[str, StoredTensor], groups: int, config: ModelConfig) -> Tensor:
    """Linears as one tensor: in each of so many groups a part of each, after one another. [rows, ...] -> [all, ...]."""
    pieces = [rotary_to_hf(name, stored.load(), config).unflatten(0, (groups, -1)) for name, stored in parts.items()]
    return torch.cat(pieces, 1).flatten(0, 1)


def _parts(name: str, fused: StoredTensor, config: ModelConfig) -> dict[str, StoredTensor]:
    """Our parameters that a fused tensor holds, each cut from it when read. Raises UserError on a wrong shape."""
    shapes, of_experts = expected_shapes(config), ".experts." in name
    stem, way = re.fullmatch(r"(.+)_(stacked|grouped)(?:\.(?:weight|bias))?", name).groups()
    parent, _, whole = stem.rpartition(".")
    ends = [f"{module}.{'weight' if of_experts else name.rpartition('.')[2]}" for module in _FUSED.get(whole, (whole,))]
    places = [f"{parent}.{expert}" for expert in range(config.n_experts)] if of_experts else [parent]
    parts = [f"{place}.{end}" for place in places for end in ends]
    if not parts or parts[0] not in shapes:
        raise UserError(f"unknown parameter {name}: the config describes no {parts[0] if parts else 'experts'}")
    rows, groups = [shapes[part][0] for part in parts], config.n_kv_heads if way == "grouped" else 1
    expected = (*((len(places), sum(rows) // len(places)) if of_experts else (sum(rows),)), *shapes[parts[0]][1:])
    if fused.shape != expected:
        raise UserError(f"{name} has shape {list(fused.shape)}, but the config means {list(expected)}")
    # the parts are read one after the other: the last whole tensor is kept
    kept = fused._replace(load=functools.partial(_load_whole, fused))

    def take(whole: Tensor, index: int) -> Tensor:
        """One part [rows, ...]: of experts [X, rows, columns] the rows lie after one another, as _fuse() lays them."""
        by_group = (whole.flatten(0, 1) if of_experts else whole).unflatten(0, (groups, -1))
        return by_group.split([n // groups for n in rows], 1)[index].flatten(0, 1).contiguous()

    return {part: kept.then(functools.partial(take, index=index), shapes[part]) for index, part in enumerate(parts)}


@functools.lru_cache(maxsize=1)
def _load_whole(fused: StoredTensor) -> Tensor:
    """A fused tensor [rows, ...], kept until another one is read."""
    return fused.load()


def rotary_from_hf(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """Reorder the rows of a whole wq or wk, its bias or its norm [heads * E, ...] from Hugging Face's rotary layout to
    ours; others pass through.

    Hugging Face pairs row i of a head with row i + R/2 of the R that rotate; ours (Meta's) pairs rows 2i and 2i + 1.
    """
    return _reorder_rotary(name, tensor, config, (2, config.rotary_dim // 2))


def rotary_to_hf(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """The inverse of rotary_from_hf(). [heads * E, ...] -> [heads * E, ...]."""
    return _reorder_rotary(name, tensor, config, (config.rotary_dim // 2, 2))


def _reorder_rotary(name: str, tensor: Tensor, config: ModelConfig, rows: tuple[int, int]) -> Tensor:
    """Swap the two axes that a head's first rows [R] are made of, (half, pair) or (pair, half). Any shape of them."""
    of_q, of_k = (config.n_heads, config.n_kv_heads) if config.qk_norm_whole else (1, 1)
    heads = {"wq": config.n_heads, "wk": config.n_kv_heads, "q_norm": of_q, "k_norm": of_k}.get(name.split(".")[-2])
    if heads is None or FAMILIES[config.family].interleaved:
        return tensor
    by_head = tensor.unflatten(0, (heads, -1))
    turning, still = by_head.split((config.rotary_dim, config.head_dim - config.rotary_dim), 1)
    turning = turning.unflatten(1, rows).transpose(1, 2).flatten(1, 2)
    return (torch.cat((turning, still), 1) if still.shape[1] else turning).flatten(0, 1)
