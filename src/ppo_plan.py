"""What a run of ppo_train.py would need, computed from its flags, configs and prompts alone: the answer to --dry_run.

The memory of the arrangement that the flags ask for by parts, and beside it what each of the others would take.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from src import assemble, parallel, plan
from src.checkpoint.shards import expected_shapes
from src.data.encoding import encode_prompt
from src.data.examples import Prompt
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
from src.models.lora import LINEARS, LoraConfig
from src.models.quantize import bytes_a_weight
from src.text.tokenizer import Tokenizer
from src.training.ppo_config import PPOConfig
from src.training.rewards import reward_weights, short_name

RESUMED = 3 * FLOAT32  # of a weight that learns: its float32 value and both moments
# What a model holds between its phases too, unless --phases sends it away
LASTING = ("weights", "optimizer", "allocator")
DOING = {
    "actor": "the actor learns",
    "critic": "the critic learns",
    "reference": "the reference scores",
    "verifier": "the verifier scores",
    "rollouts": "the actor samples",
}
ARRANGEMENTS = ("all at once", "--phases", "--share_base")
Held = Mapping[str, Mapping[str, int]]


class Models(NamedTuple):
    """PPO's models on n tensor-parallel ranks; critic or verifier None: there is none.

    how: the way actor and critic are trained. quantize: of verifier and reference. renewed: the reference is loaded
    anew in the run, and is then a whole model though the actor has adapters.
    """

    actor: ModelConfig
    critic: ModelConfig | None
    verifier: ModelConfig | None
    n: int
    how: Training
    quantize: str = ""
    renewed: bool = False

    @property
    def has_reference(self) -> bool:
        """Whether the reference is a model of its own, and not the actor without its adapters."""
        return self.how.lora is None or self.renewed

    @property
    def verifier_precision(self) -> str:
        """What the verifier's weights are held in, as load_verifier() does."""
        return self.quantize or ("bfloat16" if self.how.on_gpu else "")


class Work(NamedTuple):
    """The sizes of a rank's work: its largest pass in training, the rows that decode at once, and their tokens."""

    largest: Pass
    n_rows: int
    n_tokens: int


