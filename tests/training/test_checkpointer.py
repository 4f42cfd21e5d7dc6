"""src/training/checkpointer.py: what a stopped run goes on from, and that it then does what it would have done."""

import functools
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from src import load, parallel
from src.checkpoint import saving, storage
from src.command.config import OptimizerFlags, SavingFlags
from src.data.batch import Batch
from src.errors import UserError
from src.models.lora import LoraConfig
from src.runlog import RunLog
from src.training.checkpointer import Checkpointer, Trainee
from src.training.sft import n_supervised, sft_loss
from src.training.trainer import Trainer
from tests.conftest import Folders
from tests.ranks import ROOT, Job, run_jobs
from tests.reference import batch
from tests.training.workers import resumed_epochs

STEPS, KILLED = 6, 77
OPERATIONS = ("mkdir", "replace", "unlink", "rmdir", "link", "fsync", "pwrite", "truncate", "ftruncate")


class Run:
    """A run of six steps in two epochs on one batch, at the step it was resumed at."""

    def __init__(
        self, ckpt_dir: str, folder: Path, lora_rank: int = -1, background: bool = False, **options: object
    ) -> None:
        self.folder = folder
        self.model = load.load_solver(ckpt_dir, trained=load.Trained())
        lora = LoraConfig(rank=lora_rank, alpha=16.0, dropout=0.1, targets=("wq", "w2")) if lora_rank > 0 else None
        load.put_lora_on(self.model, lora, seed=1)
        log = RunLog(str(folder), {})
        self.trainer = Trainer(self.model, log, OptimizerFlags(lr=1e-2, weight_decay=0.1), total_steps=STEPS)
        kept = {name: options.pop(name) for name in ("save_every", "keep_last") if name in options}
        self.checkpointer = Checkpointer(
            log,
            [Trainee(str(folder), self.trainer, ckpt_dir)],
            SavingFlags(save_dtype="bfloat16", background_save=background, **kept),
            lora=lora,
            steps_per_epoch=3,
            total_steps=STEPS,
            run_fingerprint={"seed": 1},
            **options,
        )
        self.model.train()

    def step(self, score: float | None = None) -> None:
        micro = Batch(*(part[:2] for part in batch()[:2]))
        for each in (micro, batch()):
            self.trainer.backward(sft_loss(self.model, each) / (2 * n_supervised([micro, batch()])))
        self.trainer.step()
        self.checkpointer.step_done(self.trainer.steps, score)

    def bits(self) -> dict[str, Tensor]:
        """Everything that the next step depends on."""
        return {name: tensor.detach().clone() for name, tensor in self.trainer.state().tensors.items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.fixture(autouse=True)
def alone(folders: Folders) -> None:
    parallel.start()


@pytest.mark.parametrize("lora_rank", [-1, 4])
def test_a_resumed_run_ends_with_the_same_bits(folders: Folders, tmp_path: Path, lora_rank: int) -> None:
    whole = Run(folders.one, tmp_path / "whole", lora_rank)
    for _ in range(STEPS):
        whole.step()
    for stop in (1, 3, 5):  # in an epoch, at its end, behind it
        folder = tmp_path / str(stop)
        first = Run(folders.one, folder, lora_rank, save_every=1)
        assert first.checkpointer.resume("auto") == 0
        for _ in range(stop):
            first.step()
        rest = Run(folders.one, folder, lora_rank)
        torch.manual_seed(99)  # what the process drew before does not matter
        assert rest.checkpointer.resume("auto") == stop
        for _ in range(stop, STEPS):
            rest.step()
        assert_equal(rest.bits(), whole.bits())
        rest.checkpointer.finish()
        storage.check_complete(folder)
        assert not list(folder.glob("optimizer*"))


def test_what_is_kept(folders: Folders, tmp_path: Path) -> None:
    run = Run(folders.one, tmp_path, save_every=2, keep_last=2)
    for score in (None, 0.5, None, 0.7, 0.6, None):
        run.step(score)
    run.checkpointer.finish()
    kept = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert kept == {"step-4", "step-6", "epoch-1", "epoch-2", "best"}
    weights = [storage.read_shard(tmp_path / name / "consolidated.00.pth") for name in ("best", "step-4")]
    assert_equal(*weights)
    again = Run(folders.one, tmp_path, save_every=2)
    assert again.checkpointer.resume("auto") == STEPS
    assert json.loads((tmp_path / "step-6" / "state.json").read_text())["best"] == 0.7


def test_a_save_counts_beside_a_later_one_from_before_a_kill(folders: Folders, tmp_path: Path) -> None:
    """The actor's of step 4, say, whose critic was not written: the run went on from step 2, which both had."""
    run = Run(folders.one, tmp_path, save_every=1, keep_last=2)
    run.step()
    shutil.copytree(tmp_path / "step-1", tmp_path / "step-5")
    for _ in range(2):
        run.step(0.5)
    assert {path.name for path in tmp_path.glob("step-*")} == {"step-2", "step-3"}
    storage.check_complete(tmp_path / "best")


def test_a_run_that_is_replaced_leaves_no_weights_beside_those_of_the_new_one(folders: Folders, tmp_path: Path) -> None:
    run = Run(folders.one, tmp_path)
    for _ in range(STEPS):
        run.step(0.5)
    run.checkpointer.finish()
    left = tmp_path / "epoch-1-copy"
    (tmp_path / "epoch-1").rename(left)
    assert Run(folders.one, tmp_path).checkpointer.resume("none") == 0
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [left]  # a user's own


def test_only_what_is_better_than_the_start_is_best(
    folders: Folders, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for stop in (0, 2):  # the second run is stopped and resumed, and takes the place of the first
        run = Run(folders.one, tmp_path, save_every=1)
        assert run.checkpointer.resume("none") == 0
        run.checkpointer.measured_start(0.6)
        assert not (tmp_path / "best").exists()
        for number in range(1, STEPS + 1):
            run.step(0.6 if number < 5 or not stop else 0.7)
            if number == stop:
                run = Run(folders.one, tmp_path, save_every=1)
                assert run.checkpointer.resume("auto") == stop
        run.checkpointer.finish()
        warned = "nothing did better on held-out data than the start, 0.6" in caplog.text
        assert warned == (not stop) == (not (tmp_path / "best").exists())
        caplog.clear()
    run = Run(folders.one, tmp_path)
    assert run.checkpointer.resume("none") == 0
    run.checkpointer.measured_start(0.6)
    assert not (tmp_path / "best").exists()  # it was of another run


def test_an_unfinished_run_is_not_overwritten_and_not_mixed(folders: Folders, tmp_path: Path) -> None:
    Run(folders.one, tmp_path, save_every=1).step()
    with pytest.raises(UserError, match="holds a run that stopped at step 1; continue it with --resume auto"):
        Run(folders.one, tmp_path).checkpointer.resume("none")
    other = Run(folders.one, tmp_path)
    other.checkpointer._run_fingerprint = other.checkpointer._run_fingerprint | {"seed": 2}
    with pytest.raises(UserError, match="seed was 1 and is 2 now; resume with the data and flags of then"):
        other.checkpointer.resume("auto")
    with pytest.raises(UserError, match="is missing; other parameters were trained then than now"):
        Run(folders.one, tmp_path, lora_rank=4).checkpointer.resume("auto")


@pytest.mark.parametrize("background", [False, True])
def test_sigterm_saves_and_ends_with_status_0(folders: Folders, tmp_path: Path, background: bool) -> None:
    run = Run(folders.one, tmp_path, background=background)
    run.step()
    run.checkpointer._ask_to_stop(15, None)
    with pytest.raises(SystemExit) as end:
        run.step()
    assert not end.value.code
    assert Run(folders.one, tmp_path).checkpointer.resume("auto") == 2


@pytest.mark.parametrize(("background", "stride"), [(False, 1), (True, 4)])
def test_a_save_killed_at_any_file_operation_leaves_one_to_resume_from(
    folders: Folders, tmp_path: Path, background: bool, stride: int
) -> None:
    """The process dies, without any clean-up, at its k-th file operation of the third save, for every (fourth) k."""
    run = Run(folders.one, tmp_path / "run", lora_rank=2, background=background, save_every=1)
    states = []
    for _ in range(2):
        run.step()
        run.checkpointer.complete()
        states.append(run.bits())
    resumed, k = set(), 0
    while True:
        k += stride
        child = os.fork()
        if not child:
            _die_at_operation(k)
            run.step()
            run.checkpointer.complete()
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, KILLED)
        rest = Run(folders.one, tmp_path / "run", lora_rank=2)
        done = rest.checkpointer.resume("auto")
        resumed.add(done)
        if done == 2:
            assert_equal(rest.bits(), states[1])
        else:
            assert done == 3
            break
    while status:  # the kills after the save was complete: publishing, discarding
        k += stride
        child = os.fork()
        if not child:
            _die_at_operation(k)
            run.step()
            run.checkpointer.complete()
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert Run(folders.one, tmp_path / "run", lora_rank=2).checkpointer.resume("auto") == 3
    assert resumed == {2, 3} and k > 30
    storage.check_complete(tmp_path / "run" / "epoch-1")


def _die_at_operation(k: int) -> None:
    """In a forked child: let the k-th change to the file system be the last thing this process tries."""
    left = k
    parallel.barrier = lambda: None  # the threads that would carry it stayed with the parent

    def counted(operation: object, *arguments: object, **options: object) -> object:
        nonlocal left
        left -= 1
        if not left:
            os._exit(KILLED)
        return operation(*arguments, **options)

    for name in OPERATIONS:
        setattr(os, name, functools.partial(counted, getattr(os, name)))


def test_a_run_goes_on_at_another_number_of_ranks(folders: Folders, tmp_path: Path) -> None:
    """Tensor-parallel 4, then 2, then two replicas, then alone; the first two write in the background."""
    whole = resumed_epochs(folders.one, str(tmp_path / "whole"), 0, 8)["losses"]
    save_dir, target = str(tmp_path / "run"), "tests.training.workers:resumed_epochs"
    four, two, replicas = (
        Job(n, target, {"folder": folder, "save_dir": save_dir, "first": first, "last": first + 2, **how}, *sizes)
        for n, folder, first, how, sizes in (
            (4, folders.two, 0, {"background": True}, (4,)),
            (2, folders.two, 2, {"background": True}, (2,)),
            (2, folders.one, 4, {}, (1, 2)),
        )
    )
    parts = run_jobs([four], tmp_path) + run_jobs([two, replicas], tmp_path)
    parts.append([resumed_epochs(folders.one, save_dir, 6, 8)])
    for ranks, expected in zip(parts, whole.split(2), strict=True):
        for rank in ranks:
            assert_close(rank["losses"], expected, rtol=0, atol=1e-4)


def test_a_save_in_the_background_is_of_the_moment_it_began(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk takes nothing until it is let: training goes on, the next save waits, nothing counts meanwhile."""
    options = {"save_every": 2, "keep_last": 2}
    at_once = Run(folders.one, tmp_path / "at once", **options)
    run = Run(folders.one, tmp_path / "run", background=True, **options)
    let, write = threading.Event(), storage.write_shard
    monkeypatch.setattr(storage, "write_shard", lambda *rest: (let.wait(60), write(*rest)))
    for _ in range(2):
        run.step()
    assert Run(folders.one, tmp_path / "run").checkpointer.resume("auto") == 0
    threading.Timer(1.0, let.set).start()
    run.step()  # the end of the epoch: it trains, then waits to save
    run.checkpointer.complete()
    monkeypatch.undo()
    for _ in range(3):
        at_once.step()
    for step in ("step-2", "step-3"):
        one, other = (storage.manifest_files(tmp_path / name / step) for name in ("at once", "run"))
        assert one == other and len(one) == 2  # the same bytes, by their hashes


@pytest.mark.parametrize("background", [False, True])
def test_a_disk_that_fills_during_a_save_leaves_one_to_resume_from(
    folders: Folders, tmp_path: Path, background: bool
) -> None:
    """The kernel refuses to let a file grow, as it does on a full disk; a writing thread's error ends the run."""
    run = Run(folders.one, tmp_path, background=background, save_every=1)
    run.step()
    run.checkpointer.complete()
    expected = run.bits()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(UserError, match=r"in the middle of writing, .* Free some space and run the same"):
            run.step()
            run.step()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    again = Run(folders.one, tmp_path, save_every=1)
    assert again.checkpointer.resume("auto") == 1
    assert_equal(again.bits(), expected)


def test_a_directory_belongs_to_one_run_at_a_time(folders: Folders, tmp_path: Path) -> None:
    """Another run holds it until its process ends, be it killed."""
    holder = (
        f"from src.checkpoint import saving; saving.check_save_dir({str(tmp_path)!r}); print(1, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"1\n"
        with pytest.raises(UserError, match=rf"is being written by process {process.pid}; wait for it"):
            saving.check_save_dir(str(tmp_path), folders.one)
        process.kill()
    saving.check_save_dir(str(tmp_path), folders.one)
