"""What episodes are worth: verifiers, the grader, a user's function, and the penalties of how a response ended.

B episodes, S sequence, T steps of a solution. A reward is [B, S] float32 on the CPU: what each response token earns, 0
everywhere else. With it come counts for the log, of what this rank alone has seen.
"""

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from src import context_parallel, losses, parallel, runlog
from src.code_solutions.tool_hook import PASSED
from src.data.batch import chunks
from src.data.encoding import STEP_ENDS, Encoded, split_steps
from src.data.examples import OUTCOMES
from src.errors import UserError
from src.evaluation.report import type_of
from src.evaluation.scoring import encode_in_steps, read_steps
from src.grading.grader import Grader
from src.inference.engine import vocabulary_of
from src.models.config import ModelConfig
from src.models.decoder import Decoder
from src.models.forward import response_scores
from src.text.tokenizer import Tokenizer
from src.training.ppo_config import PPOConfig, RewardFlags
from src.training.rollout import Rollout, shard_for_rank
from src.training.user_reward import UserReward

Counts = Mapping[str, tuple[float, int]]  # by metric: how many, of how many; or a sum, of how many numbers


Score = Callable[[Rollout], tuple[Tensor, Counts]]  # of some episodes


class Reward(NamedTuple):
    """One of the rewards that are added up, and what it weighs; 0 = it is only logged. Every rank asks it for all
    episodes."""

    weight: float
    score: Score


class Scores(NamedTuple):
    """What episodes earn, alike on every rank."""

    by_reward: dict[str, Tensor]  # not weighted, [B, S] each
    total: Tensor  # their weighted sum [B, S]
    counts: dict[str, tuple[float, int]]

    def take(self, rows: Tensor) -> "Scores":
        """What some of the episodes earn; the counts stay those of all. rows [K] int64."""
        by_reward = {name: scores[rows] for name, scores in self.by_reward.items()}
        return Scores(by_reward, self.total[rows], self.counts)


def score_rollout(rewards: Mapping[str, Reward], rollout: Rollout) -> Scores:
    """Every reward of the episodes, and their weighted sum, alike on all ranks."""
    by_reward, counts = {}, {}
    for name, reward in rewards.items():
        by_reward[name], own = reward.score(rollout)
        counts |= own
    total = torch.stack([reward.weight * by_reward[name] for name, reward in rewards.items()]).sum(0)
    return Scores(by_reward, total, add_counts(parallel.gather_over_data_parallel([counts])))


def share_out(score: Score, rollout: Rollout) -> tuple[Tensor, Counts]:
    """A score of which each data-parallel rank computes its share of the episodes; all get all. -> [B, S]."""
    rows = torch.tensor(shard_for_rank(range(len(rollout.prompts))), dtype=torch.int64)
    laid_out, counts = torch.zeros(rollout.batch.tokens.shape), {}
    if len(rows):  # else there are more ranks than episodes
        laid_out[rows], counts = score(rollout.take(rows))
    return parallel.join_over_data_parallel(laid_out), counts


def apply_length_penalty(scores: Tensor, rollout: Rollout, config: PPOConfig) -> Tensor:
    """Take what a response loses for not ending, or for coming close to the limit. [B, S] -> [B, S].

    `zero` leaves a response without end nothing but what it lost: where rewards are negative, nothing would be the best
    of all. `penalty` takes missing_eos_penalty, of which longer and longer responses lose a growing share in the last
    overlong_buffer tokens before the limit (DAPO, Yu et al. 2025, eq. 13).
    """
    unfinished = ~rollout.finished
    if config.truncated == "zero":
        return torch.where(unfinished[:, None], scores.clamp_max(0.0), scores)
    if config.truncated == "mask":
        return scores
    share = unfinished.float()
    if config.overlong_buffer:
        over = rollout.lengths - (config.max_new_tokens - config.overlong_buffer)
        share = torch.maximum(share, (over / config.overlong_buffer).clamp(0, 1))
    return scores - at_last(config.missing_eos_penalty * share, rollout)


