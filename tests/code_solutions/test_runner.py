"""src/code_solutions/runner.py: what a block shows, how it ends, where it refuses. Attacks: test_code_attacks.py."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from src.code_solutions import sandbox
from src.code_solutions.runner import (
    WORKER,
    Execution,
    Limits,
    best_isolation,
    bubblewrap,
    replays,
    run,
)
from src.errors import UserError

REPO = Path(__file__).resolve().parents[2]
OTHER_USER = 54321
try:
    best_isolation()
    REFUSAL = ""
except UserError as refusal:
    REFUSAL = str(refusal)
isolated = pytest.mark.skipif(bool(REFUSAL), reason=REFUSAL)
pytestmark = isolated


@pytest.fixture(params=["isolated", "none"])
def isolation(request: pytest.FixtureRequest) -> str | None:
    return "none" if request.param == "none" else None


@pytest.mark.parametrize(("blocks", "output", "status"), [
    (["print(1 + 1)"], "2\n", "ok"),
    (["1 + 1"], "2\n", "ok"),
    (["x = 3\nx"], "3\n", "ok"),
    (["x = 3\nx;"], "", "ok"),
    (["'a\\tb'"], "'a\\tb'\n", "ok"),
    (["None"], "", "ok"),
    ([""], "", "ok"),
    (["# nothing"], "", "ok"),
    (["x = 3", "def f(): return x", "f()"], "3\n", "ok"),
    (["print('lost')", "print('kept')"], "kept\n", "ok"),
    (["print('lost', end='')", "2"], "2\n", "ok"),
    (["import sys\nx = 1\nprint(1, file=sys.stderr)\n1/0\nx = 2", "x"], "1\n", "ok"),
    (["import sys; sys.exit(3)", "4"], "4\n", "ok"),
    (["import sys; print(1); sys.exit()"], "1\n", "ok"),
    (["import os; os._exit(0)", "print('never')"], "", "replay"),
    (["import sys\nprint('a')\nprint('b', file=sys.stderr)\nprint('c')"], "a\nb\nc\n", "ok"),
    (["print('\\u00e9', '\\U0001f600')"], "\u00e9 \U0001f600\n", "ok"),
    (["print('\\ud83d')"], "surrogates not allowed\n", "error"),
    (["import os\nos.write(1, b'\\xff\\x1b[1m\\x00\\r\\n')\nNone"], "\ufffd\ufffd[1m\ufffd\n", "ok"),
    (["input()"], "EOFError: EOF when reading a line\n", "error"),
    (["x = (1"], "SyntaxError: '(' was never closed\n", "error"),
    (["x = '\\0'", "exec('\\0')"], "null bytes", "error"),
    (["raise KeyboardInterrupt"], "KeyboardInterrupt\n", "error"),
    (["import sys; sys.exit('no')"], "SystemExit: no\n", "error"),
    (["raise MemoryError"], "MemoryError\n", "memory"),
    (["import os; os.kill(os.getpid(), 11)"], "", "crashed"),
    (["print('x' * 70000)"], "x" * 65536, "output_limit"),
    (["import pickle\nclass A:\n    x = 1", "pickle.loads(pickle.dumps(A())).x"], "1\n", "ok"),
    (["open('f', 'w').write('7')", "open('f').read()"], "'7'\n", "ok"),
    (["from concurrent import futures", "with futures.ThreadPoolExecutor() as p: print([*p.map(abs, [-1, -2])])"],
     "[1, 2]\n", "ok"),
    (["import subprocess", "print(subprocess.run(['echo', '5'], capture_output=True).stdout)"], "b'5\\n'\n", "ok"),
])
def test_a_block_shows_what_a_notebook_shows(blocks: list[str], output: str, status: str) -> None:
    execution = run(blocks)
    assert execution.status == status, execution.output
    if status == "error":
        assert execution.output.endswith(output) or output in execution.output
    else:
        assert execution.output.endswith(output) if status == "memory" else execution.output == output


def test_a_traceback_shows_the_block_and_nothing_of_the_runner(isolation: str | None) -> None:
    execution = run(["def f(x):\n    return 1 / x", "print('so far')\nf(0)"], isolation=isolation)
    lines = [
        line for line in execution.output.split("\n") if set(line) - set(" ^~")
    ]  # marks differ by version
    assert execution.status == "error"
    assert lines == [
        "so far",
        "Traceback (most recent call last):",
        '  File "<block 2>", line 2, in <module>',
        "    f(0)",
        '  File "<block 1>", line 2, in f',
        "    return 1 / x",
        "ZeroDivisionError: division by zero",
    ]


def test_a_syntax_error_names_no_file_of_ours() -> None:
    shown = run(["p k"]).output
    assert shown.splitlines() == ['  File "<block 1>", line 1', "    p k", "      ^", "SyntaxError: invalid syntax"]


def test_packages_of_the_caller_are_there() -> None:
    execution = run(["from sympy import *", "x = symbols('x')", "integrate(x**2, x)"])
    assert execution == Execution("x**3/3\n", "ok")


def test_scdpo_06_a_killed_block_does_not_disturb_the_next(isolation: str | None) -> None:
    blocks = {
        "x = 1\nprint('A')": "A\n",
        "import time\ntime.sleep(9)\nprint('SLOW')": "",
        "print('B')": "B\n",
        "print('so far')\nwhile True: pass": "so far\n",
        "print('C', x)": "C 1\n",
    }
    assert replays(list(blocks), list(blocks.values()), Limits(wall_seconds=1.0), isolation)


def test_every_block_has_its_own_time() -> None:
    slow = "import time\ntime.sleep(0.7)\nprint(1)"
    assert run([slow] * 3, Limits(wall_seconds=1.4)) == Execution("1\n", "ok")


def test_processor_time_is_limited() -> None:
    before = os.times().children_user
    limits = Limits(cpu_seconds=1, wall_seconds=60)
    assert run(["while True: pass"], limits) == Execution("", "timeout")
    ignoring = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    assert run([ignoring], limits) == Execution("", "timeout")
    assert os.times().children_user - before < 6


def test_scdpo_14_a_solution_that_cannot_be_replayed_is_found() -> None:
    blocks = ["import random\nx = 1", "print(sorted({'a', 'b'}), {'b', 'c', 'a'})", "print(x)"]
    outputs = [run(blocks[: end + 1]).output for end in range(3)]
    assert replays(blocks, outputs)
    assert not replays(blocks, [*outputs[:2], "2\n"])
    blocks[1] = "import time\nprint(time.time())"
    assert not replays(blocks, [outputs[0], run(blocks[:2]).output, outputs[2]])


@pytest.mark.parametrize("draw", [
    "import random\nx = random.random(), random.SystemRandom().random()",
    "import numpy as np\nx = np.random.rand(), np.random.default_rng().random()",
    "import secrets, uuid\nx = secrets.randbelow(10**9), uuid.uuid4()",
    "x = map(abs, [1]), lambda: 1, (n for n in ())",
])
def test_a_later_block_sees_what_an_earlier_one_has_shown(draw: str, isolation: str | None) -> None:
    shown = run([f"{draw}\nx"], isolation=isolation)
    assert shown == run([draw, "x"], isolation=isolation) and shown.status == "ok"


def test_a_block_that_printed_too_much_is_there_for_the_next() -> None:
    limits, blocks = Limits(output_bytes=100), ["x = 7\nprint('y' * 200)", "x"]
    outputs = [run(blocks[: end + 1], limits).output for end in range(2)]
    assert outputs == ["y" * 100, "7\n"] and replays(blocks, outputs, limits)


def test_runs_do_not_meet() -> None:
    def one(number: int) -> Execution:
        code = f"import os\nopen('f', 'x').write('{number}')\nprint(open('f').read(), os.listdir('.'))"
        return run([code])

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(one, range(8))) == [Execution(f"{n} ['f']\n", "ok") for n in range(8)]


def test_nothing_is_left_of_a_run() -> None:
    before = state()
    for code in ("1", "1/0", "import os\nos.fork()"):
        run([code])
    assert state() == before


def state() -> tuple[set[str], int, str, str]:
    """Open files, threads, mounts and children of this process, which may have some that other tests use."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    return set(os.listdir("/proc/self/fd")), threading.active_count(), mounts(), children


