"""trl's GRPOTrainer with a scripted reward, on prompts that are token ids; a buffer is used in one step an epoch."""

from collections import defaultdict
from pathlib import Path

import torch
from datasets import Dataset
from transformers import LlamaForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.paired import Watch
from benchmarks.trl_common import Clock, Setting, words


class Norms(TrainerCallback):
    """The norm of the gradient of each optimizer step."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_pre_optimizer_step(self, *_: object, model: torch.nn.Module, **__: object) -> None:
        """After the gradients of a step are added up; nothing clips them here."""
        norms = [parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]
        self.found.append(torch.stack(norms).norm().item())


def train(setting: Setting, group: int, watch: Watch, norms: Norms | None = None) -> None:
    """All iterations, the watch's work being their response tokens and its losses those of the optimizer steps."""

    class Watched(GRPOTrainer):
        def _generate_single_turn(self, prompt_ids: list[list[int]], *rest: object) -> tuple[list[list[int]], None]:
            if setting.given is None:
                return super()._generate_single_turn(prompt_ids, *rest)
            start, given = len(prompt_ids[0]), defaultdict(list)
            for row in setting.given.tolist():
                response = [token for token in row[start:] if token]  # padding, 0, is never sampled
                given[tuple(row[:start])].append(response)
            return [given[tuple(prompt)].pop() for prompt in prompt_ids], None

        def _generate_and_score_completions(self, inputs: object) -> object:
            found = super()._generate_and_score_completions(inputs)
            watch.collected()
            watch.work.append(int(found["completion_mask"].sum()))
            return found

        def _compute_loss(self, *given: object) -> torch.Tensor:
            loss = super()._compute_loss(*given)
            watch.losses.append(loss.item())
            return loss

    def even(completion_ids: list[list[int]], **_: object) -> list[float]:
        return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]

    settings = GRPOConfig(
        output_dir=str(setting.folder / "trl"), use_cpu=True, bf16=setting.bf16, gradient_checkpointing=False,
        per_device_train_batch_size=setting.micro, gradient_accumulation_steps=setting.episodes // setting.micro,
        num_generations=group, num_iterations=setting.epochs, max_completion_length=setting.response, temperature=1.0,
        top_k=0, beta=0.0, max_steps=setting.epochs * setting.iterations, learning_rate=setting.lr,
        lr_scheduler_type="constant", warmup_steps=0, adam_beta2=0.95, weight_decay=0.0, epsilon=0.2, loss_type="grpo",
        shuffle_dataset=False, max_grad_norm=0.0 if norms else 1.0, logging_strategy="no", save_strategy="no",
        report_to=[], disable_tqdm=True,
    )
    trainer = Watched(
        model=LlamaForCausalLM.from_pretrained(setting.folder / "hf", dtype=torch.float32), reward_funcs=even,
        args=settings, processing_class=words(setting.vocab_size), callbacks=[Clock(watch, setting.epochs)],
        train_dataset=Dataset.from_list([{"prompt": " ".join(map(str, ids))} for ids in setting.prompts]),
    )
    if norms:
        trainer.add_callback(norms)
    watch.start()
    trainer.train()


def loss(
    model: LlamaForCausalLM, given: dict[str, torch.Tensor], folder: Path, **settings: object
) -> torch.Tensor:
    """trl's policy loss of one batch of episodes: what tests compare ours with. -> []."""
    settings = {"loss_type": "grpo", "num_generations": 2, "per_device_train_batch_size": 2, "beta": 0.0} | settings
    config = GRPOConfig(output_dir=str(folder / "trl"), use_cpu=True, bf16=False, report_to=[], **settings)
    trainer = GRPOTrainer(model=model.eval(), reward_funcs=len, args=config, processing_class=words(64),
                          train_dataset=Dataset.from_list([{"prompt": "2"}] * 2))
    return trainer._compute_loss(model, given)


def parity(setting: Setting, group: int) -> dict[str, object]:
    """What benchmarks/ppo.py compares: the mean loss and norm of the gradient of the epochs, one step each."""
    watch, norms = Watch(), Norms()
    train(setting, group, watch, norms)
    return {
        "policy_loss": sum(watch.losses) / len(watch.losses), "grad_norm": sum(norms.found) / len(norms.found),
    }


def measure(setting: Setting, group: int) -> dict[str, object]:
    """A run's figures."""
    watch = Watch()
    train(setting, group, watch)
    return watch.record()
