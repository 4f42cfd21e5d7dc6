"""The flags of ppo_train.py: PPO and its relatives without a critic, and which of their numbers go together."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from src.command.config import (
    Bounds,
    ColumnFlags,
    Config,
    Count,
    CountOrOff,
    CountOrZero,
    LoraFlags,
    NonNegative,
    NonNegativeOrOff,
    OptimizerFlags,
    Positive,
    PositiveOrOff,
    RoundsFlags,
    RunFlags,
    SavingFlags,
    Share,
    ShareOrOff,
    Weights,
    flag,
)
from src.data.encoding import StepKind
from src.errors import UserError

OF_THE_LOG = ["format", "std", "code", "length_correlation"]  # behind reward_: numbers of no single reward
Advantage = Literal["gae", "grpo", "dr_grpo", "gdpo", "rloo", "reinforce++"]
Aggregation = Literal["token-mean", "seq-mean", "seq-sum", "seq-constant"]


class Estimator(NamedTuple):
    """What an advantage estimator needs, and the defaults that go with it by the name of their flag."""

    has_critic: bool
    least_group: int
    defaults: Mapping[str, object]


GROUP = {"group_size": 8, "kl_coef": 0.0, "clip_high": 0.28}
# Critic-free estimators: Shao et al. 2024 (GRPO), Liu et al. 2025 (Dr. GRPO), Ahmadian et al. 2024 (RLOO),
# Hu et al. 2025 (REINFORCE++), Liu et al. 2026 (GDPO). The wider upper clip is DAPO's (Yu et al. 2025).
ESTIMATORS: dict[str, Estimator] = {
    "gae": Estimator(True, 1, {"group_size": 1, "kl_coef": 0.02, "loss_aggregation": "token-mean"}),
    "grpo": Estimator(False, 2, GROUP | {"loss_aggregation": "seq-mean"}),
    "dr_grpo": Estimator(False, 2, GROUP | {"loss_aggregation": "seq-constant"}),
    "gdpo": Estimator(False, 2, GROUP | {"loss_aggregation": "seq-mean"}),
    "rloo": Estimator(False, 2, {"group_size": 8, "kl_coef": 0.02, "loss_aggregation": "token-mean"}),
    "reinforce++": Estimator(False, 1, {"group_size": 1, "kl_coef": 0.02, "loss_aggregation": "token-mean"}),
}

# Clips of whole sequences are narrow (Zheng et al. 2025, section 5.1). Of CISPO's weights only the upper bound is set
# (MiniMax 2025, section 3.1), here to 5 as in Khatri et al. 2025; it is a mean over tokens.
POLICY_LOSSES: dict[str, Mapping[str, object]] = {
    "ppo": {"clip_ratio": 0.2},
    "gspo": {"clip_ratio": 3e-4, "clip_high": 4e-4, "loss_aggregation": "seq-mean"},
    "cispo": {"clip_ratio": 1.0, "clip_high": 4.0, "loss_aggregation": "token-mean"},
}


@dataclass(frozen=True, kw_only=True)
class SamplingFlags(Config):
    """Rollouts"""

    max_buffer_size: Count = flag(96, "episodes in one rollout buffer, over all ranks")
    rollout_batch_size: Count = flag(64, "sequences that decode at once on a rank")
    temperature: NonNegative = flag(1.0, "sampling temperature; ratios and KL are at the same temperature")
    max_new_tokens: Count = flag(256, "longest response; with code, what the policy writes of it")
    group_size: CountOrOff = flag(-1, "responses to each prompt; -1 = 8 for grpo, dr_grpo, gdpo and rloo, else 1")
    filter_groups: bool = flag(False, "do not learn from groups whose rewards are all equal")
    max_refills: CountOrZero = flag(0, """how often a buffer is refilled with groups of further prompts for
        those that were filtered out""")
    rollout_samples: CountOrZero = flag(8, "episodes of each buffer written to rollouts/")


@dataclass(frozen=True, kw_only=True)
class ServerFlags(Config):
    """Rollouts at a server"""

    rollout_backend: Literal["engine", "openai"] = flag("engine", """engine = the actor samples here; openai = at
        servers that speak vLLM's protocol (vllm serve --enable-lora with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, or
        solver_evaluate.py --serve), which hold actor_ckpt_dir and see the run's directory: they get the adapters""")
    base_url: list[str] = flag([], "their addresses up to /v1; the requests of a buffer are shared out among them")
    api_key_env: str = flag("", "name of the environment variable that holds the servers' key")
    rollout_ahead: Literal[0, 1] = flag(0, """1 = servers sample a buffer while the one before is learnt from, from
        the policy before: its log-probs differ by an update more, which tis_cap weighs and mismatch_limit bounds""")
    server_seconds: Positive = flag(600.0, "after so long without an answer a request is sent again")
    mismatch_limit: Positive = flag(0.05, """nats a token by which a server's log-probs may differ from the
        actor's, as a mean over a buffer (a response: ten times as much); what differs more is not learnt from""")