def at_last(scores: Tensor, rollout: Rollout) -> Tensor:
    """Lay one score of each episode on its last token. [B] -> [B, S]."""
    laid_out = torch.zeros(rollout.batch.tokens.shape)
    laid_out[torch.arange(len(scores)), rollout.last] = scores.float()
    return laid_out


def add_counts(parts: Iterable[Counts]) -> dict[str, tuple[float, int]]:
    """Counts of several ranks or rollouts together."""
    found: dict[str, tuple[float, int]] = {}
    for part in parts:
        for name, (n, of) in part.items():
            found[name] = found.get(name, (0, 0))[0] + n, found.get(name, (0, 0))[1] + of
    return found


def verifier_reward(
    verifier: Decoder, tokenizer: Tokenizer, flags: RewardFlags, max_batch_size: int, own: Tokenizer | None,
    rollout: Rollout,
) -> tuple[Tensor, Counts]:
    """The reward [B, S] of a verifier, by what its config says it was trained for; nothing is counted. own: its
    tokenizer, if that is not the policy's.

    Equal episodes are scored once. Scores depend on the other rows of a pass by rounding, and estimators that divide by
    a group's deviation would make advantages as large as any other of that.
    """
    kinds = {
        "pairwise": lambda rollout: pairwise_reward(verifier, rollout, flags, max_batch_size),
        "outcome": lambda rollout: outcome_reward(verifier, tokenizer, rollout, flags, max_batch_size),
        "process": lambda rollout: process_reward(verifier, tokenizer, rollout, flags, max_batch_size, own)}
    score = kinds[verifier.config.objective]
    first, which = _distinct(rollout)
    scores, _ = share_out(lambda some: (score(some), {}), rollout.take(first))
    return scores[which], {}


def _distinct(rollout: Rollout) -> tuple[Tensor, Tensor]:
    """The first of the equal episodes of each kind, and every episode's kind. -> [K], [B] int64."""
    tokens, mask = rollout.batch.tokens.numpy(), rollout.batch.response_mask.numpy()
    kinds: dict[tuple[object, ...], int] = {}
    first, which = [], []
    for row, (prompt, finished) in enumerate(zip(rollout.prompts, rollout.finished.tolist(), strict=True)):
        kind = prompt.instruction, tokens[row].tobytes(), mask[row].tobytes(), finished
        if kind not in kinds:
            kinds[kind] = len(first)
            first.append(row)
        which.append(kinds[kind])
    return torch.tensor(first), torch.tensor(which)


@torch.no_grad()
def pairwise_reward(verifier: Decoder, rollout: Rollout, flags: RewardFlags, max_batch_size: int) -> Tensor:
    """A pairwise verifier's normalised, clipped score of each response, at its last token. -> [B, S]. Of one that is
    longer than the verifier's context it reads the beginning, and the log says so."""
    scores, batch, longest = [], rollout.batch, verifier.config.max_seq_len
    _warn_of_cut(int((rollout.last >= longest).sum()), len(rollout.prompts), longest)
    for rows in torch.arange(len(batch.tokens)).split(max_batch_size):
        mask = batch.response_mask[rows, :longest]
        n = int(mask.any(0).nonzero().max()) + 1  # what follows is padding of all of these rows
        scores.append(response_scores(verifier, batch.tokens[rows, :n], mask[:, :n]))
    return at_last(_normalise(torch.cat(scores).cpu(), verifier.config, flags.reward_clip), rollout)


def outcome_reward(
    verifier: Decoder, tokenizer: Tokenizer, rollout: Rollout, flags: RewardFlags, max_batch_size: int
) -> Tensor:
    """An outcome verifier's score of each whole response, at its last token. -> [B, S].

    probability: of being right; logit: its score, normalised and clipped.
    """
    logits = torch.tensor([steps[-1] for steps in step_logits(verifier, tokenizer, rollout, max_batch_size)])
    if flags.outcome_reward == "probability":
        return at_last(logits.sigmoid(), rollout)
    return at_last(_normalise(logits, verifier.config, flags.reward_clip), rollout)