def of_run(
    config: PPOConfig,
    prompts: Sequence[Prompt],
    held_out: Sequence[Prompt],
    tokenizer: Tokenizer,
    n_buffers: int,
) -> str:
    """The plan of ppo_train.py with these flags. Raises UserError."""
    models = _models(config, len(prompts))
    ids, held_ids = (
        [encode_prompt(tokenizer, prompt.instruction) for prompt in some] for some in (prompts, held_out)
    )
    work = work_of(models, config, [*map(len, ids)], [*map(len, held_ids)])
    per_epoch = -(-len(prompts) // config.prompts_per_buffer)
    kept = saves(n_buffers, per_epoch, config.save_every, config.reference_refresh, config.keep_last)
    facts = {
        "tensor-parallel ranks": models.n,
        "data-parallel ranks": models.how.data_parallel,
        "prompts": f"{len(ids)}, the longest {max(map(len, ids))} tokens of a context of {models.actor.max_seq_len}",
        "rollout buffers": f"{n_buffers} of {episodes(config, len(ids))} episodes, each for "
        f"{config.inner_epochs} x {config.minibatches} optimizer steps",
        "largest forward pass": f"{work.largest.n_tokens} tokens, {work.largest.n_supervised} of them supervised",
        "disk": disk(models, kept, config.save_dtype, best=bool(held_out)),
        "rewards": places(reward_weights(config), models.verifier, config),
        "an example": f"{tokenizer.decode(ids[0], show_control=True)}[[...]], {len(ids[0])} tokens and at most "
        f"{config.max_new_tokens} to learn",
    }
    if config.share_base and not _can_share(models):
        raise UserError(
            "--share_base: one base cannot be below these models; actor, critic and verifier must be adapters on the "
            "same weights, and all ranks one tensor-parallel group (--tensor_parallel_size)"
        )
    asked = "--share_base" if config.share_base else "--phases" if config.phases else "all at once"
    return f"{plan.report(facts, {})}\n{memory_table(models, work, asked)}"


def _models(config: PPOConfig, n_prompts: int) -> Models:
    """The models that the flags name, each by the config of its own directory."""
    folder, asked = config.actor_ckpt_dir, config.tensor_parallel_size
    actor = assemble.load_config(folder, config.model_type)
    ranks = parallel.world_size() // assemble.tensor_parallel_size(folder, asked)
    n = assemble.planned_ranks(folder, asked)
    critic = verifier = None
    if config.has_critic:
        critic = assemble.solver_to_verifier(assemble.load_config(config.critic_ckpt_dir))
    if "verifier" in config.reward:
        verifier = assemble.load_config(config.reward_model_ckpt_dir)
    for model, name in ((actor, "actor"), (critic, "critic"), (verifier, "reward model")):
        if model:
            model.check_divides(n, f"the {name}'s checkpoint")
    passes = -(-_episodes_a_step(config, n_prompts) // config.max_batch_size)
    how = Training(
        assemble.lora_config(config),
        checkpointing=config.activation_checkpointing,
        data_parallel=ranks,
        accumulates=passes > ranks,
        on_gpu=parallel.device().type == "cuda",
    )
    return Models(actor, critic, verifier, n, how, config.quantize, config.reference_refresh > 0)


def episodes(config: PPOConfig, n_prompts: int) -> int:
    """Episodes in the fullest buffer."""
    return min(config.prompts_per_buffer, n_prompts) * config.group_size


def _episodes_a_step(config: PPOConfig, n_prompts: int) -> int:
    """Episodes in the largest optimizer step, over all ranks."""
    return -(-episodes(config, n_prompts) // config.minibatches)


def work_of(models: Models, config: PPOConfig, lengths: Sequence[int], held_out: Sequence[int]) -> Work:
    """The largest work if the longest prompts get the longest responses. lengths: tokens of prompts, of held-out ones.

    Buffers are sampled and held-out problems solved in the same way; the latter are not learned from.
    """
    context, ranks = models.actor.max_seq_len, models.how.data_parallel
    n_rows = min(config.max_batch_size, _episodes_a_step(config, len(lengths)))
    n_tokens = min(max(lengths) + config.max_new_tokens, context)
    largest = Pass(n_rows * n_tokens, n_rows * min(config.max_new_tokens, n_tokens))
    sampled = config.group_size * -(-min(config.prompts_per_buffer, len(lengths)) // ranks)
    decoding = min(config.rollout_batch_size, max(sampled, -(-len(held_out) // ranks)))
    return Work(largest, decoding, min(max(*lengths, *held_out) + config.max_new_tokens, context))


def saves(n_buffers: int, per_epoch: int, save_every: int, refresh: int, keep_last: int) -> tuple[int, int]:
    """How many saves' weights lie on the disk in the end, and how many of them training can be resumed from.

    Kept are the ends of epochs and of the run, the newest reference, and the newest keep_last to resume from.
    """

    def multiples(every: int) -> set[int]:
        return set(range(every, n_buffers + 1, every)) if every > 0 else set()

    ends, references = multiples(per_epoch) | {n_buffers}, multiples(refresh)
    to_resume = set(sorted(ends | references | multiples(save_every))[-keep_last:])
    return len(ends | to_resume | set(sorted(references)[-1:])), len(to_resume)


def disk(models: Models, kept: tuple[int, int], dtype: str, *, best: bool) -> str:
    """What the checkpoints of actor and critic take in the end, and what one more takes until it replaces another.

    kept: as saves() says. dtype of the weights: empty = as in the directories started from. best: one save more.
    """
    n, lora, n_resumed = models.n, models.how.lora, kept[1]
    n_saves = kept[0] + best
    weights = resumed = 0
    for config in filter(None, (models.actor, models.critic)):
        trained = local_lora_parameters(config, lora, n) if lora else local_parameters(config, n)
        weights += n * trained * (FLOAT32 if lora else plan.BYTES[dtype or config.dtype])
        resumed += n * trained * RESUMED
    return (
        f"{plan.size(n_saves * weights + n_resumed * resumed)}: weights of {n_saves} saves, {n_resumed} of them to "
        f"resume from; {plan.size(weights + resumed)} more while another is written"
    )


def places(weights: Mapping[str, float], verifier: ModelConfig | None, config: PPOConfig) -> str:
    """The tokens that rewards are laid on, for those that weigh something."""
    steps = {"verifier"} if verifier and verifier.objective == "process" else set()
    laid = [
        f"{short_name(name)} at {'the ends of steps' if name in steps else 'the last token'}"
        for name, weight in weights.items()
        if weight
    ]
    return ", ".join(laid + ["KL at every token"] * bool(config.kl_coef))


def memory_table(models: Models, work: Work, asked: str) -> str:
    """The memory of each rank in the arrangement asked for, by parts, and in all others: rows and columns of flags."""
    base = 0 if models.how.on_gpu else parallel.resident_memory() + plan.STILL_TO_COME
    when = moments(models, work, asked)
    peak = max(when, key=when.__getitem__)
    lines = [f"{'memory of each rank':24}{plan.size(base + when[peak])}, its peak while {peak}"]
    lines += [f"  {'process':22}{plan.size(base)}"] * bool(base)
    for model, parts in held(models, work, asked).items():
        said = ", ".join(f"{name} {plan.size(n_bytes)}" for name, n_bytes in parts.items() if n_bytes)
        lines.append(f"  {model:22}{said}")
    lines.append(f"{'arrangements':24}" + "".join(f"{name:14}" for name in ARRANGEMENTS).rstrip())
    for name, variant in _variants(models):
        found = (max(moments(variant, work, arrangement).values(), default=0) for arrangement in ARRANGEMENTS)
        cells = (plan.size(base + total) if total else "-" for total in found)
        lines.append(f"  {name:22}" + "".join(f"{cell:14}" for cell in cells).rstrip())
    return "\n".join(lines)


def _variants(models: Models) -> Iterator[tuple[str, Models]]:
    """The same models with and without adapters, those that do not learn in each precision."""
    experts = any(config.n_experts for config in (models.actor, models.critic) if config)
    usual = LoraConfig(rank=16, alpha=16.0, dropout=0.0, targets=LINEARS[:4] if experts else LINEARS)
    for lora in (None, models.how.lora or usual):
        adapted = models._replace(how=models.how._replace(lora=lora))
        frozen = adapted.has_reference or adapted.verifier
        for precision in ("", "int8", "int4") if frozen else ("",):
            name = f"LoRA of rank {lora.rank}" if lora else "all weights"
            name += f", {precision}" if precision else ""
            yield name, adapted._replace(quantize=precision)


def moments(models: Models, work: Work, arrangement: str) -> dict[str, int]:
    """Bytes that a rank holds at the largest moment of each phase; empty where the models cannot be held so."""
    if arrangement == "--share_base" and not _can_share(models):
        return {}
    memory = held(models, work, arrangement)
    lasting = {name: sum(parts.get(part, 0) for part in LASTING) for name, parts in memory.items()}
    weights = {name: parts["weights"] for name, parts in memory.items() if "weights" in parts}
    loading = _loading(models) if arrangement != "--share_base" else {"actor": _loading(models)["actor"]}
    found = {}
    for name, parts in memory.items():
        alone = lasting[name] or weights["actor"]  # rollouts are sampled from the actor
        beside = alone if arrangement == "--phases" else sum(lasting.values())
        found[DOING[name]] = sum(parts.values()) - lasting[name] + beside
    others = 0 if arrangement == "--phases" else sum(weights.values())
    return found | {
        "loading": max(size + max(0, others - weights[name]) for name, size in loading.items()),
    }


def held(models: Models, work: Work, arrangement: str) -> dict[str, dict[str, int]]:
    """What a rank holds of each model in its own largest phase, and what sampling adds to the actor. Bytes by part.

    With --share_base all but the actor bring their adapters alone; the verifier's are taken to be of the same rank.
    """
    n, how = models.n, models.how
    found = {"actor": training_memory(models.actor, n, work.largest, how)}
    if models.critic:
        found["critic"] = training_memory(models.critic, n, work.largest, how)
    if models.has_reference:
        found["reference"] = {"weights": _frozen(models.actor, n, models.quantize)}
    if models.verifier:
        found["verifier"] = {"weights": _frozen(models.verifier, n, models.verifier_precision)}
    if arrangement == "--share_base":
        for name, config in (("critic", models.critic), ("verifier", models.verifier)):
            if config:
                found[name]["weights"] = FLOAT32 * local_lora_parameters(config, how.lora, n)
    decoding = decoding_memory(models.actor, n, work.n_rows, work.n_tokens)
    found["rollouts"] = {name: decoding[name] for name in ("kv cache", "logits")}
    if how.data_parallel > 1:  # a rank that samples holds whole weights, see parallel.gathered()
        found["rollouts"]["gathered"] = found["actor"]["weights"] * how.data_parallel
    return found


def _frozen(config: ModelConfig, n: int, precision: str) -> int:
    return int(bytes_a_weight(precision) * local_parameters(config, n))


def _loading(models: Models) -> dict[str, int]:
    """What a rank holds as the last weight of each model is read."""
    wanted = {"actor": (models.actor, "")}
    if models.critic:
        wanted["critic"] = models.critic, ""
    if models.has_reference:
        wanted["reference"] = models.actor, models.quantize
    if models.verifier:
        wanted["verifier"] = models.verifier, models.verifier_precision
    n, found = models.n, {}
    for name, (config, precision) in wanted.items():
        stored = plan.BYTES[config.dtype] * local_parameters(config, n)
        found[name] = loading_memory(config, n, stored, precision)
    return found


def _can_share(models: Models) -> bool:
    """Whether --share_base is allowed, and the models are such that one base could be below all of them."""
    if models.how.lora is None or models.quantize or models.renewed or models.how.data_parallel > 1:
        return False
    others = filter(None, (models.critic, models.verifier))
    return all(_below_head(config) == _below_head(models.actor) for config in others)


def _below_head(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights that a solver and the verifiers that start from it have in common."""
    heads = ("output.weight", "v_head.weight")
    return {name: shape for name, shape in expected_shapes(config).items() if name not in heads}
