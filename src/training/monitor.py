"""Watch a run of PPO: its numbers, held-out accuracy, checks at its start, alerts that name the flag to change."""

import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from src import context_parallel, losses, parallel
from src.errors import UserError
from src.evaluation.metrics import answer_classes, winners
from src.evaluation.report import type_of
from src.grading.grader import Grader
from src.inference.sampling import Sampling
from src.runlog import Phases
from src.text.tokenizer import Tokenizer
from src.training.ppo import PPOBuffer, group_has_variance
from src.training.ppo_config import PPOConfig
from src.training.ppo_setup import Inputs, PPOModels
from src.training.rollout import Rollout, sample_rollout, shard_for_rank

# Largest differences at the start that rounding explains, of log-probs of one model computed twice in the same batches,
# by the type it computes in; on a CPU they are 0. Between sampler and training forward the mean difference counts.
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
ROUNDING_MEAN = 0.05  # nats; the largest such difference on average


def rollout_metrics(buffer: PPOBuffer, config: PPOConfig, kl_scale: float = 1.0) -> dict[str, float]:
    """Means over a buffer for the log."""
    rollout, scores, mask = buffer.rollout, buffer.scores, buffer.batch.response_mask
    logprobs, reference = buffer.logprobs[mask], buffer.reference_logprobs[mask]
    earned, lengths = scores.total.sum(1), rollout.lengths.float()
    mismatch = (rollout.sampled_logprobs[mask] - logprobs).abs()
    kl = losses.kl_k1(logprobs, reference)
    found = {
        "reward": earned.mean().item(),
        "reward_std": earned.double().std(unbiased=False).item(),  # equal rewards have exactly none
        **{f"reward_{name}": part.sum(1).mean().item() for name, part in scores.by_reward.items()},
        **{name: n / max(1, of) for name, (n, of) in scores.counts.items()},
        "kl": kl.mean().item(),
        "kl_k3": losses.kl_k3(logprobs, reference).mean().item(),
        # of a whole response: what --kl_target is compared with
        "kl_response": kl.sum().item() / len(earned),
        "kl_coef": config.kl_coef * kl_scale,
        "response_tokens": lengths.mean().item(),
        "response_tokens_max": lengths.max().item(),
        "truncated_share": 1 - rollout.finished.float().mean().item(),
        "kept_share": len(buffer.trainable) / len(earned),
        "reward_length_correlation": correlation(earned, lengths),
        "sampler_mismatch": mismatch.mean().item(),
        "sampler_mismatch_max": mismatch.max().item()}
    if config.group_size > 1:
        alive = group_has_variance(earned, config.group_size)
        found["dead_groups"] = int((~alive).sum()) / len(alive)
    if buffer.values is not None and buffer.returns is not None:
        found["explained_variance"] = losses.explained_variance(buffer.values[mask], buffer.returns[mask]).item()
    return found


def correlation(first: Tensor, second: Tensor) -> float:
    """Pearson's correlation of two [N] tensors; 0 where one of them is constant."""
    first, second = (x.double() - x.double().mean() for x in (first, second))
    scale = (first.norm() * second.norm()).item()
    return (first @ second).item() / scale if scale > 1e-12 else 0.0


def check_start(metrics: Mapping[str, float], buffer: PPOBuffer, config: PPOConfig, dtype: torch.dtype) -> None:
    """Refuse a run whose first buffer shows that it computes something else than PPO. dtype: of the actor. Raises
    UserError."""
    # the actor bit for bit, so that their KL must be 0
    same_reference = config.lora_rank > 0 or not config.quantize
    apart = (buffer.logprobs - buffer.reference_logprobs).abs()[buffer.batch.response_mask]
    worst, mean = apart.max().item(), apart.mean().item()
    if same_reference and (worst > ROUNDING[dtype] or mean > ROUNDING_MEAN):
        raise UserError(
            f"the reference differs from the untrained actor by {worst:.3g} nats at a token, {mean:.3g} on average, "
            f"expected 0; was --actor_ckpt_dir changed while it was read?")
    if metrics["sampler_mismatch"] > config.mismatch_limit:
        raise UserError(
            f"sampler and training forward differ by {metrics['sampler_mismatch']:.3g} nats a token, expected at most "
            f"{config.mismatch_limit}: episodes are sampled from another policy than the one trained")


