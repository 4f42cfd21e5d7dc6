"""What episodes are worth: verifiers, the grader, a user's function, and the penalties of how a response ended.

B episodes, S sequence, T steps of a solution. A reward is [B, S] float32 on the CPU, alike on every rank: what each
response token earns, 0 everywhere else.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from src import losses, parallel
from src.data import collate
from src.data.collate import Batch, Encoded
from src.errors import UserError
from src.inference.scoring import response_scores, token_scores
from src.models.decoder import Decoder
from src.text.tokenizer import Tokenizer
from src.training.ppo_settings import Settings
from src.training.rollouts import Episodes, trim

SCORE_LIMIT = 5.0  # a verifier's normalised score beyond this many deviations is noise, not merit

StepReward = Literal["raw", "min-drop", "prod-drop"]
OutcomeReward = Literal["probability", "logit"]


class TaskReward(Protocol):
    """What episodes are worth, apart from KL and penalties."""

    def __call__(self, episodes: Episodes) -> Tensor:
        """-> [B, S] float32 on the CPU, alike on every rank."""


class Part(NamedTuple):
    """One of the rewards that are added up, and what it weighs."""

    weight: float
    reward: TaskReward


def weights_of(names: Sequence[str], weights: Sequence[float]) -> dict[str, float]:
    """What each reward weighs; 1 each where no weights are given. Raises UserError where the two do not match."""
    if not names or len(set(names)) < len(names):
        raise UserError(f"--reward is {' '.join(names) or 'empty'}; expected one or more, each named once")
    if weights and len(weights) != len(names):
        raise UserError(
            f"--reward_weights has {len(weights)} numbers for {len(names)} rewards; give one for each"
        )
    return dict(zip(names, weights or [1.0] * len(names), strict=True))


def short_name(reward: str) -> str:
    """What a reward is called in the log: verifier, rule or the name of the user's function."""
    return reward.rpartition(":")[2]


def at_last(scores: Tensor, episodes: Episodes) -> Tensor:
    """Lay one score of each episode on its last token. [B] -> [B, S]."""
    laid_out = torch.zeros(episodes.batch.tokens.shape)
    laid_out[torch.arange(len(scores)), episodes.last] = scores.float()
    return laid_out


def score_parts(parts: Mapping[str, Part], episodes: Episodes) -> dict[str, Tensor]:
    """Every part's weighted reward. -> name to [B, S]."""
    return {name: part.weight * part.reward(episodes) for name, part in parts.items()}


def settle_ending(task: Tensor, episodes: Episodes, settings: Settings) -> Tensor:
    """Take what a response loses for not ending, or for coming close to the limit. [B, S] -> [B, S].

    `zero` leaves a response without end nothing. `penalty` takes missing_eos_penalty, of which longer and longer
    responses lose a growing share in the last overlong_buffer tokens before the limit (DAPO, Yu et al. 2025, eq. 13).
    """
    unfinished = ~episodes.finished
    if settings.truncated == "zero":
        return task.masked_fill(unfinished[:, None], 0.0)
    if settings.truncated == "mask":
        return task
    share = unfinished.float()
    if settings.overlong_buffer:
        over = episodes.lengths - (settings.max_new_tokens - settings.overlong_buffer)
        share = torch.maximum(share, (over / settings.overlong_buffer).clamp(0, 1))
    return task - at_last(settings.missing_eos_penalty * share, episodes)


def verifier_reward(
    verifier: Decoder,
    tokenizer: Tokenizer,
    max_batch_size: int,
    *,
    outcome: OutcomeReward,
    steps: StepReward,
    step_bonus: float,
) -> TaskReward:
    """The reward of a verifier, by what its config says it was trained for."""
    if verifier.config.objective == "outcome":
        return outcome_reward(verifier, tokenizer, max_batch_size, outcome)
    if verifier.config.objective == "process":
        return process_reward(verifier, tokenizer, max_batch_size, steps, step_bonus)
    return pairwise_reward(verifier, max_batch_size)


def pairwise_reward(verifier: Decoder, max_batch_size: int) -> TaskReward:
    """A pairwise verifier's normalised score of each response, within +-SCORE_LIMIT, at its last token."""
    config = verifier.config

    @torch.no_grad()
    def reward(episodes: Episodes) -> Tensor:
        scores, batch = [], episodes.batch
        for rows in torch.arange(len(batch.tokens)).split(max_batch_size):
            micro = trim(Batch(batch.tokens[rows], batch.response_mask[rows])).to(parallel.device())
            scores.append(response_scores(verifier, *micro).cpu())
        normalised = (torch.cat(scores) - config.score_mean) / config.score_std
        return at_last(normalised.clamp(-SCORE_LIMIT, SCORE_LIMIT), episodes)

    return reward


def outcome_reward(
    verifier: Decoder, tokenizer: Tokenizer, max_batch_size: int, scale: OutcomeReward
) -> TaskReward:
    """An outcome verifier's word on each whole response, at its last token.

    probability: of being right; logit: its score, normalised and within +-SCORE_LIMIT.
    """
    config = verifier.config

    def reward(episodes: Episodes) -> Tensor:
        logits = torch.tensor(
            [steps[-1] for steps in step_logits(verifier, tokenizer, episodes, max_batch_size)]
        )
        if scale == "probability":
            return at_last(logits.sigmoid(), episodes)
        normalised = (logits - config.score_mean) / config.score_std
        return at_last(normalised.clamp(-SCORE_LIMIT, SCORE_LIMIT), episodes)

    return reward


