"""src/training/preference.py: the loss and the reference point by hand and beside trl, invariance, the command."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import preference_train
from src import load, losses
from src.command.config import OptimizerFlags
from src.data.batch import BatchSampler
from src.data.examples import StepLabels
from src.errors import UserError
from src.runlog import RunLog
from src.text.tokenizer import Tokenizer
from src.training.preference import KTO, outcome_dataset, with_reference
from src.training.reference import reference_logprobs
from src.training.trainer import Trainer
from tests.conftest import Folders
from tests.ranks import Job, run_jobs
from tests.reference import hf_model, relative_difference
from tests.training.workers import join_weights, preference_epochs

KIND = {"kto": True, "undesirable_weight": 0.5}


def test_loss_by_hand_and_its_gradient() -> None:
    # beta 1, z log 2: right at log 2 is 1/2, at log 6 1 / (1 + 1/3); wrong at log 2 1/2, at 0 1 / (1 + 1/2)
    ratios = torch.tensor([2.0, 6.0, 2.0, 1.0]).log().requires_grad_()
    right = torch.tensor([True, True, False, False])
    found = losses.kto_loss(ratios, right, math.log(2), 1.0, 1.0, 3.0)
    assert_close(found.detach(), torch.tensor([0.5, 0.25, 1.5, 1.0]))
    found.sum().backward()  # sigmoid' = s (1 - s)
    assert_close(ratios.grad, torch.tensor([-0.25, -0.1875, 0.75, 2 / 3]))


def test_each_prompt_gets_the_response_of_another_problem(tokenizer: Tokenizer) -> None:
    rows = [StepLabels(q, [a], [float(a == "1")]) for q, a in (("a", "1"), ("a", "2"), ("b", "3"), ("c", "44"))]
    data = outcome_dataset(rows, tokenizer, max_seq_len=64, source="rows.json")
    texts = [tuple(tokenizer.decode(encoded.tokens) for encoded in sample) for sample in data.samples]
    # two rows on, as one problem has two; the last but one would meet its own prompt's rows no earlier
    assert texts == [("a 1", "a 3"), ("a 2", "a 44"), ("b 3", "b 1"), ("c 44", "c 2")]
    assert data.report.endswith("1 right and 3 wrong")
    uneven = [StepLabels("aaaaa", ["1"], [1.0]), StepLabels("b", ["33333"], [0.0])]
    data = outcome_dataset(uneven, tokenizer, max_seq_len=10, source="rows.json")  # a long prompt, a long response
    assert max(len(encoded.tokens) for sample in data.samples for encoded in sample) == 10
    with pytest.raises(UserError, match=r"rows\.json: all responses are to one problem; .* needs two or more"):
        outcome_dataset(rows[:2], tokenizer, max_seq_len=64, source="rows.json")


def test_what_code_printed_counts_in_no_response(code_tokenizer: Tokenizer) -> None:
    ran = "<|code|>print(1)<|endofblock|><|execution|>1<|endofblock|><|text|>so<|endofblock|>"
    rows = [StepLabels("a", [ran], [1.0]), StepLabels("b", ["<|text|>2<|endofblock|>"], [0.0])]
    (own, _), (_, mismatched) = outcome_dataset(rows, code_tokenizer, max_seq_len=200, source="rows.json").samples
    printed = code_tokenizer.decode([
        token for token, counts in zip(mismatched.tokens, mismatched.supervised, strict=True) if not counts
    ], show_control=True)
    assert printed.endswith("<|assistant|><|execution|>1<|endofblock|>")
    assert mismatched.n_response == own.n_response < len(own.tokens) - own.response_start


@pytest.fixture(scope="module")
def whole(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Weights and reports with every step in one padded forward pass on one rank."""
    return preference_epochs(folders.one, str(tmp_path_factory.mktemp("log")), **KIND)


def test_first_loss_is_half_the_weights(whole: dict[str, Tensor]) -> None:
    n_right, n_wrong = 6, 6
    first, later = whole["reports"][0], whole["reports"][-1]
    assert first[2:4].tolist() == pytest.approx([0.0, 0.0], abs=1e-5)  # margin and reference point
    everything = 0.5 * (n_right + 0.5 * n_wrong) / (n_right + n_wrong)
    assert first[0].item() == pytest.approx(everything, abs=0.05)  # a step of 8 of the 12
    assert later[3] > 0 and whole["held"][2] > 0


