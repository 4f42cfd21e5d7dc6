"""What a run of PPO starts with: its prompts, its models, its rewards, and what saves it."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from src import load, parallel, runlog
from src.checkpoint import saving
from src.code_solutions.tool_hook import Coding, block_limits
from src.data.batch import chunks, epoch_order
from src.data.encoding import encode_prompt
from src.data.examples import Prompt, read_prompts
from src.errors import UserError
from src.evaluation.report import type_of
from src.grading.grader import Grader
from src.grading.tasks import INSTRUCTION, Task, find_task
from src.models.decoder import Decoder
from src.models.forward import Distribution
from src.runlog import Phases, RunLog
from src.text.tokenizer import Tokenizer
from src.training import rewards, user_reward
from src.training.checkpointer import Checkpointer, Trainee
from src.training.offload import ModelOffloader
from src.training.policy_server import PolicyServers
from src.training.ppo_config import PPOConfig, short_name
from src.training.rewards import Counts, Reward, Score
from src.training.rollout import Rollout
from src.training.shared_base import SharedBase
from src.training.trainer import Trainer

NAMED = 5  # prompts that a warning names; it counts all


class Inputs(NamedTuple):
    """What a run reads before it starts: prompts as the policy is shown them, and the rows that iterations answer.
    coding: how the code of responses is run; None of text alone."""

    prompts: list[Prompt]
    held_out: list[Prompt]
    n_held_out: int  # with those that are too long to be answered
    tokenizer: Tokenizer
    task: Task
    iterations: list[tuple[int, list[int]]]  # epoch and rows of prompts
    per_epoch: int
    coding: Coding | None = None

    def distribution(self, temperature: float) -> Distribution:
        """What the policy samples from."""
        return Distribution(temperature, self.tokenizer.vocab_size, self.coding.banned if self.coding else ())


def read_inputs(config: PPOConfig) -> Inputs:
    """Read prompts and tokenizer, and check that they fit the models. Raises UserError."""
    user_reward.check(name for name in config.reward if name not in ("verifier", "rule", "code"))
    # pairs: one directory may be given twice
    kinds = [(config.actor_ckpt_dir, "solver"), (config.critic_ckpt_dir, ""),
             (config.reward_model_ckpt_dir, "verifier"), (config.teacher_ckpt_dir, "solver")]
    configs = {folder: load.load_config(folder, kind=kind) for folder, kind in kinds if folder}
    load.check_context_parallel(configs, config.context_parallel_size,
                                load.tensor_parallel_size(config.actor_ckpt_dir, config.tensor_parallel_size))
    contexts = {folder: each.max_seq_len for folder, each in configs.items()}
    task = find_task(config.task)
    if not task.graded:
        raise UserError(f"--task {task.name} grades nothing; name the task of the answers")
    prompts = _in_words_of(task, read_prompts(config.train_file, config.renamed,
                                              need_label=config.reward == ["rule"]))
    held_out = _in_words_of(task, read_prompts(config.eval_file, config.renamed, need_label=True)
                            ) if config.eval_file else []
    if task.prompt != INSTRUCTION and "verifier" in config.reward:
        runlog.logger().warning("--task %s puts each problem into words of its own, and the verifier reads these too; "
                                "it should have learnt on them", config.task)
    tokenizer = load.load_tokenizer(config.actor_ckpt_dir, config)
    if tokenizer.code and config.rollout_backend == "openai":
        raise UserError(f"{config.actor_ckpt_dir} writes solutions with code, which no server runs while it samples; "
                        "leave --rollout_backend openai out")
    if "code" in config.reward and not tokenizer.code:
        raise UserError(f"--reward code looks at runs of code, but {config.actor_ckpt_dir} answers in text alone; "
                        "leave it out, or train a solver with --chat_template code")
    if not tokenizer.code:
        config.refuse(("isolation", "code_seconds", "max_rounds"), f"{config.actor_ckpt_dir} answers in text alone")
    coding = Coding(tokenizer, config.max_rounds, config.isolation or None, block_limits(config.code_seconds)
                    ) if tokenizer.code else None
    judge = config.reward_model_ckpt_dir
    foreign = bool(judge) and load.load_config(judge).verifier_form  # it comes with a tokenizer of its own
    load.check_tokenizer(tokenizer, config.critic_ckpt_dir, config.teacher_ckpt_dir, "" if foreign else judge)
    readers = [folder for folder in (config.critic_ckpt_dir, config.teacher_ckpt_dir) if folder]
    prompts = fitting_prompts(
        prompts, config.train_file, tokenizer, contexts, config.max_new_tokens, config.actor_ckpt_dir, readers)
    n_held_out, own = len(held_out), {config.actor_ckpt_dir: contexts[config.actor_ckpt_dir]}
    if held_out:
        held_out = fitting_prompts(
            held_out, config.eval_file, tokenizer, own, config.max_new_tokens, config.actor_ckpt_dir)
    if "verifier" in config.reward:
        load.check_step(judge, configs[judge], config.step)
        objective = configs[judge].objective
        of_others = {"pairwise": ["outcome_reward", "step_reward", "step_bonus"],
                     "outcome": ["step_reward", "step_bonus"], "process": ["outcome_reward", "reward_clip"]}[objective]
        if objective == "outcome" and config.outcome_reward == "probability":
            of_others.append("reward_clip")
        config.refuse(of_others, f"{judge} is a verifier of objective {objective}")
    schedule = ((epoch, rows) for epoch in range(1, config.epochs + 1)
                for rows in chunks(epoch_order(len(prompts), config.seed, epoch), config.prompts_per_buffer))
    # the whole schedule is known before the run: a resumed one takes up where it stopped
    iterations = list(itertools.islice(schedule, config.max_steps if config.max_steps >= 0 else None))
    runlog.warn_of_early_end(len(iterations), config.epochs, config.max_steps)
    per_epoch = -(-len(prompts) // config.prompts_per_buffer)
    return Inputs(prompts, held_out, n_held_out, tokenizer, task, iterations, per_epoch, coding)


def _in_words_of(task: Task, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Each problem put as the task puts it. Raises UserError for an answer type that is not known."""
    for prompt in prompts:
        type_of(prompt)
    return [prompt._replace(instruction=task.text(prompt.instruction)) for prompt in prompts]


