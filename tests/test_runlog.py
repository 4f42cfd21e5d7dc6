"""src/runlog.py: run.json, metrics.jsonl, who speaks, and what goes to which stream."""

import json
import logging
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from src import runlog
from src.errors import UserError
from src.runlog import RunLog
from tests.ranks import ROOT, command


def test_run_and_metrics_files(tmp_path: Path) -> None:
    log = RunLog(str(tmp_path / "new"), {"lr": 1e-5, "lora_targets": ["wq"]})
    log.metrics(1, loss=0.5)
    log.metrics(2, loss=0.25, lr=1e-6)
    facts = json.loads((tmp_path / "new/run.json").read_text())
    assert facts["flags"] == {"lr": 1e-5, "lora_targets": ["wq"]}
    assert facts["versions"]["torch"] and facts["command"] and facts["world_size"] == 1
    assert facts["processor"]["name"] and facts["processor"]["onednn"] == torch.backends.mkldnn.is_available()
    rows = [json.loads(line) for line in (tmp_path / "new/metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 0.5), (2, 0.25)]
    assert rows[1]["lr"] == 1e-6 and 0 <= rows[0]["seconds"] <= rows[1]["seconds"]


def test_a_kill_while_trackers_are_opened_again_loses_no_metrics(tmp_path: Path) -> None:
    log = RunLog(str(tmp_path), {})
    for step in (1, 2, 3):
        log.metrics(step, loss=float(step))
    killed = '''import os, sys
from src import runlog
runlog.OPEN["tensorboard"] = lambda *place: os.kill(os.getpid(), 9)
log = runlog.RunLog(sys.argv[1], {}, trackers=["tensorboard"])
log.go_on_after(2)
log.metrics(3, loss=3.0)'''
    done = subprocess.run([sys.executable, "-c", killed, str(tmp_path)], cwd=ROOT, check=False)
    assert done.returncode == -9
    assert [row["step"] for row in runlog.read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_every_file_that_is_read_is_hashed(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"abc")
    (tmp_path / "a.py").write_bytes(b"abc")
    flags = {"train_file": [str(tmp_path / "a.json")] * 2, "eval_file": str(tmp_path / "a.json"), "save_file": "gone",
             "reward": ["rule", f"{tmp_path / 'a.py'}:score"], "task": str(tmp_path / "a.json"), "few_shot": "gsm8k8",
             "reference_file": str(tmp_path / "a.json"), "lr": 0.1}
    RunLog(str(tmp_path / "run"), flags)
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    found = json.loads((tmp_path / "run/run.json").read_text())["inputs"]
    assert found == {"train_file": [abc, abc], "eval_file": [abc], "reward": [abc], "task": [abc]}


def test_a_machine_without_git_keeps_a_record_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def revision() -> str:
        RunLog(str(tmp_path / "run"), {})
        return json.loads((tmp_path / "run/run.json").read_text())["revision"]

    if shutil.which("git"):
        assert re.fullmatch("[0-9a-f]{40}|", revision())
    monkeypatch.setenv("PATH", str(tmp_path))
    assert revision() == ""


def test_a_directory_that_vanishes_ends_the_run_at_its_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # its thread would complain too, later
    log = RunLog(str(tmp_path / "run"), {})
    log.metrics(1, loss=0.5)
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    (tmp_path / "run").mkdir()  # as a save makes it anew
    with pytest.raises(UserError, match=r"run: the run's directory, or a file in it, is gone since the run began"):
        log.metrics(2, loss=0.25)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own
def test_a_directory_that_is_being_deleted_ends_the_run_by_the_same_line(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    log = RunLog(str(tmp_path / "run"), {})
    log.metrics(1, loss=0.5)
    shutil.rmtree(tmp_path / "run" / "tensorboard")  # its thread finds out when it next writes
    with pytest.raises(UserError, match=r"run: the run's directory, or a file in it, is gone since the run began"):
        for step in range(2, 1000):
            log.metrics(step, loss=0.25)
            time.sleep(0.005)


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
    assert "in between\n" in err and "2/2 [" in err and "loss=0.1" in err and "tok/s=" in err


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
    log.rows("rollouts.jsonl", [{"reward": float("-inf"), "kl": [0.5, float("nan")]}])
    third = (tmp_path / "metrics.jsonl").read_text().splitlines()[2]
    assert '"grad_norm": null' in third  # json has no word for NaN
    assert json.loads((tmp_path / "rollouts.jsonl").read_text()) == {"reward": None, "kl": [0.5, None]}
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # a line that is being written
    done = command("-m", "src.runlog", tmp_path)
    assert (done.returncode, done.stdout) == (0, f"wrote {tmp_path / 'metrics.png'}\n"), done.stderr
    data = (tmp_path / "metrics.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = (int.from_bytes(data[place : place + 4], "big") for place in (16, 20))
    # accuracy, loss with eval_loss over it, grad_norm
    assert (width, height) == (int(4.2 * 3 * 110), int(2.6 * 110))


ODD_ROWS = [
    b'\xff\xfe{"step": 1}',
    b"{",
    b"null",
    b"7",
    b'"step"',
    b'["step"]',
    b'{"loss": 1}',
    b'{"step": null}',
    b'{"step": "2"}',
    b'{"step": [1]}',
    b'{"step": NaN}',
    b'{"step": 1e999}',
    b'{"step": 1' + b"0" * 400 + b"}",
    b'{"step": ' + b"1" * 6000 + b"}",
    b"[" * 100_000,
    b'{"step": 1, "deep": ' + b"[" * 100_000 + b"}",
]


def test_odd_rows_of_metrics_are_left_out_with_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Drawing and going on keep the rows with a step, whatever stands between them."""
    path = tmp_path / "metrics.jsonl"
    good = [b'{"step": 1, "loss": NaN}', b'{"step": 2, "loss": 0.5}', b'{"step": 3, "loss": 0.25}']
    path.write_bytes(b"\n".join([good[0], *ODD_ROWS, b"", *good[1:], b'{"step": 4, "lo']))
    assert runlog.draw(tmp_path).read_bytes().startswith(b"\x89PNG")
    told = f"{len(ODD_ROWS)} lines without a step are left out, the first is line 2\n"
    assert capsys.readouterr().err.count(told) == 1
    log = RunLog(str(tmp_path), {})
    log.go_on_after(2)
    log.metrics(3, loss=0.125)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows[1:]] == [(2, 0.5), (3, 0.125)] and rows[0]["step"] == 1
    assert capsys.readouterr().err.count(told) == 1


@pytest.mark.parametrize(
    "row",
    [
        {"loss": "high"},
        {"loss": None},
        {"loss": [1, 2], "note": {"a": 1}},
        {"loss": True},
        {"loss": float("inf")},
        {"loss": 10**400},
        {"$\\frac{": 1.0, "a_$^b$": 2.0},
        {f"key{number}": 1.0 for number in range(40)},
        {"": 1.0},
        {"eval_loss": 0.5},
        {"epoch": 2},
    ],
    ids=lambda row: str(row)[:30],
)
def test_a_row_with_odd_values_is_drawn(row: dict[str, object], tmp_path: Path) -> None:
    folder = tmp_path / "a_$^b$ run"
    folder.mkdir()
    rows = [{"step": 1, "reward": 1.0}, {"step": 2, **row}, {"step": 10**300, "reward": 0.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    assert runlog.draw(folder).read_bytes().startswith(b"\x89PNG")


def test_rows_without_a_number_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "note": "none"}\n')
    with pytest.raises(UserError, match="metrics.jsonl holds no number to draw"):
        runlog.draw(tmp_path)


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(tmp_path: Path) -> None:
    """Into a pipe go whole lines, no more of them than the time allows, and none is torn by a log line."""
    code = (
        "import time; from src import runlog; runlog.LINE_SECONDS = 0.2\n"
        f"log = runlog.RunLog({str(tmp_path)!r}, {{}}); log.progress(103, 'step', 3)\n"
        "for number in range(100):\n    time.sleep(0.01); log.advance(tokens=10, loss=number)\n"
        "    if number == 50: log.logger.info('half')\nlog.close_progress()"
    )
    done = command("-c", code)
    lines = done.stderr.splitlines()
    assert done.returncode == 0 and "\r" not in done.stderr and done.stderr.endswith("\n")
    assert "3/103" in lines[0] and "103/103" in lines[-1] and "loss=99" in lines[-1]
    assert 4 <= len(lines) <= 20 and sum(line.endswith(" half") for line in lines) == 1
    assert all("/103 [" in line or line.endswith(" half") for line in lines)


@pytest.mark.parametrize("words", [("nowhere",), (), ("a", "b")])
def test_what_cannot_be_drawn_is_one_line(words: tuple[str, ...], tmp_path: Path) -> None:
    done = command("-m", "src.runlog", *words)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
