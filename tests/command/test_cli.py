"""src/command/cli.py: exit status, output and torchrun by real processes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import solver_train
from src.command import cli
from tests.command.test_flags import main

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = '''"""Train something small.

torchrun --nproc_per_node 2 script.py --ckpt_dir ckpt/2 --a_command_wider_than_the_terminal 1
"""

import os
import signal
import time

from src.command import cli
from src.errors import UserError


def main(ckpt_dir: str, fail: str = "", lr: float = 1e-5, resume: bool = False) -> str:
    """Train.

    ckpt_dir: where the weights are
    fail: how to fail
    lr: peak learning rate, reached after the warm-up and then lowered
      along a cosine
    resume: go on from the last checkpoint
    """
    rank = int(os.environ.get("RANK", "0"))
    if fail == "all":
        signal.signal(signal.SIGTERM, lambda *_: None)      # as a trainer that saves before it dies
        raise UserError("4 shards but 2 ranks; run checkpoint_split.py")
    if fail == "rank1" and rank == 1:
        raise UserError("rank 1 has no shard")
    if fail == "rank1":
        time.sleep(100)
    if fail.startswith("collective"):
        import torch      # not at the top: it would add a second to every other case
        from torch import distributed
        distributed.init_process_group("gloo")
        distributed.all_reduce(torch.ones(1))
        if rank == 1:
            raise UserError("rank 1 is out") if fail == "collective_user" else KeyError("rank 1 bug")
        distributed.barrier()
    if fail == "missing":
        open("/no/such/file")
    if fail == "full":
        open("/dev/full", "w").write("x" * 100_000)
    if fail == "memory":
        raise MemoryError
    if fail == "nul":
        open("checkpoint\\0")
    if fail == "bug":
        raise KeyError("a bug")
    if fail == "interrupt":
        raise KeyboardInterrupt
    cli.show(f"{(ckpt_dir, lr, resume)!r}\\n")
    return "a result that nobody prints"


if __name__ == "__main__":
    cli.run(main)
'''


def test_run_hands_over_the_parsed_values_and_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    calls = []

    def record(ckpt_dir: str, n: int = 8, files: list[str] = []) -> str:  # noqa: B006
        calls.append((ckpt_dir, n, files))
        return "not for stdout"

    cli.run(record, ["--ckpt_dir", "1,2", "--files", "3", "{}"])
    assert calls == [("1,2", 8, ["3", "{}"])]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("width", [20, 60, 300])
def test_usage_fits_the_terminal(width: int) -> None:
    text = cli.usage(main, width)
    assert all(len(line) <= max(40, min(width, 100)) for line in text.splitlines())
    assert text.index("--n  whole number") < text.index("Optional flags:") < text.index("--lr  number")


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def launch(*command: str | Path, columns: int = 60) -> subprocess.CompletedProcess[str]:
    """Run a command with this repository importable and without the ranks of a torchrun around pytest."""
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK")}
    env |= {"PYTHONPATH": str(ROOT), "COLUMNS": str(columns), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "argv, status, stderr",
    [
        (["--ckpt_dir", "123", "--resume=false"], 0, ""),
        (["--ckpt_dir", "x", "--lr_"], 2, "error: unknown flag --lr_; did you mean --lr?\n"),
        ([], 2, "error: missing required --ckpt_dir; write --ckpt_dir VALUE, or see --help\n"),
        (["--ckpt_dir=x", "--fail=all"], 1, "error: 4 shards but 2 ranks; run checkpoint_split.py\n"),
        (["--ckpt_dir=x", "--fail=missing"], 1, "error: /no/such/file: No such file or directory\n"),
        (["--ckpt_dir=x", "--fail=full"], 1, "error: No space left on device\n"),
        (["--ckpt_dir=\udcff"], 2, "error: '--ckpt_dir=\\udcff' on the command line holds a NUL or is not UTF-8; "
         "rename the file it names\n"),
        (["--ckpt_dir=x", "--fail=nul"], 1, "error: the name of a file holds a NUL character; look for one in the "
         "files that name other files\n"),
        (["--ckpt_dir=x", "--fail=memory"], 1, "error: out of memory (MemoryError); --dry_run says what a run takes, "
         "smaller batches take less\n"),
        (["--ckpt_dir=x", "--fail=interrupt"], 130, "interrupted\n"),
    ],
)
def test_exit_status_and_stderr(script: Path, argv: list[str], status: int, stderr: str) -> None:
    result = launch(script, *argv)
    assert (result.returncode, result.stderr) == (status, stderr)
    assert result.stdout == ("" if status else "('123', 1e-05, False)\n")


ALL_FINE = "('x', 1e-05, False)\n"


@pytest.mark.parametrize(
    "words, status, out, err",
    [
        ("--ckpt_dir=x | (exec 0<&-; sleep 1)", 0, "", ""),  # a reader that goes without reading
        ("--help | (exec 0<&-; sleep 1)", 0, "", ""),
        ("--help >&-", 0, "", ""),
        ("--ckpt_dir=x >&-", 0, "", ""),
        ("--ckpt_dir=x <&- 2>&-", 0, ALL_FINE, ""),
        ("--lrr >&- 2>&- <&-", 2, "", ""),
        ("--lrr 2> >(exec 0<&-; sleep 1)", 2, "", ""),
        ("--lrr 2>/dev/full", 2, "", ""),
        ("--help >/dev/full", 1, "", "error: cannot write to standard output: No space left on device\n"),
        ("--ckpt_dir=x >/dev/full", 1, "", "error: cannot write to standard output: No space left on device\n"),
        ("--ckpt_dir=x --fail=all >&-", 1, "", "error: 4 shards but 2 ranks; run checkpoint_split.py\n"),
    ],
)
def test_streams_that_are_closed_full_or_not_read(
    script: Path, words: str, status: int, out: str, err: str
) -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    shell = ["bash", "-o", "pipefail", "-c", f"{sys.executable} {script} {words}"]
    done = subprocess.run(shell, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (status, out, err)


def test_a_closed_stream_s_place_is_taken_by_no_file(tmp_path: Path) -> None:
    """What a library prints must not land in the next file that is opened."""
    code = ("import os; from src.command import cli; "
            "cli.guarded(lambda: os.write(open('kept', 'w').fileno() and 1, b'noise'))")
    shell = ["bash", "-c", f'{sys.executable} -c "{code}" >&-']
    done = subprocess.run(shell, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert done.returncode == 0 and (tmp_path / "kept").read_bytes() == b""


def test_a_name_that_the_terminal_cannot_show_is_shown(tmp_path: Path) -> None:
    code = "from src.command import cli; cli.guarded(lambda: cli.show('caf\u00e9 \\udcff\\n'))"
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "caf\\xe9 \\udcff\n", "")


def test_a_bug_keeps_its_traceback(script: Path) -> None:
    result = launch(script, "--ckpt_dir=x", "--fail=bug")
    assert result.returncode == 1
    assert result.stderr.startswith("Traceback") and result.stderr.endswith("KeyError: 'a bug'\n")


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["--wrong", "--help"]])
def test_help(script: Path, argv: list[str]) -> None:
    result = launch(script, *argv)
    assert (result.returncode, result.stderr) == (0, "")
    assert (
        result.stdout
        == """Train something small.

