"""The numbers of PPO and of its relatives without a critic, and which of them go together."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, NamedTuple

from src.errors import UserError

Advantage = Literal["gae", "grpo", "dr_grpo", "rloo", "reinforce++"]
Aggregation = Literal["token-mean", "seq-mean", "seq-sum", "seq-constant"]
Truncated = Literal["penalty", "zero", "mask"]
KlLoss = Literal["none", "k2", "k3"]


class Estimator(NamedTuple):
    """What an advantage estimator needs, and the defaults that go with it by the name of their flag."""

    has_critic: bool
    least_group: int
    defaults: Mapping[str, object]


# Critic-free estimators: Shao et al. 2024 (GRPO), Liu et al. 2025 (Dr. GRPO), Ahmadian et al. 2024 (RLOO),
# Hu et al. 2025 (REINFORCE++). The wider upper clip is DAPO's (Yu et al. 2025).
ESTIMATORS: dict[str, Estimator] = {
    "gae": Estimator(True, 1, {"group_size": 1, "kl_coef": 0.02, "loss_aggregation": "token-mean"}),
    "grpo": Estimator(
        False,
        2,
        {"group_size": 8, "kl_coef": 0.0, "clip_high": 0.28, "loss_aggregation": "seq-mean"},
    ),
    "dr_grpo": Estimator(
        False,
        2,
        {"group_size": 8, "kl_coef": 0.0, "clip_high": 0.28, "loss_aggregation": "seq-constant"},
    ),
    "rloo": Estimator(False, 2, {"group_size": 8, "kl_coef": 0.02, "loss_aggregation": "token-mean"}),
    "reinforce++": Estimator(False, 1, {"group_size": 1, "kl_coef": 0.02, "loss_aggregation": "token-mean"}),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The numbers of the algorithm; ppo_train.py's flags of the same names say what each means."""

    advantage: Advantage
    group_size: int
    temperature: float
    max_new_tokens: int
    rollout_batch_size: int
    max_buffer_size: int
    max_batch_size: int
    inner_epochs: int
    minibatches: int
    loss_aggregation: Aggregation
    entropy_coef: float
    kl_coef: float
    kl_loss: KlLoss
    kl_loss_coef: float
    kl_target: float
    kl_horizon: float
    clip_ratio: float
    clip_high: float
    dual_clip: float
    value_clip: float
    gamma: float
    gae_lambda: float
    critic_lambda: float
    whiten_rewards: bool
    whiten_advantages: bool
    tis_cap: float
    truncated: Truncated
    missing_eos_penalty: float
    overlong_buffer: int
    filter_groups: bool
    max_refills: int
    seed: int

    def __post_init__(self) -> None:
        """Raise UserError for numbers that contradict each other."""
        least = ESTIMATORS[self.advantage].least_group
        if self.group_size < least:
            raise UserError(
                f"--group_size is {self.group_size}, but --advantage {self.advantage} compares the responses to one "
                f"prompt; expected {least} or more"
            )
        if self.max_buffer_size % self.group_size:
            raise UserError(
                f"--max_buffer_size {self.max_buffer_size} episodes are no whole number of groups of --group_size "
                f"{self.group_size}; give a multiple of it"
            )
        if self.temperature <= 0:
            raise UserError(
                f"--temperature {self.temperature}: PPO learns from sampled responses; expected more than 0"
            )
        if self.dual_clip and self.dual_clip <= 1:
            raise UserError(f"--dual_clip is {self.dual_clip}, expected more than 1, or 0 for none")
        if self.filter_groups and self.group_size == 1:
            raise UserError(
                "--filter_groups drops groups of equal rewards, so --group_size must be 2 or more"
            )
        if self.max_refills and not self.filter_groups:
            raise UserError("--max_refills replaces the groups that --filter_groups drops; give both")
        if self.overlong_buffer and (
            self.truncated != "penalty" or self.overlong_buffer >= self.max_new_tokens
        ):
            raise UserError(
                f"--overlong_buffer {self.overlong_buffer} needs --truncated penalty and more --max_new_tokens than "
                f"it; they are {self.truncated} and {self.max_new_tokens}"
            )
        if self.kl_target >= 0 and not self.kl_coef and self.kl_loss == "none":
            raise UserError(
                "--kl_target adapts a KL term, but --kl_coef is 0 and --kl_loss none; give one of them"
            )

    @property
    def has_critic(self) -> bool:
        """Whether a critic is trained."""
        return ESTIMATORS[self.advantage].has_critic

    @property
    def prompts_a_buffer(self) -> int:
        """Prompts whose groups fill a buffer."""
        return self.max_buffer_size // self.group_size

    def critic_warmup(self, asked: int, n_buffers: int) -> int:
        """Buffers from which only the critic learns: as many as asked, or for -1 a tenth of all, at most 10."""
        if asked < 0:
            return min(10, n_buffers // 10) if self.has_critic else 0
        if asked and not self.has_critic:
            raise UserError(f"--critic_warmup: --advantage {self.advantage} has no critic")
        if asked > n_buffers:
            raise UserError(f"--critic_warmup is {asked}, but there are only {n_buffers} buffers; lower it")
        return asked

    def with_kl_scale(self, scale: float) -> "Settings":
        """The same with both KL weights multiplied."""
        return replace(self, kl_coef=self.kl_coef * scale, kl_loss_coef=self.kl_loss_coef * scale)


def from_flags(flags: Mapping[str, object]) -> Settings:
    """The flags named like the fields of Settings; where one is -1 or empty its default takes its place.

    A grader's reward comes at the end and is exact: the returns need no critic to hold their variance down, and
    lambda is 1.
    """
    values = {field.name: flags[field.name] for field in fields(Settings)}
    if values["gae_lambda"] == -1:
        values["gae_lambda"] = 1.0 if flags["reward"] == ["rule"] else 0.95
    defaults = {"clip_high": values["clip_ratio"], "critic_lambda": values["gae_lambda"]}
    defaults |= ESTIMATORS[str(values["advantage"])].defaults
    return Settings(
        **values | {name: default for name, default in defaults.items() if values[name] in (-1, "")}
    )


def check_together(flags: Mapping[str, object]) -> None:
    """Raise UserError for flags of ppo_train.py that name models and directories and do not go together."""
    advantage = str(flags["advantage"])
    actor, critic = Path(str(flags["actor_save_dir"])), Path(str(flags["critic_save_dir"]))
    has_critic = ESTIMATORS[advantage].has_critic
    if "verifier" in flags["reward"] and not flags["reward_model_ckpt_dir"]:
        raise UserError(
            "--reward verifier needs --reward_model_ckpt_dir; or grade answers with --reward rule"
        )
    if not has_critic == bool(flags["critic_ckpt_dir"]) == bool(flags["critic_save_dir"]):
        raise UserError(
            f"--advantage {advantage} {'needs' if has_critic else 'has no critic; leave out'} "
            f"--critic_ckpt_dir and --critic_save_dir"
        )
    if has_critic and actor.resolve() == critic.resolve():
        raise UserError(
            "--actor_save_dir and --critic_save_dir are the same directory; one would overwrite the other"
        )
    if flags["share_base"]:
        _check_share_base(flags)


def _check_share_base(flags: Mapping[str, object]) -> None:
    """Raise UserError for flags that contradict --share_base."""
    if flags["lora_rank"] == -1:
        raise UserError("--share_base shares frozen weights below adapters; give --lora_rank")
    for name, off in (("phases", False), ("quantize", ""), ("reference_refresh", -1)):
        if flags[name] != off:
            raise UserError(f"--share_base holds one base in float32 for the whole run; leave out --{name}")
