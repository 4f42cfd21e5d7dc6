"""src/training/ppo.py: where rewards, values and log-probs sit, and the first minibatch."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from src import load, losses
from src.data.batch import Batch
from src.evaluation.metrics import answer_classes
from src.evaluation.report import Graded, summarize
from src.grading.extract import Extraction
from src.grading.grader import Grader
from src.grading.tasks import Task
from src.inference.sampling import Sampling
from src.models.decoder import Decoder
from src.models.forward import Distribution, response_logprobs, response_values
from src.runlog import Phases
from src.text.tokenizer import Tokenizer
from src.training import ppo
from src.training.monitor import measure_held_out, rollout_metrics
from src.training.ppo import PPOBuffer
from src.training.ppo_config import PPOConfig
from src.training.ppo_setup import Inputs, PPOModels
from src.training.rewards import at_last
from src.training.rollout import Rollout, sample_rollout
from src.training.trainer import StepReport, lr_factor
from tests.conftest import Folders
from tests.ranks import OURS, ROOT, TIMEOUT
from tests.tiny import weights
from tests.training.workers import PROMPTS, collect, ppo_config, ppo_models, ppo_update

EOS = 2


@pytest.fixture
def models(folders: Folders, tmp_path: Path) -> PPOModels:
    return ppo_models(folders.one, folders.verifier, str(tmp_path / "log"))


def by_length(rollout: Rollout) -> Tensor:
    """A reward that differs between episodes."""
    return at_last(rollout.lengths.float() - 2.5, rollout)


def buffer_of(
    models: PPOModels, tokenizer: Tokenizer, reward: Callable[[Rollout], Tensor], config: PPOConfig, iteration: int
) -> PPOBuffer:
    """A buffer of PROMPTS with one reward."""
    return collect(models, tokenizer, reward, config, iteration)[0]


class Recorder:
    """Takes a trainer's place: the losses of each optimizer step, and weights that stay as they are."""

    def __init__(self, model: Decoder) -> None:
        self.model, self.losses = model, [[]]

    def set_step(self, step: int) -> None: ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.losses[-1].append(loss)

    def step(self) -> StepReport:
        self.losses.append([])
        return StepReport(sum(self.losses[-2]).item(), 0.0, 0.0)


def actor_loss(models: PPOModels, buffer: PPOBuffer, config: PPOConfig) -> tuple[Tensor, dict[str, float]]:
    """The loss of one optimizer step over a whole buffer, and what the log says of it."""
    actor = Recorder(models.actor.model)
    metrics = ppo.update_actor(actor, buffer, replace(config, minibatches=1, inner_epochs=1), 0)
    return sum(actor.losses[0]), metrics


def test_rewards_of_a_buffer_sit_on_the_last_tokens(models: PPOModels, tokenizer: Tokenizer) -> None:
    # with gamma = lambda = 1 and no KL the return of every token is the reward still to come: all of it
    numbers = ppo_config(gamma=1.0, gae_lambda=1.0, kl_coef=0.0)
    found = buffer_of(models, tokenizer, by_length, numbers, iteration=1)
    mask = found.batch.response_mask
    rewards = by_length(found.rollout).sum(1) - 0.5 * ~found.rollout.finished
    assert_close(found.returns, rewards[:, None] * mask)
    # with gamma = 0 only the token that the reward sits on returns it
    found = buffer_of(models, tokenizer, by_length, ppo_config(gamma=0.0, kl_coef=0.0), iteration=1)
    last = (torch.arange(mask.shape[1]) * mask).argmax(1)
    expected = torch.zeros(mask.shape)
    expected[torch.arange(len(mask)), last] = rewards
    assert_close(found.returns, expected, rtol=1e-5, atol=1e-5)
    # the last token is EOS exactly where the response ended by itself
    assert torch.equal(found.batch.tokens[torch.arange(len(mask)), last] == EOS, found.rollout.finished)
    assert 0 < found.rollout.finished.sum() < len(mask)