def fitting_prompts(
    prompts: Sequence[Prompt], source: str, tokenizer: Tokenizer, contexts: Mapping[str, int], max_new_tokens: int,
    policy: str, readers: Sequence[str] = (),
) -> list[Prompt]:
    """The prompts of the file `source` that leave every model a token of its context; warns of the others, by name.

    contexts: tokens by checkpoint directory, of which `policy` answers and `readers` read answers to their end. Warns
    too where a response may be cut off before max_new_tokens. Raises UserError if no prompt is left, and where a
    response may be longer than a reader's context: it has not learnt what such positions mean.
    """
    folder, context = min(contexts.items(), key=lambda item: item[1])
    n_tokens = [len(encode_prompt(tokenizer, prompt.instruction, where=prompt.where)) for prompt in prompts]
    too_long = [f"row {row} (id {prompt.id!r}, {n} tokens)"
                for row, (prompt, n) in enumerate(zip(prompts, n_tokens, strict=True), 1) if n >= context]
    found = f"{source}: {len(too_long)} of {len(prompts)} prompts fill the context of {folder}, {context} tokens"
    if len(too_long) == len(prompts):
        raise UserError(f"{found}; the first is {too_long[0]}; shorten them or give models with a longer context")
    if too_long:
        more = ", ..." if len(too_long) > NAMED else ""
        runlog.logger().warning("%s, and are left out: %s%s", found, ", ".join(too_long[:NAMED]), more)
    n_cut = sum(context - max_new_tokens < n < context for n in n_tokens)
    if n_cut:
        runlog.logger().warning(
            "%s: %d of %d prompts leave less than --max_new_tokens %d in the context of %s, %d tokens",
            source, n_cut, len(prompts) - len(too_long), max_new_tokens, folder, context)
    longest = contexts[policy]
    if not tokenizer.code:  # what code prints comes on top of max_new_tokens
        longest = min(max(n for n in n_tokens if n < context) + max_new_tokens, longest)
    for reader in (reader for reader in readers if contexts[reader] < longest):
        raise UserError(f"{source}: prompts with their responses may have {longest} tokens, more than the context of "
                        f"{reader}, {contexts[reader]} tokens, which reads them whole; lower --max_new_tokens by "
                        f"{longest - contexts[reader]}, or shorten the prompts")
    return [prompt for prompt, n in zip(prompts, n_tokens, strict=True) if n < context]


