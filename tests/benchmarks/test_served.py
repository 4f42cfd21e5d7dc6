"""benchmarks/served.py beside a server of ours: what it finds of the model that is served, and of others."""

from pathlib import Path

import pytest
import torch

from benchmarks import served
from src import load
from src.checkpoint import saving
from tests.conftest import Folders
from tests.serving.test_server import serving


@pytest.mark.parametrize("factor", [1.0, 2.0, -1.0])
def test_only_equal_weights_agree(folders: Folders, tmp_path: Path, factor: float) -> None:
    model = load.load_solver(folders.one)
    with torch.no_grad():
        model.output.weight.mul_(factor)
    saving.begin_save(model, str(tmp_path / "asked"), folders.one).complete()
    with serving(folders.one) as url:
        found = served.compare(str(tmp_path / "asked"), url, folders.one, 4, 12)
    # twice the logits have the same order; the most likely token is the least likely one of their opposite
    assert found.responses == 4 and (found.equal == 4) == (factor > 0)
    assert (found.tokens_before_difference == found.tokens) == (factor > 0)
    assert (found.largest_logprob_difference < 1e-4) == (factor != 2)
