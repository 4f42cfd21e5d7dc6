"""src/training/rewards.py: what each reward is and on which token it lies."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from src import load
from src.checkpoint import saving
from src.data.batch import Batch, make_batch
from src.data.encoding import Encoded, encode_prompt, encode_response, encode_steps, split_steps
from src.data.examples import Prompt
from src.errors import UserError
from src.grading.grader import Grader
from src.models.decoder import Decoder
from src.models.forward import response_scores, token_scores
from src.text.tokenizer import Tokenizer
from src.training import rewards
from src.training.ppo_config import RewardFlags
from src.training.rollout import Rollout
from tests.conftest import Folders
from tests.ranks import run_ranks
from tests.text.files import write_sentencepiece
from tests.training.workers import ppo_config


def prompt(index: int, label: str | None = None) -> Prompt:
    return Prompt(str(index), "2+2=", label, None, None)


def episodes_of(tokenizer: Tokenizer, responses: list[str], finished: list[bool]) -> Rollout:
    """Rollout as if these texts had been sampled."""
    rows = []
    for text, ended in zip(responses, finished, strict=True):
        ids = encode_prompt(tokenizer, "2+2=")
        rows.append(Encoded(ids + tokenizer.encode(text) + [tokenizer.eos_id] * ended, len(ids)))
    batch = make_batch(rows)
    prompts = [prompt(index) for index in range(len(rows))]
    return Rollout(prompts, responses, batch, torch.tensor(finished), torch.zeros(batch.tokens.shape),
                   [[]] * len(rows))


@pytest.fixture
def verifier(folders: Folders) -> Decoder:
    return load.load_verifier(folders.verifier)  # score statistics 0.5 and 2


TEXTS = ["1+1=2\n\n3\n\n#### 4", "abc", "4\n\n5 6"]


def test_ending_costs_what_truncated_says(tokenizer: Tokenizer) -> None:
    episodes = episodes_of(tokenizer, TEXTS, [True, False, False])
    task = rewards.at_last(torch.tensor([1.0, 1.0, -2.0]), episodes)
    lost = {"penalty": [1.0, 0.5, -2.5], "zero": [1.0, 0.0, -2.0], "mask": [1.0, 1.0, -2.0]}
    for policy, expected in lost.items():
        found = rewards.apply_length_penalty(task, episodes, ppo_config(truncated=policy))
        assert_close(found, rewards.at_last(torch.tensor(expected), episodes))


def test_overlong_penalty_grows_to_the_limit(tokenizer: Tokenizer) -> None:
    episodes = episodes_of(tokenizer, ["a" * n for n in (2, 4, 6, 9)], [True, True, True, False])
    numbers = ppo_config(max_new_tokens=int(episodes.lengths[2]) + 1, overlong_buffer=4)
    over = (episodes.lengths - (numbers.max_new_tokens - 4)).clamp(0, 4) / 4
    assert over[2] == 0.75 and over[0] < over[1] < 0.75
    found = rewards.apply_length_penalty(torch.zeros(episodes.batch.tokens.shape), episodes, numbers)
    over[3] = 1.0
    assert_close(found, rewards.at_last(-0.5 * over, episodes))


def test_pairwise_reward_is_the_normalised_clamped_score(verifier: Decoder, tokenizer: Tokenizer) -> None:
    episodes = episodes_of(tokenizer, TEXTS, [True, False, True])
    scores = response_scores(verifier, *episodes.batch.inputs)
    for size in (1, 2, 5):
        found = rewards.pairwise_reward(verifier, episodes, RewardFlags(), size)
        expected = rewards.at_last(((scores - 0.5) / 2).clamp(-5, 5), episodes)
        assert_close(found, expected, rtol=1e-5, atol=1e-5)
    saving.record(verifier, score_std=1e-6)
    extreme = rewards.pairwise_reward(verifier, episodes, RewardFlags(), 5)
    assert set(extreme[extreme != 0].tolist()) <= {-5.0, 5.0} and not extreme.requires_grad


def alone(verifier: Decoder, tokenizer: Tokenizer, text: str, finished: bool) -> list[float]:
    """Logits at the ends of a text's steps, without padding."""
    steps = split_steps(text)
    row = encode_steps(tokenizer, "2+2=", steps, [1.0] * len(steps), finished=finished)
    batch = make_batch([row])
    scores = token_scores(verifier, *batch.inputs)[0][batch.response_mask[0]]
    return scores[~torch.tensor(row.targets).isnan()].tolist()


