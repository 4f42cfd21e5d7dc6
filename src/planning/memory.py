"""What one rank holds in memory at the peak, by parts, from a config and the tokens of a forward pass. All in bytes.

On a CPU it is resident memory, on a GPU what torch allocates there. In a step of one backward pass gradients come as
activations go; on a CPU both are counted all the same, for the heap keeps the holes that the last step's left.

Not counted: the holes that blocks of long rows leave in glibc's heap: rows of 8k to 32k tokens took 1.4 to 2.1 times as
much there in scoring, 1.1 with jemalloc.

D width, H query heads, K key-value heads, E head dim, F feed-forward width, V vocabulary: what the first of n
tensor-parallel ranks has of each; none has more.
"""

import contextlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from src import parallel
from src.checkpoint import adapters
from src.checkpoint.shards import cut_of, expected_shapes, layer_of
from src.models.cache import PREFILL_TOKENS, SMALLEST, bucket_capacity
from src.models.config import ModelConfig
from src.models.forward import CHUNK_BYTES, SOFTMAX_BYTES
from src.models.linear import INTEL
from src.models.lora import LINEARS, LoraConfig, check_targets
from src.models.quantize import PRECISIONS

FLOAT32 = 4
# of both moments of a weight; in 8 bits 256 of them share a float32 scale
MOMENT_BYTES = {"adamw": 2 * FLOAT32, "adamw_8bit": 2 * (1 + FLOAT32 / 256)}
# of a weight of the tensor that torchao updates, where it does not compile: on a CPU (77 measured, of 16M weights)
WORK_IN_8_BITS = 80


class Training(NamedTuple):
    """How a model is trained. accumulates: a step has several backward passes. quantize: of LoRA's frozen base.

    half: it computes in two bytes a number, see Decoder. summed: its loss is a sum of log-probs. context_parallel:
    ranks that share the tokens of a pass. longest: tokens of its longest row. background: saves are copies.
    """

    lora: LoraConfig | None = None
    quantize: str = ""
    checkpointing: Literal["none", "selective", "full"] = "none"
    data_parallel: int = 1
    accumulates: bool = False
    on_gpu: bool = False
    half: bool = False
    optimizer: str = "adamw"
    summed: bool = True
    context_parallel: int = 1
    longest: int = 0
    background: bool = False


def bytes_per_weight(precision: str) -> float:
    """What a weight takes, its share of its group's scale and low included; float32 for an empty name."""
    if precision in PRECISIONS:
        bits, group = PRECISIONS[precision]
        return bits / 8 + 4 / group
    return 2.0 if precision else 4.0


def local_sizes(config: ModelConfig, n: int, lora: LoraConfig | None = None) -> dict[str, int]:
    """Entries of each parameter on the first of n ranks; with lora, of those that learn: adapters and a value head."""
    if lora:
        check_targets(lora, config)
    sizes = {}
    for name, shape in (adapters.expected_shapes(config, lora) if lora else expected_shapes(config)).items():
        how = cut_of(name, config, n)
        sizes[name] = math.prod(len(how.rows[0]) if axis == how.dim else size for axis, size in enumerate(shape))
    return sizes


def local_parameters(config: ModelConfig, n: int, lora: LoraConfig | None = None) -> int:
    """Parameters that the first of n ranks holds; with lora, those that learn."""
    return sum(local_sizes(config, n, lora).values())