def check_mismatch(rollout: Rollout, logprobs: Tensor, limit: float) -> None:
    """Refuse a buffer that servers sampled from another policy than the one trained: their log-probs differ from its
    logprobs [B, S] by more than `limit` on average, or in a response by ten times as much. Raises UserError."""
    apart, mask = (rollout.sampled_logprobs - logprobs).abs(), rollout.batch.response_mask
    means = (apart * mask).sum(1) / mask.sum(1)
    mean, worst = apart[mask].mean().item(), int(means.argmax())
    if not mean <= limit or not means[worst] <= 10 * limit:
        raise UserError(
            f"the servers' log-probs differ from the actor's by {mean:.3g} nats a token, in a response to prompt "
            f"{rollout.prompts[worst].id!r} by {means[worst]:.3g}; --mismatch_limit is {limit}: do they hold "
            f"--actor_ckpt_dir? Nothing was learnt from this buffer; mend them, and go on with --resume auto")


def check_first_update(metrics: Mapping[str, float], buffer: PPOBuffer, dtype: torch.dtype) -> bool:
    """Refuse a run whose first actor update starts from another policy, or has no gradient. Raises UserError. Returns
    whether there was anything to learn: without it a later buffer's update is the first one."""
    ratio, limit = metrics["first_ratio_deviation"], ROUNDING[dtype]
    if ratio > limit:
        raise UserError(
            f"the first probability ratio is off 1 by {ratio:.3g}, expected at most {limit}: the old log-probs are "
            f"not those of the policy that is trained; is something random (dropout) left in the actor?")
    learned = bool(buffer.advantages[buffer.trainable].any())
    if learned and metrics["grad_norm"] == 0:
        raise UserError("the first update has advantages but no gradient; no weight of the actor is trainable")
    return learned


def kl_factor(kl: float, n_episodes: int, config: PPOConfig) -> float:
    """By what the KL weights are multiplied after a buffer (Ziegler et al. 2019, section 2.2); 1 without --kl_target.

    kl: nats a response. The proportional error is clipped to +-0.2 and acts over kl_horizon episodes. It is compounded,
    where the paper adds: a buffer larger than the horizon would turn the paper's factor negative.
    """
    if config.kl_target < 0:
        return 1.0
    # clipped: one odd buffer must not throw the weight far off
    error = max(-0.2, min(0.2, kl / config.kl_target - 1))
    # by episodes, so that large and small buffers steer alike
    return (1 + error) ** (n_episodes / config.kl_horizon)


def readable_rows(buffer: PPOBuffer, n: int, tokenizer: Tokenizer) -> list[dict[str, object]]:
    """The first n episodes of a buffer to be read by a person, with advantage and KL, in nats, of each token."""
    rollout, trainable = buffer.rollout, set(buffer.trainable.tolist())
    kl, tokens, mask = losses.kl_k1(buffer.logprobs, buffer.reference_logprobs), *buffer.batch[:2]
    spans = [slice(int(mask[row].int().argmax()), last + 1) for row, last in enumerate(rollout.last.tolist())]

    def rounded(values: Tensor, row: int) -> list[float | None]:
        """An episode's values [B, S] at its response tokens, short enough for a file; None where code printed."""
        pairs = zip(values[row, spans[row]].tolist(), mask[row, spans[row]].tolist(), strict=True)
        return [round(value, 4) if is_sampled else None for value, is_sampled in pairs]

    return [
        {
            "id": rollout.prompts[row].id,
            "prompt": rollout.prompts[row].instruction,
            "label": rollout.prompts[row].label,
            "response": rollout.responses[row],
            "rewards": {name: part[row].sum().item() for name, part in buffer.scores.by_reward.items()},
            "kl": kl[row].sum().item(),
            "tokens": int(rollout.lengths[row]),
            "finished": bool(rollout.finished[row]),
            "learned": row in trainable,
            "pieces": tokenizer.pieces(tokens[row, spans[row]].tolist(), show_control=tokenizer.code),
            "token_kl": rounded(kl, row),
            "advantages": rounded(buffer.advantages, row),
        }
        for row in range(min(n, len(rollout.prompts)))]