def test_outcome_reward_is_the_last_probability(verifier: Decoder, tokenizer: Tokenizer) -> None:
    saving.record(verifier, objective="outcome")
    endings = [True, False, True]
    episodes = episodes_of(tokenizer, TEXTS, endings)
    last = torch.tensor([alone(verifier, tokenizer, *row)[-1] for row in zip(TEXTS, endings, strict=True)])
    for scale, expected in (("probability", last.sigmoid()), ("logit", ((last - 0.5) / 2).clamp(-5, 5))):
        found, _ = rewards.verifier_reward(verifier, tokenizer, RewardFlags(outcome_reward=scale), 2, None, episodes)
        assert_close(found, rewards.at_last(expected, episodes), rtol=1e-5, atol=1e-5)


def test_process_reward_lies_on_the_tokens_that_end_steps(verifier: Decoder, tokenizer: Tokenizer) -> None:
    saving.record(verifier, objective="process")
    episodes = episodes_of(tokenizer, TEXTS, [True, False, True])
    config = RewardFlags(step_reward="raw", step_bonus=0.25)
    found, counts = rewards.verifier_reward(verifier, tokenizer, config, 2, None, episodes)
    assert not counts
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
        found = rewards.process_reward(verifier, tokenizer, episodes, RewardFlags(step_reward=shape), 2)
        assert found[0].sum().item() == pytest.approx(total.item() - 1, abs=1e-5)


def test_runs_of_code_that_fail_cost_their_share_and_are_counted(tokenizer: Tokenizer) -> None:
    ends = [["ok", "error", "ok", "timeout"], [], ["output_limit", "memory"]]
    found, counts = rewards.code_reward(episodes_of(tokenizer, TEXTS, [True] * 3)._replace(executions=ends))
    assert found.sum(1).tolist() == [-0.5, 0.0, -0.5]
    assert counts == {"executions": (6, 3), "executions_ok": (2, 6), "executions_error": (1, 6),
                      "executions_timeout": (1, 6), "executions_other": (2, 6)}


def test_a_step_that_ends_in_what_code_printed_rewards_the_code(code_base: str, code_tokenizer: Tokenizer) -> None:
    verifier = load.load_verifier(code_base, from_solver=True)  # which has no opinion yet: 1/2
    saving.record(verifier, objective="process")
    text = ("<|text|>a\n\nb<|endofblock|><|code|>print(1)<|endofblock|><|execution|>1\n\n2<|endofblock|>"
            "<|text|>c<|endofblock|>")
    row = encode_response(code_tokenizer, "Q", text)
    batch = make_batch([row])
    rollout = Rollout([prompt(0)], [text], batch, torch.tensor([True]), torch.zeros(batch.tokens.shape), [["ok"]])
    found = rewards.process_reward(verifier, code_tokenizer, rollout, RewardFlags(step_reward="raw"), 2)
    before = row.tokens.index(code_tokenizer.control["<|execution|>"]) - 1
    first = next(n for n in range(row.response_start, before)
                 if code_tokenizer.decode(row.tokens[row.response_start : n + 1]) == "a\n\n")
    assert found.nonzero()[:, 1].tolist() == [first, before, len(row.tokens) - 1]
    assert found.sum().item() == 1.5


@pytest.mark.parametrize("step_end", ["\n\n", "\n"])
def test_steps_end_where_their_characters_do(tokenizer: Tokenizer, step_end: str) -> None:
    texts = (*TEXTS, "a\n\n\n\nb\n\n", "a\n\n\nb", "\n\na", "a\n\na\n\na", "a\nb\n\na\na\n", "\na\nb")
    for text in texts:
        tokens = [*tokenizer.encode(text), tokenizer.eos_id]
        ends, steps = rewards.step_ends(tokenizer, tokens, text, step_end), split_steps(text, step_end)
        assert len(ends) == len(steps) and ends == sorted(ends)
        assert ends[-1] == len(tokens) - 1
        for end, step in zip(ends, steps[:-1], strict=False):
            before, with_it = tokenizer.decode(tokens[:end]), tokenizer.decode(tokens[: end + 1])
            assert (step + step_end) in with_it and not before.endswith(step + step_end)


