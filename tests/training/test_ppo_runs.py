"""ppo_train.py as a whole: a run that fails in the middle of a buffer ends, once resumed, as one that never stopped."""

import gc
import json
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch

import ppo_train
from src import load, runlog
from src.errors import UserError
from src.models.decoder import Decoder
from src.training import monitor
from src.training.ppo import PPOBuffer
from tests.conftest import Folders
from tests.ranks import command, succeed
from tests.reference import relative_difference
from tests.tiny import weights
from tests.training.workers import PROMPTS

REWARD = """
from pathlib import Path

calls = 0

def length(prompt, response, label):
    global calls
    calls += 1
    if calls > 9 and Path(__file__).with_name("stop").exists():
        raise RuntimeError("stopped")
    return len(response) / 10
"""


def write_files(tmp_path: Path) -> None:
    """A reward and prompts."""
    (tmp_path / "mine.py").write_text(REWARD)
    rows = [{"instruction": prompt.instruction, "label": "4"} for prompt in PROMPTS]
    (tmp_path / "prompts.json").write_text(json.dumps(rows))
    (tmp_path / "eval.json").write_text(json.dumps(rows[:2]))


def words_of(folders: Folders, tmp_path: Path, name: str, **changes: object) -> list[str]:
    """The command of a run with an actor and a critic on what write_files() wrote."""
    flags = {
        "actor_ckpt_dir": folders.one,
        "actor_save_dir": tmp_path / name / "actor",
        "critic_ckpt_dir": folders.verifier,
        "critic_save_dir": tmp_path / name / "critic",
        "reward": f"rule,{tmp_path}/mine.py:length",
        "reward_weights": "0,1",
        "train_file": tmp_path / "prompts.json",
        "eval_file": tmp_path / "eval.json",
        "max_new_tokens": 5,
        "max_buffer_size": 4,
        "group_size": 2,
        "kl_target": 0.5,
        "kl_horizon": 10,
        "kl_loss": "k3",
        "critic_warmup": 1,
        "reference_refresh": 2,
        "save_every": 1,
        "lr": 1e-3,
        "resume": "auto",
    } | changes
    return ["ppo_train.py", *(f"--{flag}={value}" for flag, value in flags.items())]


def logged(tmp_path: Path, name: str) -> list[dict[str, object]]:
    """The metrics of a run but for times."""
    rows = map(json.loads, (tmp_path / name / "actor/metrics.jsonl").read_text().splitlines())
    return [{key: row[key] for key in row if not key.startswith(("seconds", "tokens_per_second"))} for row in rows]


def test_a_run_that_fails_in_a_buffer_goes_on_bit_for_bit(folders: Folders, tmp_path: Path) -> None:
    write_files(tmp_path)
    words = partial(words_of, folders, tmp_path)
    whole_run = succeed(*words("whole"))
    (tmp_path / "stop").touch()
    failed = command(*words("parts"))
    assert failed.returncode == 1 and "raised RuntimeError: stopped" in failed.stderr
    (tmp_path / "stop").unlink()
    resumed = succeed(*words("parts"))
    assert "resumed after step 2 of 3" in resumed.stderr
    # every buffer is cut off, and the resumed part knows that it was said
    warnings = [done.stderr.count("buffer 1: cut off: over 30%") for done in (whole_run, failed, resumed)]
    assert warnings == [1, 1, 0]
    assert all("3 of 3 buffers, from 1 to 3: cut off" in done.stderr for done in (whole_run, resumed))

    # one model at a time in memory, and the others in files meanwhile
    succeed(*words("phased", phases=True))
    assert not list((tmp_path / "phased").rglob("*-weights"))
    for model in ("actor", "critic"):
        whole = weights(tmp_path / "whole" / model)
        for other in (weights(tmp_path / name / model) for name in ("parts", "phased")):
            assert all(torch.equal(whole[name], other[name]) for name in whole | other)
    expected, found, phased = (logged(tmp_path, name) for name in ("whole", "parts", "phased"))
    assert found == expected == phased and [row["step"] for row in found] == [0, 1, 2, 3]
    # nothing of the right form was learned: the start is not surpassed, and the resumed part knows what it was worth
    assert found.pop(0)["eval_accuracy"] == found[2]["eval_accuracy"]
    for done, name in ((whole_run, "whole"), (resumed, "parts")):
        assert "nothing did better on held-out data than the start" in done.stderr
        assert not (tmp_path / name / "actor/best").exists()
    # the reference is the actor as it was saved after the second buffer
    assert found[1]["grad_norm"] > 0 and found[2]["kl"] == 0.0
    assert found[0]["kl_coef"] != found[2]["kl_coef"]  # adapted, and the resumed part knew it
    assert found[0]["policy_loss"] == 0.0 and found[1]["grad_norm"] > 0  # the critic was warmed up
    assert all(row["reward_rule"] == 0.0 and row["reward"] == row["reward_length"] for row in found)
    first = (tmp_path / "whole/actor/rollouts/step-000001.jsonl").read_text()
    assert first == (tmp_path / "parts/actor/rollouts/step-000001.jsonl").read_text()
    assert len(first.splitlines()) == 4 and json.loads(first.splitlines()[0])["rewards"].keys() == {
        "rule",
        "length",
    }


