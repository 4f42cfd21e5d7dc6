"""What episodes are worth: verifiers, the grader, a user's function, and the penalties of how a response ended.

B episodes, S sequence, T steps of a solution. A reward is [B, S] float32 on the CPU, alike on every rank: what each
response token earns, 0 everywhere else.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from src import losses, parallel, runlog
from src.data import collate
from src.data.collate import Batch
from src.data.encoding import STEP_ENDS, Encoded, encode_steps, split_steps
from src.errors import UserError
from src.inference.scoring import response_scores, token_scores
from src.models.config import ModelConfig
from src.models.decoder import Decoder
from src.text.tokenizer import Tokenizer
from src.training.ppo_settings import Settings
from src.training.rollouts import Episodes, my_share, trim, widen

StepReward = Literal["raw", "min-drop", "prod-drop"]
OutcomeReward = Literal["probability", "logit"]


class TaskReward(Protocol):
    """What episodes are worth, apart from KL and penalties."""

    def __call__(self, episodes: Episodes) -> Tensor:
        """-> [B, S] float32 on the CPU, alike on every rank."""


class Part(NamedTuple):
    """One of the rewards that are added up, and what it weighs; 0 = it only looks on."""

    weight: float
    reward: TaskReward


class Scored(NamedTuple):
    """What episodes earn."""

    parts: dict[str, Tensor]  # by name, not weighted, [B, S] each
    task: Tensor  # their weighted sum [B, S]

    def take(self, rows: Tensor) -> "Scored":
        """What some of the episodes earn. rows [K] int64."""
        return Scored({name: part[rows] for name, part in self.parts.items()}, self.task[rows])


LOGGED = ("format", "std")  # metrics reward_format and reward_std, which are no user's function


def weights_of(names: Sequence[str], weights: Sequence[float]) -> dict[str, float]:
    """What each reward weighs; 1 each where no weights are given.

    Raises UserError where the two do not match, and for functions that the log could not tell apart.
    """
    if not names or len(set(names)) < len(names):
        raise UserError(f"--reward is {' '.join(names) or 'empty'}; expected one or more, each named once")
    short = [*map(short_name, names), *LOGGED]
    twice = [name for name in names if ":" in name and short.count(short_name(name)) > 1]
    if twice:
        raise UserError(
            f"--reward {' '.join(twice)}: the log has another {short_name(twice[-1])!r}; rename the function"
        )
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


def score_parts(parts: Mapping[str, Part], episodes: Episodes) -> Scored:
    """Every part's reward, and their weighted sum. Each data-parallel rank judges its share and gets all."""
    rows = torch.tensor(my_share(range(len(episodes.prompts))), dtype=torch.int64)
    mine, found = episodes.take(rows), {}
    for name, part in parts.items():
        laid_out = torch.zeros(episodes.batch.tokens.shape)
        if len(rows):  # else there are more ranks than episodes
            laid_out[rows] = part.reward(mine)
        found[name] = parallel.join_over_data_parallel(laid_out)
    return Scored(found, torch.stack([part.weight * found[name] for name, part in parts.items()]).sum(0))


def join_scored(found: Sequence[Scored], width: int) -> Scored:
    """What the episodes of several parts of a buffer earn, below one another and padded to the same width."""

    def rows(tensors: Iterable[Tensor]) -> Tensor:
        return torch.cat([widen(tensor, width) for tensor in tensors])

    return Scored(
        {name: rows(scored.parts[name] for scored in found) for name in found[0].parts},
        rows(scored.task for scored in found),
    )


def settle_ending(task: Tensor, episodes: Episodes, settings: Settings) -> Tensor:
    """Take what a response loses for not ending, or for coming close to the limit. [B, S] -> [B, S].

    `zero` leaves a response without end nothing but what it lost: where rewards are negative, nothing would be the best
    of all. `penalty` takes missing_eos_penalty, of which longer and longer
    responses lose a growing share in the last overlong_buffer tokens before the limit (DAPO, Yu et al. 2025, eq. 13).
    """
    unfinished = ~episodes.finished
    if settings.truncated == "zero":
        return torch.where(unfinished[:, None], task.clamp_max(0.0), task)
    if settings.truncated == "mask":
        return task
    share = unfinished.float()
    if settings.overlong_buffer:
        over = episodes.lengths - (settings.max_new_tokens - settings.overlong_buffer)
        share = torch.maximum(share, (over / settings.overlong_buffer).clamp(0, 1))
    return task - at_last(settings.missing_eos_penalty * share, episodes)


