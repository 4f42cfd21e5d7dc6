"""What a run would need, computed from its config and data alone: the answer to --dry_run.

python -m src.plan llama-2-7b llama-2-13b llama-2-70b
shows what each GPU of tensor-parallel 8 x data-parallel 1 .. 64 would hold of these, trained on packs of 4096 tokens.
"""

import itertools
import math
import sys
from collections.abc import Mapping, Sequence

from src import parallel, runlog
from src.checkpoint.sources import Source
from src.data.encoding import Encoded
from src.errors import UserError
from src.memory import (
    FLOAT32,
    Pass,
    Training,
    decoding_memory,
    loading_memory,
    local_lora_parameters,
    local_parameters,
    training_memory,
)
from src.models.config import ModelConfig
from src.models.foreign import released_config
from src.models.lora import LINEARS, LoraConfig
from src.models.quantize import bytes_a_weight
from src.text.tokenizer import Tokenizer

# What a run adds on a CPU to what its dry run holds: the process group, TensorBoard and the kernels' code (measured)
STILL_TO_COME = 28 * 2**20
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def largest_pass(examples: Sequence[Encoded], rows: int, *, packing: bool) -> Pass:
    """The forward pass of this many rows, should the longest ones meet in it."""
    longest = sorted(examples, key=lambda example: len(example.tokens))[-rows:]
    n_tokens = sum(len(e.tokens) for e in longest) if packing else rows * len(longest[-1].tokens)
    return Pass(n_tokens, sum(example.n_response for example in longest), packing)


def training(
    config: ModelConfig,
    n: int,
    how: Training,
    largest: Pass,
    examples: Sequence[Encoded],
    tokenizer: Tokenizer,
    *,
    steps: int,
    epochs: int,
) -> str:
    """The plan of a trainer that reads these examples: steps, lengths, memory and disk, and one example."""
    config.check_divides(n, "this checkpoint")
    stored = BYTES[config.dtype] * local_parameters(config, n)
    facts = {
        "tensor-parallel ranks": n,
        "data-parallel ranks": how.data_parallel,
        "examples": f"{len(examples)}, the longest {max(len(e.tokens) for e in examples)} tokens",
        "largest forward pass": f"{largest.n_tokens} tokens, {largest.n_supervised} of them supervised",
        "optimizer steps": steps,
        "disk": f"{size(n * _saved(config, n, how) * epochs)} for {epochs} epochs",
        "an example": masked_text(examples[0], tokenizer),
    }
    parts = training_memory(config, n, largest, how)
    base = 0 if how.on_gpu else parallel.resident_memory() + STILL_TO_COME
    peaks = {"training": sum(parts.values()), "loading": loading_memory(config, n, stored, how.quantize)}
    peak = max(peaks, key=peaks.__getitem__)
    lines = [
        report(facts, {}),
        f"{'memory of each rank':24}{size(base + peaks[peak])}, its peak while {peak}",
    ]
    lines += [f"  {name:22}{size(held)}" for name, held in ({"process": base} | parts).items() if held]
    lines += [f"  {'while loading':22}{size(base + peaks['loading'])} in all"]
    return "\n".join(lines)


def _saved(config: ModelConfig, n: int, how: Training) -> int:
    """Bytes that a rank puts into a checkpoint to start from."""
    if how.lora:
        return FLOAT32 * local_lora_parameters(config, how.lora, n)
    return BYTES[config.dtype] * local_parameters(config, n)


def decoding(
    config: ModelConfig,
    n: int,
    prompts: Sequence[list[int]],
    *,
    samples: int,
    max_new_tokens: int,
    n_rows: int,
    quantize: str = "",
) -> str:
    """The plan of decoding these prompts with at most n_rows rows at once."""
    config.check_divides(n, "this checkpoint")
    longest = max(map(len, prompts))
    facts = {
        "tensor-parallel ranks": n,
        "prompts": f"{len(prompts)}, the longest {longest} tokens of a context of {config.max_seq_len}",
        "samples": samples * len(prompts),
    }
    n_rows = min(n_rows, samples * len(prompts))
    n_tokens = min(longest + max_new_tokens, config.max_seq_len)
    return report(facts, {"model": decoding_memory(config, n, n_rows, n_tokens, quantize)})


