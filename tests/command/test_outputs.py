"""src/command/outputs.py: no command destroys what it reads, or what is finished; and one process at a time writes."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import checkpoint_split
import data_build
import ppo_train
import preference_evaluate
import preference_train
import solver_evaluate
import solver_train
import verifier_evaluate
import verifier_train
from dataset import prepare
from src.checkpoint import storage
from src.command import cli, outputs
from src.command.flags import REPLACED, WRITTEN, flags_of, is_path, parse
from src.errors import UserError
from tests.conftest import Folders
from tests.ranks import ROOT, command
from tests.tiny import build

SCRIPTS = (checkpoint_split, solver_train, solver_evaluate, verifier_train, verifier_evaluate, preference_train,
           preference_evaluate, ppo_train, prepare)
MAINS = [*(script.main for script in SCRIPTS), *data_build.COMMANDS.values()]
GRADED = [
    {"id": "0", "sample": n, "prompt": "1+1=", "response": f"#### {n}", "label": "2", "outcome": outcome}
    for n, outcome in ((2, "right"), (3, "wrong"))
]


def write(path: Path, rows: object) -> str:
    path.write_text(json.dumps(rows))
    return str(path)


def started(main: Callable[..., None], *words: str) -> None:
    """A command up to the place where its work would begin."""
    values = {name: flag.default for name, flag in flags_of(main).items()} | parse(main, list(words))
    outputs.check(values)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with files and checkpoints of every kind that a command reads."""
    monkeypatch.chdir(tmp_path)
    for name in ("log", "ckpt/deep", "links", "new"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "log/samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in GRADED))
    (tmp_path / "rows.json").write_text("[]")
    for folder in ("ckpt", "ckpt/deep"):
        (tmp_path / folder / "params.json").write_text("{}")
        (tmp_path / folder / "consolidated.00.pth").write_bytes(b"0")
    (tmp_path / "links/soft.jsonl").symlink_to(tmp_path / "log/samples.jsonl")
    os.link(tmp_path / "log/samples.jsonl", tmp_path / "links/hard.jsonl")
    (tmp_path / "links/ckpt").symlink_to(tmp_path / "ckpt", target_is_directory=True)
    return tmp_path


@pytest.mark.parametrize("words", ["", "--overwrite", "--dry_run"])
@pytest.mark.parametrize("name", ["pipe", "link", "new", "."])
def test_nothing_but_a_file_gives_its_name_to_one(here: Path, name: str, words: str) -> None:
    """A rename into place would put a file where /dev/null was, for one with the rights to do so."""
    os.mkfifo(here / "pipe")
    (here / "link").symlink_to("pipe")
    flags = ("--samples_file", "log/samples.jsonl", "--save_file", name, *words.split())
    with pytest.raises(UserError, match=rf"--save_file {name} is a directory, a device or a pipe; expected the name"):
        started(data_build.pairs, *flags)


TRAIN = "--train_file rows.json"
EVALUATE = "--task toy --label_file rows.json"
SAME = [
    (data_build.pairs, "--samples_file log/samples.jsonl --save_file log/samples.jsonl"),
    (data_build.pairs, "--samples_file log/samples.jsonl --save_file ./log/../log/samples.jsonl"),
    (data_build.outcome, "--samples_file log/samples.jsonl --save_file links/soft.jsonl"),
    (data_build.reject, "--samples_file links/soft.jsonl --save_file log/samples.jsonl"),
    (data_build.prefer, "--samples_file log/samples.jsonl --save_file links/hard.jsonl"),
    (data_build.select, "--train_file rows.json --split easy --save_file rows.json"),
    (data_build.split, "--train_file rows.json --first_file a.json --second_file rows.json"),
    (data_build.split, "--train_file rows.json --first_file a.json --second_file a.json"),
    (data_build.mix, "--pairs_file rows.json --branch_file b.json --save_file m.json --control_file rows.json"),
    (data_build.branch, "--ckpt_dir ckpt --task toy --samples_file log/samples.jsonl --log_dir log --save_file b.json"),
    (data_build.attempts, "--ckpt_dir ckpt --task toy --label_file rows.json --log_dir ckpt"),
    (data_build.process, "--ckpt_dir ckpt --task toy --samples_file s.jsonl --log_dir l --save_file l/samples.jsonl"),
    (data_build.weak_icl, "--weak_file new/weak.json --icl_file i.jsonl --save_dir new"),
    (prepare.main, "--task gsm8k --raw_file rows.json --save_file rows.json"),
    (solver_evaluate.main, f"{EVALUATE} --samples_file log/samples.jsonl --log_dir log"),
    (solver_evaluate.main, f"{EVALUATE} --samples_file links/hard.jsonl --log_dir log"),
    (solver_evaluate.main, f"{EVALUATE} --ckpt_dir ckpt --log_dir links/ckpt"),
    (solver_evaluate.main, f"{EVALUATE} --ckpt_dir ckpt --few_shot log/samples.jsonl --log_dir log"),
    (solver_train.main, f"{TRAIN} --ckpt_dir ckpt --save_dir links/ckpt"),
    (solver_train.main, f"{TRAIN} --ckpt_dir ckpt --save_dir ckpt --resume auto"),
    (solver_train.main, f"{TRAIN} --ckpt_dir ckpt --save_dir ckpt --overwrite"),
    (solver_train.main, "--ckpt_dir ckpt --save_dir log --train_file log/metrics.jsonl"),
    (verifier_train.main, "--ckpt_dir ckpt --save_dir ckpt/. --train_file rows.json log/samples.jsonl"),
    (preference_train.main, "--ckpt_dir ckpt --save_dir new --train_file rows.json --reference_file rows.json"),
    (checkpoint_split.main, "--ckpt_file ckpt --save_path links/ckpt --overwrite"),
    (checkpoint_split.main, "--ckpt_file ckpt --save_path ckpt/new"),
    (checkpoint_split.main, "--ckpt_file ckpt/deep --save_path ckpt --overwrite"),
    (checkpoint_split.main, "--ckpt_file ckpt/consolidated.00.pth --save_path ckpt --overwrite"),
    (checkpoint_split.main, "--ckpt_file a.pth b.pth ckpt/deep --save_path ckpt --overwrite"),
    (checkpoint_split.main, "--ckpt_file a --base_dir ckpt --save_path ckpt --overwrite"),
    (checkpoint_split.main, "--ckpt_file a.pth --config_file ckpt/config.json --save_path ckpt --overwrite"),
]


@pytest.mark.parametrize("main, words", SAME, ids=[f"{m.__module__} {words}" for m, words in SAME])
def test_an_output_that_is_an_input_is_refused(here: Path, main: Callable[..., None], words: str) -> None:
    with pytest.raises(
        UserError, match="itself, which is needed|would replace --|lie in each other"
    ) as problem:
        started(main, *words.split())
    assert "choose another place to write to" in str(problem.value)


@pytest.mark.parametrize("main, words", [
    (solver_evaluate.main, f"{EVALUATE} --ckpt_dir ckpt --log_dir ckpt/log"),
    (solver_evaluate.main, f"{EVALUATE} --samples_file log/samples.jsonl --log_dir graded"),
    (solver_train.main, f"{TRAIN} --ckpt_dir ckpt --save_dir ."),
    (solver_train.main, f"{TRAIN} --ckpt_dir ckpt --save_dir new --overwrite"),
    (data_build.pairs, "--samples_file log/samples.jsonl --save_file log/pairs.json"),
    (checkpoint_split.main, "--ckpt_file ckpt --save_path new"),
    (checkpoint_split.main, "--inspect ckpt"),
    (ppo_train.main, "--actor_ckpt_dir ckpt --actor_save_dir new/actor --log_dir new/actor"),
    (ppo_train.main, "--actor_ckpt_dir ckpt --actor_save_dir new --critic_save_dir new/critic"),
])
def test_what_destroys_nothing_is_let_through(here: Path, main: Callable[..., None], words: str) -> None:
    before = {path: path.stat().st_mtime_ns for path in here.rglob("*")}
    started(main, *words.split())
    assert {path: path.stat().st_mtime_ns for path in here.rglob("*")} == before


FINISHED = [
    (data_build.pairs, "--samples_file log/samples.jsonl --save_file rows.json", "rows.json exists"),
    (
        data_build.split,
        "--train_file a.json --first_file rows.json --second_file b.json",
        "--first_file rows.json",
    ),
    (data_build.weak_icl, "--weak_file a --icl_file b --save_dir new", "new holds icl.json"),
    (prepare.main, "--task gsm8k --raw_file raw --save_file rows.json", "rows.json exists"),
    (checkpoint_split.main, "--ckpt_file other --save_path ckpt", "ckpt holds params.json"),
    (solver_train.main, f"{TRAIN} --ckpt_dir other --save_dir ckpt", "ckpt holds params.json"),
]


@pytest.mark.parametrize("main, words, message", FINISHED, ids=[words for _, words, _ in FINISHED])
def test_what_is_finished_is_replaced_only_where_asked(
    here: Path, main: Callable[..., None], words: str, message: str
) -> None:
    (here / "new/icl.json").write_text("[]")
    with pytest.raises(
        UserError, match=f"{message}.*; choose another name, or give --overwrite to replace it"
    ):
        started(main, *words.split())
    started(main, *words.split(), "--overwrite")
    if main is not prepare.main:
        started(main, *words.split(), "--dry_run")


@pytest.mark.parametrize("main", MAINS, ids=lambda main: f"{main.__module__}.{main.__name__}")
def test_an_empty_path_is_refused_in_every_script(main: Callable[..., None]) -> None:
    for flag in flags_of(main).values():
        if is_path(flag.name):
            for words in ([f"--{flag.name}="], [f"--{flag.name}", ""], [f"--{flag.name}", "  "]):
                with pytest.raises(UserError, match=f"--{flag.name} is empty; name a file or directory"):
                    parse(main, words)


def test_every_flag_that_is_written_is_known() -> None:
    """A flag whose meaning says that it is written stands in the table, and none of the table is gone."""
    flags = {flag.name: flag.meaning for main in MAINS for flag in flags_of(main).values()}
    said = {
        name
        for name, meaning in flags.items()
        if is_path(name) and any(word in meaning for word in ("to write", "directory for", "json file for"))
    }
    assert said <= set(WRITTEN) and set(REPLACED) <= flags.keys()
    assert all(name in WRITTEN for name in flags if name.startswith(("save_", "log_d")) and is_path(name))


def test_the_reported_commands(folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One as a process, the others as what they run."""
    samples = tmp_path / "samples.jsonl"
    samples.write_text("".join(json.dumps(row) + "\n" for row in GRADED))
    before = samples.read_bytes()
    done = command("data_build.py", "pairs", "--samples_file", samples, "--save_file", samples)
    assert done.returncode == 1 and "is --samples_file" in done.stderr and samples.read_bytes() == before

    def refused(status: int, message: str, main: Callable[..., None], *words: object) -> None:
        with pytest.raises(SystemExit) as end:
            cli.run(main, [*map(str, words)])
        assert end.value.code == status and message in capsys.readouterr().err

    train = ("--ckpt_dir", folders.one, "--train_file", samples, "--save_dir")
    refused(2, "error: --save_dir is empty", solver_train.main, *train, "")
    out = tmp_path / "out"
    cli.run(checkpoint_split.main, ["--ckpt_file", folders.one, "--save_path", str(out)])
    was = storage.fingerprint(out)
    words = ["--ckpt_file", folders.verifier, "--save_path", str(out)]
    refused(1, f"{out} holds manifest.json, of something finished", checkpoint_split.main, *words)
    refused(1, f"{out} holds manifest.json, of something finished", solver_train.main, *train, out)
    assert storage.fingerprint(out) == was
    cli.run(checkpoint_split.main, [*words, "--overwrite"])
    assert storage.fingerprint(out) != was
    assert "--overwrite" in cli.usage(checkpoint_split.main, 100)


def test_two_evaluations_do_not_write_in_one_directory(folders: Folders, tmp_path: Path) -> None:
    """The second is refused by the first one's number; a kill lets the directory go."""
    write(tmp_path / "rows.json", [{"instruction": "1+1=", "label": "2"}])
    flags = {"task": "toy", "ckpt_dir": folders.one, "label_file": f"{tmp_path}/rows.json",
             "log_dir": f"{tmp_path}/log", "max_new_tokens": 4}
    judged = write(tmp_path / "steps.json", [{"instruction": "1+1=", "steps": ["2"], "labels": [1]}])
    samples = tmp_path / "samples.jsonl"
    samples.write_text("".join(json.dumps(row) + "\n" for row in GRADED))
    holder = (
        f"from pathlib import Path; from src.checkpoint import storage; import time\n"
        f"place = Path({flags['log_dir']!r}); place.mkdir(); storage.hold(place); print(1, flush=True); time.sleep(30)"
    )
    with subprocess.Popen([sys.executable, "-c", holder], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"1\n"
        message = f"log is being written by process {process.pid}; wait for it, or choose another place"
        with pytest.raises(UserError, match=message):
            solver_evaluate.main(solver_evaluate.SolverEvaluateConfig(**flags))
        judged = write(tmp_path / "steps.json", [{"instruction": "1+1=", "steps": ["2"], "labels": [1]}])
        with pytest.raises(UserError, match=message):
            verifier_evaluate.main(verifier_evaluate.VerifierEvaluateConfig(
                ckpt_dir=folders.verifier, log_dir=flags["log_dir"], task="toy", samples_file=str(samples),
                label_file=flags["label_file"],
            ))
        with pytest.raises(UserError, match=message):
            preference_evaluate.main(
                preference_evaluate.CreditConfig(
                    ckpt_dir=folders.one,
                    reference_ckpt_dir=folders.one,
                    steps_file=judged,
                    log_dir=flags["log_dir"],
                )
            )
        with pytest.raises(UserError, match=message):
            build.attempts("toy", flags["label_file"], flags["log_dir"], folders.one)
        process.kill()
    solver_evaluate.main(solver_evaluate.SolverEvaluateConfig(**flags))
    assert len((tmp_path / "log/samples.jsonl").read_text().splitlines()) == 1


def test_a_lock_says_who_holds_it_and_is_free_after_its_holder(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("17 elsewhere")  # of a process that was killed
    with storage.alone(tmp_path):
        with pytest.raises(UserError, match=rf"is being written by process {os.getpid()}; wait for it"):
            storage.alone(tmp_path).__enter__()
        (tmp_path / ".lock").write_text("17 elsewhere")
        with pytest.raises(UserError, match="is being written by process 17 on elsewhere; wait for it"):
            storage.alone(tmp_path / ".").__enter__()
        with storage.alone(tmp_path / "file.jsonl"):  # in it, not it
            pass
    with storage.alone(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_of_many_that_begin_at_once_one_has_the_directory(tmp_path: Path) -> None:
    """Eight threads, each with a file of its own, race for a lock again and again: never two of them hold it."""
    ends = time.monotonic() + 1.0

    def hurry(_: int) -> int:
        held = 0
        while time.monotonic() < ends:
            try:
                with storage.alone(tmp_path):
                    (tmp_path / "inside").mkdir()  # fails if another one is inside
                    (tmp_path / "inside").rmdir()
                    held += 1
            except UserError:
                continue
        return held

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(hurry, range(8))) > 8
