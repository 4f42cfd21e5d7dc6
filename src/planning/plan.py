"""What a run would need, computed from its flags, configs and data alone: the answer to --dry_run."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from src import load, parallel
from src.checkpoint import storage
from src.checkpoint.sources import Source
from src.command.config import ModelFlags, SavingFlags, TrainConfig
from src.data.batch import Step
from src.data.encoded_rows import Sample
from src.data.encoding import encode_prompt, masked_text
from src.data.examples import Prompt
from src.errors import UserError
from src.models.cache import shared_prefix
from src.models.config import ModelConfig
from src.models.lora import LoraConfig
from src.models.quantize import PRECISIONS
from src.planning.memory import (
    FLOAT32,
    MOMENT_BYTES,
    Training,
    available_memory,
    decoding_memory,
    frozen_memory,
    local_parameters,
    scoring_memory,
    sent_for_attention,
    training_memory,
)
from src.processes import heap
from src.text.tokenizer import Tokenizer
from src.training.ppo_config import PPOConfig, short_name
from src.training.run import matrix_rate
from src.training.shared_base import base_of

# What a run adds on a CPU to what its dry run holds: process group, TensorBoard, kernels' code, sampling (measured)
STILL_TO_COME = 60 * 2**20
MEASURED = "measured on a CPU it was 7% above to 39% below (long rows: holes in the heap); no GPU was measured"
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "q8_0": 34 / 32}
ARRANGEMENTS = ("all at once", "--phases", "--share_base")
DOING = {"model": "training", "actor": "the actor learns", "critic": "the critic learns",
         "rollouts": "the actor samples"}  # the others score
Memory = Mapping[str, Mapping[str, int]]  # model, or rollouts of the actor -> part -> bytes of a rank


def training(
    config: TrainConfig, model: ModelConfig, steps: Iterable[Step], samples: Sequence[Sample], tokenizer: Tokenizer,
    data_parallel: int, *, summed: bool = True,
) -> str:
    """The plan of a trainer that takes these steps, of these samples. summed: its loss is a sum of log-probs."""
    n = load.tensor_parallel_size(config.ckpt_dir, config.tensor_parallel_size, planned=True)
    model.check_divides(n, "this checkpoint")
    parts = config.context_parallel_size
    passes, longest = [], 0
    for step in steps:
        passes.append((step.epoch, [batch.tokens.numel() for batch in step.batches]))
        longest = max(longest, *(int(batch.sample_lengths().max()) for batch in step.batches))
    n_tokens = max((max(tokens) for _, tokens in passes), default=0)
    used = local_parameters(model, n) - model.idle_weights // n
    n_flop = 6 * used * sum(sum(tokens) for _, tokens in passes) // parts
    how = Training(load.lora_config(config, config.lora_dropout), config.quantize, config.activation_checkpointing,
                   parallel.divided(data_parallel * parts, "replicas", config.replicas),
                   config.accumulation_steps > 1, _on_gpu(), is_half(config), config.optimizer, summed, parts,
                   longest, config.background_save)
    memory = {"model": training_memory(model, n, n_tokens, how)}
    sizes = (n for sample in samples for row in sample for n in (len(row.tokens), len(row.targets)))
    lengths, n_targets = np.fromiter(sizes, np.int64).reshape(-1, 2).T
    ids = size(int(4 * lengths.sum() + 8 * n_targets.sum()))
    facts = {
        "tensor-parallel ranks": n,
        "data-parallel ranks": data_parallel * parts,
        "examples": f"{len(lengths)}, the longest {lengths.max()} tokens; their ids take {ids}",
        "largest forward pass": f"{n_tokens} tokens",
        **sharing(n_tokens, how, sent_for_attention(model, n, n_tokens, how)),
        "optimizer steps": len(passes),
        "time": duration(n_flop, config),
        "disk": disk([model], n, how, config, len(passes), sum(epoch == 1 for epoch, _ in passes)),
        "an example": masked_text(samples[0][0], tokenizer)}
    return report(facts, memory, moments(memory, {"model": model}, n), n * data_parallel * parts)


def sharing(n_tokens: int, how: Training, sent: int) -> dict[str, str]:
    """The fact that context-parallel ranks share a pass over so many tokens, if they do. sent: bytes, by each."""
    n = how.context_parallel
    shared = f"{n} ranks, {-(-n_tokens // n)} tokens each; for attention each sends {size(sent)} a pass"
    return {"shared by": shared} if n > 1 else {}


def duration(flop: int, config: ModelFlags) -> str:
    """About how long a rank takes for this many operations, at half the measured rate of matrix products."""
    rate = matrix_rate(parallel.compute_dtype(config.precision))
    minutes = 1 + flop / (0.5 * rate) / 60  # one to start
    time = f"{minutes / 60:.1f} h" if minutes >= 90 else f"{minutes:.0f} min"
    return f"about {time} where a rank multiplies matrices as fast as here, {rate / 1e9:.0f} GFLOP/s"


def decoding(
    config: ModelConfig, n: int, prompts: Sequence[list[int]], *, samples: int, max_new_tokens: int, n_rows: int,
    quantize: str = "", half: bool = False,
) -> str:
    """The plan of decoding these prompts with at most n_rows rows at once."""
    config.check_divides(n, "this checkpoint")
    longest, n_samples, shared = max(map(len, prompts)), samples * len(prompts), shared_prefix(prompts)
    facts = {"tensor-parallel ranks": n, "samples": n_samples,
             "prompts": f"{len(prompts)}, the longest {longest} tokens of a context of {config.max_seq_len}, the first "
             f"{shared} of all the same"}
    n_rows, n_tokens = min(n_rows, n_samples), min(longest + max_new_tokens, config.max_seq_len)
    parts = frozen_memory(config, n, quantize or "bfloat16" * half)
    parts |= decoding_memory(config, n, n_rows, n_tokens, shared, half=half)
    if half and quantize in PRECISIONS:
        parts["prepared weights"] = parts["weights"]  # the codes, laid out for a CPU's kernel
    return report(facts, {"model": parts}, {"decoding": sum(parts.values())}, n)


def scoring(
    flags: ModelFlags, model: ModelConfig, n: int, lengths: Sequence[int], n_rows: int, quantize: str = "", *,
    context_parallel: int = 1,
) -> str:
    """The plan of scoring rows of these lengths with a model that does not learn, n_rows of them in a pass."""
    model.check_divides(n, "this checkpoint")
    longest = max(lengths, default=0)
    n_tokens = min(len(lengths), n_rows) * longest
    how = Training(quantize=quantize, on_gpu=_on_gpu(), half=is_half(flags), context_parallel=context_parallel,
                   longest=longest)
    parts, sent = scoring_memory(model, n, n_tokens, how), sent_for_attention(model, n, n_tokens, how, learns=False)
    facts = {"tensor-parallel ranks": n, "rows": f"{len(lengths)}, the longest {longest} tokens",
             "largest forward pass": f"{n_tokens} tokens", **sharing(n_tokens, how, sent)}
    return report(facts, {"model": parts}, {"scoring": sum(parts.values())}, n * context_parallel)


def ppo(
    config: PPOConfig, prompts: Sequence[Prompt], held_out: Sequence[Prompt], tokenizer: Tokenizer, n_buffers: int
) -> str:
    """The plan of ppo_train.py with these flags. Raises UserError."""
    n = load.tensor_parallel_size(config.actor_ckpt_dir, config.tensor_parallel_size, planned=True)
    ranks = parallel.world_size() // load.tensor_parallel_size(config.actor_ckpt_dir, config.tensor_parallel_size)
    models = ppo_models(config, n)
    ids, held_ids = ([encode_prompt(tokenizer, p.instruction) for p in some] for some in (prompts, held_out))
    context = models["actor"].max_seq_len
    longest = context if tokenizer.code else config.max_new_tokens  # what code prints comes on top
    work = ppo_work(config, context, longest, [*map(len, ids)], [*map(len, held_ids)], ranks)
    how = Training(load.lora_config(config), checkpointing=config.activation_checkpointing,
                   data_parallel=parallel.divided(ranks, "replicas", config.replicas), accumulates=work.accumulates,
                   on_gpu=_on_gpu(), half=is_half(config), summed=False, context_parallel=config.context_parallel_size,
                   longest=work.n_decoded, background=config.background_save)
    memory = {name: ppo_memory(models, n, how, work, config.quantize, name) for name in ARRANGEMENTS}
    peaks = {name: moments(memory[name], models, n, phases=name == "--phases") for name in ARRANGEMENTS}
    folders = filter(None, (config.actor_ckpt_dir, config.critic_ckpt_dir, config.reward_model_ckpt_dir))
    one_base = how.lora and not config.quantize and "reference" not in models and ranks == 1
    if not (one_base and len({base_of(folder) for folder in folders}) == 1):
        del peaks["--share_base"]
    asked = "--share_base" if config.share_base else "--phases" if config.phases else "all at once"
    if asked not in peaks:
        raise UserError("--share_base: one base cannot be below these models; actor, critic and verifier must be "
                        "adapters on the same weights, all ranks one tensor-parallel group (--tensor_parallel_size)")
    facts = {
        "tensor-parallel ranks": n, "data-parallel ranks": ranks,
        "prompts": f"{len(ids)}, the longest {max(map(len, ids))} tokens of a context of {context}",
        "rollout buffers": f"{n_buffers} of {min(config.prompts_per_buffer, len(ids)) * config.group_size} "
        f"episodes, each for {config.inner_epochs} x {config.minibatches} optimizer steps",
        "largest forward pass": f"{work.n_tokens} tokens",
        **sharing(work.n_tokens, how, sent_for_attention(models["actor"], n, work.n_tokens, how)),
        "disk": disk([models[name] for name in ("actor", "critic") if name in models], n, how, config, n_buffers,
                     -(-len(prompts) // config.prompts_per_buffer), config.reference_refresh),
        "rewards": places(config, models.get("verifier")),
        "an example": f"{tokenizer.decode(ids[0], show_control=True)}[[...]], {len(ids[0])} tokens and at most "
        f"{config.max_new_tokens} to learn"}
    found = ((name, size(_process() + max(peaks[name].values())) if name in peaks else "-") for name in ARRANGEMENTS)
    rows = [f"  {name:22}{needed}" for name, needed in found]
    return "\n".join([report(facts, memory[asked], peaks[asked], n * ranks), "in each arrangement", *rows])


def ppo_models(config: PPOConfig, n: int) -> dict[str, ModelConfig]:
    """The models that the flags name, each by the config of its own directory. The reference is one of them unless it
    is the actor without its adapters. Raises UserError for one that n ranks cannot share."""
    models = {"actor": load.load_config(config.actor_ckpt_dir, config.model_type)}
    if config.has_critic:
        models["critic"] = load.solver_to_verifier(load.load_config(config.critic_ckpt_dir))
    if config.lora_rank == -1 or config.reference_refresh > 0:
        models["reference"] = models["actor"]
    if "verifier" in config.reward:
        models["verifier"] = load.load_config(config.reward_model_ckpt_dir)
    if config.teacher_ckpt_dir:
        models["teacher"] = load.load_config(config.teacher_ckpt_dir)
    for name, model in models.items():
        model.check_divides(n, f"the {name}'s checkpoint")
    return models


class PPOWork(NamedTuple):
    """A rank's largest pass in training, and the rows that decode at once with the most tokens that one gets."""

    n_tokens: int
    accumulates: bool
    n_rows: int
    n_decoded: int