def scoring(config: ModelConfig, n: int, samples: int, quantize: str = "") -> str:
    """The plan of scoring samples with a verifier, which only holds its weights."""
    config.check_divides(n, "this checkpoint")
    memory = {"model": {"weights": int(bytes_a_weight(quantize) * local_parameters(config, n))}}
    return report({"tensor-parallel ranks": n, "samples": samples}, memory)


def splitting(config: ModelConfig, n: int, dtype: str) -> str:
    """The plan of cutting a checkpoint into n shards: what a shard holds and what the disk must."""
    config.check_divides(n, "this checkpoint")
    shard = BYTES[dtype or config.dtype] * local_parameters(config, n)
    facts = {
        "parameters": f"{local_parameters(config, 1):,}",
        "shards": f"{n} of {size(shard)}: {_counts(config, n, 0)} heads, {_counts(config, n, 1)} kv heads each",
        "disk": size(n * shard),
    }
    return report(facts, {})


def exporting(config: ModelConfig, dtype: str, max_file_bytes: int) -> str:
    """The plan of writing a checkpoint as Hugging Face's: its files, none larger than max_file_bytes if it can be."""
    n_bytes = BYTES[dtype or config.dtype] * local_parameters(config, 1)
    facts = {
        "parameters": f"{local_parameters(config, 1):,}",
        "files": f"about {-(-n_bytes // max_file_bytes)} of at most {size(max_file_bytes)}",
        "disk": size(n_bytes),
    }
    return report(facts, {})


def adapting(config: ModelConfig, lora: LoraConfig, n: int = 1) -> str:
    """The plan of writing an adapter in n files."""
    n_bytes = FLOAT32 * local_lora_parameters(config, lora, n)
    facts = {
        "adapter": f"rank {lora.rank} on {', '.join(lora.targets)}",
        "parameters": f"{local_lora_parameters(config, lora, 1):,}",
        "disk": size(n * n_bytes),
    }
    return report(facts, {})


def _counts(config: ModelConfig, n: int, kind: int) -> str:
    """How many query (0) or KV heads (1) a shard holds: one number, or the fewest and the most."""
    counts = sorted({len(config.heads_on(n, index)[kind]) for index in range(n)})
    return _between(counts[0], counts[-1])


def inspection(source: Source, stored: str, n_shards: int, ranks: Sequence[int] = (1, 2, 4, 8)) -> str:
    """What a checkpoint is, and what each number of tensor-parallel ranks would hold of it, or why it cannot."""
    config = source.config
    params = sum(math.prod(tensor.shape) for tensor in source.tensors.values())
    n_bytes = sum(math.prod(t.shape) * t.dtype.itemsize for t in source.tensors.values())
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in source.tensors.values()})
    facts = {
        "family": f"{config.family}, a {'verifier' if config.value_head else 'solver'}",
        "parameters": f"{params:,}",
        "stored as": f"{', '.join(dtypes)}, {size(n_bytes)}; {stored}: {n_shards}",
        "layers": f"{config.n_layers} of width {config.dim}, {_feed_forward(config)}",
        "heads": f"{config.n_heads} query, {config.n_kv_heads} key-value, of {config.head_dim}",
        "vocabulary": f"{config.vocab_size}, {'tied to' if config.tied else 'apart from'} the output layer",
        "context": config.max_seq_len,
        "tokenizer": ", ".join(path.name for path in source.tokenizer_files) or "none: give --tokenizer_file",
    }
    head = f"{'ranks':8}{'a rank, ' + config.dtype:20}{'kv heads a rank':18}what to know"
    return "\n".join([report(facts, {}), "", head, *(_rank_row(config, n) for n in ranks)])


