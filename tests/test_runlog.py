"""src/runlog.py: run.json, metrics.jsonl, who speaks, and what goes to which stream."""

import json
import logging
import sys
from pathlib import Path

import pytest

from src import runlog
from src.errors import UserError
from src.runlog import RunLog
from tests.ranks import command


def test_run_and_metrics_files(tmp_path: Path) -> None:
    log = RunLog(str(tmp_path / "new"), {"lr": 1e-5, "lora_targets": ["wq"]})
    log.metrics(1, loss=0.5)
    log.metrics(2, loss=0.25, lr=1e-6)
    facts = json.loads((tmp_path / "new/run.json").read_text())
    assert facts["flags"] == {"lr": 1e-5, "lora_targets": ["wq"]}
    assert facts["versions"]["torch"] and facts["command"] and facts["world_size"] == 1
    rows = [json.loads(line) for line in (tmp_path / "new/metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 0.5), (2, 0.25)]
    assert rows[1]["lr"] == 1e-6 and 0 <= rows[0]["seconds"] <= rows[1]["seconds"]


def test_progress_and_log_lines_go_to_stderr_and_tables_to_stdout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = RunLog(str(tmp_path), {})
    log.advance(loss=1.0)  # no bar yet: nothing happens
    log.progress(2, "step")
    log.advance(tokens=100, loss=0.123456)
    log.logger.info("in between")
    log.advance(tokens=100, loss=0.1)
    log.close_progress()
    runlog.table("a  b\n1  2\n\n")
    out, err = capsys.readouterr()
    assert out == "a  b\n1  2\n"
    assert "in between\n" in err and "2/2" in err and "loss=0.1" in err and "tok/s=" in err


def test_other_ranks_write_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(logging.getLogger("splitrl"), "handlers", [])  # as a process that has not logged yet
    log = RunLog(str(tmp_path / "rank1"), {})
    log.metrics(1, loss=0.5)
    log.progress(1, "step")
    log.advance(tokens=1)
    log.logger.info("quiet")
    runlog.table("quiet")
    assert capsys.readouterr() == ("", "") and not (tmp_path / "rank1").exists()
    logging.getLogger("splitrl").setLevel(logging.INFO)


def test_a_run_is_drawn_while_it_goes_on(tmp_path: Path) -> None:
    log = RunLog(str(tmp_path), {})
    for step in range(1, 5):
        log.metrics(step, epoch=0, loss=1 / step, grad_norm=float("nan") if step == 3 else 1.0)
    log.metrics(4, epoch=0, eval_loss=0.3, accuracy=0.5)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # a line that is being written
    done = command("-m", "src.runlog", tmp_path)
    assert (done.returncode, done.stdout) == (0, f"wrote {tmp_path / 'metrics.png'}\n"), done.stderr
    data = (tmp_path / "metrics.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = (int.from_bytes(data[place : place + 4], "big") for place in (16, 20))
    # seconds, loss with eval_loss over it, grad_norm; accuracy in a second row
    assert (width, height) == (int(4.2 * 3 * 110), int(2.6 * 2 * 110))


@pytest.mark.parametrize("words", [("nowhere",), (), ("a", "b")])
def test_what_cannot_be_drawn_is_one_line(words: tuple[str, ...], tmp_path: Path) -> None:
    done = command("-m", "src.runlog", *words)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_wandb_holds_the_metrics_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline: flags as config, every step's values, and the same run when it is resumed."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for part in (0, 1):
        log = RunLog(str(tmp_path), {"lr": 1e-5}, wandb="splitrl/first")
        if part:
            log.go_on_after(2)
        for step in (1 + 2 * part, 2 + 2 * part):
            log.metrics(step, loss=1 / step)
        run = log._wandb_run
        assert (run.project, run.name, run.config["lr"]) == ("splitrl", "first", 1e-5)
        assert run.summary["step"] == step and run.summary["loss"] == 1 / step
        run.finish()
        assert run.id == (tmp_path / "wandb" / "id").read_text()
    assert len(list(tmp_path.glob(f"wandb/offline-run-*/run-{run.id}.wandb"))) == 2
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4
    RunLog(str(tmp_path), {}, wandb="splitrl").metrics(1, loss=0.0)
    assert (tmp_path / "wandb" / "id").read_text() != run.id


def test_missing_wandb_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    RunLog(str(tmp_path), {})
    with pytest.raises(UserError, match="--wandb splitrl needs the package wandb, which is not installed"):
        RunLog(str(tmp_path), {}, wandb="splitrl")
