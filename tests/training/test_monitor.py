"""src/training/monitor.py: the panel by hand, what stops a run at its start, and when an alarm rings."""

import json
import logging

import pytest
import torch

from src.data.batch import Batch
from src.data.examples import Prompt
from src.errors import UserError
from src.models.forward import Distribution
from src.text.tokenizer import Tokenizer
from src.training import monitor
from src.training.ppo import PPOBuffer
from src.training.rewards import Scores
from src.training.rollout import Rollout
from tests.training.workers import ppo_config

MASK = torch.tensor([[0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 1, 1, 1]]).bool()
EARNED = torch.zeros(4, 4).index_put((torch.tensor(3), torch.tensor(3)), torch.tensor(2.0))
SCORES = Scores({"rule": EARNED}, EARNED, {"graded_right": (1, 4)})


def buffer(**changes: object) -> PPOBuffer:
    """Two groups of two episodes of 1, 2, 2 and 3 tokens."""
    rollout = Rollout(
        [Prompt(str(index // 2), "q", "4", None, None) for index in range(4)],
        ["a", "b", "c", "d"],
        Batch(torch.zeros(4, 4, dtype=torch.int64), MASK),
        torch.tensor([True, True, True, False]),
        -0.9 * MASK,
        [[]] * 4,
    )
    numbers = {
        "rollout": rollout,
        "scores": SCORES,
        "logprobs": -1.0 * MASK,
        "reference_logprobs": -1.5 * MASK,
        "values": None,
        "advantages": MASK.float(),
        "returns": None,
        "weights": MASK.float(),
        "trainable": torch.arange(4),
        "distribution": Distribution(size=8),
    }
    return PPOBuffer(**(numbers | changes))


def test_panel_by_hand() -> None:
    numbers = ppo_config(advantage="grpo", group_size=2, kl_coef=0.1)
    found = monitor.rollout_metrics(buffer(), numbers, kl_scale=3.0)
    expected = {
        "reward": 0.5,
        "reward_std": 0.75**0.5,
        "reward_rule": 0.5,
        "graded_right": 0.25,
        "kl": 0.5,
        "kl_k3": 2.718281828**-0.5 + 0.5 - 1,
        "kl_response": 1.0,  # 8 tokens of half a nat in 4 responses
        "kl_coef": 0.3,
        "response_tokens": 2.0,
        "response_tokens_max": 3.0,
        "truncated_share": 0.25,
        "kept_share": 1.0,
        # deviations -.5 -.5 -.5 1.5 and -1 0 0 1: 2 / (sqrt 3 sqrt 2)
        "reward_length_correlation": 2 / 6**0.5,
        "sampler_mismatch": 0.1,
        "sampler_mismatch_max": 0.1,
        "dead_groups": 0.5,
    }
    assert found == {name: pytest.approx(value, abs=1e-5) for name, value in expected.items()}
    assert monitor.correlation(torch.ones(3), torch.arange(3.0)) == 0.0


def test_samples_can_be_read(tokenizer: Tokenizer) -> None:
    ids = torch.tensor([tokenizer.encode("one two")[-2:] * 2] * 4)
    rollout = buffer().rollout._replace(batch=Batch(ids, MASK))
    found = buffer(rollout=rollout, trainable=torch.tensor([1]))
    first, second = monitor.readable_rows(found, 2, tokenizer)
    assert second["pieces"] == tokenizer.pieces(ids[1][MASK[1]].tolist())
    assert len(second["pieces"]) == 2 and second["token_kl"] == [0.5, 0.5] and second["advantages"] == [1.0, 1.0]
    assert (
        first | {"id": "0", "response": "a", "rewards": {"rule": 0.0}, "tokens": 1, "learned": False} == first
    )
    assert second["kl"] == 1.0 and second["learned"] and monitor.readable_rows(buffer(), 0, tokenizer) == []


def test_start_is_refused_where_the_models_disagree() -> None:
    numbers = ppo_config(group_size=1)
    same = buffer(reference_logprobs=buffer().logprobs)
    good = monitor.rollout_metrics(same, numbers) | {"sampler_mismatch": 1e-6}
    monitor.check_start(good, same, numbers, torch.float32)
    monitor.check_start(good, buffer(), ppo_config(group_size=1, quantize="int8"), torch.float32)
    with pytest.raises(UserError, match="reference differs from the untrained actor by 0.5 nats"):
        monitor.check_start(good, buffer(), numbers, torch.float32)
    with pytest.raises(UserError, match="sampler and training forward differ by 0.1 nats"):
        monitor.check_start(good | {"sampler_mismatch": 0.1}, same, numbers, torch.float32)


def test_first_update_is_refused_without_gradient_or_with_another_policy() -> None:
    good = {"first_ratio_deviation": 1e-6, "grad_norm": 1.0}
    assert monitor.check_first_update(good, buffer(), torch.float32)
    with pytest.raises(UserError, match="first probability ratio is off 1 by 0.5"):
        monitor.check_first_update(good | {"first_ratio_deviation": 0.5}, buffer(), torch.float32)
    assert monitor.check_first_update(good | {"first_ratio_deviation": 0.06}, buffer(), torch.bfloat16)
    with pytest.raises(UserError, match="advantages but no gradient"):
        monitor.check_first_update(good | {"grad_norm": 0.0}, buffer(), torch.float32)
    nothing = buffer(advantages=torch.zeros(4, 4))  # equal rewards: nothing to learn is no mistake
    assert not monitor.check_first_update(good | {"grad_norm": 0.0}, nothing, torch.float32)
    empty = buffer(trainable=torch.zeros(0, dtype=torch.int64))  # nor is a buffer without an episode to learn from
    assert not monitor.check_first_update(good | {"first_ratio_deviation": 0.0, "grad_norm": 0.0}, empty, torch.float32)


def test_kl_controller_by_hand() -> None:
    numbers = ppo_config(kl_target=2.0, kl_horizon=100.0)
    assert monitor.kl_factor(2.0, 10, numbers) == 1.0
    assert monitor.kl_factor(2.2, 10, numbers) == pytest.approx(1.1**0.1)
    assert monitor.kl_factor(9.0, 100, numbers) == pytest.approx(1.2)  # clipped at 0.2
    assert monitor.kl_factor(0.0, 100, numbers) == pytest.approx(0.8)
    assert monitor.kl_factor(0.0, 1000, numbers) == pytest.approx(0.8**10)  # a large buffer leaves it positive
    assert monitor.kl_factor(9.0, 10, ppo_config()) == 1.0


WELL = {
    "reward_std": 0.5,
    "truncated_share": 0.1,
    "kl": 0.01,
    "clipped_low": 0.05,
    "clipped_high": 0.05,
    "entropy": 0.5,
    "reward_length_correlation": 0.3,
    "graded_right": 0.5,
    "reward_verifier": 0.0,
}


def test_equal_rewards_are_no_alarm_where_a_teacher_is_learnt_from() -> None:
    alarms = monitor.Monitor(logging.getLogger("test"), {})
    assert alarms.check(1, WELL | {"dead_groups": 1.0, "reward_std": 0.0, "teacher_kl": 0.1}) == ({}, [])


def test_a_reward_functions_own_numbers_are_no_alarm_whatever_they_are_called() -> None:
    alarms = monitor.Monitor(logging.getLogger("test"), {})
    assert alarms.check(1, WELL | {"reward_mine/parse_failed": 0.9}) == ({}, [])


@pytest.mark.parametrize(
    "ill, flag",
    [
        ({"reward_std": 0.0}, "--reward"),
        ({"truncated_share": 0.4}, "--max_new_tokens"),
        ({"kl": 0.6}, "--kl_coef"),
        ({"clipped_low": 0.3}, "--inner_epochs"),
        ({"entropy": 0.001}, "--clip_high"),
        ({"explained_variance": -2.0}, "--critic_warmup"),
        ({"dead_groups": 0.9}, "--group_size"),
        ({"graded_timeout": 0.08, "graded_error": 0.04}, "--reward"),
        ({"reward_mine_failed": 0.2}, "--reward"),
        ({"reward_length_correlation": 0.9}, "--overlong_buffer"),
        ({"graded_unparsed": 0.7}, "--task"),
    ],
)
def test_an_alarm_names_its_flag_and_does_not_repeat(
    ill: dict[str, float], flag: str, caplog: pytest.LogCaptureFixture
) -> None:
    alarms = monitor.Monitor(logging.getLogger("test"), {})
    assert alarms.check(1, WELL) == ({}, []) and not caplog.records
    said = []
    for step in (*range(2, 12), 2 + monitor.REPEAT):
        shown, warned = alarms.check(step, WELL | ill)
        ((name, advice),) = shown.items()
        assert flag in advice
        said.append(warned)
    assert said == [[f"{name}: {advice}"], *([[]] * 9), [f"{name}: {advice}"]]
    assert [record.getMessage() for record in caplog.records] == [
        f"buffer {step}: {name}: {advice}" for step in (2, 2 + monitor.REPEAT)
    ]


def test_the_summary_counts_the_buffers_of_each_alarm_over_a_resume(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    logger, state = logging.getLogger("test"), {}
    alarms = monitor.Monitor(logger, state)
    alarms.summary(3)
    assert caplog.records.pop().getMessage() == "no alarm in 3 buffers"
    for step in range(1, 9):
        if step == 5:  # saved and resumed
            saved = json.loads(json.dumps(state))
            alarms = monitor.Monitor(logger, state)
            state.update(saved)
        alarms.check(step, WELL | {"kl": 0.6 if step % 2 else 0.0, "reward_std": float(step != 7)})
    alarms.summary(8)
    far, none = [record.getMessage() for record in caplog.records][-2:]  # after the warnings of buffers
    assert far.startswith("alarm in 4 of 8 buffers, from 1 to 7: far away: the policy is over 0.5 nats")
    assert none.startswith("alarm in 1 of 8 buffers, from 7 to 7: no spread: ")


@pytest.mark.parametrize("stopped_after", [None, 7])
def test_hacking_is_a_rising_verifier_with_falling_answers(
    caplog: pytest.LogCaptureFixture, stopped_after: int | None
) -> None:
    for sign, rings in ((1, False), (-1, True)):
        caplog.clear()
        state: dict[str, object] = {}
        alarms = monitor.Monitor(logging.getLogger("test"), state)
        for step in range(monitor.WINDOW + monitor.REPEAT // 2):
            noise = 0.01 * (-1) ** step
            rewards = {"reward_verifier": 0.1 * step + noise, "graded_right": 0.5 + sign * 0.01 * step + noise}
            alarms.check(step, WELL | rewards)
            if step in (stopped_after, monitor.WINDOW + 2):  # before the alarm and behind it: saved and resumed
                saved = json.loads(json.dumps(state))
                alarms = monitor.Monitor(logging.getLogger("test"), state)
                state.update(saved)
        assert caplog.text.count("found the verifier's weakness") == rings
