"""Outcome and process verifiers: the update does not depend on how a step is cut up, and a killed run ends the same."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import verifier_train
from src import load
from src.training.trainer import StepReport, Trainer
from tests.conftest import Folders
from tests.ranks import Job, in_few_launches
from tests.training.test_invariance import assert_same
from tests.training.verifier_workers import ROWS, verifier_epochs
from tests.training.workers import join_weights, lora_of

OBJECTIVES = ("outcome", "process")
APART = ("losses", "report", "passes")


@pytest.fixture(scope="module")
def whole(
    folders: Folders, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, int], dict[str, Tensor]]:
    """Weights, losses and report with every step in one padded forward pass on one rank."""
    log_dir = str(tmp_path_factory.mktemp("log"))
    return {
        (objective, rank): verifier_epochs(folders.verifier, log_dir, objective, lora_rank=rank)
        for objective, rank in itertools.product(OBJECTIVES, (-1, 4))
    }


def assert_same_run(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name in APART[:2]:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)
    assert_same(*({name: x for name, x in run.items() if name not in APART} for run in (found, expected)))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    ("max_batch_size", "accumulation_steps", "packing", "lora_rank"),
    [(8, 1, True, -1), (1, 8, False, -1), (2, 4, True, 4), (4, 2, False, 4)],
)
def test_micro_batches_and_packing(
    folders: Folders,
    whole: dict[tuple[str, int], dict[str, Tensor]],
    tmp_path: Path,
    objective: str,
    max_batch_size: int,
    accumulation_steps: int,
    packing: bool,
    lora_rank: int,
) -> None:
    found = verifier_epochs(
        folders.verifier, str(tmp_path), objective, max_batch_size, accumulation_steps, packing, lora_rank
    )
    assert_same_run(found, whole[objective, lora_rank])


TOPOLOGIES = [(2, 1, 1), (2, 2, 1), (4, 2, 1), (4, 4, 1), (2, 1, 2)]  # ranks, those of a model, those of a batch
CASES = [
    (size, {"objective": objective, **case})
    for objective in OBJECTIVES
    for size, case in ((4, {}), (1, {"packing": True}), (2, {"lora_rank": 4}))
]


@pytest.fixture(scope="module")
def on_ranks(
    folders: Folders, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[tuple[int, ...]], list[dict[str, object]]]:
    """By topology, what every rank has of every case, whose steps all have 8 rows."""
    folder, jobs = tmp_path_factory.mktemp("ranks"), {}
    for n, tensor_parallel_size, context_parallel_size in TOPOLOGIES:
        share = n // tensor_parallel_size // context_parallel_size
        arguments = {
            "folder": folders.verifier if tensor_parallel_size == 1 else folders.verifier_two,
            "log_dir": str(folder / "log"),
            "cases": [
                {"max_batch_size": size, "accumulation_steps": 8 // size // share, **case} for size, case in CASES
            ],
        }
        jobs[n, tensor_parallel_size, context_parallel_size] = Job(
            n, "tests.training.verifier_workers:verifier_cases", arguments, tensor_parallel_size,
            context_parallel_size=context_parallel_size,
        )
    return in_few_launches(jobs, folder)


@pytest.mark.parametrize(("n", "tensor_parallel_size", "context_parallel_size"), TOPOLOGIES)
def test_ranks(
    folders: Folders,
    whole: dict[tuple[str, int], dict[str, Tensor]],
    on_ranks: Callable[[tuple[int, ...]], list[dict[str, object]]],
    n: int,
    tensor_parallel_size: int,
    context_parallel_size: int,
) -> None:
    ranks = on_ranks((n, tensor_parallel_size, context_parallel_size))
    for index, (size, case) in enumerate(CASES):
        lora_rank = case.get("lora_rank", -1)
        model = load.load_verifier(folders.verifier)
        load.put_lora_on(model, lora_of(lora_rank), 1)
        found = [rank[str(index)] for rank in ranks]
        apart = [{name: rank.pop(name) for name in APART} for rank in found]
        # data-parallel ranks measure a share each, and all say the same
        share = n // tensor_parallel_size // context_parallel_size
        assert all(rank["passes"] == -(-len(ROWS[case["objective"]]) // (size * share)) for rank in apart)
        assert all(torch.equal(rank["report"], apart[0]["report"]) for rank in apart)
        for first in range(0, n, tensor_parallel_size):  # every data-parallel copy
            joined = join_weights(found[first : first + tensor_parallel_size], model)
            assert_same_run(joined | apart[first], whole[case["objective"], lora_rank])


class Killed(BaseException):
    """What a run dies of; nothing catches it."""


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_killed_run_ends_with_the_same_bits(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: str
) -> None:
    keys = ("output", "correct") if objective == "outcome" else ("steps", "labels")
    sides = [(row.steps[0], row.labels[0] == 1) if objective == "outcome" else (row.steps, row.labels)
             for row in ROWS[objective]]
    rows = [{"instruction": row.instruction or "q", **dict(zip(keys, side, strict=True))}
            for row, side in zip(ROWS[objective], sides, strict=True)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))

    def train(name: str, **more: object) -> Path:
        verifier_train.main(
            verifier_train.VerifierTrainConfig(
                ckpt_dir=folders.one,
                save_dir=str(tmp_path / name),
                train_file=[str(tmp_path / "rows.json")],
                objective=objective,
                held_out=0.2,
                max_seq_len=64,
                max_batch_size=2,
                epochs=3,
                lr=1e-3,
                packing=True,
                save_every=1,
                **more,
            )
        )
        return tmp_path / name

    expected = train("whole")
    steps = itertools.count(1)
    step = Trainer.step

    def dying(trainer: Trainer) -> StepReport:
        if next(steps) == 5:
            raise Killed
        return step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", dying)
        with pytest.raises(Killed):
            train("killed")
    found = train("killed", resume="auto")
    for name in ("consolidated.00.pth", "params.json"):
        assert (found / name).read_bytes() == (expected / name).read_bytes()
