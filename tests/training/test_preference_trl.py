"""Thirty steps of DPO beside trl's DPOTrainer: the same rows in the same order, losses and log-probs."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as WordTokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from src import assemble
from src.data.batches import Batching
from src.data.examples import Pair
from src.runlog import RunLog
from src.training.loop import TrainLoop
from src.training.preference import Preference, PreferenceData, report
from src.training.reference import reference_logprobs, response_sums
from tests.conftest import Folders
from tests.reference import hf_model

STEPS, BATCH, LR, BETA = 30, 4, 1e-3, 0.3


def theirs(folders: Folders, folder: Path, rows: list[dict[str, list[int]]]) -> list[dict[str, float]]:
    """trl's metrics of every step."""
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")

    class AsGiven(trl.DPOTrainer):
        """Rows that are token ids already, in their order."""

        def _prepare_dataset(self, dataset: object, *_: object) -> object:
            return dataset

        def _get_train_sampler(self, *_: object) -> torch.utils.data.Sampler:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    words = WordTokenizer(WordLevel({"<pad>": 0, "a": 1, "<eos>": 2}, unk_token="a"))
    settings = trl.DPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=BATCH,
        num_train_epochs=1,
        learning_rate=LR,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        beta=BETA,
        precompute_ref_log_probs=True,
        max_length=None,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = AsGiven(
        model=hf_model(folders.hf),
        args=settings,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"
        ),
    )
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


def test_losses_and_logprobs_equal_trl(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, log = assemble.load_tokenizer(folders.one), RunLog(str(tmp_path), {})
    pairs = [
        Pair(f"{n % 7}+{n % 5}=", [f"{n % 9}" * (1 + n % 4)], [f"b{n % 8}" * (1 + n % 3)])
        for n in range(STEPS * BATCH)
    ]
    data = PreferenceData(pairs, tokenizer, max_seq_len=64, source="pairs")
    model, preference = assemble.load_solver(folders.one), Preference(objective="dpo", beta=BETA)
    reference = reference_logprobs(model, data.samples, tmp_path / "r.jsonl", "x", max_batch_size=8, log=log)
    loop = TrainLoop(model, log, lr=LR, total_steps=STEPS, schedule="constant", warmup_ratio=0.0)
    monkeypatch.setattr("src.data.collate.epoch_order", lambda n, seed, epoch: list(range(n)))
    batching, found = Batching(max_batch_size=BATCH, accumulation_steps=1, seed=1), []
    for _, _, (batch,) in data.steps(batching, reference, packing=False, epochs=1):
        with torch.no_grad():
            sides = response_sums(model, batch.batch).view(BATCH, 2).mean(0).tolist()
        loss, tally = preference.loss(model, batch, BATCH)
        loop.backward(loss)
        found.append((loop.step(), report([tally]), sides))
    rows = [
        {
            "prompt_ids": chosen.tokens[: chosen.response_start],
            "chosen_ids": chosen.tokens[chosen.response_start :],
            "rejected_ids": rejected.tokens[rejected.response_start :],
        }
        for chosen, rejected in data.samples
    ]
    expected = theirs(folders, tmp_path, rows)
    assert len(expected) == len(found) == STEPS
    for (step, means, sides), row in zip(found, expected, strict=True):
        assert step.loss == pytest.approx(row["loss"], abs=1e-4)
        assert sides == pytest.approx([row["logps/chosen"], row["logps/rejected"]], rel=1e-4)
        assert BETA * means.margin == pytest.approx(row["rewards/margins"], abs=1e-4)
    assert found[-1][0].loss < 0.9 * found[0][0].loss
