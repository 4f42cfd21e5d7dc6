"""Two torchrun agents that meet as two machines do; both are lost in turn, a scheduler starts again what has ended."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import Folders
from tests.ranks import ROOT, succeed
from tests.tiny import weights

STEPS = 32
LIMIT = 300  # seconds for six starts of a rank


def kill_machine(agent: subprocess.Popen[bytes]) -> None:
    """End an agent and its ranks, which are in sessions of their own, at once."""
    ranks = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    for process in (agent.pid, *map(int, ranks)):
        os.kill(process, signal.SIGKILL)
    agent.wait()


def test_machines_that_are_lost_and_come_back_change_no_bit(folders: Folders, tmp_path: Path) -> None:
    rows = [{"instruction": "a" * (1 + n % 5), "output": f"{n}+{n}={2 * n}"} for n in range(2 * STEPS)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    words = ["solver_train.py", f"--ckpt_dir={folders.one}", f"--train_file={tmp_path / 'rows.json'}", "--lr=1e-3",
             "--max_batch_size=1", "--tensor_parallel_size=1", "--save_every=4", "--resume=auto"]
    succeed(*words, f"--save_dir={tmp_path / 'whole'}", n=2)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def start(machine: int) -> subprocess.Popen[bytes]:
        # is_host: between machines it follows from their names, here from nothing; a lost one is missed after 3 s
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--max_restarts=3",
             "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}", "--rdzv_id=run", "--local_addr=localhost",
             f"--rdzv_conf=is_host={1 - machine},keep_alive_interval=1", *words, f"--save_dir={tmp_path / 'run'}"],
            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=(tmp_path / f"machine-{machine}").open("ab"),
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                              "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})

    # the agent of machine 0 hosts the rendezvous: without it the other one ends too
    losses = [(1, tmp_path / "run" / "step-4"), (0, tmp_path / "run" / "step-12")]
    agents, starts, deadline = [start(0), start(1)], 2, time.monotonic() + LIMIT
    try:
        while any(agent.poll() != 0 for agent in agents):
            for machine, agent in enumerate(agents):
                if agent.poll():
                    agents[machine], starts = start(machine), starts + 1
            if losses and (losses[0][1] / "manifest.json").exists():
                kill_machine(agents[losses.pop(0)[0]])
            if time.monotonic() > deadline or starts > 6:
                pytest.fail((tmp_path / "machine-0").read_text() + (tmp_path / "machine-1").read_text())
            time.sleep(0.02)
    finally:
        for agent in agents:
            agent.terminate()
            agent.wait()
    said = (tmp_path / "machine-0").read_text() + (tmp_path / "machine-1").read_text()
    assert not losses and said.count("resumed after step ") == 2
    found, expected = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