def test_ranks_that_share_batches_learn_what_one_does_and_go_on_bit_for_bit(folders: Folders, tmp_path: Path) -> None:
    write_files(tmp_path)
    words = partial(words_of, folders, tmp_path, policy_loss="gspo", eval_samples=3, lr=1e-4)
    shared = {"tensor_parallel_size": 1, "context_parallel_size": 2}
    succeed(*words("one"))
    succeed(*words("two", **shared), n=2)
    (tmp_path / "stop").touch()
    failed = command(*words("parts", **shared), n=2)
    assert failed.returncode == 1 and "raised RuntimeError: stopped" in failed.stderr
    (tmp_path / "stop").unlink()
    assert "resumed after step 2 of 3" in succeed(*words("parts", **shared), n=2).stderr
    for model in ("actor", "critic"):
        one, two, parts = (weights(tmp_path / name / model) for name in ("one", "two", "parts"))
        for name in one:
            assert relative_difference(two[name], one[name]) < 1e-6, name
            assert torch.equal(two[name], parts[name]), name
    one, two, parts = (logged(tmp_path, name) for name in ("one", "two", "parts"))
    assert two == parts and [row["step"] for row in two] == [0, 1, 2, 3]
    for row, expected in zip(two, one, strict=True):
        assert row.keys() == expected.keys()
        for name, value in row.items():
            assert isinstance(value, dict) or value == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name
    assert max(row["grad_norm"] for row in one[1:]) > 0


def test_grpo_with_adapters_runs_without_critic_or_reference(folders: Folders, tmp_path: Path) -> None:
    rows = [{"instruction": row.instruction, "label": "1e9", "tolerance": 1e10, "answer_type": "number"}
            for row in PROMPTS]
    (tmp_path / "prompts.json").write_text(json.dumps(rows))
    task = {"prompt": "a {instruction}=", "stop": ["b"], "extraction": "gsm8k/last-number@5", "equality": "typed@5"}
    (tmp_path / "own.json").write_text(json.dumps(task))
    flags = {
        "task": tmp_path / "own.json",
        "eval_file": tmp_path / "prompts.json",
        "eval_samples": 4,
        "actor_ckpt_dir": folders.one,
        "actor_save_dir": tmp_path / "actor",
        "reward_model_ckpt_dir": folders.verifier,
        "reward": "verifier,rule",
        "train_file": tmp_path / "prompts.json",
        "advantage": "grpo",
        "policy_loss": "gspo",
        "group_size": 4,
        "filter_groups": "true",
        "truncated": "mask",
        "lora_rank": 4,
        "max_new_tokens": 6,
        "max_buffer_size": 12,
        "lr": 1e-2,
    }
    done = succeed("ppo_train.py", *(f"--{flag}={value}" for flag, value in flags.items()))
    rows = [json.loads(line) for line in (tmp_path / "actor/metrics.jsonl").read_text().splitlines()]
    start = rows.pop(0)
    assert len(rows) == 2 and (tmp_path / "actor/adapter.json").is_file()
    assert rows[0]["kl"] == 0.0 != rows[1]["kl"] and rows[0]["first_ratio_deviation"] < 1e-5
    assert rows[0]["grad_norm"] > 0 and rows[0]["value_loss"] == 0.0 and rows[0]["kl_coef"] == 0.0
    assert all(row["kept_share"] == pytest.approx(1 - row["truncated_share"]) for row in rows), rows
    # the task's own words and end, and a tolerance that takes any number for right
    assert all(row["reward"] == pytest.approx(row["reward_verifier"] + row["reward_rule"]) for row in rows[1:])
    assert all(1 >= row["eval_pass"] >= row["eval_accuracy"] >= 0 <= row["eval_majority"] for row in (start, rows[1]))
    assert all(row["reward_rule"] == pytest.approx(1 - row["graded_unparsed"]) for row in rows)
    shown = [json.loads(line) for line in (tmp_path / "actor/rollouts/step-000001.jsonl").read_text().splitlines()]
    assert all(row["prompt"].startswith("a ") and row["prompt"].endswith("=") for row in shown)
    assert not any("b" in row["response"] for row in shown)
    assert "into words of its own, and the verifier reads these too" in done.stderr
    assert "30% of the responses did not end" in done.stderr


def prompts_file(folder: Path) -> Path:
    """PROMPTS with labels as a file."""
    rows = [{"instruction": prompt.instruction, "label": "4"} for prompt in PROMPTS]
    (folder / "prompts.json").write_text(json.dumps(rows))
    return folder / "prompts.json"


