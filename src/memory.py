"""What one rank holds in memory, by parts, from a config and the size of a forward pass alone. All in bytes.

On a CPU the sum is resident memory beside what the process holds before it has a model; on a GPU it is what torch
allocates there. Not counted: the scores of attention with a softcap, the masks of LoRA's dropout.

D width, H query heads, K key-value heads, E head dim, F feed-forward width, V vocabulary: what the first of n
tensor-parallel ranks has of each; none has more.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from src.checkpoint.shards import cut_of, expected_shapes, layer_of
from src.models.config import ModelConfig
from src.models.forward import CHUNK_BYTES
from src.models.lora import LoraConfig, check_targets
from src.models.quantize import bytes_a_weight

FLOAT32 = 4
# glibc's malloc returns freed blocks of this size at once (the highest its threshold rises to); smaller ones stay
HEAP_BLOCK = 32 * 2**20
# of both moments of a weight; in 8 bits 256 of them share a float32 scale
MOMENT_BYTES = {"adamw": 2 * FLOAT32, "adamw_8bit": 2 * (1 + FLOAT32 / 256)}
Checkpointing = Literal["none", "selective", "full"]


class Pass(NamedTuple):
    """A forward pass: its tokens, padding included, the supervised among them, and whether samples lie end to end."""

    n_tokens: int
    n_supervised: int
    packed: bool = False


class Training(NamedTuple):
    """How a model is trained. accumulates: a step has several backward passes. quantize: of LoRA's frozen base."""

    lora: LoraConfig | None = None
    quantize: str = ""
    checkpointing: Checkpointing = "none"
    data_parallel: int = 1
    accumulates: bool = False
    on_gpu: bool = False
    optimizer: str = "adamw"


def local_parameters(config: ModelConfig, n: int) -> int:
    """Parameters that the first of n tensor-parallel ranks holds; none holds more."""
    return sum(_local_sizes(config, n).values())


def _local_sizes(config: ModelConfig, n: int) -> dict[str, int]:
    return {name: _local_size(name, shape, config, n) for name, shape in expected_shapes(config).items()}


def _local_size(name: str, shape: Sequence[int], config: ModelConfig, n: int) -> int:
    """Entries of a parameter of this whole shape on the first of n ranks."""
    how = cut_of(name, config, n)
    return math.prod(len(how.rows[0]) if axis == how.dim else size for axis, size in enumerate(shape))


def local_lora_parameters(config: ModelConfig, lora: LoraConfig, n: int) -> int:
    """Trainable parameters of one rank under LoRA: adapters, and the value head where there is one."""
    check_targets(lora, config)
    total = config.dim if config.value_head else 0
    for name, shape in expected_shapes(config).items():
        stem = name.removesuffix(".weight")
        if stem.split(".")[-1] in lora.targets:
            rows, columns = shape
            for factor, factor_shape in (("lora_a", (lora.rank, columns)), ("lora_b", (rows, lora.rank))):
                total += _local_size(f"{stem}.{factor}.weight", factor_shape, config, n)
    return total