def process_reward(
    verifier: Decoder, tokenizer: Tokenizer, rollout: Rollout, flags: RewardFlags, max_batch_size: int,
    own: Tokenizer | None = None,
) -> Tensor:
    """A process verifier's score of each step, at the sampled token that ends the step. -> [B, S].
    losses.process_rewards() has the three kinds. The bonus is added for every step."""
    laid_out = torch.zeros(rollout.batch.tokens.shape)
    for row, steps in enumerate(step_logits(verifier, own or tokenizer, rollout, max_batch_size)):
        worth = losses.process_rewards(torch.tensor(steps).sigmoid(), flags.step_reward)
        # the verifier read the response's text in tokens of its own layout; rewards belong to the sampled ones
        places = rollout.batch.response_mask[row].nonzero()[:, 0]
        first = int(places[0])
        tokens = rollout.batch.tokens[row, first : int(places[-1]) + 1].tolist()
        ends = torch.tensor(step_ends(tokenizer, tokens, rollout.responses[row], STEP_ENDS[verifier.config.step]))
        # a step that ends in what code printed is the worth of the code
        columns = places[torch.searchsorted(places, first + ends, right=True) - 1].tolist()
        # two steps may end in one token, and a solution too long for the verifier has fewer scores than steps
        for column, value in zip(columns, (worth + flags.step_bonus).tolist(), strict=False):
            laid_out[row, column] += value
    return laid_out


def _normalise(scores: Tensor, config: ModelConfig, clip: float) -> Tensor:
    """Scores in deviations from the mean on the verifier's held-out data, clipped; 0 does not clip. [B] -> [B]."""
    # a pairwise loss fixes differences of scores alone: where they lie, and their scale, is an accident of training
    normalised = (scores - config.score_mean) / config.score_std
    return normalised.clamp(-clip, clip) if clip else normalised


def _warn_of_cut(n_cut: int, n: int, max_seq_len: int) -> None:
    if n_cut:
        runlog.logger().warning("%d of %d responses are longer than the verifier's context of %d tokens; it judges "
                                "their beginnings", n_cut, n, max_seq_len)


def step_logits(
    verifier: Decoder, tokenizer: Tokenizer, rollout: Rollout, max_batch_size: int
) -> list[list[float]]:
    """The verifier's logit at the end of every step of every response, read in the layout that it was trained on. Of a
    response longer than the verifier's context it reads the beginning, and the log says so."""
    config, n = verifier.config, len(rollout.prompts)
    # a response of control tokens alone has no text; its end is then all there is to score
    rows = [encode_in_steps(tokenizer, prompt.instruction, response, config, finished=finished or not response)
            for prompt, response, finished in zip(
                rollout.prompts, rollout.responses, rollout.finished.tolist(), strict=True)]
    _warn_of_cut(sum(len(row.tokens) > config.max_seq_len for row in rows), n, config.max_seq_len)
    end = math.nan if config.verifier_form else 0.0  # other verifiers are read at tokens of their own
    cut = (_cut(row, config.max_seq_len, end) for row in rows)
    return [logits for chunk in chunks([*cut], max_batch_size) for logits in read_steps(verifier, chunk)]


def _cut(row: Encoded, max_seq_len: int, end: float) -> Encoded:
    """The beginning of a row that is too long; with end 0 its last token speaks for the step cut there."""
    if len(row.tokens) <= max_seq_len:
        return row
    if row.response_start >= max_seq_len:
        raise UserError(f"a prompt has {row.response_start} tokens, which leaves none of the verifier's context of "
                        f"{max_seq_len}; drop it from --train_file")
    targets = row.targets[: max_seq_len - row.response_start - 1]
    return Encoded(row.tokens[:max_seq_len], row.response_start, (*targets, end))


