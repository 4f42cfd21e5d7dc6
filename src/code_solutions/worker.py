"""The process that runs one list of code blocks; started by runner.py, never imported.

A JSON job in, {"blocks", "limits", "isolation", "folder", "visible", "site_packages"}; out, one JSON line
{"status"} and then the bytes that the last block wrote. A problem before the first block ends it with exit
status SETUP_FAILED and a text on standard error instead.

Three processes: one that only waits (the caller's child, outside the process namespace), this worker as process
1 inside, which no signal from inside reaches, and the code in a fork of it. The worker believes nothing that
the code says: marks that a block begins move a deadline, at most once a block, and all else is measured.
"""

import ast
import contextlib
import errno
import json
import linecache
import math
import os
import random
import resource
import select
import signal
import sys
import time
import traceback

from src.code_solutions import sandbox

SETUP_FAILED = 70
EXIT_OK, EXIT_ERROR, EXIT_MEMORY = 0, 1, 3
SAMPLE_SECONDS = 0.05
CHUNK = 65536  # bytes
FRAMES = 50  # of a traceback; an endless recursion has millions
BLOCK = "<block"  # beginning of the name that a block has in tracebacks
COUNTED = ("VmRSS:", "VmSwap:")  # kB in /proc/PID/status
SOCKET_BYTES = 212992  # what a socket holds of what nobody has read: Linux' net.core.wmem_default


def main() -> None:
    """Run the job of standard input."""
    job = json.load(sys.stdin.buffer)
    isolated = job["isolation"] != "none"
    try:
        # the kernel's first choice when the machine runs out of memory
        sandbox.write_file("/proc/self/oom_score_adj", "1000")
        release = os.uname().release
        if isolated and tuple(map(int, release.split("-")[0].split(".")[:2])) < sandbox.MIN_KERNEL:
            oldest = ".".join(map(str, sandbox.MIN_KERNEL))
            raise OSError(errno.ENOSYS, f"Linux {release} is older than {oldest}")
        if job["isolation"] == "namespaces":
            sandbox.enter_namespaces()
            sandbox.build_tree(job["visible"], job["limits"]["disk_bytes"], job["limits"]["files"])
        os.chdir(job["folder"])
        sandbox.hide_memory()
        # process 1 gets the signals that it has a handler for, and Python has one for SIGINT
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        watch = Watch(job, isolated)
        status = watch.wait()
    except OSError as problem:
        os.write(2, str(problem).encode())
        os._exit(SETUP_FAILED)
    message = json.dumps({"status": status}).encode() + b"\n" + watch.output
    while message:
        message = message[os.write(1, message) :]
    os._exit(0)


class Watch:
    """The process of the code seen from outside: what it wrote, how far it is, how long it may go on."""

    def __init__(self, job: dict, isolated: bool) -> None:
        """Start the process."""
        self.limits, self.blocks, self.isolated = job["limits"], len(job["blocks"]), isolated
        self.output, self.started = b"", 0
        self.output_fd, output_end = os.pipe()
        self.marks_fd, marks_end = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.output_fd)
            os.close(self.marks_fd)
            run_code(job, isolated, output_end, marks_end)
        os.close(output_end)
        os.close(marks_end)
        os.set_blocking(self.output_fd, False)
        os.set_blocking(self.marks_fd, False)
        self.deadline = time.monotonic() + self.limits["wall_seconds"]

    def wait(self) -> str:
        """Until the code ends or breaks a limit; then nothing of it is left. Returns the status. Raises OSError if it
        never came to its first block."""
        broken = self.watch()
        self.kill()
        _, wait_status, usage = os.wait4(self.pid, 0)
        self.read_output()
        self.read_marks()
        if not self.started:
            raise OSError(errno.ECHILD, "the process ended before its first block")
        status = broken or outcome(os.waitstatus_to_exitcode(wait_status), usage, self.limits)
        if len(self.output) > self.limits["output_bytes"]:
            status, self.output = "output_limit", self.output[: self.limits["output_bytes"]]
        if self.started < self.blocks:
            return "replay"
        return status

    def watch(self) -> str | None:
        """The name of the limit that the code breaks, None if it ends before it does."""
        end = os.pidfd_open(self.pid)
        poll = select.poll()
        for fd in (self.output_fd, self.marks_fd, end):
            poll.register(fd, select.POLLIN)
        sample_at = time.monotonic() + SAMPLE_SECONDS
        while True:
            ready = {fd for fd, _ in poll.poll(1000 * SAMPLE_SECONDS)}
            # a pipe without writers stays ready for ever
            if self.output_fd in ready and not self.read_output():
                poll.unregister(self.output_fd)
            if self.marks_fd in ready and not self.read_marks():
                poll.unregister(self.marks_fd)
            now = time.monotonic()
            if len(self.output) > self.limits["output_bytes"]:
                return "output_limit"
            if end in ready:
                return None
            if now > self.deadline:
                return "timeout"
            if now > sample_at:
                if self.isolated and (broken := broken_limit(self.limits)):
                    return broken
                sample_at = now + SAMPLE_SECONDS

    def read_output(self) -> bool:
        """Take what the code wrote, to one chunk beyond the limit; False at the end of the pipe."""
        chunk = None
        with contextlib.suppress(BlockingIOError):
            while len(self.output) <= self.limits["output_bytes"] and (chunk := os.read(self.output_fd, CHUNK)):
                self.output += chunk
        return chunk != b""

    def read_marks(self) -> bool:
        """Take the marks of blocks that began, each of which starts the clock anew; False at the end of the pipe."""
        marks = None
        with contextlib.suppress(BlockingIOError):
            marks = os.read(self.marks_fd, CHUNK)
        started = min(self.started + len(marks or b""), self.blocks)
        if started > self.started:
            self.started, self.deadline = started, time.monotonic() + self.limits["wall_seconds"]
        return marks != b""

    def kill(self) -> None:
        """SIGKILL for the code and, where it is isolated, for all that it started."""
        if self.isolated and os.getpid() == 1:  # elsewhere -1 would mean every process of the user
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        os.kill(self.pid, signal.SIGKILL)  # it may have left its group, and it is not reaped yet


