"""trl's PPOTrainer with a scripted reward, on prompts that are token ids; trl 1.12 is the last that has one.

B episodes, R response tokens, S prompt and response
"""

import gc

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import LlamaForCausalLM, LlamaForSequenceClassification
from trl.experimental.ppo import PPOConfig, PPOTrainer
from trl.experimental.ppo import ppo_trainer as module

from benchmarks.paired import Watch
from benchmarks.trl_common import Clock, Setting, words


class Reward(nn.Module):
    """The share of even ids among a response's tokens so far, in the form of a reward model of transformers."""

    base_model_prefix = "backbone"

    def __init__(self, prompt: int) -> None:
        super().__init__()
        self.backbone, self.score = EvenIds(prompt), nn.Identity()


class EvenIds(nn.Module):
    """Reward's hidden states [B, S, 1], 0 at the prompt's tokens."""

    def __init__(self, prompt: int) -> None:
        super().__init__()
        self.prompt = prompt

    def forward(self, input_ids: Tensor, **_: object) -> object:
        """An output of transformers that has the hidden states alone."""
        even = (input_ids[:, self.prompt :] % 2 == 0).float().cumsum(1)
        share = even / torch.arange(1, even.shape[1] + 1)
        hidden = torch.cat((torch.zeros(len(share), self.prompt), share), 1)[..., None]
        return type("Output", (), {"hidden_states": [hidden]})()


class Seen:
    """What the trainer computes on the way, by taking the place of its module's functions."""

    def __init__(self, setting: Setting, watch: Watch) -> None:
        self.watch, self.given, self.prompt = watch, setting.given, len(setting.prompts[0])
        self.advantages: list[Tensor] = []  # [B, R]
        self.means: list[float] = []  # the masked means of a minibatch: value loss, its clip share, policy's two
        self.whiten, self.mean = module.masked_whiten, module.masked_mean
        module.masked_whiten = self.watched_whiten
        if self.given is not None:
            module.masked_mean, module.batch_generation = self.watched_mean, self.not_sampled

    def watched_whiten(self, values: Tensor, mask: Tensor, **options: object) -> Tensor:
        """The last that is done before the update. mask [B, R] bool."""
        self.advantages.append(self.whiten(values, mask, **options))
        self.watch.collected()
        self.watch.work.append(int(mask.sum()))
        return self.advantages[-1]

    def watched_mean(self, *arguments: object) -> Tensor:
        """A mean, noted."""
        found = self.mean(*arguments)
        self.means.append(found.item())
        return found

    @torch.no_grad()
    def not_sampled(self, model: nn.Module, *_: object) -> tuple[Tensor, Tensor]:
        """The episodes given [B, S] and the logits of their responses [B, R, V]."""
        return self.given, model(self.given).logits[:, self.prompt - 1 : -1]


def train(setting: Setting, watch: Watch) -> Seen:
    """All iterations, the watch's work being their response tokens."""
    hf, seen = setting.folder / "hf", Seen(setting, watch)
    policy, reference = (LlamaForCausalLM.from_pretrained(hf, dtype=torch.float32) for _ in range(2))
    value = LlamaForSequenceClassification.from_pretrained(hf, num_labels=1, dtype=torch.float32)
    value.score.weight.data.copy_(torch.load(setting.folder / "head.pth"))
    settings = PPOConfig(
        output_dir=str(setting.folder / "trl"), use_cpu=True, bf16=setting.bf16, gradient_checkpointing=False,
        per_device_train_batch_size=setting.micro, gradient_accumulation_steps=setting.episodes // setting.micro,
        num_mini_batches=1, num_ppo_epochs=setting.epochs, total_episodes=setting.episodes * setting.iterations,
        response_length=setting.response, stop_token="eos", temperature=1.0, learning_rate=setting.lr,
        local_rollout_forward_batch_size=setting.episodes, lr_scheduler_type="constant", warmup_steps=0,
        adam_beta2=0.95, weight_decay=0.0, kl_coef=0.05, vf_coef=1.0, cliprange=0.2, cliprange_value=0.2, gamma=1.0,
        lam=0.95, num_sample_generations=0, logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True,
        eval_strategy="no",
    )
    rows = Dataset.from_list([{"input_ids": ids} for ids in setting.prompts])
    trainer = PPOTrainer(
        args=settings, processing_class=words(setting.vocab_size), model=policy, ref_model=reference,
        reward_model=Reward(len(setting.prompts[0])), value_model=value, train_dataset=rows,
        eval_dataset=rows.select(range(setting.episodes)), callbacks=[Clock(watch)],
    )
    gc.collect()
    watch.start()
    trainer.train()
    return seen


def parity(setting: Setting) -> dict[str, object]:
    """What benchmarks/ppo.py compares: advantages [B, R], and the mean losses of the epochs, one step each."""
    seen = train(setting, Watch())
    means = seen.means[-4 * setting.epochs :]
    value, policy = (sum(means[first::4]) / setting.epochs for first in (0, 2))
    return {"advantages": seen.advantages[0].tolist(), "value_loss": 0.5 * value, "policy_loss": policy}


def measure(setting: Setting) -> dict[str, object]:
    """A run's figures."""
    watch = Watch()
    train(setting, watch)
    return watch.record()