class Alert(NamedTuple):
    """A state in which a run should not stay: how it shows in a buffer's metrics, and its cause and cure."""

    name: str
    shows: Callable[[Mapping[str, float]], bool]
    advice: str


def _not_graded(seen: Mapping[str, float]) -> bool:
    """Whether the grader or a user's function gave no verdict on over a tenth of the responses."""
    graded = seen.get("graded_timeout", 0.0) + seen.get("graded_error", 0.0)
    # behind a "/" stand numbers of the function's own, whatever it calls them
    failed = (share for name, share in seen.items() if name.endswith("_failed") and "/" not in name)
    return max(graded, *failed, 0.0) > 0.1


ALERTS = [
    Alert("no spread", lambda seen: seen["reward_std"] == 0 and "teacher_kl" not in seen,
          "all responses earn the same, so there is nothing to learn; look at rollouts/ and check --reward and --task"),
    Alert("cut off", lambda seen: seen["truncated_share"] > 0.3,
          "over 30% of the responses did not end; raise --max_new_tokens (--max_rounds, --code_seconds), or "
          "--missing_eos_penalty if they ramble"),
    Alert("far away", lambda seen: seen["kl"] > 0.5,
          "the policy is over 0.5 nats a token from the reference; raise --kl_coef or lower --lr"),
    Alert("clipped", lambda seen: seen["clipped_low"] + seen["clipped_high"] > 0.3,
          "over 30% of the probability ratios are clipped; lower --lr or --inner_epochs"),
    Alert("collapsed", lambda seen: 0 < seen["entropy"] < 0.01,
          "the policy's entropy is below 0.01 nats, it explores no more; raise --entropy_coef or --clip_high, "
          "lower --lr"),
    Alert("blind critic", lambda seen: seen.get("explained_variance", 0.0) < -0.5,
          "the critic is worse than a constant; raise --critic_warmup, or lower --critic_lr if value_loss rises"),
    Alert("dead groups", lambda seen: seen.get("dead_groups", 0.0) > 0.8 and "teacher_kl" not in seen,
          "over 80% of the groups earn equal rewards; raise --group_size, or choose prompts of middling difficulty "
          "(data_build.py select --samples_file)"),
    Alert("length", lambda seen: seen["reward_length_correlation"] > 0.8,
          "the reward follows the length of the response, not its merit; set --overlong_buffer or mend the reward"),
    Alert("unreadable", lambda seen: seen.get("graded_unparsed", 0.0) > 0.5,
          "over half of the responses hold no answer that --task finds; fine-tune on its form first, or change --task"),
    Alert("failing code", lambda seen: seen.get("executions_error", 0.0) + seen.get("executions_timeout", 0.0) > 0.5,
          "over half of the executions fail; look at rollouts/, and give --reward code some of --reward_weights"),
    Alert("not judged", _not_graded,
          "over 10% of the responses earn 0 because the grader or your --reward function ran out of time or died; "
          "look at rollouts/ for what they stumble on"),
]
REPEAT = 20  # buffers between two warnings of one alert
WINDOW = 20  # buffers over which a trend is looked for
HACKED = (
    "the verifier's reward rises while the grader's falls: the policy has found the verifier's weakness; "
    "raise --kl_coef, give the rule more of --reward_weights, or train the verifier on these responses")


