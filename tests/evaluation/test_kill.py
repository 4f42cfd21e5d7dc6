"""kill -9 in the middle of an evaluation, at random moments: the rerun leaves the files of an undisturbed run.

KILLS=10 python -m pytest tests/evaluation/test_kill.py tries more moments than the three of a plain run.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.tiny import split, write_hf_llama

ROOT = Path(__file__).resolve().parents[2]
KILLS = int(os.environ.get("KILLS", "3"))

# Imports once, then forks a real process for every evaluation: the import costs more than the evaluation. In its own
# process, because a fork of the tests' one would inherit their process group.
DRIVER = """
import json, os, random, signal, sys, time
import solver_evaluate
from pathlib import Path

def start(log_dir):
    pid = os.fork()
    if pid == 0:
        os.close(1)
        os.open(os.devnull, os.O_WRONLY)
        solver_evaluate.main(solver_evaluate.SolverEvaluateConfig(log_dir=log_dir, **flags))
        os._exit(0)
    return pid

def size(log_dir):
    path = Path(log_dir) / "samples.jsonl"
    return path.stat().st_size if path.exists() else 0

flags, folder, kills = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3])
assert os.waitpid(start(f"{folder}/whole"), 0)[1] == 0
total, generator = size(f"{folder}/whole"), random.Random(time.time_ns())
for number in range(kills):
    log_dir, moment = f"{folder}/killed{number}", generator.random()
    pid = start(log_dir)
    while size(log_dir) < moment * 0.6 * total:      # without outcomes the lines are shorter
        time.sleep(0.0005)
    time.sleep(generator.uniform(0, 0.02))
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL, "it ended before the kill"
    found = Path(log_dir, "samples.jsonl").read_bytes() if size(log_dir) else b""
    print(json.dumps({"moment": moment, "lines": found.count(b"\\n"), "graded": b"outcome" in found}), flush=True)
    assert os.waitpid(start(log_dir), 0)[1] == 0
"""


def test_a_killed_evaluation_continues_to_the_same_files(tmp_path: Path) -> None:
    ckpt_dir = split(write_hf_llama(tmp_path / "hf"), tmp_path / "ckpt")
    generator = random.Random(0)
    problems = [
        {"instruction": f"{generator.randrange(99)}+{n}=", "label": str(n), "level": 1 + n % 3}
        for n in range(40)
    ]
    (tmp_path / "labels.json").write_text(json.dumps(problems))
    flags = {
        "task": "toy",
        "label_file": str(tmp_path / "labels.json"),
        "ckpt_dir": ckpt_dir,
        "num_samples": 3,
        "temperature": 1.0,
        "max_new_tokens": 24,
        "max_batch_size": 8,
    }
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(flags), str(tmp_path), str(KILLS)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    kills = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kills) == KILLS and any(0 < kill["lines"] < 120 for kill in kills), kills
    whole = [json.loads(line) for line in (tmp_path / "whole/samples.jsonl").read_text().splitlines()]
    assert len(whole) == 120
    for number in range(KILLS):
        folder = tmp_path / f"killed{number}"
        for name in ("results.json", "results.png"):
            assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), kills[number]
        rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        for row, other in zip(rows, whole, strict=True):
            # rounded, so equal but for a sum that another batch moved over the border of two tenths
            assert abs(row.pop("logprob") - other["logprob"]) < 0.11
            assert row == {key: value for key, value in other.items() if key != "logprob"}, kills[number]


def test_ranks_that_share_problems_leave_the_files_of_one_also_when_they_are_killed(tmp_path: Path) -> None:
    ckpt_dir = split(write_hf_llama(tmp_path / "hf"), tmp_path / "ckpt")  # one shard: two ranks hold two models
    problems = [{"instruction": f"{n}+{n}=", "label": str(n), "level": 1 + n % 3} for n in range(60)]
    (tmp_path / "labels.json").write_text(json.dumps(problems))
    flags = ("--task=toy", "--label_file=labels.json", f"--ckpt_dir={ckpt_dir}", "--num_samples=2", "--temperature=1",
             "--max_new_tokens=48", "--max_batch_size=4")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")

    def start(log_dir: str, *launcher: str) -> subprocess.Popen[bytes]:
        words = [sys.executable, *launcher, str(ROOT / "solver_evaluate.py"), *flags, f"--log_dir={log_dir}"]
        return subprocess.Popen(words, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"},
                                stdout=subprocess.DEVNULL)

    def files(log_dir: str) -> list[bytes]:
        names = ("samples.jsonl", "results.json")
        assert not list((tmp_path / log_dir).glob("samples.part*"))
        return [(tmp_path / log_dir / name).read_bytes() for name in names]

    assert start("one").wait(120) == 0
    assert start("two", *torchrun).wait(120) == 0
    assert files("two") == files("one")

    job, part = start("killed", *torchrun), tmp_path / "killed/samples.part-1.jsonl"
    while not (part.is_file() and part.read_bytes().count(b"\n") > 3):
        assert job.poll() is None, "it ended before the kill"
        time.sleep(0.001)
    for place in Path("/proc").glob("[0-9]*/cmdline"):  # the ranks too, which have process groups of their own
        with contextlib.suppress(OSError):
            if f"--ckpt_dir={ckpt_dir}".encode() in place.read_bytes():
                os.kill(int(place.parent.name), signal.SIGKILL)
    job.wait()
    joined = part.read_bytes().splitlines(keepends=True)[0]  # by a start that was killed before it removed the part
    for name, end in (("samples.jsonl", joined), (part.name, b'{"id": "7", "sample": 1, "respo')):
        path = tmp_path / "killed" / name
        whole = path.read_bytes()
        path.write_bytes(whole[: whole.rfind(b"\n") + 1] + end)
    assert start("killed").wait(120) == 0
    assert files("killed") == files("one")
