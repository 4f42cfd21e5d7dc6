"""src/training/reward_model.py: which token is judged, and the loss against plain PyTorch."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import verifier_train
from src import load
from src.checkpoint import storage
from src.command.config import OptimizerFlags
from src.data.batch import BatchSampler, Dataset
from src.data.encoding import STEP_END, encode_steps
from src.data.examples import StepLabels
from src.models.decoder import Decoder
from src.runlog import RunLog
from src.text.tokenizer import Tokenizer
from src.training.reward_model import LabelObjective, label_dataset
from src.training.trainer import Trainer
from tests.conftest import Folders

ROWS = [
    StepLabels("1+1=", ["a b", "c", "#### 2"], [1.0, None, 0.0]),
    StepLabels("a", ["9-8=1", "#### 1"], [0.25, 1.0]),
    StepLabels("", ["7"], [1.0]),
]


@pytest.fixture
def verifier(folders: Folders) -> Decoder:
    return load.load_verifier(folders.verifier)


def make_data(rows: list[StepLabels], tokenizer: Tokenizer, **options: object) -> tuple[Dataset, LabelObjective]:
    return label_dataset(rows, tokenizer, max_seq_len=64, source="steps.json", **options)


def batching(max_batch_size: int, accumulation_steps: int) -> BatchSampler:
    return BatchSampler(max_batch_size=max_batch_size, accumulation_steps=accumulation_steps, seed=1)


def test_each_step_is_judged_at_its_last_token(tokenizer: Tokenizer) -> None:
    encoded = encode_steps(tokenizer, *ROWS[0][:3])
    response = encoded.tokens[encoded.response_start :]
    read = [place for place, target in enumerate(encoded.targets) if not math.isnan(target)]
    assert len(encoded.targets) == len(response) == encoded.n_response
    assert tokenizer.decode(response[: read[0] + 1]) == f"a b{STEP_END}"
    assert response[read[1]] == tokenizer.eos_id and read[1] == len(response) - 1
    assert [encoded.targets[place] for place in read] == [1.0, 0.0]
    assert tokenizer.decode(response[:-1]) == STEP_END.join(ROWS[0].steps)


def expected_terms(verifier: Decoder, data: Dataset, right_weight: float) -> list[float]:
    """The loss of every label, one sequence at a time by plain PyTorch."""
    terms = []
    for (sample,) in data.samples:
        scores = verifier.scores(verifier(torch.tensor([sample.tokens])))[0, sample.response_start :]
        for score, target in zip(scores, sample.targets, strict=True):
            if not math.isnan(target):
                weight = torch.tensor(right_weight)
                loss = F.binary_cross_entropy_with_logits(score, torch.tensor(target), pos_weight=weight)
                terms.append(loss.item())
    return terms


@pytest.mark.parametrize("options", [{}, {"label_tokens": "all"}, {"balance": True}], ids=str)
def test_loss_is_the_mean_over_labels_however_a_step_is_split(
    verifier: Decoder, tokenizer: Tokenizer, options: dict[str, object]
) -> None:
    data, objective = make_data(ROWS, tokenizer, **options)
    terms = expected_terms(verifier, data, objective.right_weight)
    all_tokens = "label_tokens" in options
    assert len(terms) == 4 + (len(data.samples[2][0].targets) if all_tokens else 1)
    for size, packing in itertools.product((1, 2, 3), (False, True)):
        ((_, _, batches),) = batching(size, 3 // size + 1).steps(data, packing=packing, epochs=1)
        n = objective.count(batches)
        assert n == len(terms)
        loss = sum(objective.loss(verifier, batch).item() for batch in batches) / n
        assert loss == pytest.approx(sum(terms) / n, abs=1e-5)


def test_balance_lets_both_kinds_weigh_alike(tokenizer: Tokenizer) -> None:
    rows = [StepLabels("q", ["s"], [float(index == 0)]) for index in range(4)]
    assert make_data(rows, tokenizer, balance=True)[1].right_weight == pytest.approx(3.0)
    assert make_data(rows, tokenizer)[1].right_weight == 1.0


def test_balance_counts_what_is_read(tokenizer: Tokenizer) -> None:
    """The labels of rows that were dropped do not count, and a solution judged everywhere counts with each token."""
    kept = [StepLabels("q", ["s"], [1.0])] * 150 + [StepLabels("q", ["abcd"], [0.0])] * 50
    long = StepLabels("q", ["0" * 100], [0.0])
    assert make_data([*kept, long, long], tokenizer, balance=True)[1].right_weight == pytest.approx(1 / 3)
    n_right, n_wrong = (len(tokenizer.encode(text)) + 1 for text in ("s", "abcd"))
    everywhere = make_data(kept, tokenizer, balance=True, label_tokens="all")[1].right_weight
    assert everywhere == pytest.approx(50 * n_wrong / (150 * n_right)) and n_wrong > n_right


# the same step as PRM800K gives it: the first and only one of its row, the last of its row, or one in the middle
FIRST, LATER = StepLabels("q", ["a" * 20], [0.0]), StepLabels("q", ["b", "a" * 20], [None, 0.0])
INNER = StepLabels("q", ["b", "a" * 20, "c"], [1.0, 0.0, None])


@pytest.mark.parametrize("row", [FIRST, LATER, INNER, StepLabels("q", ["a\n\nbc\n\nd"], [0.0])], ids=str)
def test_one_step_is_one_label_wherever_it_stands_and_however_long_it_is(
    verifier: Decoder, tokenizer: Tokenizer, row: StepLabels
) -> None:
    n_labels = sum(label is not None for label in row.labels)
    data, objective = make_data([row] * 3, tokenizer)
    for packing in (False, True):
        ((_, _, batches),) = batching(3, 1).steps(data, packing=packing, epochs=1)
        assert objective.count(batches) == sum(batch.n_targets for batch in batches) == 3 * n_labels
    assert f"{3 * n_labels} labels" in data.report
    short = StepLabels("q", ["z"], [1.0])
    mixed, objective = make_data([row, short], tokenizer, balance=True)
    n_right = 1 + sum(label == 1.0 for label in row.labels)
    assert objective.right_weight == pytest.approx((n_labels + 1 - n_right) / n_right)
    agree = [
        (score > 0) == bool(target)
        for each in (row, short)
        for (sample,) in make_data([each], tokenizer)[0].samples
        for score, target in zip(
            verifier.scores(verifier(torch.tensor([sample.tokens])))[0, sample.response_start :],
            sample.targets,
            strict=True,
        )
        if not math.isnan(target)
    ]
    assert len(agree) == n_labels + 1
    assert objective.evaluate(verifier, mixed, 2).held_out_accuracy == pytest.approx(sum(agree) / len(agree))


def test_a_row_whose_judged_steps_are_cut_off_is_dropped(tokenizer: Tokenizer) -> None:
    rows = [StepLabels("q", ["a"], [1.0])] * 200 + [StepLabels("q", ["b" * 80, "c"], [None, 0.0])]
    assert "1 too long: 0 cut, 1 dropped; 200 labels" in make_data(rows, tokenizer, truncation="right")[0].report


@pytest.mark.parametrize("text", ["a\nb c\n#### 2", "a\n\nb c\n\n\n#### 2\n"])
def test_steps_that_are_lines_are_laid_out_as_lines(tokenizer: Tokenizer, text: str) -> None:
    """A solution and the list of its steps are the same tokens, each line judged at its end."""
    lines = ["a", "b c", "#### 2"]
    rows = [StepLabels("1+1=", lines, [1.0, 0.0, 1.0]), StepLabels("1+1=", [text], [1.0])]
    (judged,), (whole,) = make_data(rows, tokenizer, step="line")[0].samples
    assert judged.tokens == whole.tokens
    ids = [
        token
        for n, line in enumerate(lines)
        for token in tokenizer.encode(line + "\n" * (n < 2), start=n == 0)
    ]
    assert judged.tokens[judged.response_start :] == [*ids, tokenizer.eos_id]
    assert [target for target in judged.targets if not math.isnan(target)] == [1.0, 0.0, 1.0]
    assert math.isnan(whole.targets[-2]) and whole.targets[-1] == 1.0
    assert make_data(rows, tokenizer)[0].samples[0][0].tokens != judged.tokens


def test_report_by_hand(verifier: Decoder, tokenizer: Tokenizer) -> None:
    data, objective = make_data(ROWS[:2], tokenizer)
    scores = [
        score.item()
        for (sample,) in data.samples
        for score, target in zip(
            verifier.scores(verifier(torch.tensor([sample.tokens])))[0, sample.response_start :],
            sample.targets,
            strict=True,
        )
        if not math.isnan(target)
    ]
    report = objective.evaluate(verifier, data, 2)
    agree = [(score > 0) == right for score, right in zip(scores, [True, False, False, True], strict=True)]
    assert report.held_out_accuracy == pytest.approx(sum(agree) / 4)
    assert report.accuracy_on_right == pytest.approx((agree[0] + agree[3]) / 2)
    assert report.accuracy_on_wrong == pytest.approx((agree[1] + agree[2]) / 2)
    assert report.score_mean == pytest.approx(sum(scores) / 4, abs=1e-5)
    above = [scores[right] > scores[wrong] for right in (0, 3) for wrong in (1, 2)]
    assert report.held_out_auc == sum(above) / 4
    # U = 4 AUC of 2 right and 2 wrong ones has the variance 2 x 2 x 5 / 12
    assert report.separation == pytest.approx((sum(above) - 2) / math.sqrt(20 / 12))


def test_it_learns_which_step_is_wrong(folders: Folders, tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [
        StepLabels(f"{a}", [f"{a} {a}", f"{a} {b}"], [1.0, float(a == b)]) for a in range(4) for b in range(4)
    ]
    data, objective = make_data(rows, tokenizer, balance=True)
    model = load.load_verifier(folders.one, from_solver=True)
    trainer = Trainer(model, RunLog(str(tmp_path), {}), OptimizerFlags(lr=1e-2), total_steps=60)
    for _, _, batches in batching(16, 1).steps(data, packing=True, epochs=60):
        trainer.backward(objective.loss(model, batches[0]) / objective.count(batches))
        trainer.step()
    report = objective.evaluate(model, data, 16)
    assert report.accuracy_on_right == report.accuracy_on_wrong == 1.0


def test_a_verifier_that_is_measured_on_one_kind_alone_is_not_shown_to_tell(
    folders: Folders, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, kinds in (("train", (True, False)), ("held", (True,))):
        rows = [{"instruction": f"{name}{a}", "output": f"a{a}", "correct": kind} for a in range(4) for kind in kinds]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    verifier_train.main(verifier_train.VerifierTrainConfig(
        ckpt_dir=folders.one, save_dir=str(tmp_path / "out"), train_file=[str(tmp_path / "train.json")],
        label_file=str(tmp_path / "held.json"), objective="outcome", max_batch_size=8))
    assert "not shown to tell right from wrong" in caplog.text


@pytest.mark.parametrize("objective", ["outcome", "pairwise"])
def test_a_verifier_that_learns_nothing_says_so_once(
    folders: Folders, tmp_path: Path, caplog: pytest.LogCaptureFixture, objective: str
) -> None:
    rows = [{"instruction": f"{a}+1=", "output": f"a{b}", "correct": b == 1, "chosen": "a1", "rejected": f"b{a}"}
            for a in range(8) for b in (0, 1)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    config = verifier_train.VerifierTrainConfig(
        ckpt_dir=folders.one, save_dir=str(tmp_path / "out"), train_file=[str(tmp_path / "rows.json")],
        objective=objective, held_out=0.5, max_batch_size=8, epochs=2, lr=0.0)
    verifier_train.main(config)
    assert caplog.text.count("not shown to tell right from wrong: on held-out rows it is ") == 1
    caplog.clear()
    verifier_train.main(replace(config, save_dir=str(tmp_path / "learnt"), lr=2e-2, epochs=12, eval_every=5))
    assert "not shown to tell" not in caplog.text
    kept = [load.load_config(str(tmp_path / "learnt" / f"epoch-{epoch}")) for epoch in (1, 7, 12)]
    assert len({1.0, *(each.score_std for each in kept)}) == 4  # each in units of its own scores


def test_a_verifier_learns_on_a_quantised_base(folders: Folders, tmp_path: Path) -> None:
    rows = [{"instruction": f"{a}+1=", "output": str(a + 1 + wrong), "correct": not wrong}
            for a in range(8) for wrong in (0, 1)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    verifier_train.main(verifier_train.VerifierTrainConfig(
        ckpt_dir=folders.one, save_dir=str(tmp_path / "out"), train_file=[str(tmp_path / "rows.json")],
        objective="outcome", quantize="int4", lora_rank=4, held_out=0.25, max_batch_size=12, epochs=8,
        lr=1e-2))
    steps = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in steps if "loss" in row]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and losses[-1] < losses[0] - 1e-3
    adapter = storage.read_shard(tmp_path / "out/adapter.00.pth")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32} and adapter["v_head.weight"].any()
