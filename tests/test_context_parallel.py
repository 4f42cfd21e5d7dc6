"""src/context_parallel.py: ranks that share the positions of a batch compute what one does, and learn alike."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

import ppo_train
import preference_evaluate
from ppo_train import PPOConfig
from preference_evaluate import CreditConfig
from solver_train import SolverTrainConfig, main
from src import load, parallel
from src.errors import UserError
from tests.conftest import Folders
from tests.ranks import run_ranks, succeed
from tests.reference import relative_difference
from tests.workers import shared_positions


def test_what_is_read_of_a_model_and_its_gradient_are_those_of_one_rank(tmp_path: Path) -> None:
    """Eleven positions over four ranks, with fewer key heads than ranks."""
    parallel.start()
    one = shared_positions()
    for found in run_ranks(4, "tests.workers:shared_positions", tmp_path, 1, context_parallel_size=4):
        for case, tensors in one.items():
            for name, expected in tensors.items():
                assert relative_difference(found[case][name], expected) < 1e-6, (case, name)


def flags(folder: str, tmp_path: Path, name: str, **changes: object) -> dict[str, object]:
    """Of a run over rows of many lengths that is saved after each step."""
    rows = [{"instruction": "1+1=" * (1 + i % 3), "output": "2 abc" * (1 + 3 * i % 5)} for i in range(12)]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    # at 1e-3 Adam makes of the rounding of small gradients 1.3e-6 of the largest weight on a CPU without AVX-512
    return {"ckpt_dir": folder, "train_file": str(tmp_path / "rows.json"), "save_dir": str(tmp_path / name),
            "max_batch_size": 4, "schedule": "constant", "warmup_ratio": 0.0, "lr": 1e-4, "save_every": 1,
            "tensor_parallel_size": 1} | changes


def test_a_run_goes_on_as_one_on_one_rank_does(folders: Folders, tmp_path: Path) -> None:
    """Two ranks share batches for a step, and again from there for two more."""
    main(SolverTrainConfig(**flags(folders.one, tmp_path, "one")))
    for steps in (1, 3):
        words = flags(folders.one, tmp_path, "two", max_steps=steps, resume="auto", context_parallel_size=2)
        succeed("solver_train.py", *(f"--{name}={value}" for name, value in words.items()), n=2)
    one, two = (dict(load.load_solver(str(tmp_path / name)).named_parameters()) for name in ("one", "two"))
    for name, parameter in one.items():
        assert relative_difference(two[name].detach(), parameter.detach()) < 1e-6, name
    losses = [[row["loss"] for row in map(json.loads, (tmp_path / name / "metrics.jsonl").open()) if "loss" in row]
              for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6) and len(losses[0]) == 3


def test_scores_are_those_of_one_process(folders: Folders, tmp_path: Path) -> None:
    """Two ranks share long and short rows, and with two tensor-parallel ranks to each part of them four; what scoring
    is planned to take is halved."""
    texts = ["1+1=2\n\n" * (1 + 5 * i % 7) + "#### 2" for i in range(6)]
    files = {
        "samples": [{"id": str(i % 2), "sample": i, "prompt": "1+1=", "response": text}
                    for i, text in enumerate(texts)],
        "problems": [{"id": str(i), "instruction": "1+1=", "label": "2"} for i in range(2)],
        "steps": [{"instruction": "1+1=", "steps": text.split("\n\n"), "labels": [0.0] * (text.count("\n\n") + 1)}
                  for text in texts],
    }
    for name, rows in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    main(SolverTrainConfig(**flags(folders.one, tmp_path, "tuned", max_steps=2, lr=1e-2)))
    scripts = {
        "verifier_evaluate.py": {"ckpt_dir": folders.verifier, "task": "GSM8K",
                                 "samples_file": tmp_path / "samples.json", "label_file": tmp_path / "problems.json"},
        "preference_evaluate.py": {"ckpt_dir": tmp_path / "tuned", "reference_ckpt_dir": folders.one,
                                   "steps_file": tmp_path / "steps.json"},
    }
    for script, words in scripts.items():
        found, passes = [], []
        for n in (None, 2, 4) if script == "verifier_evaluate.py" else (None, 2):
            here = tmp_path / f"{script}{n}"
            given = words | {"log_dir": here, "max_batch_size": 3, "context_parallel_size": 2 if n else 1}
            typed = [script, *(f"--{name}={value}" for name, value in given.items())]
            succeed(*typed, n=n)
            file = here / ("samples.jsonl" if script == "verifier_evaluate.py" else "credits.jsonl")
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            numbers = [number for row in rows for number in row.get("credits", [row.get("score")])]
            found.append(torch.tensor(numbers, dtype=torch.float64))
            if n != 4:
                planned = succeed(*typed, "--dry_run", n=n).stdout
                passes.append(float(re.search(r"forward pass +([\d.]+) KiB", planned)[1]))
        assert found[0].abs().max() > 0.1
        assert all(relative_difference(each, found[0]) < 1e-6 for each in found[1:])
        assert 0.4 < passes[1] / passes[0] < 0.7


@pytest.mark.parametrize(
    ("changes", "message"),
    [({}, "--context_parallel_size 2 does not divide the 1 data-parallel ranks that run"),
     ({"compile": True}, "--compile has not been tried with --context_parallel_size")])
def test_what_cannot_be_shared_is_refused(
    folders: Folders, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        main(SolverTrainConfig(**flags(folders.one, tmp_path, "none", context_parallel_size=2, **changes)))


def test_heads_that_do_not_divide_are_refused_before_rows_are_read(folders: Folders, tmp_path: Path) -> None:
    wrong = flags(folders.one, tmp_path, "none", context_parallel_size=3) | {"train_file": "absent.json"}
    with pytest.raises(UserError, match="size 3 does not divide the . query heads of a tensor-parallel rank"):
        main(SolverTrainConfig(**wrong))


def test_scoring_and_reinforcement_refuse_what_does_not_divide_before_any_work(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"instruction": "1+1=", "steps": ["1+1=2", "#### 3"], "labels": [1.0, 0.0]}]
    (tmp_path / "steps.json").write_text(json.dumps(rows), encoding="utf-8")
    scoring = CreditConfig(ckpt_dir=folders.one, reference_ckpt_dir=folders.one, log_dir=str(tmp_path / "log"),
                           steps_file=str(tmp_path / "steps.json"), context_parallel_size=3)
    learning = PPOConfig(actor_ckpt_dir=folders.one, actor_save_dir=str(tmp_path / "log"), critic_save_dir="critic",
                         critic_ckpt_dir=folders.verifier, reward=["rule"], train_file="absent.json",
                         tensor_parallel_size=1, context_parallel_size=3)
    heads = "size 3 does not divide the . query heads of a "
    for ranks, message in ((1, f"size 3 does not divide the 1 processes|{heads}"), (3, heads)):
        monkeypatch.setattr(parallel, "world_size", lambda ranks=ranks: ranks)
        for start, config in ((preference_evaluate.main, scoring), (ppo_train.main, learning)):
            with pytest.raises(UserError, match=message):
                start(config)
    assert not (tmp_path / "log").exists()
    with pytest.raises(UserError, match="--compile has not been tried with --context_parallel_size"):
        dataclasses.replace(learning, compile=True)
