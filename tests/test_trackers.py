"""src/trackers.py: TensorBoard, W&B and trackio are given what metrics.jsonl holds, or refused before a run begins."""

import json
import re
import sys
from pathlib import Path

import pytest

from src.errors import UserError
from src.runlog import RunLog
from tests.conftest import Folders
from tests.ranks import command


def test_wandb_holds_the_metrics_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline: flags as config, every step's values, and the same run when it is resumed."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for part in (0, 1):
        write_part(tmp_path, part, "wandb:splitrl/first")
        run = wandb.run
        assert (run.project, run.name, run.config["lr"]) == ("splitrl", "first", 1e-5)
        assert run.summary["step"] == 2 * part + 2 and run.summary["loss"] == 1 / (2 * part + 2)
        run.finish()
        assert run.id == (tmp_path / "wandb" / "id").read_text()
    assert len(list(tmp_path.glob(f"wandb/offline-run-*/run-{run.id}.wandb"))) == 2
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4
    RunLog(str(tmp_path), {}, trackers=["wandb:splitrl"]).metrics(1, loss=0.0)
    assert (tmp_path / "wandb" / "id").read_text() != run.id


def write_part(folder: Path, part: int, *trackers: str) -> None:
    """Two steps of a run; part 1 is resumed after part 0's."""
    log = RunLog(str(folder), {"lr": 1e-5}, trackers=trackers)
    log.go_on_after(2 * part)
    for step in (1 + 2 * part, 2 + 2 * part):
        log.metrics(step, alarms={"loss": "lower --lr"} if step == 3 else None, loss=1 / step)


def test_trackio_and_tensorboard_hold_the_metrics_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each part in a process of its own, as a run is: trackio finds the run again, even after one whose directory has
    the same name; standard output stays empty."""
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = "Path(sys.argv[1]), int(sys.argv[2]), 'trackio:splitrl', 'tensorboard'"
    code = f"import sys; from pathlib import Path; from tests.test_trackers import write_part; write_part({words})"
    first = tmp_path / "first" / "run"
    for folder, part in ((first, 0), (tmp_path / "second" / "run", 0), (first, 1)):
        folder.mkdir(parents=True, exist_ok=True)
        done = command("-c", code, folder, part)
        assert (done.returncode, done.stdout) == (0, ""), done.stderr

    def ask(*words: str) -> dict[str, object]:
        return json.loads(command("-m", "trackio.cli", *words, "--project", "splitrl", "--json").stdout)

    name = "run-" + (first / "trackio" / "id").read_text()
    assert ask("get", "run", "--run", name)["config"]["lr"] == 1e-5
    values = ask("get", "metric", "--run", name, "--metric", "loss")["values"]
    assert [(value["step"], value["value"]) for value in values] == [(step, 1 / step) for step in (1, 2, 3, 4)]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves = EventAccumulator(str(first / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in curves.Scalars("loss")] == [
        (step, pytest.approx(1 / step)) for step in (1, 2, 3, 4)]


@pytest.mark.parametrize("word, problem", [
    ("wandb:splitrl", "needs the package wandb, which is not installed; pip install wandb"),
    ("trackio:splitrl", "needs the package trackio, which is not installed; pip install trackio"),
    ("tensorboard", "needs the package tensorboard, which is not installed; pip install tensorboard"),
    ("wandb", "expected tensorboard, wandb:PROJECT"), ("mlflow:splitrl", "expected tensorboard, wandb:PROJECT"),
    ("tensorboard:here", "expected tensorboard, wandb:PROJECT"),
])
def test_a_tracker_that_is_not_there_is_one_line(
    word: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("wandb", "trackio", "tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    RunLog(str(tmp_path), {}).metrics(1, loss=0.5)
    assert not (tmp_path / "tensorboard").exists()
    with pytest.raises(UserError, match=f"--trackers {word}.*{re.escape(problem)}"):
        RunLog(str(tmp_path), {}, trackers=[word])


@pytest.mark.parametrize("words", [["tensorboard", "tensorboard"], ["wandb:a/x", "wandb:b/y"], ["trackio:/x"]])
def test_a_tracker_that_would_hide_another_is_refused(words: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected tensorboard, .* each once"):
        RunLog(str(tmp_path), {}, trackers=words)


@pytest.mark.parametrize("word, variable, value, problem", [
    ("wandb:splitrl", "WANDB_API_KEY", "short", "API key must have 40+ characters"),
    ("trackio:splitrl", "TRACKIO_SERVER_URL", "http://127.0.0.1:9", "requires a write token"),
    ("trackio:splitrl", "TRACKIO_SPACE_ID", "splitrl", "You must be logged in to Hugging Face"),
    ("trackio:registry-x", "TRACKIO_DIR", "unused", "reserved for trackio"),
])
def test_what_a_tracker_would_refuse_at_the_first_metrics_is_one_line(
    word: str, variable: str, value: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(word.partition(":")[0])
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(variable, value)
    code = "import sys; from src import trackers; from src.command import cli; " \
           "cli.guarded(lambda: trackers.check_trackers(sys.argv[1:]))"
    done = command("-c", code, word)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
    assert done.stderr.startswith(f"error: --trackers {word}: ") and problem in done.stderr


def test_a_trainer_asks_for_the_key_before_it_reads_rows(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", str(tmp_path))
    done = command("solver_train.py", "--ckpt_dir", folders.one, "--save_dir", tmp_path / "run", "--train_file",
                   "dataset/toy/train.json", "--trackers", "wandb:splitrl")
    assert done.returncode == 1 and "wandb:splitrl: it has no key; log in with" in done.stderr
    assert not (tmp_path / "run/rows").exists()
