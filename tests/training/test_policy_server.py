"""ppo_train.py --rollout_backend openai: real servers that sample, die, hold another model or lie."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

import ppo_train
from src import load
from src.checkpoint import saving
from src.errors import UserError
from src.inference.engine import Request, Vocabulary
from src.inference.sampling import Sampling
from src.serving.server_client import Reply, read_reply
from src.training.policy_server import read_response
from src.training.ppo_config import PPOConfig
from tests.conftest import Folders
from tests.serving.test_server import post, serving


def train(folders: Folders, tmp_path: Path, urls: list[str], **flags: object) -> None:
    rows = [{"instruction": f"{n}+{n}=", "label": str(2 * n)} for n in range(4)]
    (tmp_path / "prompts.json").write_text(json.dumps(rows))
    (tmp_path / "mine.py").write_text("def length(prompt, response, label):\n    return len(response) / 10\n")
    flags = {
        "actor_ckpt_dir": folders.one, "actor_save_dir": str(tmp_path / "actor"),
        "train_file": str(tmp_path / "prompts.json"), "reward": [f"{tmp_path}/mine.py:length"],
        "advantage": "grpo", "group_size": 4, "max_buffer_size": 8, "max_new_tokens": 6,
        "lora_rank": 2, "lr": 0.05, "save_every": 1, "resume": "auto",
        "rollout_backend": "openai", "base_url": urls,
    } | flags
    ppo_train.main(PPOConfig(**flags))


def test_two_servers_sample_the_policy_as_it_learns_and_a_dead_one_is_told_of(
    folders: Folders, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log_dir = str(tmp_path / "log")
    with serving(folders.one) as first:
        with serving(folders.one) as second:
            train(folders, tmp_path, [first, second], max_steps=1, log_dir=log_dir)
            assert [len(json.loads(post(url, "/models")[1])["data"]) for url in (first, second)] == [2, 2]
        # one of them has died: the other does its share, with the adapter of the second buffer
        train(folders, tmp_path, [first, second], max_steps=2, log_dir=log_dir)
        assert "does not answer" in caplog.text
    metrics = [json.loads(line) for line in (tmp_path / "log/metrics.jsonl").read_text().splitlines()]
    steps = [row for row in metrics if "sampler_mismatch" in row]
    assert len(steps) == 2 and all(row["sampler_mismatch"] < 1e-4 for row in steps)
    assert steps[1]["kl"] > 1e-3  # an old policy would have been noticed
    # none is left: one line, and what was learnt is there to go on from
    with pytest.raises(UserError, match="8 of 8 responses are missing"):
        train(folders, tmp_path, [first, second], epochs=2, max_steps=3, log_dir=log_dir)
    assert (tmp_path / "actor/step-2/manifest.json").is_file()


def test_a_server_of_another_model_teaches_nothing(folders: Folders, tmp_path: Path) -> None:
    model = load.load_solver(folders.one)
    with torch.no_grad():
        model.output.weight.mul_(1.5)
    saving.begin_save(model, str(tmp_path / "other"), folders.one).complete()
    message = "the servers' log-probs differ from the actor's by"
    with serving(str(tmp_path / "other")) as url, pytest.raises(UserError, match=message):
        train(folders, tmp_path, [url], max_steps=1)
    assert not list(tmp_path.glob("actor/step-*"))


def test_a_buffer_is_sampled_from_the_policy_before_while_one_is_learnt_from(folders: Folders, tmp_path: Path) -> None:
    def responses(step: int, run: str) -> list[str]:
        rows = (tmp_path / run / f"rollouts/step-{step:06}.jsonl").read_text().splitlines()
        return [json.loads(row)["response"] for row in rows]

    # with a rate of 0 the policy is always the first one
    flags = {"ahead": {"rollout_ahead": 1, "mismatch_limit": 9}, "still": {"lr": 0}}
    with serving(folders.one) as url:
        for name, changed in flags.items():
            train(folders, tmp_path, [url], epochs=2, max_steps=3, actor_save_dir=str(tmp_path / name), **changed)
    metrics = [json.loads(line) for line in (tmp_path / "ahead/metrics.jsonl").read_text().splitlines()]
    mismatch = [row["sampler_mismatch"] for row in metrics if "sampler_mismatch" in row]
    assert mismatch[0] < 1e-4 and min(mismatch[1:]) > 1e-3
    same = [responses(step, "ahead") == responses(step, "still") for step in (1, 2, 3)]
    assert same == [True, True, False]


def reply(**changed: object) -> Reply:
    """A server's reply of three tokens, the last of which is the end, but for what is changed."""
    choice = {"text": "ab", "finish_reason": "stop", "token_ids": [5, 6, 2],
              "logprobs": {"token_logprobs": [-1.0, -2.0, -0.5]}} | changed
    count = choice.pop("count", 3)
    return read_reply(json.dumps({"choices": [choice], "usage": {"completion_tokens": count}}).encode())


LIES = {
    "no ids": ({"token_ids": None}, "no token ids"),
    "beyond the vocabulary": ({"token_ids": [5, 9, 2]}, "token id 9"),
    "no log-probs": ({"logprobs": None}, "0 valid log-probs"),
    "positive": ({"logprobs": {"token_logprobs": [-1.0, 0.5, -0.5]}}, "0 valid log-probs"),
    "too few": ({"logprobs": {"token_logprobs": [-1.0, -0.5]}}, "2 valid log-probs"),
    "a wrong count": ({"count": 4}, "a count of 4"),
    "goes on": ({"token_ids": [5, 2, 6]}, "go on after their end"),
    "no end": ({"token_ids": [5, 6, 7]}, "finish_reason stop after 3 of 4 tokens, the last of which is 7"),
    "cut short": ({"token_ids": [5, 6, 7], "finish_reason": "length"}, "finish_reason length after 3 of 4"),
}


@pytest.mark.parametrize("name", ["the truth", *LIES])
def test_a_lying_server_teaches_nothing(name: str) -> None:
    vocabulary = Vocabulary((2,), 8, lambda ids: "".join(".....abc"[index] for index in ids if index != 2))
    read = partial(read_response, Request("0", 0, [1, 3]), vocabulary=vocabulary, context=6,
                   sampling=Sampling(temperature=1.0, max_new_tokens=9))
    if name == "the truth":
        found = read(reply())
        assert (found.tokens, found.sampled_logprobs, found.finish, found.text) == (
            [5, 6, 2], [-1.0, -2.0, -0.5], "stop", "ab")
        return
    changed, reason = LIES[name]
    with pytest.raises(ValueError, match=reason):
        read(reply(**changed))


def test_flags_that_do_not_go_with_servers_are_refused() -> None:
    config = partial(PPOConfig, actor_ckpt_dir="a", actor_save_dir="b", advantage="grpo", reward=["rule"])
    assert config().tis_cap == 0
    served = partial(config, rollout_backend="openai", base_url=["http://127.0.0.1:1/v1"], lora_rank=4)
    assert served().tis_cap == 2
    for flags, reason in (({"lora_rank": -1}, "give --lora_rank"), ({"temperature": 0.7}, "--temperature 0.7"),
                          ({"base_url": []}, "go together"), ({"rollout_backend": "engine"}, "together"),
                          ({"rollout_ahead": 1, "tis_cap": 0}, "--rollout_ahead 1")):
        with pytest.raises(UserError, match=reason):
            served(**flags)