def training_memory(config: ModelConfig, n: int, largest: Pass, how: Training) -> dict[str, int]:
    """What a rank that trains holds at its peak, which is at the beginning or the end of the largest backward pass.

    Of gradients and activations, which replace one another as that pass goes on, each is given as at the peak.
    """
    sizes = _local_sizes(config, n)
    frozen = sum(sizes.values()) if how.lora else 0
    adapters = local_lora_parameters(config, how.lora, n) if how.lora else 0
    trainable = adapters or sum(sizes.values())
    parts = {
        "weights": (int(bytes_a_weight(how.quantize) * frozen) + FLOAT32 * trainable) // how.data_parallel,
        "optimizer": int(MOMENT_BYTES[how.optimizer] * trainable) // how.data_parallel,
    }
    kept, worked = activations(config, n, largest, how)
    gradients = FLOAT32 * trainable // (1 if how.accumulates else how.data_parallel)
    logits = logits_memory(config, n, largest, how)
    held = gradients if how.accumulates else 0  # of the passes before, as the largest begins
    if held + kept + logits > gradients + worked:
        parts |= {"gradients": held, "activations": kept, "logits": logits}
    else:
        parts |= {"gradients": gradients, "activations": worked, "logits": 0}
    if how.data_parallel > 1:
        parts["gathered"] = _gathered(sizes, how)
    if (
        how.on_gpu and not how.quantize
    ):  # autocast casts each linear's weight once a forward pass, and keeps it
        linears = sum(size for name, size in sizes.items() if len(expected_shapes(config)[name]) == 2)
        parts["bfloat16 copies"] = 2 * (linears - sizes["tok_embeddings.weight"] * (not config.tied))
    if not how.on_gpu:
        # a step's gradients leave holes in the heap, which the next step's activations, of other sizes, break up
        blocks = [FLOAT32 * size // how.data_parallel for size in sizes.values()] if not how.lora else []
        if how.data_parallel > 1:  # each rank has loaded whole weights before it kept its part of them
            blocks += [FLOAT32 * size for size in sizes.values()]
        parts["allocator"] = sum(block for block in blocks if block < HEAP_BLOCK)
    return parts


def loading_memory(config: ModelConfig, n: int, stored: int, quantize: str = "") -> int:
    """What a rank holds as its last weight is read: all of them, and its shard's file of `stored` bytes, mapped."""
    return stored + int(bytes_a_weight(quantize) * local_parameters(config, n))


def activations(config: ModelConfig, n: int, largest: Pass, how: Training) -> tuple[int, int]:
    """What the backward pass needs of the forward one as it begins, and what its last block needs alone."""
    attention, feed_forward = _block_activations(config, n, largest, how)
    entry = FLOAT32 * config.dim  # a block's input, all that is left of one that is computed again
    block = attention + feed_forward
    kept = {"none": block, "selective": attention + entry, "full": entry}[how.checkpointing] * config.n_layers
    computed_again = {"none": 0, "selective": feed_forward, "full": block}[how.checkpointing]
    # the gradients of the product, the gate and the other factor, before they become one of the block's input
    working = 3 * _compute_bytes(how) * _width(config, n)
    rest = (2 if how.lora else 3) * FLOAT32 * config.dim  # of the last norm
    last = largest.n_tokens * (block + working)
    return largest.n_tokens * (kept + computed_again + rest + working), last


def _compute_bytes(how: Training) -> int:
    """Bytes of a number that linears read and write: bfloat16 on a GPU."""
    return 2 if how.on_gpu else FLOAT32


def _width(config: ModelConfig, n: int) -> int:
    """F, of all experts that a token passes."""
    return -(-config.ffn_dim // n) * max(1, config.n_active_experts)


def _block_activations(config: ModelConfig, n: int, largest: Pass, how: Training) -> tuple[int, int]:
    """Bytes a token that attention and feed-forward each keep for the backward pass: the tensors it will read."""
    D, E, F, c = config.dim, config.head_dim, _width(config, n), _compute_bytes(how)
    H, K = (len(heads) for heads in config.heads_on(n, 0))
    rank = how.lora.rank if how.lora else 0
    # a norm keeps its float32 input and, step by step on a CPU, its root and, to learn its weight, the quotient
    learns = how.lora is None and not how.on_gpu

    def norm(width: int) -> int:
        return FLOAT32 * (width * (2 if learns else 1) + (not how.on_gpu))

    # what linears read: the norm's output, which they share; under autocast each casts it for itself
    read = (3 * c * D, 2 * c * D) if how.on_gpu else (FLOAT32 * D, FLOAT32 * D)
    attention = norm(D) + read[0]
    attention += c * (H + 2 * K) * E + c * H * E + FLOAT32 * H  # queries, keys, values; output; log-sum-exps
    if not how.on_gpu:
        attention += 2 * FLOAT32 * E  # the rotation as complex numbers, for queries and for keys
        attention += c * H * E * largest.packed  # the samples' outputs, end to end
    if config.qk_norm:
        attention += norm(E) * (H + K)
    feed_forward = norm(D) + read[1] + 4 * c * F  # both products' outputs, the gate, the product of both
    if config.post_norms:
        attention, feed_forward = attention + norm(D), feed_forward + norm(D)
    adapted = how.lora.targets if how.lora else ()  # x A^T of each
    attention += c * rank * sum(name in ("wq", "wk", "wv", "wo") for name in adapted)
    feed_forward += c * rank * sum(name in ("w1", "w2", "w3") for name in adapted)
    return attention, feed_forward


def logits_memory(config: ModelConfig, n: int, largest: Pass, how: Training) -> int:
    """What the loss holds: the selected hidden states, and twice the logits of as many positions as are done at once.

    The logits and their log-softmax in the forward pass, the latter and the gradient in the backward one.
    """
    if config.value_head:
        return 0
    row = FLOAT32 * (-(-config.vocab_size // n))
    positions = min(largest.n_supervised, max(1, CHUNK_BYTES["cuda" if how.on_gpu else "cpu"] // row))
    held = FLOAT32 * config.dim * largest.n_supervised + 2 * row * positions
    if how.on_gpu:
        held += row * positions // 2  # the logits in bfloat16, as the linear yields them
    if not how.lora:  # the gradient of the output layer, and a chunk's beside it where there are several
        held += row * config.dim * (2 if positions < largest.n_supervised else 1)
    return held


def _gathered(sizes: dict[str, int], how: Training) -> int:
    """What FSDP2 has gathered at once: the block at work, the next one twice as its buffer is cut up, and the rest.

    Where weights learn there are gradients of one block and of the rest before they are summed and shared out.
    """
    block = sum(size for name, size in sizes.items() if layer_of(name) == 0)
    rest = sum(size for name, size in sizes.items() if layer_of(name) is None)
    weights = int(bytes_a_weight(how.quantize) * (3 * block + rest))
    return weights + (0 if how.lora else FLOAT32 * (block + rest))


def decoding_memory(
    config: ModelConfig, n: int, n_rows: int, n_tokens: int, quantize: str = ""
) -> dict[str, int]:
    """A rank that decodes n_rows rows of at most n_tokens tokens, if all get that long at once."""
    per_token = 2 * config.n_layers * len(config.heads_on(n, 0)[1]) * config.head_dim
    return {
        "weights": int(bytes_a_weight(quantize) * local_parameters(config, n)),
        "kv cache": FLOAT32 * per_token * n_rows * n_tokens,
        "logits": FLOAT32 * n_rows * config.vocab_size,
    }