@pytest.mark.parametrize(("size", "packing"), [(1, False), (8, True), (2, True)])
def test_micro_batches_and_packing(
    folders: Folders, whole: dict[str, Tensor], tmp_path: Path, size: int, packing: bool
) -> None:
    found = preference_epochs(folders.one, str(tmp_path), size, 8 // size, packing, **KIND)
    for name, tensor in found.items():
        assert relative_difference(tensor, whole[name]) < 2e-6, name


def test_ranks(folders: Folders, whole: dict[str, Tensor], tmp_path: Path) -> None:
    """Two of them, which share the data and then the model."""
    jobs = []
    for size in (1, 2):
        case = {"max_batch_size": 4, "accumulation_steps": size, "packing": True, **KIND}
        arguments = {"folder": (folders.one, folders.two)[size - 1], "log_dir": str(tmp_path / f"{size}"),
                     "cases": [case]}
        jobs.append(Job(2, "tests.training.workers:preference_cases", arguments, size))
    model = load.load_solver(folders.one)
    for size, ranks in zip((1, 2), run_jobs(jobs, tmp_path), strict=True):
        found = [rank["0"] for rank in ranks]
        for rank in found:
            for name in ("losses", "reports", "held"):
                assert_close(rank.pop(name), whole[name], rtol=1e-5, atol=1e-5)
        for first in range(0, 2, size):
            for name, tensor in join_weights(found[first : first + size], model).items():
                assert relative_difference(tensor, whole[name]) < 2e-6, (size, name)


def test_losses_and_reference_points_equal_trl(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl")
    from benchmarks import trl_dpo

    steps, size, lr, beta, weights = 12, 4, 1e-3, 0.3, {"desirable_weight": 1.5, "undesirable_weight": 0.7}
    tokenizer, log = load.load_tokenizer(folders.one), RunLog(str(tmp_path), {})
    rows = [StepLabels(f"{n % 7}+{n % 5}=", [f"{n % 9}" * (1 + n % 4)], [float(n % 3 == 0)])
            for n in range(steps * size)]
    data = outcome_dataset(rows, tokenizer, max_seq_len=64, source="rows")
    model, objective = load.load_solver(folders.one), KTO(beta=beta, **weights)
    reference = reference_logprobs(model, data.samples, tmp_path / "r.jsonl", "x", max_batch_size=8, log=log)
    trainer = Trainer(model, log, OptimizerFlags(lr=lr, schedule="constant", warmup_ratio=0.0), total_steps=steps)
    monkeypatch.setattr("src.data.batch.epoch_order", lambda n, seed, epoch: list(range(n)))
    batching, found = BatchSampler(max_batch_size=size, accumulation_steps=1, seed=1), []
    for _, _, (batch,) in batching.steps(with_reference(data, reference), packing=False, epochs=1):
        measured = objective.of_step(model, [batch])
        loss, tally = measured.loss(model, batch)
        trainer.backward(loss / size)
        found.append((trainer.step().loss, measured.report([tally])))
    given = [
        {"prompt_ids": own.tokens[: own.response_start], "completion_ids": own.tokens[own.response_start :],
         "KL_completion_ids": other.tokens[other.response_start :], "label": own.targets[0] == 1}
        for own, other in data.samples
    ]
    theirs = trl_dpo.kto_trainer(hf_model(folders.hf), given, tmp_path, rows_a_step=size, lr=lr, beta=beta, **weights)
    theirs.train()
    expected = [row for row in theirs.state.log_history if "loss" in row]
    assert len(expected) == len(found) == steps
    for (loss, means), row in zip(found, expected, strict=True):
        assert loss == pytest.approx(row["loss"], abs=1e-4)
        assert means.reference_point == pytest.approx(row["kl"], abs=1e-3)
    assert max(means.reference_point for _, means in found) > 0.1


def test_command_learns_from_outcomes(folders: Folders, tmp_path: Path) -> None:
    path = tmp_path / "outcomes.json"
    rows = [{"instruction": f"{a}+{b}=", "output": str(a + b + wrong), "correct": not wrong}
            for a in range(4) for b in range(3) for wrong in (0, 1)]
    path.write_text(json.dumps(rows))
    preference_train.main(preference_train.PreferenceTrainConfig(
        ckpt_dir=folders.one, save_dir=str(tmp_path / "out"), train_file=str(path), objective="kto", held_out=0.25,
        max_batch_size=4, lr=1e-3, epochs=4, lora_rank=4))
    steps = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    taken = [row for row in steps if "margin" in row]
    assert taken[0]["loss"] == pytest.approx(0.5, abs=1e-6) and taken[0]["reference_point"] == 0.0
    assert taken[0]["responses"] == 4 and taken[-1]["loss"] < 0.49 and taken[-1]["margin"] > 0
    assert {"eval_loss", "eval_accuracy", "eval_reference_point"} <= steps[-1].keys()
    path.write_text(json.dumps([{"instruction": "a", "steps": ["b", "c"], "labels": [1, 0]}]))
    with pytest.raises(UserError, match=r"outcomes\.json, row 1 holds judged steps, .* kto learns from whole"):
        preference_train.main(preference_train.PreferenceTrainConfig(
            ckpt_dir=folders.one, save_dir=str(tmp_path / "no"), train_file=str(path), objective="kto"))