def test_values_and_logprobs_belong_to_the_state_before_the_token(
    models: PPOModels, tokenizer: Tokenizer
) -> None:
    numbers = ppo_config()
    found = buffer_of(models, tokenizer, by_length, numbers, iteration=0)
    for row, (tokens, mask) in enumerate(zip(found.batch.tokens, found.batch.response_mask, strict=True)):
        places = mask.nonzero()[:, 0]
        alone = tokens[None, : places[-1] + 1]
        scores = models.critic.model.scores(models.critic.model(alone))[0]
        logits = models.actor.model.logits(models.actor.model(alone))[0, :, : tokenizer.vocab_size]
        logprobs = (logits / numbers.temperature).log_softmax(-1)
        assert_close(found.values[row, places], scores[places - 1], rtol=1e-5, atol=1e-5)
        expected = logprobs[places - 1, tokens[places]]
        assert_close(found.logprobs[row, places], expected, rtol=1e-5, atol=1e-5)
        outside = torch.stack((found.values, found.logprobs, found.advantages, found.returns))[
            :, row, ~mask
        ]
        assert not outside.any()
    # the sampler draws from the very distribution that is trained, though half of the embedding is padding
    assert tokenizer.vocab_size < models.actor.model.config.vocab_size
    assert_close(found.rollout.sampled_logprobs, found.logprobs, rtol=1e-4, atol=1e-4)


def test_first_minibatch_has_ratio_1_and_no_kl_but_a_gradient(
    models: PPOModels, tokenizer: Tokenizer
) -> None:
    numbers = ppo_config(max_batch_size=2)
    found = buffer_of(models, tokenizer, by_length, numbers, iteration=0)
    assert torch.equal(found.logprobs, found.reference_logprobs)
    assert rollout_metrics(found, numbers)["kl"] == 0.0
    advantages = found.advantages[found.batch.response_mask]
    assert advantages.mean().abs() < 1e-5
    assert advantages.std(unbiased=False).item() == pytest.approx(1.0, abs=1e-4)
    first = next(ppo.minibatches(found, numbers, iteration=0))
    everyone = torch.cat([micro.rows for micro in first.micros])
    n_tokens = int(found.batch.response_mask[everyone].sum())
    assert (first.tokens, first.episodes) == (n_tokens, len(everyone))
    actor, critic = Recorder(models.actor.model), Recorder(models.critic.model)
    seen = ppo.update_critic(critic, found, numbers, 0) | ppo.update_actor(actor, found, numbers, 0)
    assert seen["ratio_deviation_max"] < 1e-5 and seen["clipped_low"] == seen["clipped_high"] == 0
    assert seen["entropy"] > 0 and seen["value_clipped"] == 0
    # every ratio is 1, so the loss is minus the mean advantage of the minibatch
    mask = found.batch.response_mask[everyone]
    expected = -found.advantages[everyone][mask].mean().item()
    assert sum(actor.losses[0]).item() == pytest.approx(expected, abs=1e-5)
    for side in (actor, critic):
        sum(side.losses[0]).backward()
        norms = {name: parameter.grad.norm().item() for name, parameter in side.model.named_parameters()}
        assert min(norms.values()) > 1e-6, norms