def _feed_forward(config: ModelConfig) -> str:
    """How wide the feed-forward layers are, and how many of them a token passes."""
    if config.n_experts:
        return f"{config.n_active_experts} of {config.n_experts} experts of {config.ffn_dim}"
    return f"feed-forward {config.ffn_dim}"


def _rank_row(config: ModelConfig, n: int) -> str:
    """A line of inspection(): one number of ranks."""
    try:
        config.check_divides(n, "fails")
    except UserError as problem:
        return f"{n:<8}{problem}"
    notes = []
    if config.n_kv_heads < n:
        copies = _between(n // config.n_kv_heads, -(-n // config.n_kv_heads))
        notes.append(f"each key-value head lies on {copies} ranks")
    elif config.n_heads % n or config.n_kv_heads % n:
        notes.append(f"uneven: {_counts(config, n, 0)} query heads")
    if padding := -config.vocab_size % n:
        notes.append(f"{padding} rows of padding in the vocabulary")
    weights = size(BYTES[config.dtype] * local_parameters(config, n))
    return f"{n:<8}{weights:20}{_counts(config, n, 1):18}{'; '.join(notes) or 'even'}"


def _between(fewest: int, most: int) -> str:
    return str(fewest) if fewest == most else f"{fewest} to {most}"


def masked_text(encoded: Encoded, tokenizer: Tokenizer) -> str:
    """One example as the model sees it; what carries loss stands in double brackets."""
    parts = []
    pairs = zip(encoded.tokens, encoded.supervised, strict=True)
    for supervised, group in itertools.groupby(pairs, key=lambda pair: pair[1]):
        text = tokenizer.decode([token for token, _ in group], show_control=True)
        parts.append(f"[[{text}]]" if supervised else text)
    return "".join(parts)


def report(facts: Mapping[str, object], memory: Mapping[str, Mapping[str, int]]) -> str:
    """The plan as text: the facts line by line, then a row for each model's memory and their sum."""
    lines = [f"{name:24}{value}" for name, value in facts.items()]
    total = 0
    for model, parts in memory.items():
        total += sum(parts.values())
        lines.append(
            f"{model + ', each rank':24}" + ", ".join(f"{name} {size(b)}" for name, b in parts.items())
        )
    if memory:
        lines.append(f"{'memory, each rank':24}{size(total)}")
    return "\n".join(lines)


def size(n_bytes: int) -> str:
    """Bytes as a person reads them."""
    power = max(0, min(4, (n_bytes.bit_length() - 1) // 10))
    return f"{n_bytes / 1024**power:.{2 if power else 0}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


# What a card of 80 GB leaves to tensors, beside the CUDA context, NCCL's buffers and holes between blocks
CARD_BYTES = 75 * 2**30
GROUPS = (1, 2, 4, 8, 16, 32, 64)


def cluster(model_types: Sequence[str], n: int = 8, n_tokens: int = 4096) -> str:
    """GiB on each GPU by model and number of data-parallel groups of n ranks; a star: does not fit a card of 80 GB.

    Packs of n_tokens, all supervised, blocks computed again; LoRA of rank 16 on all linears of a bfloat16 base.
    """
    lora = LoraConfig(rank=16, alpha=16.0, dropout=0.0, targets=LINEARS)
    lines = [f"{f'GiB a GPU, tp {n} x dp':24}" + "".join(f"{groups:>8}" for groups in GROUPS)]
    for model_type in model_types:
        config = released_config(model_type, n_tokens)
        for name, how in (("full", Training()), ("LoRA", Training(lora, "bfloat16"))):
            row = f"{model_type + ' ' + name:24}"
            for groups in GROUPS:
                how = how._replace(checkpointing="full", data_parallel=groups, on_gpu=True)
                held = sum(training_memory(config, n, Pass(n_tokens, n_tokens, True), how).values())
                row += f"{f'{held / 2**30:.1f}' + '*' * (held > CARD_BYTES):>8}"
            lines.append(row)
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        runlog.table(cluster(sys.argv[1:]))
    except UserError as problem:
        sys.exit(f"error: {problem}")
