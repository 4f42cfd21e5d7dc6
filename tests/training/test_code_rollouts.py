"""PPO on solutions with code: what code prints is read by all that follows, and nothing is learned of it."""

import json
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import ppo_train
from src import load
from src.errors import UserError
from src.losses import gae
from src.report.page import write_report
from src.text.blocks import Marker
from src.training.rewards import at_last
from src.training.rollout import Rollout, pack_episodes
from tests.conftest import CODE_QUESTION, Folders
from tests.ranks import run_ranks
from tests.tiny import make_verifier, weights
from tests.training.test_ppo_invariance import assert_same_run
from tests.training.workers import collect, join_weights, ppo_buffers, ppo_config, ppo_models, ppo_update

SIZES = {"max_new_tokens": 80, "group_size": 2, "max_buffer_size": 10}
# It knows its solution by heart: many gradients are rounding, which Adam would make as large as the others, and equal
# responses have rewards that differ by rounding, which GRPO would
ASKED = SIZES | {"question": CODE_QUESTION, "lr": 1e-4, "adam_eps": 1e-3}
CASES = [
    ASKED | {"advantage": "gae", "gamma": 0.9},
    ASKED | {"advantage": "dr_grpo", "policy_loss": "gspo", "kl_loss": "k3", "entropy_coef": 0.01},
]