@dataclass(frozen=True, kw_only=True)
class RewardFlags(Config):
    """Rewards"""

    reward: list[str] = flag(["verifier"], """one or more, added up: verifier = its score (pairwise, outcome)
        or those of the steps (process); rule = 1 for an answer that grades right against the label, else 0 (0
        without a label beside another reward); code = minus the share of its runs of code that fail;
        FILE.py:FUNCTION = what your function(prompts, completions, **columns) gives for the lists of a buffer: a
        number for each response, or these and a dictionary of numbers for the log; columns are those of
        train_file, such as label. It asks for those that it names""")
    reward_weights: Weights = flag([], "what each of them weighs, 0 to log it only; default: 1 each")
    outcome_reward: Literal["probability", "logit"] = flag("probability", """what an outcome verifier gives:
        its probability, or its normalised logit""")
    step_reward: Literal["raw", "min-drop", "prod-drop"] = flag("min-drop", """what a process verifier gives
        at the end of a step: raw = its probability; min-drop, prod-drop = how far it takes the least, or the
        product of, probabilities so far down""")
    step_bonus: Annotated[float, Bounds("a finite number", math.isfinite)] = flag(0.0, """added at the end of
        every step that a process verifier scores""")
    step: Literal["", StepKind] = flag("", """what a step is: a paragraph, which a blank line ends, or a line;
        default: what it was in the verifier's training, which nothing else may be""")
    reward_clip: NonNegative = flag(5.0, """pairwise scores and outcome logits are kept within so many
        deviations of their mean; 0 = no limit""")
    format_penalty: NonNegative = flag(0.0, "taken from the reward of a response in which --task finds no answer")
    truncated: Literal["penalty", "zero", "mask"] = flag("penalty", """what befalls a response that did not
        end: penalty; zero = it earns nothing, and keeps what it loses; mask = nothing is learned""")
    missing_eos_penalty: NonNegative = flag(1.0, "taken from the reward of a response that did not end by itself")
    overlong_buffer: CountOrZero = flag(0, """tokens before the limit in which that penalty sets in, growing
        linearly""")


@dataclass(frozen=True, kw_only=True)
class KlFlags(Config):
    """KL to the reference"""

    kl_coef: NonNegativeOrOff = flag(-1.0, """weight of the per-token KL (k1) to the reference in the reward;
        -1 = 0.02, for grpo, gdpo and dr_grpo 0""")
    kl_loss: Literal["none", "k2", "k3"] = flag("none", """a KL term in the loss: k2 has the KL's gradient,
        k3 (GRPO's) less variance and a bias""")
    kl_loss_coef: NonNegative = flag(1e-3, "its weight")
    kl_target: PositiveOrOff = flag(-1.0, """nats of KL a response that both weights are steered to; -1 =
        weights stay fixed""")
    kl_horizon: Positive = flag(10_000.0, """episodes in which a KL twice the target multiplies the weights
        by 1.2""")
    reference_refresh: CountOrOff = flag(-1, """buffers after which the reference becomes the actor as it is saved
        then, adapters merged and rounded to --precision, which may lose most of them; -1 = it stays""")