def training_memory(config: ModelConfig, n: int, n_tokens: int, how: Training) -> dict[str, int]:
    """Bytes by part of a rank that trains on n_tokens, padding included, in its largest forward pass, or on its part
    of them."""
    sizes, ranks, pairs = local_sizes(config, n), how.data_parallel, n_tokens * how.longest
    n_tokens = -(-n_tokens // how.context_parallel)
    trainable = local_parameters(config, n, how.lora)
    frozen = sum(sizes.values()) if how.lora else 0
    # What LoRA does not train is held in the type it is computed in; FSDP2 gathers all weights in the same type
    per_frozen = bytes_per_weight(how.quantize or "bfloat16" * (how.half and how.lora is not None))
    # FSDP sums gradients and shares them out in the last backward pass of a step
    gradients = FLOAT32 * trainable // (1 if how.accumulates else ranks)
    kept, last_block = (sum(both) for both in zip(
        activations(config, n, n_tokens, how), scores_memory(config, n, pairs, how), strict=True))
    logits = logits_memory(config, n, n_tokens, how)
    if how.on_gpu and not how.accumulates:  # gradients come as activations go: the peak is at either end
        if kept + logits < gradients:
            kept = logits = 0
        else:
            gradients = 0
    parts = {
        "weights": int(per_frozen * frozen + FLOAT32 * trainable) // ranks,
        "optimizer": int(MOMENT_BYTES[how.optimizer] * trainable) // ranks,
        "gradients": gradients,
        "activations": kept + last_block,
        "logits": logits}
    if ranks > 1:
        parts["gathered"] = _gathered(sizes, how)
    if how.optimizer == "adamw_8bit" and not (how.on_gpu or how.lora):  # when activations are gone
        work = WORK_IN_8_BITS * max(sizes.values()) // ranks
        parts["8-bit step"] = max(0, work - parts["activations"] - parts["logits"])
    if how.background and not how.on_gpu:  # weights, as they learn and as they are stored, and moments, whole on a rank
        parts["being saved"] = 4 * FLOAT32 * trainable
    if how.half and not how.lora and ranks == 1:  # each weight is rounded in a forward pass, and kept for the backward
        parts["rounded weights"] = 2 * _linear_parameters(config, n)
    return parts


def _linear_parameters(config: ModelConfig, n: int) -> int:
    """Weights of linear layers on the first of n ranks, the output layer's among them."""
    shapes = expected_shapes(config)
    linears = sum(size for name, size in local_sizes(config, n).items() if len(shapes[name]) == 2)
    return linears - local_sizes(config, n)["tok_embeddings.weight"] * (not config.tied)


def activations(config: ModelConfig, n: int, n_tokens: int, how: Training) -> tuple[int, int]:
    """What the backward pass needs of all blocks but the last, and of the last with what it makes there."""
    H, K = map(len, config.heads_on(n, 0))
    D, E = config.dim, config.head_dim
    F = -(-config.ffn_dim // n) * max(1, config.n_active_experts) + -(-config.shared_ffn_dim // n)
    computed = 2 if how.half else FLOAT32  # bytes of what linears read and write
    norm = FLOAT32 * D  # its input
    norms = norm * (config.pre_norms + config.post_norms)
    attention = norms + computed * (D + 2 * (H + K) * E)  # the norm's output, queries, keys, values, output
    attention += norm * (H + K) * E // D if config.qk_norm else 0
    attention += computed * 2 * (_exchanged(K, how) - K) * E
    feed_forward = norms + computed * (D + 4 * F)  # the norm's output, products, gate and their product
    if config.n_experts:  # of each that a token goes through, what it reads and gives, and that weighed
        read_and_given = config.n_active_experts * (2 * computed + FLOAT32) + computed * bool(config.shared_ffn_dim)
        feed_forward += D * read_and_given
    # of an adapted linear a mask of what is dropped of its input, and what it yields before its rows have their lengths
    widths = {"wq": (D, H * E), "wk": (D, K * E), "wv": (D, K * E), "wo": (H * E, D), "w1": (D, F), "w2": (F, D),
              "w3": (D, F)}
    for name in how.lora.targets if how.lora else ():
        read, yielded = widths[name]
        entries = read * bool(how.lora.dropout) + yielded * how.lora.dora
        attention += computed * entries * (name in LINEARS[:4])
        feed_forward += computed * entries * (name not in LINEARS[:4])
    block, entry = attention + feed_forward, FLOAT32 * D  # entry: all that is left of a block computed again
    kept = {"none": block, "selective": attention + entry, "full": entry}[how.checkpointing]
    gradients = 3 * computed * F  # of the product, the gate and the other factor, before they are the input's
    return n_tokens * kept * (config.n_layers - 1), n_tokens * (block + gradients)


def scores_memory(config: ModelConfig, n: int, pairs: int, how: Training) -> tuple[int, int]:
    """What attention holds of so many pairs of positions, which its kernels do not where there is neither a softcap nor
    a window: what the backward pass needs of all blocks but the last, and of the last with what it makes there."""
    computed = 2 if how.half else FLOAT32
    windowed = sum(0 < config.window_of(layer) < how.longest for layer in range(config.n_layers))
    each, layers, made = computed, windowed, 3  # a mask as it is added to scores, and three of booleans
    if config.attention_softcap:  # tanh, softmax and its rounded copy of each head; what comes before and between
        heads = -(-len(config.heads_on(n, 0)[0]) // how.context_parallel)
        each, layers, made = heads * (2 * FLOAT32 + 2 * how.half), config.n_layers, heads * 3 * FLOAT32
    kept = max(0, layers - 1) if how.checkpointing != "full" else 0
    return pairs * each * kept, pairs * (each + made) * (layers > 0)


def _exchanged(n_kv_heads: int, how: Training) -> int:
    """Key-value heads with the copies that context parallelism makes of them: see models/attention.py."""
    return math.lcm(n_kv_heads, how.context_parallel)


def sent_for_attention(config: ModelConfig, n: int, n_tokens: int, how: Training, *, learns: bool = True) -> int:
    """Bytes that each rank sends to those it shares n_tokens with, in a forward pass over them: queries, keys, values
    and attention's output. Where it learns there come their gradients; with blocks computed again the former twice."""
    H, K = map(len, config.heads_on(n, 0))
    heads, own = 2 * (H + _exchanged(K, how)), -(-n_tokens // how.context_parallel)
    times = config.n_layers * (1 + learns + (learns and how.checkpointing == "full"))
    computed = 2 if how.half else FLOAT32
    return times * own * heads * config.head_dim * computed * (how.context_parallel - 1) // how.context_parallel


def logits_memory(config: ModelConfig, n: int, n_tokens: int, how: Training, *, learns: bool = True) -> int:
    """What the loss holds, were all tokens supervised: see models/forward.py.

    A chunk of logits, and the first one where it is kept; a part in float32 and its softmax; hidden states and their
    gradient; and a chunk's gradient of the output layer besides the sum of all, which on a CPU is among the gradients.
    """
    if config.value_head:
        return 0
    place, computed = "cuda" if how.on_gpu else "cpu", 2 if how.half else FLOAT32
    rows = -(-config.vocab_size // n)
    whole = computed * rows * n_tokens
    chunk, parts = min(whole, CHUNK_BYTES[place]), min(FLOAT32 * rows * n_tokens, SOFTMAX_BYTES[place])
    held = chunk + 2 * parts + (1 + learns) * computed * config.dim * n_tokens
    # oneDNN's gradients copy it to a number of rows that a kernel is made for; MKL's need no copy
    if learns and computed == FLOAT32 and not how.on_gpu and not INTEL:
        held += chunk
    if how.quantize and (how.quantize != "bfloat16" or computed == FLOAT32):  # the layer as it is multiplied
        held += computed * rows * config.dim
    if how.lora or not learns:
        return held
    cut_up = whole > chunk
    of_layer = (FLOAT32 * how.on_gpu + computed * cut_up) * rows * config.dim
    return held + of_layer + (chunk if cut_up and not how.summed else 0)


def _gathered(sizes: Mapping[str, int], how: Training) -> int:
    """What FSDP2 has gathered at once: the block at work, the next one twice as its buffer is cut up, and the rest.

    Where weights learn there are gradients of one block and of the rest before they are summed and shared out. On a
    CPU the heap keeps what the whole weights took as they were loaded, and again as they were gathered (measured).
    """
    block = sum(size for name, size in sizes.items() if layer_of(name) == 0)
    rest = sum(size for name, size in sizes.items() if layer_of(name) is None)
    per_weight = 2 if how.half and not how.quantize else bytes_per_weight(how.quantize)
    if not how.on_gpu:
        return int(per_weight * 2 * sum(sizes.values()))
    return int(per_weight * (3 * block + rest)) + (0 if how.lora else FLOAT32 * (block + rest))


def frozen_memory(config: ModelConfig, n: int, precision: str = "") -> dict[str, int]:
    """Bytes of a rank's share of a model that does not learn."""
    return {"weights": int(bytes_per_weight(precision) * local_parameters(config, n))}


def scoring_memory(config: ModelConfig, n: int, n_tokens: int, how: Training) -> dict[str, int]:
    """Bytes by part of a rank that scores n_tokens, padding included, in its largest forward pass, or its part of them,
    with a model that does not learn: its weights, and the most that a block makes at once, or the logits."""
    own, computed = -(-n_tokens // how.context_parallel), 2 if how.half else FLOAT32
    end = computed * config.dim * own + logits_memory(config, n, own, how, learns=False)
    return frozen_memory(config, n, how.quantize or "bfloat16" * how.half) | {
        "forward pass": max(_block_memory(config, n, n_tokens, how), end)}


def _block_memory(config: ModelConfig, n: int, n_tokens: int, how: Training) -> int:
    """The most that a block makes at once of n_tokens, or of this rank's part of them, where nothing learns."""
    scores = scores_memory(config, n, n_tokens * how.longest, how)[1]
    n_tokens, computed = -(-n_tokens // how.context_parallel), 2 if how.half else FLOAT32
    H, K = map(len, config.heads_on(n, 0))
    D, E, heads = config.dim, config.head_dim, H + 2 * K  # of queries, keys and values
    F = -(-config.ffn_dim // n) * max(1, config.n_active_experts) + -(-config.shared_ffn_dim // n)
    # queries and keys are rotated in float32, one after the other
    in_float32 = max(2 * FLOAT32 * H, (2 * FLOAT32 + computed) * K) if how.half else FLOAT32 * K
    rotated = (computed * (heads + H) + in_float32) * E
    mixed = computed * ((heads + H) * E + D)
    if how.context_parallel > 1:  # what is exchanged is laid out, sent, received and joined
        sent = _exchanged(K, how)
        mixed = computed * (heads + (2 * sent if sent > K else 0) + max(H + 4 * sent, 4 * H)) * E
    feed_forward = FLOAT32 * D + computed * (D + 3 * F)  # what attention made of its input, gate, factor and product
    block = FLOAT32 * (D + E) + computed * D + max(rotated, mixed, feed_forward)  # a block's input, angles, its norm
    return n_tokens * block + scores


def decoding_memory(
    config: ModelConfig, n: int, n_rows: int, n_tokens: int, shared: int = 0, *, half: bool = False
) -> dict[str, int]:
    """What decoding adds to the weights: n_rows rows of at most n_tokens tokens, if all get that long at once.

    shared: those of them that all rows begin with, kept once. Rows have their bucket's room, and beside it, or as holes
    in the heap, lies the bucket that they left. prefill: prompts that are read at once, and their keys and values.
    """
    computed, capacity = 2 if half else FLOAT32, bucket_capacity(n_tokens - shared)
    per_token = computed * 2 * config.n_layers * len(config.heads_on(n, 0)[1]) * config.head_dim
    left = bucket_capacity(capacity * 2 // 3) if capacity > SMALLEST else 0
    read = min(n_rows * n_tokens, max(PREFILL_TOKENS, n_tokens))
    parts = {"kv cache": per_token * (n_rows * (capacity + left) + shared),
             "prefill": per_token * read + _block_memory(config, n, read, Training(half=half, longest=n_tokens)),
             "logits": FLOAT32 * n_rows * config.vocab_size}
    if half:  # rounded, and on a CPU laid out for its kernels, while rows decode
        parts["prepared weights"] = 2 * _linear_parameters(config, n)
    return parts


def available_memory() -> int | None:
    """Bytes that this process may still take, of its GPU or of main memory; None where the system does not say."""
    if parallel.device().type == "cuda":
        return torch.cuda.mem_get_info()[0]
    found, group = [], Path("/sys/fs/cgroup")
    with contextlib.suppress(FileNotFoundError):
        words = Path("/proc/meminfo").read_text(encoding="ascii").split()
        found.append(1024 * int(words[words.index("MemAvailable:") + 1]))
    with contextlib.suppress(FileNotFoundError, ValueError):  # a container's limit, where it has one: else "max"
        limit, used = (int((group / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
        found.append(limit - used)
    return min(found, default=None)
