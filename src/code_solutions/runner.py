"""Run the Python code of a solution, each time in a fresh isolated process (sandbox.py says how).

run([first, second, third]) is what a notebook shows under the third cell: the earlier blocks are run before it
and their output is thrown away. Nothing is kept between two runs, so no run can harm, delay or answer for
another.

Processes are bubblewrap's where it is installed (Debian: bubblewrap) and the caller is not root; otherwise
worker.py makes its own namespaces. For root it always does, because only so the code gets the rights of
nobody. The total memory of a run is sampled, that of each of its processes is a limit of the kernel.
"""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from src.code_solutions import sandbox
from src.errors import UserError

REPO = Path(__file__).resolve().parents[2]
WORKER = "src.code_solutions.worker"
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/alternatives")
# no /dev/zero: a shared map of it is memory that no limit counts
DEVICES = ("/dev/null", "/dev/full", "/dev/random", "/dev/urandom")
STARTUP_SECONDS = 60.0
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONUTF8": "1", "MPLBACKEND": "Agg",
    "PYTHONHASHSEED": "0",  # a replayed block prints its sets in the same order
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one block may use; memory, disk and processes count what the blocks before it left behind."""

    cpu_seconds: float = 6.0  # processor time of one process, rounded up to whole seconds
    wall_seconds: float = 12.0
    memory_bytes: int = 2**30  # address space of each process, and memory of all, resident, swapped or in sockets
    disk_bytes: int = 64 * 2**20
    files: int = 4096
    output_bytes: int = 2**16
    processes: int = 16  # threads count as processes

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0:
                raise ValueError(f"{name}={value}; a limit is positive")


@dataclass(frozen=True)
class Execution:
    """What the last block showed, and how it ended.

    status: "ok"; "error" (an exception, whose traceback ends the output, or an exit code); "timeout" (processor time or
    clock); "memory"; "disk" (too many files); "output_limit" (the output is cut there); "crashed" (a signal, such as a
    segmentation fault); "replay" (a block before the last one did not come to its end this time).
    """

    output: str
    status: str


class SandboxError(RuntimeError):
    """The code was not run: the machine's fault, and no verdict on the solution."""


def run(blocks: Sequence[str], limits: Limits | None = None, isolation: str | None = None) -> Execution:
    """Run the blocks in turn in one fresh interpreter; the output and the status are those of the last one.

    isolation: "bubblewrap" or "namespaces"; None takes the first of them that this machine allows; "none" runs the code
    with the rights of the caller, under the limits on time, output, and memory and file size of each process only.
    Raises UserError if None finds no isolation, SandboxError if the code could not be started, ValueError for no block.
    """
    if not blocks:
        raise ValueError("no block to run")
    isolation = isolation or best_isolation()
    limits = limits or Limits()
    job = {"blocks": list(blocks), "limits": asdict(limits), "isolation": isolation, "folder": sandbox.FOLDER,
           "visible": visible_paths(), "site_packages": site_packages()}
    command = [os.path.realpath(sys.executable), "-S", "-s", "-m", WORKER]
    command = [*bubblewrap(limits), *command] if isolation == "bubblewrap" else command
    seconds = limits.wall_seconds * len(blocks) + STARTUP_SECONDS
    if isolation != "none":
        return converse(command, job, seconds)
    with tempfile.TemporaryDirectory(prefix="solution-", ignore_cleanup_errors=True) as folder:
        return converse(command, job | {"folder": folder}, seconds)


def replays(
    blocks: Sequence[str], outputs: Sequence[str], limits: Limits | None = None, isolation: str | None = None
) -> bool:
    """Whether every block shows its stored output again; if not, the state after the last one cannot be rebuilt.

    A block whose process was killed for its time or memory has lost its state, so later blocks run as if it had not
    been; one that ended in an error has done what it did before the error, and one that printed too much does all.
    Raises what run raises.
    """
    done: list[str] = []
    for block, output in zip(blocks, outputs, strict=True):
        execution = run([*done, block], limits, isolation)
        if execution.output != output:
            return False
        if execution.status in ("ok", "error", "output_limit"):
            done.append(block)
    return True


