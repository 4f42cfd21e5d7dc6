"""src/training/rewards.py: what each reward is and on which token it lies."""

import logging
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from src import assemble
from src.data import collate
from src.data.collate import Batch
from src.data.encoding import Encoded, encode_prompt, encode_steps, split_steps
from src.data.examples import Prompt
from src.errors import UserError
from src.inference.scoring import response_scores, token_scores
from src.models.decoder import Decoder
from src.text.tokenizer import Tokenizer
from src.training import rewards
from src.training.rewards import Shape
from src.training.rollouts import Episodes
from tests.conftest import Folders
from tests.ranks import run_ranks
from tests.training.workers import settings


def prompt(index: int, label: str | None = None) -> Prompt:
    return Prompt(str(index), "2+2=", label, None, None)


def episodes_of(tokenizer: Tokenizer, responses: list[str], finished: list[bool]) -> Episodes:
    """Episodes as if these texts had been sampled."""
    rows = []
    for text, ended in zip(responses, finished, strict=True):
        ids = encode_prompt(tokenizer, "2+2=")
        rows.append(Encoded(ids + tokenizer.encode(text) + [tokenizer.eos_id] * ended, len(ids)))
    batch = collate.collate(rows)
    prompts = [prompt(index) for index in range(len(rows))]
    return Episodes(prompts, responses, batch, torch.tensor(finished), torch.zeros(batch.tokens.shape))


@pytest.fixture
def verifier(folders: Folders) -> Decoder:
    return assemble.load_verifier(folders.verifier)  # score statistics 0.5 and 2


TEXTS = ["1+1=2\n\n3\n\n#### 4", "abc", "4\n\n5 6"]


def test_ending_costs_what_truncated_says(tokenizer: Tokenizer) -> None:
    episodes = episodes_of(tokenizer, TEXTS, [True, False, False])
    task = rewards.at_last(torch.tensor([1.0, 1.0, -2.0]), episodes)
    lost = {"penalty": [1.0, 0.5, -2.5], "zero": [1.0, 0.0, -2.0], "mask": [1.0, 1.0, -2.0]}
    for policy, expected in lost.items():
        found = rewards.settle_ending(task, episodes, settings(truncated=policy))
        assert_close(found, rewards.at_last(torch.tensor(expected), episodes))


def test_overlong_penalty_grows_to_the_limit(tokenizer: Tokenizer) -> None:
    episodes = episodes_of(tokenizer, ["a" * n for n in (2, 4, 6, 9)], [True, True, True, False])
    numbers = replace(settings(), max_new_tokens=int(episodes.lengths[2]) + 1, overlong_buffer=4)
    over = (episodes.lengths - (numbers.max_new_tokens - 4)).clamp(0, 4) / 4
    assert over[2] == 0.75 and over[0] < over[1] < 0.75
    found = rewards.settle_ending(torch.zeros(episodes.batch.tokens.shape), episodes, numbers)
    over[3] = 1.0
    assert_close(found, rewards.at_last(-0.5 * over, episodes))


def test_pairwise_reward_is_the_normalised_clamped_score(verifier: Decoder, tokenizer: Tokenizer) -> None:
    episodes = episodes_of(tokenizer, TEXTS, [True, False, True])
    scores = response_scores(verifier, *episodes.batch)
    for size in (1, 2, 5):
        found = rewards.pairwise_reward(verifier, size, Shape())(episodes)
        expected = rewards.at_last(((scores - 0.5) / 2).clamp(-5, 5), episodes)
        assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assemble.set_score(verifier, score_std=1e-6)
    extreme = rewards.pairwise_reward(verifier, 5, Shape())(episodes)
    assert set(extreme[extreme != 0].tolist()) <= {-5.0, 5.0} and not extreme.requires_grad


def alone(verifier: Decoder, tokenizer: Tokenizer, text: str, finished: bool) -> list[float]:
    """Logits at the ends of a text's steps, without padding."""
    steps = split_steps(text)
    row = encode_steps(tokenizer, "2+2=", steps, [1.0] * len(steps), finished=finished)
    batch = collate.collate([row])
    scores = token_scores(verifier, *batch)[0][batch.response_mask[0]]
    return scores[~torch.tensor(row.targets).isnan()].tolist()