def test_a_verifier_of_lines_rewards_lines(verifier: Decoder, tokenizer: Tokenizer) -> None:
    saving.record(verifier, objective="process", step="line")
    text = "1+1=2\n3\n#### 4"
    episodes = episodes_of(tokenizer, [text], [True])
    steps = text.split("\n")
    row = encode_steps(tokenizer, "2+2=", steps, [1.0] * 3, step_end="\n")
    scores = token_scores(verifier, *make_batch([row]).inputs)[0, row.response_start :].sigmoid()
    expected = scores[~torch.tensor(row.targets).isnan()]
    found = rewards.process_reward(verifier, tokenizer, episodes, RewardFlags(step_reward="raw"), 2)
    lengths = [len(tokenizer.encode(step + "\n", start=n == 0)) for n, step in enumerate(steps)]
    ends = torch.tensor(lengths).cumsum(0) + row.response_start - 1
    assert ends[-1] == len(row.tokens) - 1  # EOS stands where the last newline would
    assert_close(found[0, ends], expected, rtol=1e-5, atol=1e-5)
    assert found.count_nonzero() == 3
    saving.record(verifier, step="paragraph")
    assert rewards.process_reward(verifier, tokenizer, episodes, RewardFlags(step_reward="raw"), 2).count_nonzero() == 1


