"""The models of a PPO run: actor and critic that learn, a reference and a verifier that do not."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from src import load, parallel
from src.errors import UserError
from src.models.decoder import Decoder
from src.models.lora import without_adapters
from src.runlog import RunLog
from src.sharing import SharedBase
from src.training.offload import ModelOffloader
from src.training.ppo_config import PPOConfig
from src.training.trainer import Trainer


@dataclass
class PPOModels:
    """What is in memory by --phases only where `offloader.loaded(model)` says so, else all the time.

    critic None: the estimator has none. verifier None: no reward asks for it. reference None: it is the actor without
    its adapters, or not loaded yet.
    """

    actor: Trainer
    critic: Trainer | None
    verifier: Decoder | None
    offloader: ModelOffloader
    reference: Decoder | None = None

    @contextlib.contextmanager
    def reference_loaded(self) -> Iterator[Decoder]:
        """The reference, in memory."""
        with self.offloader.loaded(self.reference or self.actor.model):
            if self.reference:
                yield self.reference
            else:
                with without_adapters(self.actor.model):
                    yield self.actor.model

    def load_reference(self, config: PPOConfig, *, refreshed: bool) -> None:
        """Make the actor as it started, or as it was last kept for this (refreshed), the reference.

        In the actor's own precision their first KL is 0; a quantised one is somewhat off it.
        """
        if config.lora_rank > 0 and not refreshed:
            return  # it is the actor without its adapters
        if self.reference:
            self.offloader.drop(self.reference)
            self.reference = None  # gone before the new one comes
        folder = str(Path(config.actor_save_dir) / "reference") if refreshed else config.actor_ckpt_dir
        self.reference = load.load_solver(folder, precision=config.precision, quantize=config.quantize)
        self.offloader.add(self.reference)


def load_models(config: PPOConfig, log: RunLog, n_iterations: int) -> PPOModels:
    """All models but the reference. Raises UserError where --share_base cannot hold them on one base."""
    if config.share_base and parallel.data_parallel_size() > 1:
        raise UserError(
            "--share_base: data-parallel ranks would cut the base for each model; make all ranks one tensor-parallel "
            "group with --tensor_parallel_size"
        )
    shared = SharedBase(config.actor_ckpt_dir, config.precision) if config.share_base else None
    offloader = ModelOffloader(Path(config.run_dir) / ".waiting" if config.phases else None)

    def solver(folder: str) -> Decoder:
        if shared:
            return shared.model(folder)
        return load.load_solver(folder, model_type=config.model_type, precision=config.precision,
                                    trained=config.lora_rank == -1)

    def verifier(folder: str, *, trained: bool) -> Decoder:
        if shared:
            return shared.model(folder, value_head=True, from_solver=trained)
        return load.load_verifier(folder, precision=config.precision, trained=trained and config.lora_rank == -1,
                                      from_solver=trained, quantize="" if trained else config.quantize)

    def trainer(model: Decoder, lr: float, iterations: int) -> Trainer:
        load.put_lora_on(model, load.lora_config(config), config.seed)
        steps = iterations * config.steps_per_buffer
        made = Trainer(model, log, config, lr=lr, total_steps=steps, adam_eps=config.adam_eps)
        offloader.add(model, made)
        return made

    actor = trainer(solver(config.actor_ckpt_dir), config.lr, n_iterations - config.warmup_iterations(n_iterations))
    critic = reward_model = None
    if config.has_critic:
        critic = trainer(verifier(config.critic_ckpt_dir, trained=True), config.critic_lr, n_iterations)
    if "verifier" in config.reward:
        reward_model = verifier(config.reward_model_ckpt_dir, trained=False)
        offloader.add(reward_model)
    return PPOModels(actor, critic, reward_model, offloader)
