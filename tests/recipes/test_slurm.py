"""recipes/slurm.sbatch: what it starts on each machine, by stand-ins for Slurm's commands."""

import os
import subprocess
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[2] / "recipes" / "slurm.sbatch"


@pytest.mark.parametrize(("words", "more"), [
    ("solver_train.py --config solver.yaml", "--resume auto"),
    ("ppo_train.py --max_steps 5 --resume auto", ""),  # a line of docs/cluster.md as it stands
    ("verifier_train.py --resume=none --lr 1", ""),
    ("solver_evaluate.py --ckpt_dir of_train.py", ""),
])
def test_trainers_are_resumed_and_others_started_as_they_are(tmp_path: Path, words: str, more: str) -> None:
    for name, line in (("scontrol", "echo first"), ("srun", 'echo "$@"')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "first,second", "SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "RANKS": "4"}
    done = subprocess.run(["bash", RECIPE, *words.split()], env=os.environ | slurm | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}"}, capture_output=True, text=True, check=True)
    started = done.stdout.split("torchrun", 1)[1]
    assert "--nnodes 2 --nproc_per_node 4" in started and "--rdzv_endpoint first:20007" in started
    assert started.rstrip().endswith(f"{words} {more}".rstrip()) and started.count("--resume") <= 1
