"""The certificate passes a sound checkpoint and fails a damaged one, in real processes."""

import math
import shutil
from pathlib import Path

import pytest
import torch

from src.checkpoint import storage
from tests.conftest import Folders
from tests.ranks import command
from tools import certify
from tools.certify import Certificate, Row

WAYS = ["padded", "packed", "chunked loss", "cached decode"]


def test_a_sound_checkpoint_passes_at_one_and_two_ranks(folders: Folders) -> None:
    done = command("checkpoint_split.py", "--certify", folders.two, "--certify_ranks", "1,2,9")
    assert done.returncode == 0, done.stderr
    first, *rows, verdict = done.stdout.splitlines()
    assert "the first 2 of 2 layers" in first
    measured = [row for row in rows if row.endswith(" ok")]
    assert [row.split()[0] for row in measured] == ["1"] * 4 + ["2"] * 4
    assert [row[7:25].rstrip() for row in measured] == WAYS * 2
    assert any(row.startswith("not on 9 ranks: ") and "n_heads=8" in row for row in rows)
    assert verdict == "PASSED"


def damaged(folders: Folders, folder: Path) -> Path:
    """The directory of two shards with another norm in the second, its hashes made to fit."""
    shutil.copytree(folders.two, folder)
    path = folder / "consolidated.01.pth"
    tensors = {name: tensor.clone() for name, tensor in storage.read_shard(path).items()}
    tensors["norm.weight"] *= 1.5
    torch.save(tensors, path)
    (folder / "manifest.json").unlink()  # as in a directory of Meta's
    return folder


def test_shards_that_contradict_each_other_fail(folders: Folders, tmp_path: Path) -> None:
    folder = damaged(folders, tmp_path / "damaged")
    done = command("checkpoint_split.py", "--certify", folder, "--certify_ranks", "1,2")
    assert done.returncode == 1
    assert done.stderr.startswith("error: no certificate: on 1 ranks two shards hold different values")
    assert done.stderr.count("\n") == 1


def test_a_rank_that_computes_otherwise_fails(folders: Folders, tmp_path: Path) -> None:
    """Each rank reads its own shard at two ranks, so there the damage is in the arithmetic."""
    certify._run_job(Path(folders.two), 2, 1, tmp_path)
    folder = damaged(folders, tmp_path / "damaged")
    found = Certificate(str(folder), 2, 2, certify._run_job(folder, 2, 2, tmp_path), {})
    assert [row.passed for row in found.rows] == [False] * 4
    assert str(found).endswith("FAILED")


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e-2])
@pytest.mark.parametrize("place", [2, 3, 4])
def test_a_verdict_by_hand(value: float, place: int) -> None:
    cells = [2, "packed", 1e-7, 1e-6, 1e-5]
    assert Row(*cells).passed
    cells[place] = value
    assert not Row(*cells).passed
