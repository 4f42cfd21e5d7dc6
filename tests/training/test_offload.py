"""src/training/offload.py: what waits in files comes back, and no file stays behind."""

from pathlib import Path

import torch
from torch import nn

from src import parallel
from src.training.offload import ModelOffloader


def test_files_go_with_the_model_that_is_dropped_and_with_the_offloader(tmp_path: Path) -> None:
    parallel.start()
    first, second = nn.Linear(3, 4), nn.Linear(5, 2)
    expected = [weight.detach().clone() for weight in second.parameters()]
    with ModelOffloader(tmp_path) as offloader:
        offloader.add(first)
        offloader.add(second)
        assert len(list(tmp_path.rglob("*-weights"))) == 2
        assert first.weight.untyped_storage().nbytes() == 0
        offloader.drop(first)
        assert len(list(tmp_path.rglob("*-weights"))) == 1
        with offloader.loaded(second):
            assert all(map(torch.equal, second.parameters(), expected))
    assert not list(tmp_path.rglob("*-weights"))