def test_outcome_reward_is_the_last_probability(verifier: Decoder, tokenizer: Tokenizer) -> None:
    assemble.set_score(verifier, objective="outcome")
    endings = [True, False, True]
    episodes = episodes_of(tokenizer, TEXTS, endings)
    last = torch.tensor([alone(verifier, tokenizer, *row)[-1] for row in zip(TEXTS, endings, strict=True)])
    for scale, expected in (("probability", last.sigmoid()), ("logit", ((last - 0.5) / 2).clamp(-5, 5))):
        find = rewards.verifier_reward(verifier, tokenizer, 2, Shape(scale))
        assert_close(find(episodes), rewards.at_last(expected, episodes), rtol=1e-5, atol=1e-5)


def test_process_reward_lies_on_the_tokens_that_end_steps(verifier: Decoder, tokenizer: Tokenizer) -> None:
    assemble.set_score(verifier, objective="process")
    episodes = episodes_of(tokenizer, TEXTS, [True, False, True])
    find = rewards.verifier_reward(verifier, tokenizer, 2, Shape("logit", "raw", 0.25))
    found = find(episodes)
    for row, (text, finished) in enumerate(zip(TEXTS, (True, False, True), strict=True)):
        tokens = episodes.batch.tokens[row][episodes.batch.response_mask[row]].tolist()
        ends = rewards.step_ends(tokenizer, tokens, text, "\n\n")
        expected = torch.zeros(len(tokens))
        expected[ends] = torch.tensor(alone(verifier, tokenizer, text, finished)).sigmoid() + 0.25
        assert_close(found[row][episodes.batch.response_mask[row]], expected, rtol=1e-5, atol=1e-5)
        assert not found[row][~episodes.batch.response_mask[row]].any()
    # min-drop sums up to the least probability less 1, prod-drop to their product less 1
    probabilities = torch.tensor(alone(verifier, tokenizer, TEXTS[0], True)).sigmoid()
    for shape, total in (("min-drop", probabilities.min()), ("prod-drop", probabilities.prod())):
        find = rewards.process_reward(verifier, tokenizer, 2, Shape(steps=shape))
        assert find(episodes)[0].sum().item() == pytest.approx(total.item() - 1, abs=1e-5)


@pytest.mark.parametrize("step_end", ["\n\n", "\n"])
def test_steps_end_where_their_characters_do(tokenizer: Tokenizer, step_end: str) -> None:
    for text in (*TEXTS, "a\n\n\n\nb\n\n", "a\n\n\nb", "\n\na", "a\n\na\n\na", "a\nb\n\na\na\n", "\na\nb"):
        tokens = [*tokenizer.encode(text), tokenizer.eos_id]
        ends, steps = rewards.step_ends(tokenizer, tokens, text, step_end), split_steps(text, step_end)
        assert len(ends) == len(steps) and ends == sorted(ends)
        assert ends[-1] == len(tokens) - 1
        for end, step in zip(ends, steps[:-1], strict=False):
            before, with_it = tokenizer.decode(tokens[:end]), tokenizer.decode(tokens[: end + 1])
            assert (step + step_end) in with_it and not before.endswith(step + step_end)


def test_a_verifier_of_lines_rewards_lines(verifier: Decoder, tokenizer: Tokenizer) -> None:
    assemble.set_score(verifier, objective="process", step="line")
    text = "1+1=2\n3\n#### 4"
    episodes = episodes_of(tokenizer, [text], [True])
    steps = text.split("\n")
    row = encode_steps(tokenizer, "2+2=", steps, [1.0] * 3, step_end="\n")
    scores = token_scores(verifier, *collate.collate([row]))[0, row.response_start :].sigmoid()
    expected = scores[~torch.tensor(row.targets).isnan()]
    found = rewards.process_reward(verifier, tokenizer, 2, Shape(steps="raw"))(episodes)
    lengths = [len(tokenizer.encode(step + "\n", start=n == 0)) for n, step in enumerate(steps)]
    ends = torch.tensor(lengths).cumsum(0) + row.response_start - 1
    assert ends[-1] == len(row.tokens) - 1  # EOS stands where the last newline would
    assert_close(found[0, ends], expected, rtol=1e-5, atol=1e-5)
    assert found.count_nonzero() == 3
    assemble.set_score(verifier, step="paragraph")
    assert rewards.process_reward(verifier, tokenizer, 2, Shape(steps="raw"))(episodes).count_nonzero() == 1


