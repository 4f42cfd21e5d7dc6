"""ProcessBench's GSM8K part from the published file to the F1 report: prepare, train a small verifier, evaluate it."""

import json
from pathlib import Path

import pytest

import checkpoint_split
import verifier_evaluate
import verifier_train
from dataset import prepare
from src.data.examples import read_step_labels
from src.evaluation.verifier_report import first_wrong, report_steps

ROOT = Path(__file__).parents[1]
RAW = ROOT.parent / "shared" / "data" / "steps" / "processbench_gsm8k.json"
CHARACTERS = 900  # of a problem and its solution: what is longer costs the test time

pytestmark = pytest.mark.skipif(not RAW.is_file(), reason="needs ../shared/data")


@pytest.fixture(scope="module")
def steps_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("processbench") / "steps.json"
    prepare.main(str(RAW), str(path), "processbench")
    return str(path)


def test_a_perfect_scorer_has_f1_of_1_and_a_constant_one_of_0(steps_file: str) -> None:
    rows = list(read_step_labels(steps_file))
    wrong = first_wrong(rows)
    assert [row["label"] for row in json.loads(RAW.read_text())] == wrong
    perfect = [[0.1 if place == first else 0.9 for place in range(len(row.steps))]
               for row, first in zip(rows, wrong, strict=True)]
    assert report_steps(rows, perfect)["f1"] == 1.0
    for constant in (0.1, 0.9):
        assert report_steps(rows, [[constant] * len(row.steps) for row in rows])["f1"] == 0.0


def test_the_published_file_goes_through_training_and_the_report(steps_file: str, tmp_path: Path) -> None:
    rows = json.loads(Path(steps_file).read_text())
    short = [row for row in rows if len(row["instruction"]) + len("".join(row["steps"])) < CHARACTERS]
    train, test = short[::2], short[1::2]
    files = {name: tmp_path / f"{name}.json" for name in ("train", "test")}
    for name, part in (("train", train), ("test", test)):
        files[name].write_text(json.dumps(part))
    base, verifier, log = (str(tmp_path / name) for name in ("base", "verifier", "log"))
    checkpoint_split.main(
        checkpoint_split.SplitConfig(ckpt_file=str(ROOT / "dataset" / "toy" / "base"), save_path=base, n=1)
    )
    params = tmp_path / "base" / "params.json"
    params.write_text(json.dumps(json.loads(params.read_text()) | {"max_seq_len": CHARACTERS}))
    verifier_train.main(
        verifier_train.VerifierTrainConfig(
            ckpt_dir=base,
            save_dir=verifier,
            train_file=[str(files["train"])],
            objective="process",
            max_seq_len=CHARACTERS,
            max_batch_size=4,
            packing=True,
            max_steps=3,
        )
    )
    verifier_evaluate.main(
        verifier_evaluate.VerifierEvaluateConfig(
            ckpt_dir=verifier, log_dir=log, steps_file=str(files["test"]), threshold_file=str(files["train"])
        )
    )
    report = json.loads((tmp_path / "log" / "results.json").read_text())
    assert report["solutions"] == len(test) >= 20
    assert report["steps"] == sum(label is not None for row in test for label in row["labels"])
    assert 0 <= report["f1"] <= 1 and 0 <= report["step_accuracy"] <= 1