torchrun --nproc_per_node 2 script.py --ckpt_dir ckpt/2 --a_command_wider_than_the_terminal 1

Required flags:
  --ckpt_dir  text
      where the weights are

Optional flags:
  --fail  text  (default: empty)
      how to fail
  --lr  number  (default: 1e-05)
      peak learning rate, reached after the warm-up and then
      lowered along a cosine
  --resume  true|false  (default: false)
      go on from the last checkpoint

Where a path is read, hf:ORG/NAME[@REVISION] is a checkpoint
at the Hugging Face Hub, and
hf:ORG/NAME[@REVISION][:CONFIG][:SPLIT] rows.

--config FILE: json or yaml file of flags, or run.json of an
earlier run; flags on the command line win.

`--flag value` and `--flag=value` mean the same. A
true|false flag alone means true, --noflag false. A list is
several words, or one word with commas; where a text is
expected too, and in a list of FILE, a comma is part of it.
"""
    )


def test_help_leads_with_five_flags_of_a_config() -> None:
    text = cli.usage(solver_train.main, width=90)
    first = text.split("Look at these first:\n", 1)[1].split("\n\n", 1)[0]
    names = re.findall(r"^  --(\w+)", first, re.MULTILINE)
    assert names == ["eval_file", "max_batch_size", "lora_rank", "lr", "epochs"]
    assert text.index("Required flags:") < text.index("Look at these first:") < text.index("Supervised fine-tuning:")
    assert all(text.count(f"\n  --{name} ") == 1 for name in names)


def torchrun(script: Path, *argv: str) -> tuple[int, list[str], str, bool]:
    """Exit status, the stderr lines of the two ranks, torchrun's report, and whether it had to kill a rank."""
    result = launch("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, *argv)
    logged = re.compile(r"^[WE]\d{4} ")  # torchrun logs first, then prints its own traceback
    lines = result.stderr.splitlines()
    end = next((i for i, line in enumerate(lines) if line.startswith("Traceback ")), len(lines))
    ours = [line for line in lines[:end] if not logged.match(line)]
    return result.returncode, ours, "\n".join(lines[end:]), "forcefully exiting" in result.stderr


@pytest.mark.parametrize(
    "argv, line",
    [
        (["--ckpt_dir=x", "--fail=all"], "error: 4 shards but 2 ranks; run checkpoint_split.py"),
        (["--ckpt_dir=x", "--lrr=1"], "error: unknown flag --lrr; did you mean --lr?"),
        (["--ckpt_dir=x", "--fail=rank1"], "error: rank 1 has no shard"),
        (["--ckpt_dir=x", "--fail=collective_user"], "error: rank 1 is out"),
    ],
)
def test_torchrun_shows_one_line(script: Path, argv: list[str], line: str) -> None:
    status, lines, report, killed = torchrun(script, *argv)
    assert status != 0 and lines == [line]
    box = report[report.index("ChildFailedError") :]
    assert box.count(line) == 1 and f"traceback : {line}" in box.partition("Root Cause")[2]
    assert not killed  # torchrun turns from SIGTERM to SIGKILL after 30 s: no rank may need that


def test_torchrun_shows_the_bug_of_rank_1_and_not_what_it_did_to_rank_0(script: Path) -> None:
    status, lines, report, _ = torchrun(script, "--ckpt_dir=x", "--fail=collective_bug")
    assert status != 0 and "KeyError: 'rank 1 bug'" in report.partition("Root Cause")[2]
    assert "[rank1]: KeyError: 'rank 1 bug'" in lines
    assert not any(line.startswith("[rank0]") for line in lines)


def test_torchrun_prints_help_once(script: Path) -> None:
    result = launch("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, "--help")
    assert result.returncode == 0 and result.stdout.count("Required flags:") == 1


def test_a_dry_run_is_the_first_rank_s_alone(script: Path) -> None:
    """Every rank of this script would print."""
    script.write_text(SCRIPT.replace("resume: bool = False)", "resume: bool = False, dry_run: bool = False)"))
    result = launch("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3", script, "--ckpt_dir=x",
                    "--dry_run")
    assert result.returncode == 0 and result.stdout == "('x', 1e-05, False)\n"


def count(n: int, seed: int = 1) -> None:
    """Count to a number.

    Slowly.

    n: where to stop
    seed: unused
    """
    print(f"counted to {n}")


def spell(word: str) -> None:
    """Spell a word.

    word: the word
    """


COMMANDS = {"count": count, "spell": spell}


def test_the_first_word_picks_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    cli.run(COMMANDS, ["count", "--n", "3"])
    assert capsys.readouterr().out == "counted to 3\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "must be one of count, spell, found nothing; --help"),
        (["cuont", "--n", "3"], "found 'cuont'; did you mean count?"),
        (["--n", "3"], "found '--n'; --help"),
        (["count", "--m", "3"], "unknown flag --m"),
    ],
)
def test_a_wrong_command_stops_with_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.run(COMMANDS, words)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_help_lists_the_commands_and_then_the_flags_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    for words, shown, hidden in (
        (["--help"], ("  count  Count to a number.", "  spell  Spell a word."), "--n"),
        (
            ["count", "--help"],
            ("Count to a number.\n\nSlowly.", "--n  whole number", "where to stop"),
            "Spell",
        ),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.run(COMMANDS, words)
        out = capsys.readouterr().out
        assert stop.value.code == 0
        assert all(text in out for text in shown) and hidden not in out


def test_what_is_typed_in_another_encoding_is_no_traceback() -> None:
    script = "from src import runlog; runlog.cli.guarded(lambda: runlog.say(repr(runlog.ask(''))))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, input=b"caf\xe9\n", capture_output=True,
                          env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"}, timeout=60)
    assert done.stdout.decode() == repr("caf\ufffd"), done.stderr.decode()