def test_a_response_too_long_for_the_verifier_is_cut_and_counted(
    verifier: Decoder, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    verifier.config = replace(verifier.config, max_seq_len=12)
    episodes = episodes_of(tokenizer, ["1\n\n" + "2" * 30 + "\n\n3", ""], [True, False])
    logits = rewards.step_logits(verifier, tokenizer, episodes, 2)
    assert [len(steps) for steps in logits] == [2, 1] and all(map(math.isfinite, logits[0]))
    assert "1 of 2 responses are longer than the verifier's context of 12 tokens" in caplog.text
    pairwise = rewards.pairwise_reward(verifier, episodes, RewardFlags(), 2)
    short = Batch(episodes.batch.tokens[:1, :12], episodes.batch.response_mask[:1, :12])
    alone = response_scores(verifier, *short.inputs).item()
    assert pairwise[0].sum().item() == pytest.approx((alone - 0.5) / 2, abs=1e-4)
    verifier.config = replace(verifier.config, max_seq_len=3)
    with pytest.raises(UserError, match="leaves none of the verifier's context of 3"):
        rewards.step_logits(verifier, tokenizer, episodes, 2)


def test_graded_reward_compares_with_labels_and_leaves_the_unlabelled_nothing(tokenizer: Tokenizer) -> None:
    texts = ["#### 1", "#### 3", "no", "#### 3"]
    rollout = episodes_of(tokenizer, texts, [True] * 4)
    rollout = rollout._replace(prompts=[prompt(i, label) for i, label in enumerate(["1", "2", "3", None])])
    with Grader("GSM8K") as grader:
        found, counts = rewards.graded_reward(grader, rollout)
        assert found == [1.0, 0.0, 0.0, 0.0]
        right, wrong, unparsed = (counts[f"graded_{name}"] for name in ("right", "wrong", "unparsed"))
        assert (right, wrong, unparsed) == ((1, 3), (1, 3), (1, 3)) and counts["graded_error"] == (0, 3)
        unlabelled = rollout.take(torch.tensor([3]))
        assert rewards.graded_reward(grader, unlabelled) == ([0.0], {})
        assert rewards.format_reward(grader, 0.25, rollout) == ([0.0, 0.0, -0.25, 0.0], {})


def test_counts_of_ranks_and_refills_add_up() -> None:
    parts = [{"graded_right": (1, 4)}, {}, {"graded_right": (2, 2), "reward_mine_failed": (0, 3)}]
    assert rewards.add_counts(parts) == {"graded_right": (3, 6), "reward_mine_failed": (0, 3)}


def test_rewards_are_weighted(tokenizer: Tokenizer) -> None:
    rollout = episodes_of(tokenizer, ["1", "22"], [True, True])

    def ones(rollout: Rollout) -> tuple[torch.Tensor, dict[str, tuple[int, int]]]:
        return rewards.at_last(torch.ones(2), rollout), {"seen": (1, 2)}

    found = rewards.score_rollout({"a": rewards.Reward(0.5, ones), "b": rewards.Reward(0.0, ones)}, rollout)
    assert {name: part.sum().item() for name, part in found.by_reward.items()} == {"a": 2.0, "b": 2.0}
    assert_close(found.total, 0.5 * rewards.at_last(torch.ones(2), rollout))
    assert found.counts == {"seen": (1, 2)}


def test_weights_belong_to_the_names_of_rewards() -> None:
    def weights(names: list[str], numbers: list[float]) -> dict[str, float]:
        judge = "v" if "verifier" in names else ""
        return ppo_config(reward=names, reward_weights=numbers, reward_model_ckpt_dir=judge).weights_by_reward

    assert weights(["rule", "verifier"], []) == {"rule": 1.0, "verifier": 1.0}
    assert weights(["rule", "verifier"], [1, 0]) == {"rule": 1, "verifier": 0}
    with pytest.raises(UserError, match="--reward_weights has 1 numbers for 2 rewards"):
        weights(["rule", "verifier"], [1.0])
    for names in (["rule", "rule"], []):
        with pytest.raises(UserError, match="each named once"):
            weights(names, [])
    for names in (["a.py:score", "b.py:score"], ["rule", "a.py:rule"], ["a.py:std"], ["a.py:format"],
                  ["a.py:code"], ["a.py:length_correlation"], ["a.py:score", "b.py:score_failed"]):
        with pytest.raises(UserError, match=r"the log has another '\w+'; rename it"):
            weights(names, [])
    assert weights(["a.py:one", "b.py:two"], [1, 2]) == {"a.py:one": 1, "b.py:two": 2}


@pytest.mark.parametrize("tensor_parallel_size", [1, 2])
def test_an_episode_is_graded_once_and_all_ranks_count_it(tensor_parallel_size: int, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def count(completions):\n    n = len(completions)\n    return [n] * n, {'n': n}\n")
    target, file = "tests.training.workers:graded_once", str(tmp_path / "mine.py")
    for found in run_ranks(2, target, tmp_path, tensor_parallel_size, file=file):  # on 1: more ranks than episodes
        assert found["earned"].tolist() == [[0.0, 0.0, 1.0]] and found["graded"] == 1
        # a user's function sees the episodes of all ranks
        assert found["counted"].tolist() == [[0.0, 0.0, 2.0]] * 2 and found["n"].tolist() == [2, 1]


@pytest.mark.parametrize("objective", ["pairwise", "outcome", "process"])
def test_equal_responses_earn_the_same_bits_beside_any_others(
    verifier: Decoder, tokenizer: Tokenizer, objective: str
) -> None:
    saving.record(verifier, objective=objective)
    text = "1+1=2" * 12
    rollout = episodes_of(tokenizer, [text, "c" * 90, "d", text, text], [True] * 4 + [False])
    found, _ = rewards.verifier_reward(verifier, tokenizer, RewardFlags(), 3, None, rollout)
    assert torch.equal(found[0], found[3])  # in passes of three, one has the longer row beside it and one has not
    for row in range(5):  # each has its own, the one that was cut off too
        one = rollout.take(torch.tensor([row]))
        alone, _ = rewards.verifier_reward(verifier, tokenizer, RewardFlags(), 1, None, one)
        assert_close(found[row], alone[0], rtol=1e-5, atol=1e-5)
    assert not torch.equal(found[0], found[4])


def test_a_step_ends_behind_a_character_of_several_tokens(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path)
    tokenizer, text = Tokenizer(tmp_path), "a\U0001f642\n\nb"
    tokens = tokenizer.encode(text)
    first, _ = rewards.step_ends(tokenizer, tokens, text, "\n\n")
    assert tokenizer.decode(tokens[: first + 1]) == "a\U0001f642\n\n"