def test_policy_gradient_raises_what_was_good(
    folders: Folders, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    models = ppo_models(folders.one, folders.verifier, str(tmp_path), lr=1e-3)
    numbers = ppo_config(kl_coef=0.0, minibatches=1, inner_epochs=1, missing_eos_penalty=0.0)

    def seven(rollout: Rollout) -> Tensor:
        return at_last(torch.tensor([1.0, -1.0, 0.0, 0.0, 0.0]), rollout)

    found = buffer_of(models, tokenizer, seven, numbers, iteration=0)
    ppo_update(models, found, numbers, 0)

    def gain(rows: list[int]) -> float:
        batch = Batch(found.batch.tokens[rows], found.batch.response_mask[rows])
        new = response_logprobs(models.actor.model, *batch.inputs, distribution=found.distribution)
        weighted = (new - found.logprobs[rows][batch.response_mask]) * found.advantages[rows][
            batch.response_mask
        ]
        return weighted.sum().item()

    assert gain(list(range(len(PROMPTS)))) > 0
    values = response_values(models.critic.model, *found.batch.inputs)
    mask = found.batch.response_mask
    error, old_error = ((v - found.returns[mask]).square().mean() for v in (values, found.values[mask]))
    assert error < old_error


def rows_of(step: ppo.Minibatch) -> list[int]:
    """The episodes of an optimizer step."""
    return [row for micro in step.micros for row in micro.rows.tolist()]


def test_minibatches_hold_every_episode_once_an_inner_epoch(
    models: PPOModels, tokenizer: Tokenizer
) -> None:
    numbers = ppo_config(max_batch_size=2, minibatches=2)
    found = buffer_of(models, tokenizer, by_length, numbers, iteration=0)
    steps = list(ppo.minibatches(found, numbers, iteration=0))
    assert len(steps) == 4 and all(len(micro.rows) <= 2 for one in steps for micro in one.micros)
    orders = [[sorted(rows_of(one)) for one in steps[start : start + 2]] for start in (0, 2)]
    assert all(sorted(first + second) == list(range(len(PROMPTS))) for first, second in orders)
    assert orders[0] != orders[1]
    few = list(ppo.minibatches(found, ppo_config(minibatches=9, inner_epochs=1), iteration=0))
    assert len(few) == len(PROMPTS)  # never an empty step


def test_critic_warm_up_leaves_the_actor_alone(models: PPOModels, tokenizer: Tokenizer) -> None:
    numbers = ppo_config()
    found = buffer_of(models, tokenizer, by_length, numbers, iteration=0)
    metrics = ppo_update(models, found, numbers, 0, critic_warmup=1)
    assert (models.actor.steps, models.critic.steps) == (0, 4)
    factors = [lr_factor(number, 8, 1, 0.1) for number in range(4)]
    assert metrics["lr"] == 0.0 and metrics["critic_lr"] == pytest.approx(1e-4 * sum(factors) / 4)
    for weight, expected in zip(models.actor.model.parameters(), models.frozen.parameters(), strict=True):
        assert torch.equal(weight, expected)


def test_rates_follow_the_buffers_also_behind_one_that_kept_nothing(
    folders: Folders, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    models = ppo_models(folders.one, folders.verifier, str(tmp_path), lr=1e-3, warmup_ratio=0.0, schedule="linear")
    numbers, rates = ppo_config(), {"lr": [], "critic_lr": []}
    models.critic.total_steps = 12
    found = buffer_of(models, tokenizer, by_length, numbers, iteration=0)
    nothing = found._replace(trainable=torch.zeros(0, dtype=torch.int64))
    for iteration, buffer in enumerate((found, nothing, found)):
        metrics = ppo_update(models, buffer, numbers, iteration, critic_warmup=1)
        for name, found_rates in rates.items():
            found_rates.append(metrics[name])

    def mean_rate(first: int, total: int) -> float:
        return 1e-3 * sum(lr_factor(first + place, total, 0, 0.1, "linear") for place in range(4)) / 4

    assert rates["lr"] == pytest.approx([0.0, 0.0, mean_rate(4, 8)])
    assert rates["critic_lr"] == pytest.approx([mean_rate(0, 12), 0.0, mean_rate(8, 12)])


def test_learning_rate_0_leaves_every_bit(folders: Folders, tmp_path: Path) -> None:
    rows = [{"instruction": prompt.instruction} for prompt in PROMPTS]
    (tmp_path / "prompts.json").write_text(json.dumps(rows))
    flags = {
        "actor_ckpt_dir": folders.one,
        "actor_save_dir": tmp_path / "actor",
        "critic_ckpt_dir": folders.verifier,
        "critic_save_dir": tmp_path / "critic",
        "reward_model_ckpt_dir": folders.verifier,
        "train_file": tmp_path / "prompts.json",
        "max_new_tokens": 6,
        "max_buffer_size": 3,
        "critic_warmup": 0,
        "lr": 0,
        "critic_lr": 0,
    }
    # an interpreter of its own, which says what it imports: a forked one has imported all
    words = sys.executable, "ppo_train.py", *(f"--{name}={value}" for name, value in flags.items())
    environment = os.environ | OURS | {"PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time")}
    assert "torch.nn" in imported and not imported & {"torch._dynamo", "sympy"}  # each as long as torch itself
    for source, target in ((folders.one, tmp_path / "actor"), (folders.verifier, tmp_path / "critic")):
        before, after = weights(source), weights(target)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    steps = [json.loads(line) for line in (tmp_path / "actor/metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 2
    for row in steps:  # nothing moved, so this holds beyond the first minibatch
        assert (
            row["kl"] == 0.0
            and row["ratio_deviation_max"] < 1e-5
            and row["clipped_low"] == row["clipped_high"] == 0.0
        )
        assert row["grad_norm"] > 0 and row["critic_grad_norm"] > 0


def estimates(advantage: str, group_size: int, kept: list[int]) -> list[list[float]]:
    """Advantages of four episodes: returns 1 and 3 of one prompt, 4 and 0 of another; the first two have two tokens."""
    rewards = torch.tensor([[9.0, 0.5, 0.5], [9.0, 1.0, 2.0], [9.0, 4.0, 9.0], [9.0, 0.0, 9.0]])
    mask = torch.tensor([[0, 1, 1], [0, 1, 1], [0, 1, 0], [0, 1, 0]]).bool()
    numbers = ppo_config(advantage=advantage, group_size=group_size, kl_coef=0.0)
    advantages, returns = ppo.compute_advantages(
        rewards * mask, None, mask, torch.tensor(kept, dtype=torch.int64), numbers
    )
    assert returns is None and not advantages[~mask].any()
    return advantages.tolist()


def test_critic_free_advantages_by_hand() -> None:
    everyone = [0, 1, 2, 3]
    assert estimates("dr_grpo", 2, everyone) == [[0, -1, -1], [0, 1, 1], [0, 2, 0], [0, -2, 0]]
    assert estimates("rloo", 2, everyone) == [[0, -2, -2], [0, 2, 2], [0, 4, 0], [0, -4, 0]]
    # what each reward gives is compared before: -2 and 0 off the mean 2, and 2 and -2, over their deviation
    deviation = ((1 + 1 + 4 + 4) / 4) ** 0.5
    expected = torch.tensor([[0, -1, -1], [0, 1, 1], [0, 2, 0], [0, -2, 0]]) / deviation
    assert_close(torch.tensor(estimates("gdpo", 2, everyone)), expected)
    # deviations sqrt(2) and sqrt(8) of two samples each
    a, b = 1 / (2**0.5 + 1e-4), 2 / (8**0.5 + 1e-4)
    expected = torch.tensor([[0, -a, -a], [0, a, a], [0, b, 0], [0, -b, 0]])
    assert_close(torch.tensor(estimates("grpo", 2, everyone)), expected)
    # returns to go 1 .5, 3 2, 4, 0: mean 1.75, variance 12.875 / 6 of the six tokens
    to_go = torch.tensor([[1, 0.5], [3, 2], [4, 1.75], [0, 1.75]])
    expected = (to_go - 1.75) / (sum((x - 1.75) ** 2 for x in (1, 0.5, 3, 2, 4, 0)) / 6) ** 0.5
    assert_close(torch.tensor(estimates("reinforce++", 1, everyone))[:, 1:], expected)
    # less the group's means 2 and 2: -1 -1.5 1 0 2 -2, mean -0.25
    centred = (-1, -1.5, 1, 0, 2, -2)
    scale = (sum((x + 0.25) ** 2 for x in centred) / 6) ** 0.5
    found = torch.tensor(estimates("reinforce++", 2, everyone))[:, 1:]
    assert_close(found[0, 0].item(), (-1 + 0.25) / scale, rtol=1e-5, atol=1e-5)


def test_a_group_of_equals_learns_nothing_from_discounted_rewards_either() -> None:
    rewards, mask = torch.zeros(4, 50), torch.ones(4, 50).bool()
    mask[1, 30:] = False
    rewards[0, 49] = rewards[1, 29] = rewards[2, 49] = 1.0
    numbers = ppo_config(advantage="reinforce++", group_size=2, kl_coef=0.0, gamma=0.9, whiten_advantages=False)
    found, _ = ppo.compute_advantages(rewards, None, mask, torch.arange(4), numbers)
    assert not found[:2].any()
    discounted = 0.5 * 0.9 ** torch.arange(49.0, -1.0, -1.0)
    assert_close(found[2:], torch.stack((discounted, -discounted)))


def test_whitening_is_over_the_kept_episodes_alone() -> None:
    # returns to go of the kept: 4 and 0
    found = estimates("reinforce++", 1, [2, 3])
    assert found[2][1] == pytest.approx(1.0) and found[3][1] == pytest.approx(-1.0) and not any(found[0])
    assert not any(map(any, estimates("reinforce++", 1, [])))


def test_decoupled_lambda_changes_returns_alone() -> None:
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.full((1, 3), 0.5)
    mask, kept = torch.ones(1, 3).bool(), torch.tensor([0])
    plain = ppo.compute_advantages(rewards, values, mask, kept, ppo_config(gae_lambda=0.5))
    apart = ppo.compute_advantages(rewards, values, mask, kept, ppo_config(gae_lambda=0.5, critic_lambda=1.0))
    assert torch.equal(plain[0], apart[0])
    assert_close(plain[1], torch.tensor([[0.625, 0.75, 1.0]]))
    assert_close(apart[1], torch.ones(1, 3))


def test_groups_without_signal_and_unfinished_responses_are_dropped(
    models: PPOModels, tokenizer: Tokenizer
) -> None:
    numbers = ppo_config(advantage="grpo", group_size=2, filter_groups=True)

    def second_group_differs(rollout: Rollout) -> Tensor:
        return at_last(torch.tensor([1.0, 1, 0, 1, 0, 0, 0, 0, 0.5, 0.5]), rollout)

    free = replace(models, critic=None)
    found, stats = collect(free, tokenizer, second_group_differs, numbers, 0)
    assert found.trainable.tolist() == [0, 1]
    assert [prompt.id for prompt in found.rollout.prompts] == ["1", "1"]
    assert len({tuple(row.tolist()) for row in found.batch.tokens}) == 2  # the samples of a group differ
    assert stats["dead_groups"] == pytest.approx(0.8) and stats["sampled_reward"] == pytest.approx(0.4)
    steps = ppo.minibatches(found, numbers, 0)
    assert sorted(row for one in steps for row in rows_of(one)) == [0, 0, 1, 1]  # of two passes
    masked = buffer_of(models, tokenizer, by_length, ppo_config(truncated="mask"), iteration=0)
    assert masked.trainable.tolist() == masked.rollout.finished.nonzero()[:, 0].tolist()
    assert 0 < len(masked.trainable) < len(PROMPTS)


class FirstCharacter(Grader):
    """Finds an answer in the beginning of random text, too."""

    def extract(self, response: str) -> Extraction:
        """The first character."""
        return Extraction(response[:1].strip() or None, "first")


@pytest.mark.parametrize("n", [1, 3])
def test_held_out_measures_count_every_prompt_and_are_those_of_the_evaluator(
    models: PPOModels, tokenizer: Tokenizer, n: int
) -> None:
    numbers = ppo_config(eval_file="held", eval_samples=n)
    sampling = Sampling(temperature=numbers.temperature * (n > 1), max_new_tokens=6, seed=11)
    same = sample_rollout(models.actor.model, PROMPTS, tokenizer, sampling, numbers=range(n), max_batch_size=4)
    task = Task(name="begins", extraction="gsm8k/last-number@5", equality="typed@5")
    labels = [same.responses[place * n][:1] or "7" for place in range(len(PROMPTS))]
    prompts = [prompt._replace(label=label) for prompt, label in zip(PROMPTS, labels, strict=True)]
    data = Inputs([], prompts, 6, tokenizer, task, [], 1)  # a sixth was too long to be answered
    with FirstCharacter(task) as grader:
        found = measure_held_out(numbers, models, data, grader, Phases())
        rows = {prompt.id: [Graded(verdict) for verdict in grader.grade(same.responses[place * n : (place + 1) * n],
                                                                        [prompt.label] * n)]
                for place, prompt in enumerate(prompts)}
        for id, graded in rows.items():
            votes = answer_classes([each.verdict.answer for each in graded], grader.equal)
            rows[id] = [each._replace(vote=vote) for each, vote in zip(graded, votes, strict=True)]
    expected = summarize(task, [*prompts, prompts[0]._replace(id="too long")], rows)
    assert found["eval_accuracy"] == pytest.approx(expected["accuracy"]) and 0 < found["eval_accuracy"] < 1
    assert len(found) == (3 if n > 1 else 1)
    if n > 1:
        assert found["eval_pass"] > found["eval_accuracy"]
        assert found["eval_pass"] == pytest.approx(expected["pass_at"][n])
        assert found["eval_majority"] == pytest.approx(expected["maj_at"][n])


def test_whitened_rewards_and_truncated_importance(models: PPOModels, tokenizer: Tokenizer) -> None:
    rewards, values = torch.tensor([[0.0, 0.0, 3.0], [0.0, 0.0, 1.0]]), torch.zeros(2, 3)
    mask, kept = torch.ones(2, 3).bool(), torch.tensor([0, 1])
    numbers = ppo_config(gae_lambda=1.0, whiten_rewards=True, whiten_advantages=False)
    advantages, returns = ppo.compute_advantages(rewards, values, mask, kept, numbers)
    deviation = (10 / 6 - (4 / 6) ** 2) ** 0.5  # of 0 0 3 0 0 1; the mean stays
    expected = torch.tensor([[3.0] * 3, [1.0] * 3]) / deviation
    assert_close(advantages, expected) and assert_close(returns, expected)
    # a sampler that finds every token twice as likely: its tokens count half; the other way round at most the cap
    plain = buffer_of(models, tokenizer, by_length, ppo_config(), iteration=0)
    for factor, cap, weight in ((2.0, 2.0, 0.5), (0.25, 2.0, 2.0)):
        found = losses.truncated_importance(plain.logprobs, plain.logprobs + math.log(factor), cap)
        assert_close(found, torch.full_like(found, weight))
    weighed = buffer_of(models, tokenizer, by_length, ppo_config(tis_cap=2.0), iteration=0)
    importance = (plain.logprobs - plain.rollout.sampled_logprobs).exp()
    assert_close(weighed.advantages, plain.advantages * importance)
    assert torch.equal(weighed.returns, plain.returns)


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean", "seq-sum", "seq-constant"])
def test_aggregations_by_hand(models: PPOModels, tokenizer: Tokenizer, aggregation: str) -> None:
    numbers = ppo_config(advantage="dr_grpo", group_size=2, loss_aggregation=aggregation, max_batch_size=3)
    found = buffer_of(replace(models, critic=None), tokenizer, by_length, numbers, iteration=0)
    advantages, lengths = found.advantages.double(), found.rollout.lengths
    sums = advantages.sum(1)
    expected = {
        "token-mean": sums.sum() / lengths.sum(),
        "seq-mean": (sums / lengths).mean(),
        "seq-sum": sums.mean(),
        "seq-constant": (sums / numbers.max_new_tokens).mean(),
    }[aggregation]
    # every ratio is 1
    assert -actor_loss(models, found, numbers)[0].item() == pytest.approx(expected.item(), abs=1e-5)


def test_a_teacher_is_a_part_of_every_tokens_advantage(
    folders: Folders, models: PPOModels, tokenizer: Tokenizer
) -> None:
    numbers = ppo_config(advantage="dr_grpo", group_size=2, teacher_ckpt_dir="teacher", teacher_coef=0.5)
    models = replace(models, critic=None)
    plain, itself = (buffer_of(replace(models, teacher=teacher), tokenizer, by_length, numbers, iteration=0)
                     for teacher in (None, models.reference))
    assert torch.equal(plain.advantages, itself.advantages)  # from itself there is nothing to learn
    teacher = load.load_solver(folders.one)
    with torch.no_grad():
        teacher.output.weight.mul_(0.7)
    found = buffer_of(replace(models, teacher=teacher), tokenizer, by_length, numbers, iteration=0)
    batch = found.batch
    theirs = response_logprobs(teacher, *batch.inputs, distribution=Distribution(0.8, tokenizer.vocab_size))
    expected = plain.advantages[batch.response_mask] + 0.5 * (theirs - found.logprobs[batch.response_mask])
    assert_close(found.advantages[batch.response_mask], expected, rtol=1e-4, atol=1e-4)
    assert not found.advantages[~batch.response_mask].any()


def test_kl_loss_adds_its_estimate(models: PPOModels, tokenizer: Tokenizer) -> None:
    numbers = ppo_config(advantage="dr_grpo", group_size=2, loss_aggregation="token-mean")
    found = buffer_of(replace(models, critic=None), tokenizer, by_length, numbers, iteration=0)
    apart = found._replace(reference_logprobs=found.reference_logprobs - 0.5 * found.batch.response_mask)
    plain = actor_loss(models, apart, numbers)[0]
    for kind, expected in (("k2", 0.125), ("k3", 2.718281828**-0.5 + 0.5 - 1)):
        loss, metrics = actor_loss(models, apart, replace(numbers, kl_loss=kind, kl_loss_coef=0.01))
        assert (loss - plain).item() == pytest.approx(0.01 * expected, abs=1e-6)
        assert metrics["kl_loss"] == pytest.approx(expected, abs=1e-4)


def test_with_adapters_the_reference_is_the_actor_without_them(
    folders: Folders, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    numbers = ppo_config(advantage="grpo", group_size=2)
    alone = ppo_models(folders.one, "", str(tmp_path), lora_rank=4, lr=1e-2)
    first = buffer_of(alone, tokenizer, by_length, numbers, iteration=0)
    assert torch.equal(first.logprobs, first.reference_logprobs)
    ppo_update(alone, first, numbers, 0)
    shared = buffer_of(alone, tokenizer, by_length, numbers, iteration=1)
    whole = replace(alone, frozen=load.load_solver(folders.one))
    apart = buffer_of(whole, tokenizer, by_length, numbers, iteration=1)
    assert (shared.logprobs - shared.reference_logprobs).abs().max() > 1e-3
    assert torch.equal(shared.reference_logprobs, apart.reference_logprobs)
    assert torch.equal(shared.logprobs, apart.logprobs)


def test_entropy_bonus_is_subtracted_and_pushes_the_entropy_up(
    models: PPOModels, tokenizer: Tokenizer
) -> None:
    numbers = ppo_config(advantage="dr_grpo", group_size=2, loss_aggregation="token-mean")
    found = buffer_of(replace(models, critic=None), tokenizer, by_length, numbers, iteration=0)
    (plain, metrics), bonus = actor_loss(models, found, numbers), replace(numbers, entropy_coef=0.5)
    with_bonus, _ = actor_loss(models, found, bonus)
    assert (plain - with_bonus).item() == pytest.approx(0.5 * metrics["entropy"], rel=1e-4)
    gradients = torch.autograd.grad(with_bonus - plain, list(models.actor.model.parameters()))
    with torch.no_grad():
        for parameter, gradient in zip(models.actor.model.parameters(), gradients, strict=True):
            parameter -= 1e-2 * gradient
    assert actor_loss(models, found, numbers)[1]["entropy"] > metrics["entropy"] + 1e-5
