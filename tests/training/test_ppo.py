"""src/training/ppo.py: where rewards, values and log-probs sit, the first minibatch, and invariance of the update."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from src import assemble
from src.data.collate import Batch
from src.data.examples import Prompt
from src.inference.scoring import response_scores
from src.runlog import RunLog
from src.text.tokenizer import Tokenizer
from src.training import ppo
from src.training.loop import TrainLoop
from tests.conftest import Folders
from tests.ranks import run_ranks, succeed
from tests.tiny import weights
from tests.training.workers import PROMPTS, join_weights, ppo_buffers, ppo_models, settings

EOS = 2


@pytest.fixture
def models(folders: Folders) -> ppo.Models:
    return ppo_models(folders.one, folders.verifier)


def by_length(prompts: Sequence[Prompt], responses: Sequence[str], batch: Batch) -> Tensor:
    """A reward that differs between episodes."""
    return batch.response_mask.sum(1).float() - 2.5


def test_reward_of_each_token_by_hand() -> None:
    # an episode that ended, one that did not, one of a single token
    mask = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 1, 1, 1], [0, 1, 0, 0, 0]]).bool()
    kl = torch.tensor([[9.0, 1, 2, 3, 9], [9, 9, 0, -1, 2], [9, 4, 9, 9, 9]])
    found = ppo.token_rewards(
        torch.tensor([1.0, 1.0, -2.0]),
        torch.tensor([True, False, True]),
        kl,
        mask,
        kl_coef=0.5,
        missing_eos_penalty=0.25,
    )
    expected = [[0, -0.5, -1, 1 - 1.5, 0], [0, 0, 0, 0.5, 1 - 0.25 - 1], [0, -2 - 2, 0, 0, 0]]
    assert_close(found, torch.tensor(expected))


def test_rewards_of_a_buffer_sit_on_the_last_tokens(models: ppo.Models, tokenizer: Tokenizer) -> None:
    # with gamma = lambda = 1 and no KL the return of every token is the reward still to come: all of it
    numbers = settings(gamma=1.0, gae_lambda=1.0, kl_coef=0.0)
    found = ppo.collect(models, PROMPTS, tokenizer, by_length, numbers, step=1)
    mask = found.batch.response_mask
    rewards = found.task_rewards - 0.5 * ~found.finished
    assert_close(found.returns, rewards[:, None] * mask)
    # with gamma = 0 only the token that the reward sits on returns it
    found = ppo.collect(models, PROMPTS, tokenizer, by_length, settings(gamma=0.0, kl_coef=0.0), step=1)
    last = (torch.arange(mask.shape[1]) * mask).argmax(1)
    expected = torch.zeros(mask.shape)
    expected[torch.arange(len(mask)), last] = rewards
    assert_close(found.returns, expected, rtol=1e-5, atol=1e-5)
    # the last token is EOS exactly where the response ended by itself
    assert torch.equal(found.batch.tokens[torch.arange(len(mask)), last] == EOS, found.finished)
    assert 0 < found.finished.sum() < len(mask)


def test_episodes_are_the_sampled_tokens_in_prompt_order(models: ppo.Models, tokenizer: Tokenizer) -> None:
    numbers = settings()
    episodes = ppo.sample_episodes(models.actor, PROMPTS, tokenizer, numbers, step=0)
    assert [done.request.id for done in episodes] == [prompt.id for prompt in PROMPTS]
    batch = ppo.episodes_batch(episodes)
    for done, tokens, mask in zip(episodes, batch.tokens, batch.response_mask, strict=True):
        assert tokens[mask].tolist() == done.tokens
        assert tokens[: len(done.request.prompt)].tolist() == done.request.prompt
    again = ppo.sample_episodes(models.actor, PROMPTS[::-1], tokenizer, numbers, step=0)[::-1]
    assert [done.tokens for done in again] == [done.tokens for done in episodes]
    other = ppo.sample_episodes(models.actor, PROMPTS, tokenizer, numbers, step=1)
    assert [done.tokens for done in other] != [done.tokens for done in episodes]


def test_values_and_logprobs_belong_to_the_state_before_the_token(
    models: ppo.Models, tokenizer: Tokenizer
) -> None:
    numbers = settings()
    found = ppo.collect(models, PROMPTS, tokenizer, by_length, numbers, step=0)
    for row, (tokens, mask) in enumerate(zip(found.batch.tokens, found.batch.response_mask, strict=True)):
        places = mask.nonzero()[:, 0]
        alone = tokens[None, : places[-1] + 1]
        scores = models.critic.scores(models.critic(alone))[0]
        logprobs = (models.actor.logits(models.actor(alone))[0] / numbers.temperature).log_softmax(-1)
        assert_close(found.values[row, places], scores[places - 1], rtol=1e-5, atol=1e-5)
        expected = logprobs[places - 1, tokens[places]]
        assert_close(found.old_logprobs[row, places], expected, rtol=1e-5, atol=1e-5)
        outside = torch.stack((found.values, found.old_logprobs, found.advantages, found.returns))[
            :, row, ~mask
        ]
        assert not outside.any()


def test_first_minibatch_has_ratio_1_and_no_kl_but_a_gradient(
    models: ppo.Models, tokenizer: Tokenizer
) -> None:
    numbers = settings(max_batch_size=2)
    found = ppo.collect(models, PROMPTS, tokenizer, by_length, numbers, step=0)
    assert torch.equal(found.old_logprobs, found.reference_logprobs)
    assert ppo.rollout_metrics(found)["kl"] == 0.0
    advantages = found.advantages[found.batch.response_mask]
    assert advantages.mean().abs() < 1e-5
    assert advantages.std(unbiased=False).item() == pytest.approx(1.0, abs=1e-4)
    micros = next(ppo.minibatches(found, numbers, step=0, inner_epoch=0))
    n_tokens = int(found.batch.response_mask[torch.cat(micros)].sum())
    picked = 0.0
    for rows in micros:
        loss, seen = ppo.actor_loss(models.actor, found, rows, numbers, n_tokens)
        loss.backward()
        assert seen.ratio_deviation_max < 1e-5 and seen.clipped == 0 and seen.entropy > 0
        picked += loss.item()
        value_loss = ppo.critic_loss(models.critic, found, rows, numbers, n_tokens)
        value_loss.backward()
    # every ratio is 1, so the loss is minus the mean advantage of the minibatch
    mask = found.batch.response_mask[torch.cat(micros)]
    expected = -found.advantages[torch.cat(micros)][mask].mean().item()
    assert picked == pytest.approx(expected, abs=1e-5)
    for model in (models.actor, models.critic):
        norms = {name: parameter.grad.norm().item() for name, parameter in model.named_parameters()}
        assert min(norms.values()) > 1e-6, norms


def test_policy_gradient_raises_what_was_good(
    models: ppo.Models, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    numbers = settings(kl_coef=0.0, minibatches=1, inner_epochs=1, missing_eos_penalty=0.0)

    def seven(prompts: Sequence[Prompt], responses: Sequence[str], batch: Batch) -> Tensor:
        return torch.tensor([1.0, -1.0, 0.0, 0.0, 0.0])

    found = ppo.collect(models, PROMPTS, tokenizer, seven, numbers, step=0)
    loops = [
        TrainLoop(model, RunLog(str(tmp_path), {}), lr=1e-3, total_steps=2)
        for model in (models[0], models[2])
    ]
    ppo.update(*loops, found, numbers, 0, train_actor=True)

    def gain(rows: list[int]) -> float:
        batch = Batch(found.batch.tokens[rows], found.batch.response_mask[rows])
        new = ppo.response_logprobs(models.actor, *batch, temperature=numbers.temperature)
        weighted = (new - found.old_logprobs[rows][batch.response_mask]) * found.advantages[rows][
            batch.response_mask
        ]
        return weighted.sum().item()

    assert gain(list(range(len(PROMPTS)))) > 0
    values = ppo.response_values(models.critic, *found.batch)
    mask = found.batch.response_mask
    error, old_error = ((v - found.returns[mask]).square().mean() for v in (values, found.values[mask]))
    assert error < old_error


def test_minibatches_hold_every_episode_once_an_inner_epoch(models: ppo.Models, tokenizer: Tokenizer) -> None:
    numbers = settings(max_batch_size=2, minibatches=2)
    found = ppo.collect(models, PROMPTS, tokenizer, by_length, numbers, step=0)
    orders = []
    for inner_epoch in (0, 1):
        steps = list(ppo.minibatches(found, numbers, step=0, inner_epoch=inner_epoch))
        assert len(steps) == 2 and all(len(rows) <= 2 for micros in steps for rows in micros)
        orders.append([sorted(torch.cat(micros).tolist()) for micros in steps])
        assert sorted(orders[-1][0] + orders[-1][1]) == list(range(len(PROMPTS)))
    assert orders[0] != orders[1]
    few = list(ppo.minibatches(found, settings(minibatches=9), step=0, inner_epoch=0))
    assert len(few) == len(PROMPTS)  # never an empty step


def test_critic_warm_up_leaves_the_actor_alone(
    models: ppo.Models, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    numbers = settings()
    found = ppo.collect(models, PROMPTS, tokenizer, by_length, numbers, step=0)
    log = RunLog(str(tmp_path), {})
    actor_loop, critic_loop = (
        TrainLoop(model, log, lr=1e-3, total_steps=4) for model in (models[0], models[2])
    )
    ppo.update(actor_loop, critic_loop, found, numbers, 0, train_actor=False)
    assert (actor_loop.steps, critic_loop.steps) == (0, 4)
    for found_weight, expected in zip(models.actor.parameters(), models.reference.parameters(), strict=True):
        assert torch.equal(found_weight, expected)


def test_update_does_not_depend_on_max_batch_size(folders: Folders, tmp_path: Path) -> None:
    expected = ppo_buffers(folders.one, folders.verifier, str(tmp_path), max_batch_size=5, lr=1e-5)
    for size in (1, 3):
        found = ppo_buffers(folders.one, folders.verifier, str(tmp_path), max_batch_size=size, lr=1e-5)
        for part, tensors in expected.items():
            for name, tensor in tensors.items():
                assert_close(
                    found[part][name],
                    tensor,
                    rtol=1e-5,
                    atol=1e-6 if part != "rollouts" else 1e-5,
                    msg=name.__add__,
                )


def test_update_is_the_same_on_two_ranks(folders: Folders, models: ppo.Models, tmp_path: Path) -> None:
    log_dir = str(tmp_path / "log")
    one = ppo_buffers(folders.one, folders.verifier, log_dir)
    two = run_ranks(
        2,
        "tests.training.workers:ppo_buffers",
        tmp_path,
        actor=folders.two,
        critic=folders.verifier_two,
        log_dir=log_dir,
    )
    for rank in two:
        for name, tensor in one["rollouts"].items():
            assert_close(
                rank["rollouts"][name], tensor, rtol=1e-3, atol=1e-4, check_dtype=False, msg=name.__add__
            )
    for part, model in (("actor", models.actor), ("critic", models.critic)):
        for name, found in join_weights([rank[part] for rank in two], model).items():
            assert_close(found, one[part][name], rtol=1e-4, atol=1e-4, msg=name.__add__)
            assert not torch.equal(found, model.get_parameter(name)), name


def test_verifier_reward_is_its_normalised_clamped_score(
    folders: Folders, models: ppo.Models, tokenizer: Tokenizer
) -> None:
    episodes = ppo.episodes_batch(ppo.sample_episodes(models.actor, PROMPTS, tokenizer, settings(), 0))
    verifier = assemble.load_verifier(folders.verifier)  # score statistics 0.5 and 2
    scores = response_scores(verifier, *episodes)
    responses = [""] * len(PROMPTS)
    for size in (1, 2, 5):
        found = ppo.verifier_reward(verifier, size)(PROMPTS, responses, episodes)
        assert_close(found, ((scores - 0.5) / 2).clamp(-5, 5), rtol=1e-5, atol=1e-5)
    assemble.set_score(verifier, score_std=1e-3)
    extreme = ppo.verifier_reward(verifier, 5)(PROMPTS, responses, episodes)
    assert set(extreme.tolist()) <= {-5.0, 5.0} and not extreme.requires_grad


def test_graded_reward_compares_with_the_labels() -> None:
    prompts = [Prompt(str(index), "q", label, None, None) for index, label in enumerate(["1", "2", "3"])]
    reward = ppo.graded_reward(
        lambda responses, labels: [r == label for r, label in zip(responses, labels, strict=True)]
    )
    found = reward(prompts, ["1", "3", "3"], Batch(torch.zeros(3, 1), torch.zeros(3, 1)))
    assert_close(found, torch.tensor([1.0, 0.0, 1.0]))


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
    succeed("ppo_train.py", *(f"--{name}={value}" for name, value in flags.items()))
    for source, target in ((folders.one, tmp_path / "actor"), (folders.verifier, tmp_path / "critic")):
        before, after = weights(source), weights(target)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    steps = [json.loads(line) for line in (tmp_path / "actor/metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 2
    for row in steps:  # nothing moved, so this holds beyond the first minibatch
        assert row["kl"] == 0.0 and row["ratio_deviation_max"] < 1e-5 and row["clipped"] == 0.0
        assert row["grad_norm"] > 0 and row["critic_grad_norm"] > 0