def step_ends(tokenizer: Tokenizer, tokens: Sequence[int], response: str, step_end: str) -> list[int]:
    """The places among sampled response tokens where the steps of their text end, by characters. A step ends with the
    step_end after it, the last one with the response's last token."""
    steps, ends, characters = split_steps(response, step_end), [], 0
    decode = vocabulary_of(tokenizer).decode
    for step in steps[:-1]:
        characters = response.index(step, characters) + len(step) + len(step_end)
        # the first token with which the decoded text is at least so long: tokens may straddle the end of a step, and of
        # a character, whose first bytes would count as one each
        ends.append(bisect_left(range(1, len(tokens) + 1), characters,
                                key=lambda n: len(decode(tokens[:n]).rstrip("\ufffd"))))
    return [*ends, len(tokens) - 1]


def on_first_rank(
    score: Callable[[Rollout], tuple[Sequence[float], Counts]], rollout: Rollout
) -> tuple[Tensor, Counts]:
    """A score of each response at its last token, [B, S], which of the ranks that share a batch only the first one
    computes, and all get. The counts are those of the tensor-parallel group, alike on its ranks."""
    # grading starts processes, and need not answer twice alike where time runs out: one call, one answer for all
    nothing = [0.0] * len(rollout.responses), {}
    scores, counts = parallel.from_first_rank(
        lambda: nothing if context_parallel.rank() else score(rollout), of_group=True)
    return at_last(torch.tensor(scores), rollout), counts


def graded_reward(grader: Grader, rollout: Rollout) -> tuple[list[float], Counts]:
    """1 for a response that the grader finds right, else 0. Without a label it is 0. Counts the outcomes."""
    scores = [0.0] * len(rollout.prompts)
    labelled = [row for row, prompt in enumerate(rollout.prompts) if prompt.label is not None]
    prompts = [rollout.prompts[row] for row in labelled]
    verdicts = grader.grade([rollout.responses[row] for row in labelled], [prompt.label or "" for prompt in prompts],
                            [type_of(prompt) for prompt in prompts])
    for row, verdict in zip(labelled, verdicts, strict=True):
        scores[row] = float(verdict.outcome == "right")
    found = Counter(verdict.outcome for verdict in verdicts)
    return scores, {f"graded_{outcome}": (found[outcome], len(labelled)) for outcome in OUTCOMES if labelled}


def function_reward(function: UserReward, name: str, rollout: Rollout) -> tuple[Tensor, Counts]:
    """What a user's function says of each response, at its last token, [B, S]; the first rank asks it, once for all.
    Counts the responses that it failed at, and the numbers that it gives for the log."""
    found = parallel.from_first_rank(lambda: function.score(rollout.prompts, rollout.responses))
    counts = {f"reward_{name}/{key}": (value, 1) for key, value in found.stats.items()}
    counts[f"reward_{name}_failed"] = (found.n_failed, len(found.values))
    return at_last(torch.tensor(found.values), rollout), counts if parallel.data_parallel_rank() == 0 else {}


def code_reward(rollout: Rollout) -> tuple[Tensor, Counts]:
    """Minus the share of its executions that failed, at each response's last token; 0 without any. -> [B, S]. Counts
    how executions ended, and how many a response has."""
    scores = [-sum(status not in PASSED for status in each) / max(1, len(each)) for each in rollout.executions]
    found = Counter(status if status in ("ok", "error", "timeout") else "other"
                    for each in rollout.executions for status in each)
    ends = {f"executions_{end}": (found[end], found.total()) for end in ("ok", "error", "timeout", "other")}
    return at_last(torch.tensor(scores), rollout), ends | {"executions": (found.total(), len(scores))}


def format_reward(grader: Grader, penalty: float, rollout: Rollout) -> tuple[list[float], Counts]:
    """Minus the penalty for a response in which the grader finds no answer."""
    return [-penalty if grader.answer(response) is None else 0.0 for response in rollout.responses], {}