@dataclass(frozen=True, kw_only=True)
class AdvantageFlags(Config):
    """Advantages"""

    advantage: Advantage = flag("gae", """gae = PPO with a critic; the others have none: grpo, dr_grpo and
        rloo compare the responses to one prompt, gdpo does so for each --reward before they are added up,
        reinforce++ compares all of a buffer (and, in groups, takes off the group's mean)""")
    gamma: Share = flag(1.0, "discount")
    gae_lambda: ShareOrOff = flag(-1.0, """lambda of generalised advantage estimation; -1 = 1 for --reward
        rule alone, else 0.95""")
    critic_lambda: ShareOrOff = flag(-1.0, """lambda of the returns that the critic learns (VAPO's decoupled
        GAE); -1 = as gae_lambda""")
    whiten_rewards: bool = flag(False, "divide the rewards, KL included, by their deviation over the buffer")
    whiten_advantages: bool = flag(True, """gae, gdpo and reinforce++: bring the advantages of a buffer, over all
        ranks, to mean 0 and variance 1""")


@dataclass(frozen=True, kw_only=True)
class UpdateFlags(Config):
    """Updates"""

    inner_epochs: Count = flag(2, "passes over each buffer")
    minibatches: Count = flag(4, "optimizer steps in each pass")
    policy_loss: Literal["ppo", "gspo", "cispo"] = flag("ppo", """ppo = clipped ratio of each token; gspo = of
        each response, to the power 1 / its length; cispo = log-probs weighed by the clipped ratio, so that no
        token is left out""")
    clip_ratio: PositiveOrOff = flag(-1.0, """probability ratios are clipped to 1 - this ... 1 + clip_high; -1 =
        0.2, for gspo 0.0003, for cispo 1 (no lower bound)""")
    clip_high: PositiveOrOff = flag(-1.0, """-1 = 0.28 for grpo, gdpo and dr_grpo, for gspo 0.0004, for cispo 4, else as
        clip_ratio""")
    dual_clip: NonNegative = flag(0.0, """ppo and gspo: bound of the ratio also where the advantage is negative,
        3 is usual; 0 = none""")
    value_clip: Positive = flag(0.2, """the critic moves at most this far from its rollout values without
        penalty""")
    entropy_coef: NonNegative = flag(0.0, """weight of the policy's entropy, which the loss then rewards; it
        is logged in any case""")
    loss_aggregation: Literal["", Aggregation] = flag("", """what the policy loss is a mean over: tokens, or
        sequences of the mean or sum of their tokens or of their sum / max_new_tokens; default: for gspo
        seq-mean, for cispo token-mean, else for grpo and gdpo seq-mean, for dr_grpo seq-constant, or token-mean""")
    tis_cap: Annotated[float, Bounds("1 or more, 0 or -1", lambda x: 1 <= x < math.inf or x in (0, -1))] = flag(
        -1.0, """weigh each token by its probability in training over that in sampling, at most this (truncated
        importance sampling); 0 = off; -1 = 2 for --rollout_backend openai, else off""")
    critic_lr: NonNegative = flag(9e-6, "peak learning rate of the critic")
    critic_warmup: Annotated[int, Bounds("0 or more, or -1", lambda x: x >= -1)] = flag(-1, """first buffers,
        from which only the critic learns; -1 = a tenth of all, at most 10""")
    adam_eps: Positive = flag(1e-8, "what Adam adds to the root of its second moment")