class Shape(NamedTuple):
    """How what a verifier says becomes a reward; ppo_train.py's flags outcome_reward, step_reward, step_bonus and
    reward_clip say what each means."""

    outcome: OutcomeReward = "probability"
    steps: StepReward = "min-drop"
    step_bonus: float = 0.0
    clip: float = 5.0


def verifier_reward(verifier: Decoder, tokenizer: Tokenizer, max_batch_size: int, shape: Shape) -> TaskReward:
    """The reward of a verifier, by what its config says it was trained for."""
    if verifier.config.objective == "outcome":
        return outcome_reward(verifier, tokenizer, max_batch_size, shape)
    if verifier.config.objective == "process":
        return process_reward(verifier, tokenizer, max_batch_size, shape)
    return pairwise_reward(verifier, max_batch_size, shape)


def _clipped(scores: Tensor, config: ModelConfig, shape: Shape) -> Tensor:
    """Scores in deviations from the mean on the verifier's training data, clipped; 0 does not clip. [B] -> [B]."""
    normalised = (scores - config.score_mean) / config.score_std
    return normalised.clamp(-shape.clip, shape.clip) if shape.clip else normalised


def pairwise_reward(verifier: Decoder, max_batch_size: int, shape: Shape) -> TaskReward:
    """A pairwise verifier's normalised, clipped score of each response, at its last token.

    Of one that is longer than the verifier's context it reads the beginning, and the log says so.
    """

    @torch.no_grad()
    def reward(episodes: Episodes) -> Tensor:
        scores, batch, longest = [], episodes.batch, verifier.config.max_seq_len
        _tell_cut(int((episodes.last >= longest).sum()), len(episodes.prompts), longest)
        for rows in torch.arange(len(batch.tokens)).split(max_batch_size):
            fitting = Batch(batch.tokens[rows, :longest], batch.response_mask[rows, :longest])
            micro = trim(fitting).to(parallel.device())
            scores.append(response_scores(verifier, *micro).cpu())
        return at_last(_clipped(torch.cat(scores), verifier.config, shape), episodes)

    return reward


def outcome_reward(verifier: Decoder, tokenizer: Tokenizer, max_batch_size: int, shape: Shape) -> TaskReward:
    """An outcome verifier's word on each whole response, at its last token.

    probability: of being right; logit: its score, normalised and clipped.
    """

    def reward(episodes: Episodes) -> Tensor:
        logits = torch.tensor(
            [steps[-1] for steps in step_logits(verifier, tokenizer, episodes, max_batch_size)]
        )
        if shape.outcome == "probability":
            return at_last(logits.sigmoid(), episodes)
        return at_last(_clipped(logits, verifier.config, shape), episodes)

    return reward


def process_reward(verifier: Decoder, tokenizer: Tokenizer, max_batch_size: int, shape: Shape) -> TaskReward:
    """A process verifier's word on each step, at the sampled token that ends the step.

    losses.process_rewards() has the three kinds. The bonus is added for every step.
    """

    def reward(episodes: Episodes) -> Tensor:
        laid_out = torch.zeros(episodes.batch.tokens.shape)
        logits = step_logits(verifier, tokenizer, episodes, max_batch_size)
        for row, (steps, start) in enumerate(zip(logits, _response_starts(episodes), strict=True)):
            probabilities = torch.tensor([steps]).sigmoid()
            worth = losses.process_rewards(probabilities, torch.ones_like(probabilities).bool(), shape.steps)[
                0
            ]
            tokens = episodes.batch.tokens[row][episodes.batch.response_mask[row]].tolist()
            ends = step_ends(tokenizer, tokens, episodes.responses[row], STEP_ENDS[verifier.config.step])
            # two steps may end in one token, and a solution too long for the verifier has fewer scores than steps
            for end, value in zip(ends, (worth + shape.step_bonus).tolist(), strict=False):
                laid_out[row, start + end] += value
        return laid_out

    return reward


def _tell_cut(n_cut: int, n: int, max_seq_len: int) -> None:
    if n_cut:
        runlog.logger().warning(
            "%d of %d responses are longer than the verifier's context of %d tokens; it judges their beginnings",
            n_cut,
            n,
            max_seq_len,
        )


def _response_starts(episodes: Episodes) -> list[int]:
    return (episodes.last - episodes.lengths + 1).tolist()