def broken_limit(limits: dict) -> str | None:
    """ "memory" or "disk" if all processes of the namespace, or the folder, are beyond their limit."""
    with open("/proc/net/unix") as file:
        used = SOCKET_BYTES * (len(file.readlines()) - 1)
    for name in os.listdir("/proc"):
        if name.isdigit() and name != "1":
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                with open(f"/proc/{name}/status") as file:
                    used += 1024 * sum(int(line.split()[1]) for line in file if line.startswith(COUNTED))
    if used > limits["memory_bytes"]:
        return "memory"
    room = os.statvfs(sandbox.FOLDER)
    return "disk" if room.f_files - room.f_ffree > limits["files"] else None


def outcome(exit_code: int, usage: resource.struct_rusage, limits: dict) -> str:
    """The status of code that ended by itself; a negative exit code is a signal."""
    if exit_code in (-signal.SIGXCPU, -signal.SIGKILL) and usage.ru_utime + usage.ru_stime >= limits["cpu_seconds"]:
        return "timeout"
    if exit_code < 0:
        return "crashed"
    return {EXIT_OK: "ok", EXIT_MEMORY: "memory"}.get(exit_code, "error")


def run_code(job: dict, isolated: bool, output: int, marks: int) -> None:
    """In the forked process: put up the inner walls, run the blocks, end with the last one's exit code; no return."""
    try:
        os.setsid()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())
        sandbox.limit_resources(job["limits"]["memory_bytes"], job["limits"]["disk_bytes"])
        if isolated:
            sandbox.drop_privileges(job["limits"]["processes"])
            sandbox.filter_calls()
        nothing = os.open("/dev/null", os.O_RDWR)
    except OSError as problem:
        os.write(2, str(problem).encode())
        os._exit(SETUP_FAILED)
    for fd in (0, 1, 2):
        os.dup2(nothing, fd)
    os.close(nothing)
    prepare_interpreter(job["site_packages"])
    namespace = sys.modules["__main__"].__dict__
    code = EXIT_OK
    for number, block in enumerate(job["blocks"], start=1):
        if number == len(job["blocks"]):
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.close(output)
        limit_processor_time(job["limits"]["cpu_seconds"], len(job["blocks"]))
        os.write(marks, b".")
        code = run_block(block, f"{BLOCK} {number}>", namespace)
        flush()
    os._exit(code)


def prepare_interpreter(site_packages: list[str]) -> None:
    """A __main__ of its own, the caller's packages, output in lines so that it keeps its order with errors."""
    sys.path[0] = os.getcwd()  # in place of the directory of this file
    sys.path += site_packages
    sys.argv = [""]
    sys.dont_write_bytecode = True
    # a block that is run again before a later one must draw what it has shown: numpy's and uuid's seeds are of these
    random.seed(0)
    os.urandom = random._urandom = random.Random(0).randbytes
    sys.modules["__main__"] = type(sys)("__main__")
    sys.stdout.reconfigure(line_buffering=True)


def limit_processor_time(seconds: float, blocks: int) -> None:
    """SIGXCPU once the process has used so many seconds more, SIGKILL at what all blocks together may use."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    if hard == resource.RLIM_INFINITY:
        hard = math.ceil(seconds * blocks) + 1
    soft = min(math.ceil(usage.ru_utime + usage.ru_stime + seconds), hard)
    with contextlib.suppress(ValueError):  # an earlier block may have lowered the hard limit
        resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def run_block(block: str, name: str, namespace: dict) -> int:
    """Run it as a notebook would: the value of a last expression is shown, an error ends the block. Returns an exit
    code."""
    linecache.cache[name] = (len(block), None, block.splitlines(keepends=True), name)
    try:
        body = ast.parse(block, name)
        ends_in_value = body.body and isinstance(body.body[-1], ast.Expr) and not block.rstrip().endswith(";")
        last = body.body.pop() if ends_in_value else None
        exec(compile(body, name, "exec"), namespace)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), name, "eval"), namespace)
            if value is not None:
                sys.stdout.write(f"{value!r}\n")
    except SystemExit as stop:
        if stop.code in (None, 0):
            return EXIT_OK
        report(stop)
        return EXIT_ERROR
    except BaseException as error:  # KeyboardInterrupt and whatever else a block may raise
        report(error)
        return EXIT_MEMORY if isinstance(error, MemoryError) else EXIT_ERROR
    return EXIT_OK


def report(error: BaseException) -> None:
    """The traceback from the block on, where the block's output goes."""
    flush()
    frames = error.__traceback__
    while frames and not frames.tb_frame.f_code.co_filename.startswith(BLOCK):  # this file's, the parser's
        frames = frames.tb_next
    with contextlib.suppress(MemoryError, OSError):
        text = "".join(traceback.format_exception(type(error), error, frames, limit=FRAMES))
        os.write(2, text.encode(errors="backslashreplace"))


def flush() -> None:
    """Write what the block's standard output still holds, whatever the block has made of it."""
    with contextlib.suppress(BaseException):
        sys.stdout.flush()


if __name__ == "__main__":
    main()