@dataclass(frozen=True, kw_only=True)
class PPOConfig(
    RunFlags, SamplingFlags, RoundsFlags, ServerFlags, RewardFlags, KlFlags, AdvantageFlags, UpdateFlags,
    OptimizerFlags, LoraFlags, SavingFlags, ColumnFlags,
):
    """Models and data"""

    actor_ckpt_dir: str = flag(help="""solver to improve; a frozen copy of it, or with LoRA itself without
        adapters, is the reference""")
    actor_save_dir: str = flag(help="directory for the improved solver, metrics.jsonl, run.json and rollouts/")
    critic_ckpt_dir: str = flag("", """verifier that the critic starts from; a solver will do (its value head
        starts at zero)""")
    critic_save_dir: str = flag("", "directory for the critic; only --advantage gae has one")
    reward_model_ckpt_dir: str = flag("", "verifier that scores responses; needed for --reward verifier")
    teacher_ckpt_dir: str = flag("", """solver with the same tokenizer to learn from as well, on the actor's own
        responses: each token's reverse KL to it, at --temperature, is taken from the token's advantage (on-policy
        distillation). For its sake alone: --advantage grpo --reward rule --reward_weights 0""")
    teacher_coef: NonNegative = flag(1.0, "what that KL weighs")
    train_file: str = flag("dataset/GSM8K/train.json", """prompts, json array or jsonl of {"instruction",
        "label"?}; --reward rule alone needs labels. Those that fill a model's context are left out, counted
        and named""")
    eval_file: str = flag("", """prompts with labels on which accuracy is measured, first of all (step
        0 in metrics.jsonl); the best actor is kept as best/ if it is better than the one started from. Those
        that fill the context are wrong""")
    eval_samples: Count = flag(1, """responses to each of them: the mean share of right ones (avg@N) is
        eval_accuracy, and with 2 or more eval_pass and eval_majority are pass@N and maj@N""")
    eval_temperature: NonNegativeOrOff = flag(-1.0, """at which these are sampled; -1 = greedy for one, else as
        --temperature""")
    task: str = flag("GSM8K", """how problems are put and a response ends, and how --reward rule and
        --eval_file find and compare answers: a task of solver_evaluate.py, or FILE.json with one's own""")
    log_dir: str = flag("", "directory for metrics.jsonl, run.json and rollouts/; default: actor_save_dir")
    quantize: Literal["", "int8", "int4"] = flag("", """hold the frozen models, verifier and (without LoRA)
        reference, in 8 or 4 bits a weight; with such a reference the first KL is not 0""")
    share_base: bool = flag(False, """with --lora_rank: hold the weights below all adapters once; actor,
        critic and verifier must be the same full weights or adapters on them""")
    phases: bool = flag(False, """hold each model, and its optimizer's state, only while a phase uses it; the
        rest waits in CPU memory, on a CPU in files; the results are the same""")
    stop_on_alarm: bool = flag(False, """save and stop with status 1 at an alarm; with --resume auto the run
        goes on, and the same alarm stops it again 20 buffers later at the earliest""")
    lr: NonNegative = flag(1e-6, "peak learning rate of the actor")
    max_batch_size: Count = flag(4, "episodes in one training forward pass of a rank")
    epochs: Count = flag(1, "passes over the prompts")
    max_steps: CountOrOff = flag(-1, "stop after so many buffers; -1 = after all epochs")

    @property
    def has_critic(self) -> bool:
        """Whether a critic is trained."""
        return ESTIMATORS[self.advantage].has_critic

    @property
    def prompts_per_buffer(self) -> int:
        """Prompts whose groups fill a buffer."""
        return self.max_buffer_size // self.group_size

    @property
    def steps_per_buffer(self) -> int:
        """Optimizer steps for each buffer."""
        return self.inner_epochs * self.minibatches

    def sample_numbers(self, iteration: int, refill: int = 0) -> range:
        """The numbers of a group's samples: a prompt that comes again is answered from other parts of the random
        stream."""
        # room for each buffer's refills: no number comes twice in a run
        first = (iteration * (1 + self.max_refills) + refill) * self.group_size
        return range(first, first + self.group_size)

    def warmup_iterations(self, n_iterations: int) -> int:
        """First iterations, in which only the critic learns. Raises UserError if there are no others."""
        if not self.has_critic:
            return 0
        if self.critic_warmup >= n_iterations:
            raise UserError(f"--critic_warmup {self.critic_warmup} leaves the actor none of {n_iterations} buffers")
        return min(10, n_iterations // 10) if self.critic_warmup < 0 else self.critic_warmup

    @property
    def weights_by_reward(self) -> dict[str, float]:
        """What each --reward weighs; 1 each where no weights are given."""
        return dict(zip(self.reward, self.reward_weights or [1.0] * len(self.reward), strict=True))

    @property
    def save_dirs(self) -> list[str]:
        """The directories of the models that learn."""
        return [self.actor_save_dir, self.critic_save_dir] if self.has_critic else [self.actor_save_dir]

    @property
    def run_dir(self) -> str:
        """Where metrics and rollouts are written."""
        return self.log_dir or self.actor_save_dir

    def __post_init__(self) -> None:
        """Put the estimator's defaults where a number is -1 or empty. Raises UserError for a contradiction."""
        super().__post_init__()
        # A grader's reward comes at the end and is exact: the returns need no critic to hold their variance down
        gae_lambda = 1.0 if self.reward == ["rule"] else 0.95
        # who fills a number in first decides: the clips of a policy loss come before those of an estimator
        self._fill_in(POLICY_LOSSES[self.policy_loss])
        self._fill_in(ESTIMATORS[self.advantage].defaults | ({"gae_lambda": gae_lambda} if self.has_critic else {}))
        self._fill_in({"clip_high": self.clip_ratio, "critic_lambda": self.gae_lambda,
                       "tis_cap": 2.0 if self.rollout_backend == "openai" else 0.0})
        if self.eval_file:
            self._fill_in({"eval_temperature": self.temperature if self.eval_samples > 1 else 0.0})
        for is_wrong, message in (*self._wrong_numbers(), *self._wrong_rewards(), *self._wrong_models()):
            if is_wrong:
                raise UserError(message)
        for has_none, names, why in self._without_effect():
            self.refuse(names if has_none else (), why)

    def _fill_in(self, defaults: Mapping[str, object]) -> None:
        for name, default in defaults.items():
            if getattr(self, name) in (-1, ""):
                # the config is frozen to all but its own defaults
                object.__setattr__(self, name, default)

    def _without_effect(self) -> list[tuple[object, Collection[str], str]]:
        """Flags of which nothing would come if the first of three is true, and why."""
        apart = self.lora_rank == -1 or "verifier" in self.reward or self.teacher_ckpt_dir or self.reference_refresh > 0
        return [
            (not self.has_critic, ("gae_lambda", "critic_lambda", "value_clip", "critic_lr", "critic_warmup"),
             f"--advantage {self.advantage} has no critic"),
            (self.advantage not in ("gae", "reinforce++"), ("gamma",),
             f"--advantage {self.advantage} gives all tokens of a response the same, undiscounted"),
            (self.advantage not in ("gae", "reinforce++", "gdpo"), ("whiten_advantages",),
             f"--advantage {self.advantage} compares within groups alone"),
            (not apart, ("quantize",), "no frozen model is held apart from the actor"),
            (not self.base_url, ("api_key_env", "server_seconds"), "there is no --base_url"),
            ("verifier" not in self.reward,
             ("reward_model_ckpt_dir", "outcome_reward", "step_reward", "step_bonus", "step", "reward_clip"),
             f"--reward {' '.join(self.reward)} asks no verifier"),
            (self.truncated != "penalty", ("missing_eos_penalty",), f"--truncated {self.truncated} takes no penalty"),
            (not self.missing_eos_penalty, ("overlong_buffer",), "--missing_eos_penalty is 0"),
            (self.kl_loss == "none", ("kl_loss_coef",), "--kl_loss is none"),
            (self.kl_target == -1, ("kl_horizon",), "there is no --kl_target"),
            (not self.teacher_ckpt_dir, ("teacher_coef",), "there is no --teacher_ckpt_dir"),
            (not self.eval_file, ("eval_samples", "eval_temperature", "eval_every"), "there is no --eval_file")]

    def _wrong_numbers(self) -> list[tuple[object, str]]:
        """What is wrong with the numbers if the first of a pair is true, and what to say of it."""
        least = ESTIMATORS[self.advantage].least_group
        return [
            (self.group_size < least,
             f"--group_size is {self.group_size}, but --advantage {self.advantage} compares the responses to one "
             f"prompt; expected {least} or more"),
            (self.max_buffer_size % self.group_size,
             f"--max_buffer_size {self.max_buffer_size} episodes are no whole number of groups of --group_size "
             f"{self.group_size}; give a multiple of it"),
            (self.temperature <= 0,
             f"--temperature {self.temperature}: PPO learns from sampled responses; expected more than 0"),
            (self.eval_samples > 1 and not self.eval_temperature,
             f"--eval_samples {self.eval_samples} greedy responses would be one; give --eval_temperature above 0"),
            (0 < self.dual_clip <= 1, f"--dual_clip is {self.dual_clip}, expected more than 1, or 0 for none"),
            (self.dual_clip and self.policy_loss == "cispo",
             "--dual_clip bounds a clipped surrogate, which --policy_loss cispo has not; leave it out"),
            (self.filter_groups and self.group_size == 1,
             "--filter_groups drops groups of equal rewards, so --group_size must be 2 or more"),
            (self.advantage == "gdpo" and (self.filter_groups or self.kl_coef),
             "--advantage gdpo normalises each reward by itself, but --filter_groups and --kl_coef are of their sum; "
             "leave them out (--kl_loss is there)"),
            (self.max_refills and not self.filter_groups,
             "--max_refills replaces the groups that --filter_groups drops; give both"),
            (self.overlong_buffer and (self.truncated != "penalty" or self.overlong_buffer >= self.max_new_tokens),
             f"--overlong_buffer {self.overlong_buffer} needs --truncated penalty and more --max_new_tokens than it; "
             f"they are {self.truncated} and {self.max_new_tokens}"),
            (self.kl_target >= 0 and not self.kl_coef and self.kl_loss == "none",
             "--kl_target adapts a KL term, but --kl_coef is 0 and --kl_loss none; give one of them")]

    def _wrong_rewards(self) -> list[tuple[object, str]]:
        """The same of --reward, its weights, and functions that the log could not tell apart."""
        names = self.reward
        # reward_format, reward_std, ... and, where code is run, reward_code are no user's function
        logged = [each for name in map(short_name, names) for each in (name, f"{name}_failed")] + OF_THE_LOG
        twice = [name for name in names if ":" in name and logged.count(short_name(name)) > 1]
        return [
            (not names or len(set(names)) < len(names),
             f"--reward is {' '.join(names) or 'empty'}; expected one or more, each named once"),
            (twice, f"--reward {' '.join(twice)}: the log has another {short_name((twice or [''])[-1])!r}; rename it"),
            (self.reward_weights and len(self.reward_weights) != len(names),
             f"--reward_weights has {len(self.reward_weights)} numbers for {len(names)} rewards; give one for each"),
            ("verifier" in names and not self.reward_model_ckpt_dir,
             "--reward verifier needs --reward_model_ckpt_dir; or grade answers with --reward rule")]

    def _wrong_models(self) -> list[tuple[object, str]]:
        """The same of the directories, and of what cannot share a base."""
        asked = "needs" if self.has_critic else "has no critic; leave out"
        served = self.rollout_backend == "openai"
        alone = self.changed(("phases", "quantize", "reference_refresh"))
        return [
            (served != bool(self.base_url), "--rollout_backend openai and --base_url go together: give both or none"),
            (served and self.lora_rank == -1,
             "--rollout_backend openai hands the policy over as an adapter; give --lora_rank"),
            (self.rollout_ahead and not (served and self.tis_cap),
             "--rollout_ahead 1 is for --rollout_backend openai, with a --tis_cap"),
            (served and self.temperature != 1,
             f"--temperature {self.temperature}: servers give log-probs before the temperature; with --rollout_backend "
             f"openai it must be 1"),
            (not self.has_critic == bool(self.critic_ckpt_dir) == bool(self.critic_save_dir),
             f"--advantage {self.advantage} {asked} --critic_ckpt_dir and --critic_save_dir"),
            (self.has_critic and Path(self.actor_save_dir).resolve() == Path(self.critic_save_dir).resolve(),
             "--actor_save_dir and --critic_save_dir are the same directory; one would overwrite the other"),
            (self.teacher_ckpt_dir and self.filter_groups,
             "--filter_groups drops responses that --teacher_ckpt_dir teaches on; leave one of them out"),
            (self.share_base and self.lora_rank == -1, "--share_base is of weights below adapters; give --lora_rank"),
            (self.share_base and alone,
             f"--share_base holds one base in one type for the whole run; leave out --{''.join(alone[:1])}")]


def short_name(reward: str) -> str:
    """What a reward is called in the log: verifier, rule or the name of the user's function."""
    return reward.rpartition(":")[2]