def ppo_work(
    config: PPOConfig, context: int, longest: int, lengths: Sequence[int], held_out: Sequence[int], ranks: int
) -> PPOWork:
    """The largest work, should the longest prompts get responses of `longest` tokens. lengths: of each prompt."""
    prompts = min(config.prompts_per_buffer, len(lengths))
    per_step = -(-prompts * config.group_size // config.minibatches)  # episodes, over all ranks
    n_rows = max(config.group_size * -(-prompts // ranks), config.eval_samples * -(-len(held_out) // ranks))
    accumulates = -(-per_step // config.max_batch_size) > ranks // config.context_parallel_size
    return PPOWork(min(config.max_batch_size, per_step) * min(max(lengths) + longest, context), accumulates,
                   min(config.rollout_batch_size, n_rows), min(max(*lengths, *held_out) + longest, context))


def ppo_memory(
    models: Mapping[str, ModelConfig], n: int, how: Training, work: PPOWork, quantize: str, arrangement: str
) -> Memory:
    """What a rank holds of each model in its own largest phase. quantize: of verifier and reference.

    --share_base: critic and verifier bring their adapters alone; the verifier's are taken to be of the same rank.
    """
    memory = {}
    for name, model in models.items():
        if name in ("actor", "critic"):
            memory[name] = training_memory(model, n, work.n_tokens, how)
        else:
            memory[name] = scoring_memory(model, n, work.n_tokens, how._replace(quantize=quantize))
        if arrangement == "--share_base" and how.lora and name in ("critic", "verifier"):
            memory[name]["weights"] = FLOAT32 * local_parameters(model, n, how.lora)
    memory["rollouts"] = decoding_memory(models["actor"], n, work.n_rows, work.n_decoded, half=how.half)
    if how.data_parallel > 1:  # a rank that samples holds whole weights, see parallel.gathered()
        memory["rollouts"]["gathered"] = memory["actor"]["weights"] * how.data_parallel
    return memory


def moments(memory: Memory, models: Mapping[str, ModelConfig], n: int, *, phases: bool = False) -> dict[str, int]:
    """Bytes of a rank at the largest moment of each model's own phase and, on a CPU, as the last weight is read.
    phases: only the model at work is in memory. A file that is read is mapped: its bytes are resident until then."""
    # a heap keeps the holes of gradients
    stay = ("weights", "optimizer") if _on_gpu() else ("weights", "optimizer", "gradients", "being saved")
    lasting = {name: sum(parts.get(part, 0) for part in stay) for name, parts in memory.items()}
    weights = {name: memory[name]["weights"] for name in models}
    found = {}
    for name, parts in memory.items():
        own = lasting[name] or weights["actor"]  # rollouts are sampled from the actor
        doing = DOING.get(name, f"the {name} scores")
        found[doing] = sum(parts.values()) - lasting[name] + (own if phases else sum(lasting.values()))
    if not _on_gpu():
        files = {name: BYTES[model.dtype] * local_parameters(model, n) for name, model in models.items()}
        found["loading"] = max(files[name] + (weights[name] if phases else sum(weights.values())) for name in models)
    return found


def disk(
    models: Sequence[ModelConfig], n: int, how: Training, flags: SavingFlags, n_steps: int, per_epoch: int,
    refresh: int = -1,
) -> str:
    """What the checkpoints of these models take in the end, and what one more takes until it replaces another.

    Kept are the ends of epochs and of the run, the newest reference (renewed every `refresh` steps), the newest few to
    resume from and, where held-out rows are measured between, the best.
    """
    epochs, references, saves = (set(range(every, n_steps + 1, every)) if every > 0 else set()
                                 for every in (per_epoch, refresh, flags.save_every))
    ends = epochs | {n_steps}
    to_resume = set(sorted(ends | references | saves)[-flags.keep_last :])
    n_saves = len(ends | to_resume | set(sorted(references)[-1:])) + (flags.eval_every > 0)
    weights = resumed = 0
    for config in models:
        learn = n * local_parameters(config, n, how.lora)
        dtype = flags.save_dtype or (config.dtype if how.half else "float32")  # as in saving.stored_dtype()
        weights += learn * (FLOAT32 if how.lora else BYTES[dtype])
        resumed += int(learn * (FLOAT32 + MOMENT_BYTES[how.optimizer]))  # as they learn, and both moments
    return (f"{size(n_saves * weights + len(to_resume) * resumed)}: weights of {n_saves} saves, {len(to_resume)} of "
            f"them to resume from; {size(weights + resumed)} more while another is written")


def places(config: PPOConfig, verifier: ModelConfig | None) -> str:
    """The tokens that rewards are laid on, for those that weigh something."""
    by_step = {"verifier"} if verifier and verifier.objective == "process" else set()
    laid = [f"{short_name(name)} at {'the ends of steps' if name in by_step else 'the last token'}"
            for name, weight in config.weights_by_reward.items() if weight]
    return ", ".join(laid + ["KL at every token"] * bool(config.kl_coef))


def splitting(config: ModelConfig, n: int, dtype: str) -> str:
    """The plan of cutting a checkpoint into n shards: what a shard holds and what the disk must."""
    config.check_divides(n, "this checkpoint")
    shard = BYTES[dtype or config.dtype] * local_parameters(config, n)
    heads = f"{_counts(config, n, 0)} heads, {_counts(config, n, 1)} kv heads each"
    return report({"parameters": f"{local_parameters(config, 1):,}", "shards": f"{n} of {size(shard)}: {heads}",
                   "disk": size(n * shard)})


def exporting(config: ModelConfig, dtype: str, max_file_bytes: int | None = None) -> str:
    """The plan of writing a checkpoint as others': its files, none larger than max_file_bytes if it can be, or one."""
    n_bytes = round(BYTES[dtype or config.dtype] * local_parameters(config, 1))
    files = f"about {-(-n_bytes // max_file_bytes)} of at most {size(max_file_bytes)}" if max_file_bytes else "1"
    return report({"parameters": f"{local_parameters(config, 1):,}", "files": files, "disk": size(n_bytes)})


def adapting(config: ModelConfig, lora: LoraConfig, n: int = 1) -> str:
    """The plan of writing an adapter in n files."""
    return report({"adapter": f"rank {lora.rank} on {', '.join(lora.targets)}",
                   "parameters": f"{local_parameters(config, 1, lora):,}",
                   "disk": size(n * FLOAT32 * local_parameters(config, n, lora))})


def inspection(source: Source, stored: str, ranks: Sequence[int] = (1, 2, 4, 8)) -> str:
    """What a checkpoint is, and what each number of tensor-parallel ranks would hold of it, or why it cannot."""
    config = source.config
    params = sum(math.prod(tensor.shape) for tensor in source.tensors.values())
    n_bytes = sum(math.prod(t.shape) * t.dtype.itemsize for t in source.tensors.values())
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in source.tensors.values()})
    experts = f"{config.n_active_experts} of {config.n_experts} experts of " if config.n_experts else "feed-forward "
    facts = {
        "family": f"{config.family}, a {'verifier' if config.value_head else 'solver'}",
        "parameters": f"{params:,}",
        "stored as": f"{', '.join(dtypes)}, {size(n_bytes)}; {stored}",
        "layers": f"{config.n_layers} of width {config.dim}, {experts}{config.ffn_dim}",
        "heads": f"{config.n_heads} query, {config.n_kv_heads} key-value, of {config.head_dim}",
        "vocabulary": f"{config.vocab_size}, {'tied to' if config.tied else 'apart from'} the output layer",
        "context": config.max_seq_len,
        "tokenizer": ", ".join(path.name for path in source.tokenizer_files)
        if storage.has_vocabulary(source.tokenizer_files) else "none: give --tokenizer_file"}
    lines = [report(facts), f"\n{'ranks':8}{'a rank, ' + config.dtype:20}{'kv heads a rank':18}what to know"]
    for n in ranks:
        try:
            config.check_divides(n, "fails")
        except UserError as problem:
            lines.append(f"{n:<8}{problem}")
            continue
        notes = []
        if config.n_kv_heads < n:
            copies = {n // config.n_kv_heads, -(-n // config.n_kv_heads)}
            notes.append(f"each key-value head lies on {_span(copies)} ranks")
        elif config.n_heads % n or config.n_kv_heads % n:
            notes.append(f"uneven: {_counts(config, n, 0)} query heads")
        if padding := -config.vocab_size % n:
            notes.append(f"{padding} rows of padding in the vocabulary")
        weights = size(BYTES[config.dtype] * local_parameters(config, n))
        lines.append(f"{n:<8}{weights:20}{_counts(config, n, 1):18}{'; '.join(notes) or 'even'}")
    return "\n".join(lines)


def _counts(config: ModelConfig, n: int, kind: int) -> str:
    """How many query (0) or KV heads (1) a shard holds: one number, or the fewest and the most."""
    return _span({len(config.heads_on(n, index)[kind]) for index in range(n)})


def _span(counts: set[int]) -> str:
    """The only one of some counts, or the fewest and the most."""
    return " to ".join(map(str, sorted({min(counts), max(counts)})))


def report(
    facts: Mapping[str, object], memory: Memory | None = None, peaks: Mapping[str, int] | None = None, n_ranks: int = 1
) -> str:
    """The plan as text: the facts line by line, then each rank's memory: its peak, does it fit, models by parts."""
    lines = [f"{name:24}{value}" for name, value in facts.items()]
    if not memory:
        return "\n".join(lines)
    peak = max(peaks, key=peaks.__getitem__)
    needed, free = _process() + peaks[peak], available_memory()
    lines.append(f"{'memory of each rank':24}{size(needed)}, its peak while {peak}; {MEASURED}")
    if free is not None:
        here = 1 if _on_gpu() else int(os.environ.get("LOCAL_WORLD_SIZE", n_ranks))  # ranks share main memory
        verdict = "fits" if here * needed <= free + _process() else "does not fit"
        lines.append(f"{'this machine':24}{verdict}: {size(free)} free" + f" for {here} ranks" * (here > 1))
    if len(memory) > 1:
        lines.append(f"{'':24}" + "".join(f"{name:14}" for name in memory).rstrip())
    if _process():
        lines.append(f"  {'process':22}{size(_process())}")
    for part in dict.fromkeys(part for held in memory.values() for part in held):
        cells = (size(held[part]) if held.get(part) else "-" for held in memory.values())
        lines.append(f"  {part:22}" + "".join(f"{cell:14}" for cell in cells).rstrip())
    return "\n".join(lines)


def is_half(config: ModelFlags) -> bool:
    """Whether models compute in two bytes a number."""
    return parallel.compute_dtype(config.precision).itemsize == 2


def _on_gpu() -> bool:
    return parallel.device().type == "cuda"


def _process() -> int:
    """What the process of a rank holds on a CPU before it has a model."""
    return 0 if _on_gpu() else heap.resident_memory() + STILL_TO_COME


def size(n_bytes: int) -> str:
    """Bytes as a person reads them."""
    power = max(0, min(4, (n_bytes.bit_length() - 1) // 10))
    return f"{n_bytes / 1024**power:.{2 if power else 0}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
