"""A process that can be killed: whatever it is asked, nothing that hangs or crashes in it reaches its caller.

Both ends of it: Worker in the caller, serve() in the process. One json object a line in, {"id": number, ...request},
one out, {"id": number, ...reply}. The first line out has the id "ready", and an "error" if the process cannot begin.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from src.errors import UserError
from src.jsonfile import parse
from src.processes import watchdog

STARTUP_SECONDS = 60.0
REPO = Path(__file__).resolve().parents[2]

Reply = dict[str, object]
Answer = Callable[[dict[str, object]], Reply]


class Worker:
    """One process of a module that calls serve(), started at the first request and again after each death.

    After a kill the next process starts at once, so that it has imported what it needs by the time it is asked. The
    process ends with close(), or when nobody holds the worker any more.
    """

    def __init__(self, module: str, arguments: Sequence[str] = ()) -> None:
        self.command = ["-m", module, *arguments]
        self.process: subprocess.Popen[bytes] | None = None
        self._requests = 0

    def begin(self) -> None:
        """Wait for a process that can be asked, started if there is none. Raises UserError where it does not start."""
        if self.process is None or self.process.poll() is not None:
            self._start()
        if not self._ready:
            self._await_ready()

    def ask(self, request: Mapping[str, object], seconds: float) -> Reply:
        """The reply to a request, which may take so many seconds, the start of the process not counted.

        Raises TimeoutError where the process had to be killed or ended itself by SIGPROF, ChildProcessError where it
        died, UserError where it does not start.
        """
        self.begin()
        self._requests += 1
        try:
            self.process.stdin.write(json.dumps({"id": self._requests, **request}).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self.close()
            raise ChildProcessError("the process has died") from None
        reply = self._read(self._requests, seconds)
        watchdog.got_on()
        return reply

    def close(self) -> None:
        """Kill the process, if there is one, and wait for its end."""
        if self.process is not None:
            self._finalizer()
            self.process = None

    def _start(self) -> None:
        self.close()
        self._pending, self._ready = b"", False
        self.process = subprocess.Popen([sys.executable, *self.command], cwd=REPO, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self._finalizer = weakref.finalize(self, _end, self.process)

    def _await_ready(self) -> None:
        try:
            trouble = self._read("ready", STARTUP_SECONDS).get("error")
        except (TimeoutError, ChildProcessError) as problem:
            trouble = problem
        if trouble:
            self.close()
            raise UserError(f"the process did not start ({trouble}): `python {' '.join(self.command)}` says why; "
                            "everything in requirements.txt must be installed")
        self._ready = True

    def _read(self, wanted: int | str, seconds: float) -> Reply:
        """The reply of this id; lines that are none are ignored. Raises as ask() does, the next process started."""
        deadline = time.monotonic() + seconds
        while True:
            line, newline, rest = self._pending.partition(b"\n")
            if newline:
                self._pending = rest
                with contextlib.suppress(UserError):  # a stray line
                    reply = parse(line, "reply")
                    if reply.get("id") == wanted:
                        return reply
                continue
            left = max(0.0, deadline - time.monotonic())
            poll = select.poll()  # select() knows no descriptor from 1024 on
            poll.register(self.process.stdout, select.POLLIN)
            if not poll.poll(1000 * left):
                self._start()
                raise TimeoutError(f"no reply within {seconds:g} s")
            chunk = os.read(self.process.stdout.fileno(), 65536)
            if not chunk:
                status = self.process.wait()
                self._start()
                if status == -signal.SIGPROF:  # the signal that a worker sets for the end of its processor time
                    raise TimeoutError("its processor time is used up")
                raise ChildProcessError(f"the process ended with status {status}")
            self._pending += chunk


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    with contextlib.suppress(BrokenPipeError):  # of what it has not read
        process.stdin.close()
    process.stdout.close()


def serve(start: Callable[[], Answer]) -> None:
    """In the process: answer requests until standard input ends. What is printed meanwhile goes to standard error.
    start: gets ready, and returns the function from a request to its reply; what it raises reaches the caller."""
    # a lone surrogate, which no reader of ours takes, becomes a question mark
    replies = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8", errors="replace")
    os.dup2(2, 1)

    def send(number: object, reply: Mapping[str, object]) -> None:
        """Write one line, under the number of its request."""
        replies.write(json.dumps({"id": number, **reply}, ensure_ascii=False) + "\n")

    try:
        answer = start()
    except Exception as problem:  # a user's file may raise anything
        send("ready", {"error": f"{type(problem).__name__}: {problem}"})
        return
    send("ready", {})
    for line in sys.stdin:
        request = json.loads(line)
        send(request["id"], answer(request))