def test_one_reference_is_in_memory_however_often_it_is_refreshed(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[weakref.ref[Decoder]] = []
    alive: list[int] = []

    def load_counted(folder: str, **options: object) -> Decoder:
        gc.collect()
        alive.append(sum(model() is not None for model in loaded))
        model = load_solver(folder, **options)
        loaded.append(weakref.ref(model))
        return model

    load_solver = load.load_solver
    monkeypatch.setattr(load, "load_solver", load_counted)
    numbers = {"max_new_tokens": 3, "max_buffer_size": 4, "group_size": 2, "reference_refresh": 1}
    ppo_train.main(
        ppo_train.PPOConfig(
            actor_ckpt_dir=folders.one,
            actor_save_dir=str(tmp_path / "actor"),
            reward=["rule"],
            train_file=str(prompts_file(tmp_path)),
            advantage="rloo",
            **numbers,
        )
    )
    # the actor, its first reference, and one in the place of another after each of three buffers
    assert alive == [0, 1, 1, 1, 1]
    with pytest.raises(UserError, match="inner_epochs was 2 and is 3 now"):  # it fixes the schedule
        ppo_train.main(
            ppo_train.PPOConfig(
                actor_ckpt_dir=folders.one,
                actor_save_dir=str(tmp_path / "actor"),
                reward=["rule"],
                train_file=str(tmp_path / "prompts.json"),
                advantage="rloo",
                resume="auto",
                inner_epochs=3,
                **numbers,
            )
        )


def test_a_run_that_is_told_to_stop_leaves_no_waiting_files(folders: Folders, tmp_path: Path) -> None:
    (tmp_path / "stop.py").write_text(
        "import os, signal\n\n\ndef now(prompt, response, label):\n"
        "    os.kill(os.getppid(), signal.SIGTERM)\n    return len(response)\n"
    )
    flags = {
        "actor_ckpt_dir": folders.one,
        "actor_save_dir": tmp_path / "actor",
        "reward": f"{tmp_path}/stop.py:now",
        "train_file": prompts_file(tmp_path),
        "advantage": "rloo",
        "group_size": 2,
        "max_new_tokens": 3,
        "max_buffer_size": 4,
        "phases": True,
    }
    done = succeed("ppo_train.py", *(f"--{flag}={value}" for flag, value in flags.items()))
    assert "stopped by SIGTERM after step 1, saved" in done.stderr
    assert not list((tmp_path / "actor/.waiting").rglob("*-*s"))


def test_alarms_stand_in_the_run_and_stop_it_where_that_is_asked_for(
    folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every reward is the same: that rings at each buffer. The run stops at the first, and once resumed ends."""
    (tmp_path / "same.py").write_text("def same(prompt, response, label):\n    return 1.0\n")
    actor = tmp_path / "actor"

    def run(**changes: object) -> None:
        ppo_train.main(
            ppo_train.PPOConfig(
                actor_ckpt_dir=folders.one,
                actor_save_dir=str(actor),
                reward=[f"{tmp_path}/same.py:same"],
                train_file=str(prompts_file(tmp_path)),
                advantage="rloo",
                group_size=2,
                max_new_tokens=3,
                max_buffer_size=4,
                **changes,
            )
        )

    with pytest.raises(
        UserError, match="stopped after step 1, saved; go on with --resume auto: no spread: all resp"
    ):
        run(stop_on_alarm=True)
    assert (actor / "step-1/state.json").is_file() and not (actor / "params.json").exists()
    run(stop_on_alarm=True, resume="auto")  # the alarm was told: it does not stop the run at once again
    assert (
        "alarm in 3 of 3 buffers, from 1 to 3: no spread: all responses earn the same"
        in capsys.readouterr().err
    )
    rows = [json.loads(line) for line in (actor / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all("check --reward" in row["alarms"]["no spread"] for row in rows)
    with_alarms = runlog.draw(actor).read_bytes()
    (actor / "metrics.jsonl").write_text("".join(json.dumps(row | {"alarms": {}}) + "\n" for row in rows))
    assert runlog.draw(actor).read_bytes() != with_alarms


def test_the_first_update_is_checked_when_it_comes(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first buffer's groups are all equal and dropped; a run that is resumed behind it has yet to be checked."""
    (tmp_path / "late.py").write_text(
        "calls = 0\n\n\ndef late(prompt, response, label):\n    global calls\n    calls += 1\n"
        "    return calls * (calls > 4)\n"
    )
    checked: list[bool] = []

    def check(metrics: dict[str, float], buffer: PPOBuffer, dtype: torch.dtype) -> bool:
        checked.append(check_first_update(metrics, buffer, dtype))
        return checked[-1]

    check_first_update = monitor.check_first_update
    monkeypatch.setattr(monitor, "check_first_update", check)
    ppo_train.main(
        ppo_train.PPOConfig(
            actor_ckpt_dir=folders.one,
            actor_save_dir=str(tmp_path / "actor"),
            reward=[f"{tmp_path}/late.py:late"],
            advantage="rloo",
            train_file=str(prompts_file(tmp_path)),
            filter_groups=True,
            group_size=2,
            max_buffer_size=4,
            max_new_tokens=3,
        )
    )
    assert checked == [False, True]
    saved = json.loads((tmp_path / "actor/step-3/state.json").read_text())
    assert saved["update_checked"] is True