def mounts() -> str:
    return Path("/proc/self/mounts").read_text()


def test_the_code_ends_with_its_caller() -> None:
    name = f"orphan{os.getpid()}"
    code = f"import ctypes\nctypes.CDLL(None).prctl(15, b'{name}', 0, 0, 0)\nwhile True: pass"
    script = (
        f"from src.code_solutions.runner import *; run([{code!r}], Limits(cpu_seconds=99, wall_seconds=99))"
    )
    caller = subprocess.Popen([sys.executable, "-c", script], cwd=REPO)
    assert until(lambda: processes(name) != []), "the code never started"
    caller.send_signal(signal.SIGKILL)
    caller.wait()
    assert until(lambda: processes(name) == []), "the code outlives its caller"


def processes(name: str) -> list[str]:
    """Paths in /proc of the processes of a name."""
    found = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            found += [str(path)] * (path.read_text().strip() == name)
        except OSError:  # it has ended in between
            continue
    return found


def until(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    """Wait for a condition; False if it never came."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.skipif(shutil.which("unshare") is None, reason="util-linux is not installed")
def test_a_machine_without_namespaces_is_refused_unless_told_otherwise() -> None:
    script = (
        "from src.errors import UserError\nfrom src.code_solutions.runner import *\n"
        "try: run(['1'])\nexcept UserError as refusal: print('refused:', refusal)\n"
        "print(run(['1'], isolation='none'))"
    )
    close = 'echo 0 > /proc/sys/user/max_user_namespaces; exec "$0" -c "$1"'
    command = ["unshare", "--user", "--map-root-user", "sh", "-c", close, sys.executable, script]
    output = subprocess.run(command, cwd=REPO, capture_output=True, text=True).stdout
    assert output.startswith("refused: this machine does not isolate a solution's code: bubblewrap: ")
    told = "namespaces): user namespaces are switched off here: /proc/sys/user/max_user_namespaces is 0. Allow"
    assert told in output
    assert "or say isolation='none' to run the code with your own rights" in output
    assert output.endswith("Execution(output='1\\n', status='ok')\n")


def test_no_namespace_has_its_true_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full, denied = OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EPERM, "Operation not permitted")
    assert str(sandbox.refusal("net", full)).startswith(
        "no more net namespaces are allowed here: /proc/sys/user/max_net_namespaces, or that of a namespace around"
    )
    (tmp_path / "switch").write_text("1\n")
    for off, told in (("1", "switched off here: .*/switch is 1"), ("0", "not allowed here: Operation not permitted")):
        monkeypatch.setattr(sandbox, "SWITCHES", {str(tmp_path / "switch"): off, "/nowhere": "0"})
        assert re.fullmatch(f"user namespaces are {told}", str(sandbox.refusal("user", denied)))


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("isolation", ["namespaces", "bubblewrap"])
def test_another_user_is_isolated_too(isolation: str) -> None:
    if isolation == "bubblewrap" and shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    attacks = (
        "import os, socket\nfor attack in (lambda: open('/etc/passwd'), lambda: open('/usr/x', 'w'),\n"
        " lambda: socket.socket(), lambda: os.kill(1, 9), lambda: open('/proc/1/mem')):\n"
        "  try: print('done', attack())\n  except OSError as problem: print(problem.errno)\n"
        "print(os.getuid(), os.getpid(), os.listdir('.'))"
    )
    script = f"from src.code_solutions.runner import *; print(run([{attacks!r}], isolation={isolation!r}))"
    as_other = {"user": OTHER_USER, "group": OTHER_USER, "extra_groups": [], "cwd": REPO, "text": True}
    python = next(filter(usable_by_other, (sys.executable, "/usr/bin/python3")), None)
    if python is None:
        pytest.skip("no Python 3.11 that another user can start")
    done = subprocess.run([python, "-B", "-c", script], capture_output=True, env={}, **as_other)
    # (kill of process 1 is done, and it lives)
    assert done.stdout == "Execution(output='2\\n30\\n1\\ndone None\\n13\\n1000 2 []\\n', status='ok')\n", (
        done.stderr
    )


def usable_by_other(python: str) -> bool:
    """Whether OTHER_USER can start it, it is new enough, and the repository is readable."""
    code = "import sys, src.errors; assert sys.version_info >= (3, 11)"
    try:
        return not subprocess.run(
            [python, "-B", "-c", code], cwd=REPO, user=OTHER_USER, group=OTHER_USER, capture_output=True
        ).returncode
    except OSError:
        return False


@pytest.mark.parametrize("name", ["cpu_seconds", "wall_seconds", "memory_bytes", "output_bytes", "processes"])
def test_a_limit_is_positive(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0; a limit is positive"):
        Limits(**{name: 0})


def test_no_block_is_refused() -> None:
    with pytest.raises(ValueError, match="no block to run"):
        run([])


def test_bubblewrap_shows_the_worker_its_own_code() -> None:
    words = bubblewrap(Limits())
    worker = Path("/runner", *WORKER.split(".")).with_suffix(".py")
    source = words[words.index(str(worker.parent)) - 1]
    assert (Path(source) / worker.name).is_file()