def process_reward(
    verifier: Decoder, tokenizer: Tokenizer, max_batch_size: int, shape: StepReward, step_bonus: float
) -> TaskReward:
    """A process verifier's word on each step, at the sampled token that ends the step.

    shape: losses.process_rewards() has the three. step_bonus is added for every step.
    """

    def reward(episodes: Episodes) -> Tensor:
        laid_out = torch.zeros(episodes.batch.tokens.shape)
        logits = step_logits(verifier, tokenizer, episodes, max_batch_size)
        for row, (steps, start) in enumerate(zip(logits, _response_starts(episodes), strict=True)):
            probabilities = torch.tensor([steps]).sigmoid()
            worth = losses.process_rewards(probabilities, torch.ones_like(probabilities).bool(), shape)[0]
            tokens = episodes.batch.tokens[row][episodes.batch.response_mask[row]].tolist()
            ends = step_ends(tokenizer, tokens, episodes.responses[row])
            # two steps may end in one token, and a solution too long for the verifier has fewer scores than steps
            for end, value in zip(ends, (worth + step_bonus).tolist(), strict=False):
                laid_out[row, start + end] += value
        return laid_out

    return reward


def _response_starts(episodes: Episodes) -> list[int]:
    return (episodes.last - episodes.lengths + 1).tolist()


@torch.no_grad()
def step_logits(
    verifier: Decoder, tokenizer: Tokenizer, episodes: Episodes, max_batch_size: int
) -> list[list[float]]:
    """The verifier's logit at the end of every step of every response, read in the layout that it was trained on."""
    rows = [
        _in_steps(tokenizer, prompt.instruction, response, finished, verifier.config.max_seq_len)
        for prompt, response, finished in zip(
            episodes.prompts, episodes.responses, episodes.finished.tolist(), strict=True
        )
    ]
    found: list[list[float]] = []
    for chunk in collate.chunks(rows, max_batch_size):
        judged = collate.lay_out_judged(chunk, packing=False).to(parallel.device())
        scores = token_scores(verifier, *judged.batch)
        found += [row[~targets.isnan()].tolist() for row, targets in zip(scores, judged.targets, strict=True)]
    return found


def _in_steps(
    tokenizer: Tokenizer, instruction: str, response: str, finished: bool, max_seq_len: int
) -> Encoded:
    """A response laid out in steps. One that is too long is cut; its last token then speaks for the step cut there."""
    steps = collate.split_steps(response)
    # a response of control tokens alone has no text; its end is then all there is to judge
    row = collate.encode_steps(
        tokenizer, instruction, steps, [0.0] * len(steps), finished=finished or not response
    )
    if len(row.tokens) <= max_seq_len:
        return row
    if row.response_start >= max_seq_len:
        raise UserError(
            f"a prompt has {row.response_start} tokens, which leaves none of the verifier's context of {max_seq_len}; "
            f"drop it from --train_file"
        )
    targets = row.targets[: max_seq_len - row.response_start - 1]
    return Encoded(row.tokens[:max_seq_len], row.response_start, (*targets, 0.0))


def step_ends(tokenizer: Tokenizer, tokens: Sequence[int], response: str) -> list[int]:
    """The places among sampled response tokens where the steps of their text end, by characters.

    A step ends with the blank line behind it, the last one with the response's last token.
    """
    steps, ends, behind = collate.split_steps(response), [], 0
    for step in steps[:-1]:
        behind = response.index(step, behind) + len(step) + len(collate.STEP_END)
        ends.append(_token_reaching(tokenizer, tokens, behind))
    return [*ends, len(tokens) - 1]


def _token_reaching(tokenizer: Tokenizer, tokens: Sequence[int], characters: int) -> int:
    """The first token with which the decoded text is at least so long."""
    counts = range(1, len(tokens) + 1)
    return bisect_left(counts, characters, key=lambda n: len(tokenizer.decode(tokens[:n])))


def scored_reward(score: Callable[[Episodes], Sequence[float]]) -> TaskReward:
    """What `score` says of each response, at its last token. Only the first rank calls it; its word holds."""

    def reward(episodes: Episodes) -> Tensor:
        scores = torch.zeros(len(episodes.responses), device=parallel.device())
        if parallel.tensor_parallel_rank() == 0:
            scores += torch.tensor(score(episodes), dtype=torch.float32, device=parallel.device())
        return at_last(parallel.broadcast_from_first(scores).cpu(), episodes)

    return reward


def function_reward(
    score: Callable[[Sequence[str], Sequence[str], Sequence[str | None]], Sequence[float]],
) -> TaskReward:
    """What a user's function says of each response, from prompts, responses and labels."""
    return scored_reward(
        lambda episodes: score(
            [prompt.instruction for prompt in episodes.prompts],
            episodes.responses,
            [prompt.label for prompt in episodes.prompts],
        )
    )


def graded_reward(
    grade: Callable[[Sequence[str], Sequence[str]], Sequence[str]], outcomes: dict[str, float]
) -> TaskReward:
    """1 for a response that `grade` (of responses and labels) finds "right", else 0. Without a label it is 0.

    outcomes is filled with the share of each outcome among the labelled responses, for the log of the first rank.
    """

    def score(episodes: Episodes) -> list[float]:
        labelled = [row for row, prompt in enumerate(episodes.prompts) if prompt.label is not None]
        found = grade(
            [episodes.responses[row] for row in labelled],
            [episodes.prompts[row].label or "" for row in labelled],
        )
        outcomes.clear()
        outcomes["graded_right"] = 0.0  # a share that an alarm watches, present also where none is right
        outcomes.update({f"graded_{name}": n / len(found) for name, n in Counter(found).items()})
        scores = [0.0] * len(episodes.prompts)
        for row, outcome in zip(labelled, found, strict=True):
            scores[row] = float(outcome == "right")
        return scores

    return scored_reward(score)