@dataclass
class PPOModels:
    """Actor and critic, which learn, a verifier and a reference, which do not; in memory by --phases only inside
    `with phase(...)`.

    critic None: the estimator has none. verifier, teacher None: nothing asks for them. frozen None: the reference is
    the actor without its adapters, or not loaded yet.
    """

    actor: Trainer
    critic: Trainer | None
    verifier: Decoder | None
    offloader: ModelOffloader
    frozen: Decoder | None = None
    servers: PolicyServers | None = None  # that sample; None: the actor does
    teacher: Decoder | None = None

    @property
    def reference(self) -> Decoder:
        """The reference; where it is the actor itself, to be used inside lora.without_adapters()."""
        return self.frozen or self.actor.model

    @contextlib.contextmanager
    def phase(self, timer: Phases, name: str, model: Decoder | None, *, optimizer: bool = False) -> Iterator[None]:
        """Inside, a model and, if asked for, its optimizer's state are in memory, and time counts under this name."""
        with timer(name), self.offloader.loaded(model, optimizer=optimizer):
            yield

    def load_reference(self, config: PPOConfig, *, refreshed: bool) -> None:
        """Make the actor as it started, or as it was last kept for this (refreshed), the reference. Their first KL is
        0, but for what rounds: a quantised reference, --save_dtype, and refreshed adapters, which are merged."""
        if config.lora_rank > 0 and not refreshed:
            return  # it is the actor without its adapters
        if self.frozen:
            self.offloader.drop(self.frozen)
            self.frozen = None  # gone before the new one comes
        # saved with the step that refreshes it, so that a resumed run finds the same one
        folder = str(Path(config.actor_save_dir) / "reference") if refreshed else config.actor_ckpt_dir
        self.frozen = load.load_solver(folder, precision=config.precision, quantize=config.quantize)
        self.offloader.add(self.frozen)