def converse(arguments: list[str], job: dict[str, object], seconds: float) -> Execution:
    """Start the worker, give it the job, read its report. It reads nothing else, and inherits no descriptor."""
    variables = ENVIRONMENT | {"HOME": job["folder"], "TMPDIR": job["folder"]}
    if "LD_LIBRARY_PATH" in os.environ:  # some interpreters do not start without it
        variables["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    with subprocess.Popen(arguments, cwd=REPO, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, start_new_session=True) as process:
        try:
            report, complaint = process.communicate(json.dumps(job).encode(), timeout=seconds)
        except subprocess.TimeoutExpired:
            return Execution("", "timeout")  # the code may have slowed its worker down, but not stopped it
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
    head, newline, output = report.partition(b"\n")
    if process.returncode or not newline:
        reason = complaint.decode(errors="replace").strip() or f"exit status {process.returncode}"
        raise SandboxError(f"code was not run ({job['isolation']}): {reason}")
    return Execution(readable(output), json.loads(head)["status"])


def readable(output: bytes) -> str:
    """Output as text that is safe in a log, a JSON file and a prompt: U+FFFD for what is no UTF-8 and for control
    characters other than newline and tab. Addresses, which differ from run to run, are 0 in it."""
    text = re.sub(r" at 0x[0-9a-f]+>", " at 0x0>", output.decode(errors="replace").replace("\r\n", "\n"))
    return "".join("\ufffd" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)


@functools.cache
def best_isolation() -> str:
    """The first isolation that works here. Raises UserError with each one's reason if none does."""
    reasons = []
    for isolation in ("bubblewrap", "namespaces"):
        try:
            if isolation == "bubblewrap" and os.getuid() == 0:
                raise SandboxError("bubblewrap: would run code of root as root")
            if isolation == "bubblewrap" and shutil.which("bwrap") is None:
                raise SandboxError("bubblewrap: bwrap is not installed")
            # an import shows that the interpreter's files can be read in there
            result = run(["import fractions; print(fractions.Fraction(1, 2))"], isolation=isolation)
        except SandboxError as problem:
            reasons.append(str(problem))
            continue
        if result == Execution("1/2\n", "ok"):
            return isolation
        reasons.append(f"{isolation}: a trial ended in {result}")
    raise UserError(f"this machine does not isolate a solution's code: {'; '.join(reasons)}. Allow user namespaces, "
                    "install libseccomp2 and bubblewrap, or say isolation='none' to run the code with your own rights")


def bubblewrap(limits: Limits) -> list[str]:
    """The command line of the same walls that sandbox.enter_namespaces and build_tree put up."""
    words = ["bwrap", "--unshare-all", "--as-pid-1", "--die-with-parent", "--cap-drop", "ALL"]
    words += ["--uid", str(sandbox.INSIDE_ID), "--gid", str(sandbox.INSIDE_ID)]
    for path in visible_paths():
        if os.path.islink(path):
            words += ["--symlink", os.readlink(path), path]
        elif os.path.exists(path):
            words += ["--dev-bind" if path in DEVICES else "--ro-bind", path, path]
    words += ["--ro-bind", str(Path(__file__).parent), f"/runner/{Path(__file__).parent.relative_to(REPO)}"]
    words += ["--proc", "/proc", "--dir", sandbox.FOLDER, "--remount-ro", "/"]
    words += ["--size", str(limits.disk_bytes), "--tmpfs", sandbox.FOLDER, "--chdir", "/runner", "--"]
    return words


@functools.cache
def visible_paths() -> list[str]:
    """What the code may read of the file tree: the system's programs and libraries, Python, its packages."""
    paths = [*SYSTEM, *DEVICES]
    for path in (sys.base_prefix, *site_packages()):
        path = os.path.realpath(path)
        if not any(Path(path).is_relative_to(shown) for shown in paths):
            paths.append(path)
    return paths


@functools.cache
def site_packages() -> list[str]:
    """The folders in which this interpreter finds installed packages."""
    found = {os.path.realpath(sysconfig.get_path(name)) for name in ("purelib", "platlib")}
    return sorted(found)