@pytest.fixture(scope="module")
def code_verifier(code_solver: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_verifier(code_solver, tmp_path_factory.mktemp("verifier"))


def by_length(rollout: Rollout) -> torch.Tensor:
    return at_last(rollout.lengths.float() - 2.5, rollout)


def test_what_code_prints_is_read_but_not_learned(code_solver: str, code_verifier: str, tmp_path: Path) -> None:
    config, tokenizer = ppo_config(gamma=0.9, kl_coef=0.0, **SIZES), load.load_tokenizer(code_solver)
    models = ppo_models(code_solver, code_verifier, str(tmp_path), lr=0.0)
    found, _ = collect(models, tokenizer, by_length, config, 0, CODE_QUESTION)
    rollout, tokens, mask = found.rollout, found.batch.tokens, found.batch.response_mask
    begins, ends, asks = (tokenizer.control[marker] for marker in (
        Marker.EXECUTION, Marker.END_OF_BLOCK, Marker.ASSISTANT))
    banned = [tokenizer.control[marker] for marker in (
        Marker.EXECUTION, Marker.USER, Marker.SYSTEM, Marker.ASSISTANT)]
    for row in range(len(tokens)):
        printed, expected = False, []
        start, last = tokens[row].tolist().index(asks) + 1, int(rollout.last[row])
        for index in tokens[row, start : last + 1].tolist():
            printed = printed or index == begins
            expected.append(not printed)
            printed = printed and index != ends
        assert mask[row].tolist() == [False] * start + expected + [False] * (len(tokens[row]) - last - 1)
        # each is predicted from all that stands before it, by the distribution that was sampled from
        alone, places = tokens[row : row + 1, : last + 1], mask[row].nonzero()[:, 0]
        logits = models.actor.model.logits(models.actor.model(alone))[0].index_fill(1, torch.tensor(banned), -1e9)
        logprobs = (logits[:, : tokenizer.vocab_size] / config.temperature).log_softmax(-1)
        expected = logprobs[places - 1, tokens[row, places]]
        assert_close(found.logprobs[row, places], expected, rtol=1e-4, atol=1e-4)
        values = models.critic.model.scores(models.critic.model(alone))[0]
        assert_close(found.values[row, places], values[places - 1], rtol=1e-4, atol=1e-4)
        # as if what was printed were not there: no discount for it
        earned = torch.zeros(1, len(places)).index_fill(1, torch.tensor([len(places) - 1]), len(places) - 2.5)
        earned[0, -1] -= 0.5 * (not rollout.finished[row])
        plain = gae(earned, found.values[row, places][None], torch.ones_like(earned).bool(), 0.9, 0.95)[0]
        assert_close(found.returns[row, places], plain + found.values[row, places], rtol=1e-4, atol=1e-4)
    holes = (~mask[:, 1:] & mask[:, :-1] & (torch.arange(mask.shape[1] - 1) < rollout.last[:, None])).sum(1)
    assert holes.max() >= 2 and "<|execution|>" in rollout.responses[int(holes.argmax())]
    assert holes.tolist() == [each.count("ok") + each.count("error") for each in rollout.executions]
    outside = (found.logprobs, found.values, found.advantages, found.returns, found.weights, rollout.sampled_logprobs)
    assert not torch.stack(outside)[:, ~mask].any()
    assert_close(rollout.sampled_logprobs, found.logprobs, rtol=1e-3, atol=1e-3)
    packed = pack_episodes(found.batch, torch.tensor([3, 2]))
    assert packed.response_counts().tolist() == rollout.lengths[[3, 2]].tolist()

    assert torch.equal(found.logprobs, found.reference_logprobs)
    before = {name: weight.clone() for name, weight in models.actor.model.named_parameters()}
    metrics = ppo_update(models, found, config, 0)
    assert metrics["first_ratio_deviation"] == 0.0 and metrics["grad_norm"] > 0
    assert all(torch.equal(weight, before[name]) for name, weight in models.actor.model.named_parameters())


@pytest.mark.parametrize("case", CASES, ids=["gae", "gspo"])
def test_micro_batches_change_nothing(
    code_solver: str, code_verifier: str, tmp_path: Path, case: dict[str, object]
) -> None:
    whole = ppo_buffers(code_solver, code_verifier, str(tmp_path), **case)
    assert_same_run(ppo_buffers(code_solver, code_verifier, str(tmp_path), 10, **case), whole)


def test_ranks_change_nothing(code_solver: str, code_verifier: str, tmp_path: Path) -> None:
    """Two models of two ranks: each pair runs the code of its own episodes."""
    # at temperature 1 a draw in a thousand falls among ids of probability 1e-6, where rounding picks this or the next
    case = CASES[0] | {"max_new_tokens": 40, "group_size": 1, "temperature": 0.5}
    whole = ppo_buffers(code_solver, code_verifier, str(tmp_path), **case)
    ranks = run_ranks(4, "tests.training.workers:ppo_cases", tmp_path, 2, actor=code_solver, critic=code_verifier,
                      log_dir=str(tmp_path / "log"), cases=[case])
    models = ppo_models(code_solver, code_verifier, str(tmp_path))
    started = {"actor": models.actor.model, "critic": models.critic.model}
    for first in (0, 2):
        group = [rank["0"] for rank in ranks[first : first + 2]]
        joined = {part: join_weights([rank[part] for rank in group], model) for part, model in started.items()}
        assert_same_run(joined | {"rollouts": group[0]["rollouts"]}, whole)


STOPPING = """
from pathlib import Path

calls = 0

def nothing(completions):
    global calls
    calls += 1
    if calls > 1 and Path(__file__).with_name("stop").exists():
        raise RuntimeError("stopped")
    return [0.0] * len(completions)
"""


def test_a_run_is_resumed_bit_for_bit_and_logs_what_its_code_did(code_solver: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(STOPPING)
    (tmp_path / "prompts.json").write_text(json.dumps([{"instruction": CODE_QUESTION, "label": "68"}]))

    def run(name: str) -> Path:
        flags = {
            "actor_ckpt_dir": code_solver, "actor_save_dir": str(tmp_path / name), "advantage": "grpo", "task": "toy",
            "reward": ["rule", "code", f"{tmp_path}/mine.py:nothing"], "reward_weights": [1.0, 0.5, 0.0],
            "train_file": str(tmp_path / "prompts.json"), "eval_file": str(tmp_path / "prompts.json"),
            "group_size": 4, "max_buffer_size": 4, "max_new_tokens": 80, "max_batch_size": 4, "epochs": 2,
            "save_every": 1, "lr": 1e-4, "resume": "auto",
        }
        ppo_train.main(ppo_train.PPOConfig(**flags))
        return tmp_path / name

    whole = run("whole")
    (tmp_path / "stop").touch()
    with pytest.raises(UserError, match="raised RuntimeError: stopped"):
        run("parts")
    (tmp_path / "stop").unlink()
    parts = run("parts")
    assert all(torch.equal(weight, weights(parts)[name]) for name, weight in weights(whole).items())
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["eval_accuracy"] == 1.0
    for row in rows[1:]:
        assert row["executions"] > 0 and row["sampler_mismatch"] < 1e-3
        assert sum(row[f"executions_{end}"] for end in ("ok", "error", "timeout", "other")) == pytest.approx(1.0)
        assert row["reward"] == pytest.approx(row["reward_rule"] + 0.5 * row["reward_code"], abs=1e-6)
    assert rows[1]["kl"] == 0.0 == rows[1]["first_ratio_deviation"]
    told = map(json.loads, (whole / "rollouts/step-000001.jsonl").read_text().splitlines())
    told = next(row for row in told if None in row["token_kl"])
    printed = [piece for piece, kl in zip(told["pieces"], told["token_kl"], strict=True) if kl is None]
    assert (printed[0], printed[-1]) == ("<|execution|>", "<|endofblock|>") and None in told["advantages"]
    assert told["tokens"] == len(told["pieces"]) - len(printed)
    assert "printed by code" in write_report(whole).read_text()


def test_what_cannot_go_together_is_refused(folders: Folders, code_base: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.json").write_text(json.dumps([{"instruction": "1+1=", "label": "2"}]))
    flags = {"actor_save_dir": str(tmp_path / "actor"), "train_file": str(tmp_path / "prompts.json"),
             "advantage": "grpo", "task": "toy"}
    with pytest.raises(UserError, match="writes solutions with code, which no server runs while it samples"):
        ppo_train.main(ppo_train.PPOConfig(actor_ckpt_dir=code_base, reward=["rule"], rollout_backend="openai",
                                           base_url=["http://localhost:1/v1"], lora_rank=2, **flags))
    with pytest.raises(UserError, match="--reward code looks at runs of code, but .* answers in text alone"):
        ppo_train.main(ppo_train.PPOConfig(actor_ckpt_dir=folders.one, reward=["code"], **flags))
    with pytest.raises(UserError, match="--max_rounds has no effect: .* answers in text alone"):
        ppo_train.main(ppo_train.PPOConfig(actor_ckpt_dir=folders.one, reward=["rule"], max_rounds=5, **flags))
