"""Thirty steps of DPO beside trl's DPOTrainer: the same rows in the same order, losses and log-probs."""

from pathlib import Path

import pytest
import torch

from src import load
from src.command.config import OptimizerFlags
from src.data.batch import BatchSampler
from src.data.examples import Pair
from src.runlog import RunLog
from src.training.preference import Preference, collate_sides, with_reference
from src.training.reference import reference_logprobs, response_sums
from src.training.reward_model import pair_dataset
from src.training.trainer import Trainer
from tests.conftest import Folders
from tests.reference import hf_model

STEPS, BATCH, LR, BETA = 30, 4, 1e-3, 0.3


def test_losses_and_logprobs_equal_trl(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl")
    from benchmarks import trl_dpo

    tokenizer, log = load.load_tokenizer(folders.one), RunLog(str(tmp_path), {})
    pairs = [
        Pair(f"{n % 7}+{n % 5}=", [f"{n % 9}" * (1 + n % 4)], [f"b{n % 8}" * (1 + n % 3)])
        for n in range(STEPS * BATCH)
    ]
    data = pair_dataset(pairs, tokenizer, max_seq_len=64, source="pairs")._replace(collate=collate_sides)
    model, preference = load.load_solver(folders.one), Preference(objective="dpo", beta=BETA)
    reference = reference_logprobs(model, data.samples, tmp_path / "r.jsonl", "x", max_batch_size=8, log=log)
    trainer = Trainer(
        model, log, OptimizerFlags(lr=LR, schedule="constant", warmup_ratio=0.0), total_steps=STEPS
    )
    monkeypatch.setattr("src.data.batch.epoch_order", lambda n, seed, epoch: list(range(n)))
    batching, found = BatchSampler(max_batch_size=BATCH, accumulation_steps=1, seed=1), []
    for _, _, (batch,) in batching.steps(with_reference(data, reference), packing=False, epochs=1):
        with torch.no_grad():
            sides = response_sums(model, batch).view(BATCH, 2).mean(0).tolist()
        loss, tally = preference.loss(model, batch)
        trainer.backward(loss / BATCH)
        found.append((trainer.step(), preference.report([tally]), sides))
    rows = [
        (
            chosen.tokens[: chosen.response_start],
            chosen.tokens[chosen.response_start :],
            rejected.tokens[rejected.response_start :],
        )
        for chosen, rejected in data.samples
    ]
    theirs = trl_dpo.trainer(
        hf_model(folders.hf), rows, tmp_path, pairs_a_step=BATCH, lr=LR, beta=BETA, logging=True
    )
    theirs.train()
    expected = [row for row in theirs.state.log_history if "loss" in row]
    assert len(expected) == len(found) == STEPS
    for (step, means, sides), row in zip(found, expected, strict=True):
        assert step.loss == pytest.approx(row["loss"], abs=1e-4)
        assert sides == pytest.approx([row["logps/chosen"], row["logps/rejected"]], rel=1e-4)
        assert BETA * means.margin == pytest.approx(row["rewards/margins"], abs=1e-4)
    assert found[-1][0].loss < 0.9 * found[0][0].loss
