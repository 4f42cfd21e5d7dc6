"""src/context_parallel.py: ranks that share the positions of a batch compute what one does, and learn alike."""

import json
from pathlib import Path

import pytest

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
    return {"ckpt_dir": folder, "train_file": str(tmp_path / "rows.json"), "save_dir": str(tmp_path / name),
            "max_batch_size": 4, "schedule": "constant", "warmup_ratio": 0.0, "lr": 1e-3, "save_every": 1,
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