@torch.no_grad()
def step_logits(
    verifier: Decoder, tokenizer: Tokenizer, episodes: Episodes, max_batch_size: int
) -> list[list[float]]:
    """The verifier's logit at the end of every step of every response, read in the layout that it was trained on.

    Of a response longer than the verifier's context it reads the beginning, and the log says so.
    """
    rows = [
        _in_steps(tokenizer, prompt.instruction, response, finished, verifier.config)
        for prompt, response, finished in zip(
            episodes.prompts, episodes.responses, episodes.finished.tolist(), strict=True
        )
    ]
    rows, cut = zip(*rows, strict=True)
    _tell_cut(sum(cut), len(rows), verifier.config.max_seq_len)
    found: list[list[float]] = []
    for chunk in collate.chunks(rows, max_batch_size):
        judged = collate.lay_out_judged(chunk, packing=False).to(parallel.device())
        scores = token_scores(verifier, *judged.batch)
        found += [row[~targets.isnan()].tolist() for row, targets in zip(scores, judged.targets, strict=True)]
    return found


def _in_steps(
    tokenizer: Tokenizer, instruction: str, response: str, finished: bool, config: ModelConfig
) -> tuple[Encoded, bool]:
    """A response laid out in steps, and whether it is cut for being too long; its last token then speaks for the step
    cut there."""
    step_end, max_seq_len = STEP_ENDS[config.step], config.max_seq_len
    steps = split_steps(response, step_end)
    labels = [0.0] * len(steps)
    # a response of control tokens alone has no text; its end is then all there is to judge
    ended = finished or not response
    row = encode_steps(tokenizer, instruction, steps, labels, finished=ended, step_end=step_end)
    if len(row.tokens) <= max_seq_len:
        return row, False
    if row.response_start >= max_seq_len:
        raise UserError(
            f"a prompt has {row.response_start} tokens, which leaves none of the verifier's context of {max_seq_len}; "
            f"drop it from --train_file"
        )
    targets = row.targets[: max_seq_len - row.response_start - 1]
    return Encoded(row.tokens[:max_seq_len], row.response_start, (*targets, 0.0)), True


def step_ends(tokenizer: Tokenizer, tokens: Sequence[int], response: str, step_end: str) -> list[int]:
    """The places among sampled response tokens where the steps of their text end, by characters.

    A step ends with the step_end behind it, the last one with the response's last token.
    """
    steps, ends, behind = split_steps(response, step_end), [], 0
    for step in steps[:-1]:
        behind = response.index(step, behind) + len(step) + len(step_end)
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
    grade: Callable[[Sequence[str], Sequence[str]], Sequence[str]], outcomes: list[str]
) -> TaskReward:
    """1 for a response that `grade` (of responses and labels) finds "right", else 0. Without a label it is 0.

    The outcomes of this rank's labelled responses are appended to `outcomes`, for outcome_shares().
    """

    def score(episodes: Episodes) -> list[float]:
        labelled = [row for row, prompt in enumerate(episodes.prompts) if prompt.label is not None]
        found = grade(
            [episodes.responses[row] for row in labelled],
            [episodes.prompts[row].label or "" for row in labelled],
        )
        outcomes.extend(found)
        scores = [0.0] * len(episodes.prompts)
        for row, outcome in zip(labelled, found, strict=True):
            scores[row] = float(outcome == "right")
        return scores

    return scored_reward(score)


def format_reward(readable: Callable[[str], bool], penalty: float) -> TaskReward:
    """Minus the penalty for a response in which no answer can be read, at its last token."""
    return scored_reward(
        lambda episodes: [0.0 if readable(response) else -penalty for response in episodes.responses]
    )


def failed_shares(counts: Mapping[str, tuple[int, int]]) -> dict[str, float]:
    """The share of failed calls of each user's function over all data-parallel ranks, for the log.

    counts: by the function's name in the log, how many calls of this rank failed and how many there were.
    """
    found = {}
    for name, own in counts.items():
        failed, calls = map(sum, zip(*parallel.gather_over_data_parallel([own]), strict=True))
        found[f"reward_{name}_failed"] = failed / max(1, calls)
    return found


def outcome_shares(outcomes: list[str]) -> dict[str, float]:
    """The share of each outcome over all data-parallel ranks for the log of the first rank; empty where none was
    graded. `outcomes` is emptied."""
    found = Counter(parallel.gather_over_data_parallel(list(outcomes)))
    outcomes.clear()
    if not found:
        return {}
    # present also where none is right: an alarm watches it
    shares = {"graded_right": 0.0}
    return shares | {f"graded_{name}": n / found.total() for name, n in found.items()}
