"""Step-controlled DPO from end to end on a tiny taught model: samples, pairs, branches, a mix, preferences, credit."""

import json
from pathlib import Path

import pytest

import preference_evaluate
import preference_train
from src import parallel
from src.checkpoint import storage
from tests.test_entries import PROBLEMS, teach, write_json
from tests.tiny import build, main_of, split, write_hf_llama

BRANCH = {"attempts": 20, "max_new_tokens": 8, "max_batch_size": 16, "pairs_a_problem": 2}
TRAIN = {"lr": 1e-4, "max_batch_size": 4, "held_out": 0.3}


def stepwise(row: dict[str, object], response: str) -> str:
    """The response with two right steps before its answer."""
    return f"{row['instruction']}{row['label']}\n\nabc\n\n{response}"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the pipeline has run."""
    parallel.start()
    folder = tmp_path_factory.mktemp("steps")
    teach(write_hf_llama(folder / "hf"))
    base = split(folder / "hf", folder / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_json(folder / "train.json", PROBLEMS)
        evaluate = main_of("solver_evaluate", "task", "label_file", "log_dir", "ckpt_dir")
        evaluate("toy", "train.json", "log", base, num_samples=6, temperature=1.0, max_new_tokens=12)
        samples = folder / "log/samples.jsonl"
        lines = [json.loads(line) for line in samples.read_text().splitlines()]
        by_prompt = {row["instruction"]: row for row in PROBLEMS}
        for line in lines:  # the tiny model writes no steps of its own
            line["response"] = stepwise(by_prompt[line["prompt"]], line["response"])
        samples.write_text("".join(json.dumps(line) + "\n" for line in lines))
        build.pairs("log/samples.jsonl", "ordinary.json", pairs_a_problem=9)
        build.branch("toy", "log/samples.jsonl", "branches", "branches.json", base, **BRANCH)
        build.mix("ordinary.json", "branches.json", "mix.json", "control.json", share=0.4)
        preference_train.main(
            preference_train.PreferenceTrainConfig(
                ckpt_dir=base, save_dir="scdpo", train_file="mix.json", **TRAIN
            )
        )
        steps = [
            {"instruction": row["instruction"], "steps": stepwise(row, f"#### {answer}").split("\n\n"),
             "labels": [1, 1, int(str(answer) == row["label"])]}
            for row in PROBLEMS for answer in (row["label"], int(row["label"]) + 1)
        ]
        write_json(folder / "steps.json", steps)
        preference_evaluate.main(
            preference_evaluate.CreditConfig(
                ckpt_dir="scdpo",
                reference_ckpt_dir=base,
                steps_file="steps.json",
                log_dir="credit",
                beta=0.1,
                max_batch_size=8,
            )
        )
    return folder


def rows(file: Path) -> list[dict[str, object]]:
    text = file.read_text()
    return json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]


def test_scdpo_26_every_step_has_left_its_file(path: Path) -> None:
    mix, control, branches = (rows(path / f"{name}.json") for name in ("mix", "control", "branches"))
    assert len(mix) == len(control) > len(branches) > 0
    assert [row for row in mix if row in branches and "prefix" in row] and not any(
        "prefix" in row for row in control
    )
    storage.check_complete(path / "scdpo")
    first = rows(path / "scdpo/metrics.jsonl")[0]
    assert first["loss"] == pytest.approx(0.693147, abs=1e-6)
    report = json.loads((path / "credit/results.json").read_text())
    assert report["solutions"] == 2 * len(PROBLEMS) and report["with_a_wrong_step"] == len(PROBLEMS)
    for row in rows(path / "credit/credits.jsonl"):
        assert sum(row["credits"]) == pytest.approx(row["reward"], abs=1e-9)


def test_scdpo_26_a_rerun_goes_on_by_id(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever order the lines come in, and whichever is missing."""
    monkeypatch.chdir(path)
    samples, expected = path / "branches/samples.jsonl", (path / "branches.json").read_bytes()
    lines = samples.read_text().splitlines(keepends=True)
    samples.write_text("".join(lines[2:][::-1]))
    build.branch("toy", "log/samples.jsonl", "branches", "branches.json", str(path / "base"), **BRANCH)
    assert (path / "branches.json").read_bytes() == expected
    assert samples.read_text().splitlines(keepends=True) == lines
