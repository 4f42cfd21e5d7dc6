"""Killable processes for the expressions that need sympy: no answer of a model can hang or crash the caller."""

import json
import os
import queue
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from src import watchdog
from src.errors import UserError
from src.jsonfile import parse

STARTUP_SECONDS = 60.0
GRADER = "src.evaluation.grade_worker"
REPO = Path(__file__).resolve().parents[2]


class Worker:
    """One process of a worker module, started at the first request and again after each death.

    After a kill the next process starts at once, so that it has imported what it needs by the time it is asked.
    """

    def __init__(self, module: str = GRADER, arguments: Sequence[str] = ()) -> None:
        self.command = ["-m", module, *arguments]
        self.process: subprocess.Popen[bytes] | None = None
        self.ready = False
        self.pending = b""
        self.requests = 0

    def compare(self, answer: str, label: str, seconds: float) -> str:
        """ "right", "wrong", "timeout" or "error" (the process died or the library failed), as ask() gives it."""
        return self.ask({"answer": answer, "label": label, "seconds": seconds}, seconds)

    def extract(self, extraction: str, response: str, seconds: float) -> str:
        """The Extraction as a json list, or "timeout" or "error"."""
        return self.ask({"extraction": extraction, "response": response, "seconds": seconds}, seconds)

    def ask(self, request: Mapping[str, object], seconds: float) -> str:
        """What the process replies; "timeout" or "error" where it has to be killed or dies.

        seconds bounds the reply, the start of the process not counted.
        """
        if self.process is None or self.process.poll() is not None:
            self.launch()
        if not self.ready:
            self.await_ready()
        self.requests += 1
        try:
            self.process.stdin.write(json.dumps({"id": self.requests, **request}).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self.stop()
            return "error"
        outcome = self.read(self.requests, seconds)
        watchdog.got_on()
        return outcome

    def launch(self) -> None:
        """Start the process."""
        self.stop()
        self.process = subprocess.Popen(
            [sys.executable, *self.command],
            cwd=REPO,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def await_ready(self) -> None:
        """Wait until the process has imported what it needs. Raises RuntimeError if it cannot, with what it says."""
        if trouble := self.read("ready", STARTUP_SECONDS):
            self.stop()
            raise RuntimeError(
                f"the process did not start ({trouble}): `python {' '.join(self.command)}` says why; "
                f"everything in requirements.txt must be installed"
            )
        self.ready = True

    def read(self, wanted: int | str, seconds: float) -> str:
        """The outcome of one request; lines that are no reply to it are ignored. Kills the process on timeout."""
        deadline = time.monotonic() + seconds
        while True:
            line, newline, rest = self.pending.partition(b"\n")
            if newline:
                self.pending = rest
                reply = parse_reply(line)
                if reply is not None and reply["id"] == wanted:
                    return str(reply["outcome"])
                continue
            readable, _, _ = select.select(
                [self.process.stdout], [], [], max(0.0, deadline - time.monotonic())
            )
            if not readable:
                self.launch()
                return "timeout"
            chunk = os.read(self.process.stdout.fileno(), 65536)
            if not chunk:
                # the signal that the worker sets for the end of its processor time
                out_of_time = self.process.wait() == -signal.SIGPROF
                self.launch()
                return "timeout" if out_of_time else "error"
            self.pending += chunk

    def stop(self) -> None:
        """Kill the process, if there is one, and wait for its end."""
        if self.process is None:
            return
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        self.process, self.pending, self.ready = None, b"", False


def parse_reply(line: bytes) -> dict[str, object] | None:
    """A reply of the worker, None for a stray line."""
    try:
        reply = parse(line, "grade worker")
    except UserError:
        return None
    return reply if {"id", "outcome"} <= reply.keys() else None


class Pool:
    """A number of workers that threads borrow one at a time."""

    def __init__(self, workers: int) -> None:
        self.workers = [Worker() for _ in range(workers)]
        self.idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self.workers:
            self.idle.put(worker)

    def compare(self, answer: str, label: str, seconds: float) -> str:
        """Worker.compare on the next free worker."""
        with self.borrowed() as worker:
            return worker.compare(answer, label, seconds)

    def extract(self, extraction: str, response: str, seconds: float) -> str:
        """Worker.extract on the next free worker."""
        with self.borrowed() as worker:
            return worker.extract(extraction, response, seconds)

    @contextmanager
    def borrowed(self) -> Iterator[Worker]:
        """The next free worker."""
        worker = self.idle.get()
        try:
            yield worker
        finally:
            self.idle.put(worker)

    def stop(self) -> None:
        """Kill all processes."""
        for worker in self.workers:
            worker.stop()