def load_models(config: PPOConfig, log: RunLog, n_iterations: int) -> PPOModels:
    """All models but the reference. Raises UserError where --share_base cannot hold them on one base."""
    if config.share_base and parallel.world_size() > parallel.tensor_parallel_size():
        raise UserError("--share_base: data-parallel ranks would cut the base for each model; make all ranks one "
                        "tensor-parallel group with --tensor_parallel_size")
    shared = SharedBase(config.actor_ckpt_dir, config.precision) if config.share_base else None
    offloader = ModelOffloader(Path(config.run_dir) / ".waiting" if config.phases else None)
    # adapters of the run's seed: started again it begins with the same ones
    trained = load.Trained(load.lora_config(config), config.seed)
    how = {"precision": config.precision, "trained": trained}

    def trainer(model: Decoder, lr: float, iterations: int) -> Trainer:
        """Give a model an optimizer, and one that shares its base adapters."""
        if shared:
            load.put_lora_on(model, *trained)
        made = Trainer(model, log, config, lr=lr, total_steps=iterations * config.steps_per_buffer,
                       adam_eps=config.adam_eps)
        offloader.add(model, made)
        return made

    solver = shared.model(config.actor_ckpt_dir) if shared else load.load_solver(
        config.actor_ckpt_dir, model_type=config.model_type, **how)
    actor = trainer(solver, config.lr, n_iterations - config.warmup_iterations(n_iterations))
    critic = verifier = teacher = None
    if config.has_critic:
        folder = config.critic_ckpt_dir
        model = shared.model(folder, value_head=True, from_solver=True) if shared else load.load_verifier(
            folder, from_solver=True, **how)
        critic = trainer(model, config.critic_lr, n_iterations)
    if "verifier" in config.reward:
        folder = config.reward_model_ckpt_dir
        verifier = shared.model(folder, value_head=True) if shared else load.load_verifier(
            folder, precision=config.precision, quantize=config.quantize)
        offloader.add(verifier)
    if config.teacher_ckpt_dir:
        teacher = load.load_solver(config.teacher_ckpt_dir, precision=config.precision, quantize=config.quantize)
        offloader.add(teacher)
    return PPOModels(actor, critic, verifier, offloader, teacher=teacher)


def open_rewards(
    config: PPOConfig, models: PPOModels, tokenizer: Tokenizer, grader: Grader, in_use: contextlib.ExitStack
) -> dict[str, Reward]:
    """The rewards that are added up, by their names in the log. in_use: closes the processes of users' functions."""
    opened, code = {}, partial(rewards.share_out, rewards.code_reward)

    def of_texts(score: Callable[[Rollout], tuple[Sequence[float], Counts]]) -> Score:
        """What the first rank of each group says of its share."""
        return partial(rewards.share_out, partial(rewards.on_first_rank, score))

    for name, weight in config.weights_by_reward.items():
        short = short_name(name)
        if name == "verifier":
            own = load.load_tokenizer(config.reward_model_ckpt_dir) if models.verifier.config.verifier_form else None
            score = partial(rewards.verifier_reward, models.verifier, tokenizer, config, config.max_batch_size, own)
        elif name == "rule":
            score = of_texts(partial(rewards.graded_reward, grader))
        elif name == "code":
            score = code
        else:  # of all episodes at once: what it says of one may depend on the others
            score = partial(rewards.function_reward, in_use.enter_context(user_reward.UserReward(name)), short)
        opened[short] = Reward(weight, score)
    if tokenizer.code:  # in any case for the log
        opened.setdefault("code", Reward(0.0, code))
    if config.format_penalty:
        opened["format"] = Reward(1.0, of_texts(partial(rewards.format_reward, grader, config.format_penalty)))
    return opened


def open_checkpointer(
    config: PPOConfig, models: PPOModels, log: RunLog, state: dict[str, object], data: Inputs,
    fingerprint: dict[str, object],
) -> Checkpointer:
    """What saves actor and critic together, and brings them back."""
    trainees = [
        Trainee(save_dir, trainer, ckpt_dir, partial(models.offloader.loaded, trainer.model, optimizer=True))
        for trainer, save_dir, ckpt_dir in ((models.actor, config.actor_save_dir, config.actor_ckpt_dir),
                                            (models.critic, config.critic_save_dir, config.critic_ckpt_dir))
        if trainer]
    for trainee in trainees:
        saving.record(trainee.trainer.model, **data.tokenizer.chat_facts())
    snapshots = {"reference": config.reference_refresh} if config.reference_refresh > 0 else {}
    # the critic has learnt to read texts in the actor's template, which may be a file next to the tokenizer
    return Checkpointer(
        log, trainees, config, lora=load.lora_config(config),
        tokenizer_file=config.tokenizer_file or config.actor_ckpt_dir, steps_per_epoch=data.per_epoch,
        total_steps=len(data.iterations), run_fingerprint=fingerprint, state=state, snapshots=snapshots)
