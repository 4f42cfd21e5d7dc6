"""src/checkpoint/saving.py: what is read again computes what was saved."""

from pathlib import Path

import pytest
import torch

import checkpoint_split
from src import load
from src.checkpoint import saving
from src.command.config import OptimizerFlags
from src.models.forward import response_logprobs
from src.runlog import RunLog
from src.training.sft import sft_loss
from src.training.trainer import Trainer
from tests.conftest import Folders
from tests.reference import batch


@pytest.mark.parametrize(("precision", "stored"), [("float32", "float32"), ("bfloat16", "bfloat16")])
def test_what_was_learnt_from_rounded_weights_is_not_rounded_away(
    folders: Folders, tmp_path: Path, precision: str, stored: str
) -> None:
    start, saved = str(tmp_path / "start"), str(tmp_path / "saved")
    checkpoint_split.main(checkpoint_split.SplitConfig(
        ckpt_file=str(folders.hf), save_path=start, n=1, dtype="bfloat16"))
    model = load.load_solver(start, precision=precision, trained=load.Trained())
    before = response_logprobs(model, *batch().inputs).detach()
    trainer = Trainer(model, RunLog(str(tmp_path), {}), OptimizerFlags(lr=1e-6, warmup_ratio=0.0), total_steps=1)
    trainer.backward(sft_loss(model, batch()) / 16)
    trainer.step()
    with torch.no_grad():
        learnt = response_logprobs(model, *batch().inputs)
        saving.begin_save(model, saved, start).complete()
        read = response_logprobs(load.load_solver(saved, precision=precision), *batch().inputs)
    assert torch.equal(read, learnt) and load.load_config(saved).dtype == stored
    assert not torch.equal(learnt, before) or precision == "bfloat16"  # in which so small a step moves few weights