def test_a_response_too_long_for_the_verifier_is_cut_and_counted(
    verifier: Decoder, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("splitrl"), "propagate", True)
    verifier.config = replace(verifier.config, max_seq_len=12)
    episodes = episodes_of(tokenizer, ["1\n\n" + "2" * 30 + "\n\n3", ""], [True, False])
    logits = rewards.step_logits(verifier, tokenizer, episodes, 2)
    assert [len(steps) for steps in logits] == [2, 1] and all(map(math.isfinite, logits[0]))
    assert "1 of 2 responses are longer than the verifier's context of 12 tokens" in caplog.text
    pairwise = rewards.pairwise_reward(verifier, 2, Shape())(episodes)
    short = Batch(episodes.batch.tokens[:1, :12], episodes.batch.response_mask[:1, :12])
    assert pairwise[0].sum().item() == pytest.approx((response_scores(verifier, *short).item() - 0.5) / 2, abs=1e-4)
    verifier.config = replace(verifier.config, max_seq_len=3)
    with pytest.raises(UserError, match="leaves none of the verifier's context of 3"):
        rewards.step_logits(verifier, tokenizer, episodes, 2)


def test_graded_reward_compares_with_labels_and_leaves_the_unlabelled_nothing(tokenizer: Tokenizer) -> None:
    episodes = episodes_of(tokenizer, ["1", "3", "3", "3"], [True] * 4)
    episodes = episodes._replace(prompts=[prompt(i, label) for i, label in enumerate(["1", "2", "3", None])])
    outcomes: list[str] = []

    def grade(responses: list[str], labels: list[str]) -> list[str]:
        return ["right" if r == label else "wrong" for r, label in zip(responses, labels, strict=True)]

    found = rewards.graded_reward(grade, outcomes)(episodes)
    assert_close(found, rewards.at_last(torch.tensor([1.0, 0.0, 1.0, 0.0]), episodes))
    shares = rewards.outcome_shares(outcomes)
    assert shares == {"graded_right": pytest.approx(2 / 3), "graded_wrong": pytest.approx(1 / 3)}
    rewards.graded_reward(lambda responses, labels: ["unparsed"] * len(labels), outcomes)(episodes)
    assert rewards.outcome_shares(outcomes) == {"graded_right": 0.0, "graded_unparsed": 1.0}
    assert rewards.outcome_shares(outcomes) == {}


def test_format_penalty_is_for_responses_without_an_answer(tokenizer: Tokenizer) -> None:
    episodes = episodes_of(tokenizer, ["#### 1", "3"], [True, False])
    found = rewards.format_reward(lambda response: "####" in response, 0.25)(episodes)
    assert_close(found, rewards.at_last(torch.tensor([0.0, -0.25]), episodes))


def test_parts_are_weighted_and_weights_belong_to_names(tokenizer: Tokenizer) -> None:
    episodes = episodes_of(tokenizer, ["1", "22"], [True, True])

    def ones(episodes: Episodes) -> torch.Tensor:
        return rewards.at_last(torch.ones(2), episodes)

    parts = {"a": rewards.Part(0.5, ones), "b": rewards.Part(0.0, ones)}
    found = rewards.score_parts(parts, episodes)
    assert {name: part.sum().item() for name, part in found.parts.items()} == {"a": 2.0, "b": 2.0}  # 0 looks on
    assert_close(found.task, 0.5 * rewards.at_last(torch.ones(2), episodes))
    assert rewards.weights_of(["rule", "verifier"], []) == {"rule": 1.0, "verifier": 1.0}
    assert rewards.weights_of(["rule", "verifier"], [1, 0]) == {"rule": 1, "verifier": 0}
    with pytest.raises(UserError, match="--reward_weights has 1 numbers for 2 rewards"):
        rewards.weights_of(["rule", "verifier"], [1.0])
    with pytest.raises(UserError, match="each named once"):
        rewards.weights_of(["rule", "rule"], [])
    for names in (["a.py:score", "b.py:score"], ["rule", "a.py:rule"], ["a.py:std"], ["a.py:format"]):
        with pytest.raises(UserError, match=r"the log has another '\w+'; rename the function"):
            rewards.weights_of(names, [])
    assert rewards.weights_of(["a.py:one", "b.py:two"], [1, 2]) == {"a.py:one": 1, "b.py:two": 2}


def test_an_episode_is_graded_once_on_more_ranks_than_episodes(tmp_path: Path) -> None:
    for found in run_ranks(2, "tests.training.workers:graded_once", tmp_path, 1):
        assert found["earned"].tolist() == [[0.0, 0.0, 1.0]] and found["graded"] == 1


def test_the_share_of_failed_calls_is_told_by_function() -> None:
    found = rewards.failed_shares({"mine": (1, 4), "idle": (0, 0)})
    assert found == {"reward_mine_failed": 0.25, "reward_idle_failed": 0.0}