class Monitor:
    """Watches a run, and says the likely cause of what should not last and the flag to change. What it remembers is in
    the run's state and saved with it: a resumed run warns as one that was never stopped."""

    def __init__(self, logger: logging.Logger, state: dict[str, object]) -> None:
        """Adds to the state what was warned of at which buffer, the last WINDOW pairs of rewards, and for each alert
        the buffers that showed it: the first, the last, their number, and the advice."""
        self._logger, self._state = logger, state
        state |= {"warned": {}, "reward_pairs": [], "alarms": {}}

    def check(self, step: int, metrics: Mapping[str, float]) -> tuple[dict[str, str], list[str]]:
        """Warn of the alerts that a buffer's metrics show, of each at most once in REPEAT buffers. Returns the advice
        for each that shows, and the texts of the warnings."""
        shown = {alert.name: alert.advice for alert in ALERTS if alert.shows(metrics)}
        if {"reward_verifier", "graded_right"} <= metrics.keys():
            pair = (metrics["reward_verifier"], metrics["graded_right"])
            # values are replaced, never changed: a save under way may still hold them
            self._state["reward_pairs"] = pairs = [*self._state["reward_pairs"], pair][-WINDOW:]
            if len(pairs) == WINDOW and hacked(pairs):
                shown["hacked"] = HACKED
        seen, warned = self._state["alarms"], self._state["warned"]
        for name, advice in shown.items():
            first, _, count, _ = seen.get(name, (step, step, 0, advice))
            seen = {**seen, name: (first, step, count + 1, advice)}
        due = [name for name in shown if step - warned.get(name, -REPEAT) >= REPEAT]
        self._state |= {"alarms": seen, "warned": {**warned, **dict.fromkeys(due, step)}}
        for name in due:
            self._logger.warning("buffer %d: %s: %s", step, name, shown[name])
        return shown, [f"{name}: {shown[name]}" for name in due]

    def summary(self, n_buffers: int) -> None:
        """Say of the whole run which alerts showed, and in how many buffers."""
        for name, (first, last, count, advice) in self._state["alarms"].items():
            self._logger.warning(
                "alarm in %d of %d buffers, from %d to %d: %s: %s", count, n_buffers, first, last, name, advice)
        if not self._state["alarms"]:
            self._logger.info("no alarm in %d buffers", n_buffers)


def hacked(rewards: Sequence[tuple[float, float]]) -> bool:
    """Whether the first of two rewards, the verifier's, rises from first to second half while the second, the
    grader's, falls, both by more than two standard errors of the difference."""
    half = len(rewards) // 2

    def shift(column: Sequence[float]) -> float:
        """How many standard errors the second half's mean lies above the first's."""
        old, new = column[:half], column[-half:]
        error = ((statistics.variance(old) + statistics.variance(new)) / half) ** 0.5
        # rewards that are all alike have no error to divide by
        return (statistics.fmean(new) - statistics.fmean(old)) / max(error, 1e-9)

    verifier, grader = zip(*rewards, strict=True)
    return shift(verifier) > 2 and shift(grader) < -2


def measure_held_out(
    config: PPOConfig, models: PPOModels, data: Inputs, grader: Grader, timer: Phases
) -> dict[str, float]:
    """eval_accuracy, the mean share of right responses to the held-out prompts; of several to each, eval_pass too, the
    share of prompts with a right one, and eval_majority, that of prompts whose most frequent answer is right.

    Equally frequent answers count as their mean. A prompt that is too long to be answered is wrong.
    """
    n = config.eval_samples
    sampling = Sampling(temperature=config.eval_temperature, max_new_tokens=config.max_new_tokens,
                        stop=data.task.stop, seed=config.seed)
    counts = torch.zeros(3, dtype=torch.float64)  # right: responses, in any, by majority
    with models.phase(timer, "evaluate", models.actor.model):
        rollout = sample_rollout(models.actor.model, data.held_out, data.tokenizer, sampling, numbers=range(n),
                                 max_batch_size=config.rollout_batch_size, coding=data.coding)
    # a problem's responses are compared with one another: they stay on one rank, the first of its group
    mine = context_parallel.share(shard_for_rank(range(len(data.held_out))))
    for place in mine if parallel.tensor_parallel_rank() == 0 else ():
        prompt = data.held_out[place]
        responses, kind = rollout.responses[place * n : (place + 1) * n], type_of(prompt)
        verdicts = grader.grade(responses, [prompt.label or ""] * n, [kind] * n)
        is_right = [verdict.outcome == "right" for verdict in verdicts]
        counts[0] += sum(is_right)
        if n > 1:
            equal = partial(grader.equal, answer_type=kind)
            tied = winners(answer_classes([verdict.answer for verdict in verdicts], equal), [1.0] * n)
            counts[1] += any(is_right)
            counts[2] += sum(is_right[place] for place in tied) / max(1, len(tied))
    right, one_or_more, majority = parallel.sum_over_all(counts.to(parallel.device())).tolist()
    several = {"eval_pass": one_or_more / data.n_held_out, "eval_majority": majority / data.n_held_out}
    return {"eval_accuracy": right / (n * data.n_held_out)} | (several if n > 1 else {})
