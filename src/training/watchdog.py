"""Ends a job that hangs, every rank saying where: its step, and the collective or the line it stands in.

A rank hangs when its main thread has not left one place in its code for the time after which torch would give up
a collective too. Torch's own message names neither step nor caller, and on gloo not the rank either.
"""

import functools
import os
import sys
import threading
import time
from pathlib import Path
from types import FrameType

from src import parallel, runlog

# A little less than torch's own limits, which end the process with less to read.
HANG_SECONDS = {"cuda": 0.9 * 600, "cpu": 0.9 * 1800}
SAMPLES = 60  # looks in that time; a busy loop is never met at the same place in all of them
GRACE_SECONDS = (
    15.0  # until the others have spoken, on a busy machine too: torchrun kills them once this one is gone
)

_ROOT = Path(__file__).parents[2]


class Watchdog(threading.Thread):
    """Looks at the main thread from time to time. `step` is what it reports: steps done so far."""

    def __init__(self, seconds: float) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.step = 0
        self._seconds = seconds

    def run(self) -> None:
        """Watch until the process ends, or end it."""
        seen, since = None, time.monotonic()
        while True:
            time.sleep(self._seconds / SAMPLES)
            now = self.step, _stack()
            if now != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > self._seconds:
                self._end()

    def _end(self) -> None:
        runlog.logger().error(
            "error: rank %d has not moved for %.0f s after step %d: %s",
            parallel.rank(),
            self._seconds,
            self.step,
            _place(),
        )
        time.sleep(GRACE_SECONDS)
        os._exit(1)  # a thread cannot interrupt what the main one is waiting in


@functools.cache
def of_process() -> Watchdog:
    """The watchdog of this process, which runs from the first call on; one process alone waits for nobody."""
    watchdog = Watchdog(HANG_SECONDS[parallel.device().type])
    if parallel.world_size() > 1:
        watchdog.start()
    return watchdog


def _frames() -> list[FrameType]:
    """The main thread's frames, innermost first."""
    frame, frames = sys._current_frames().get(threading.main_thread().ident), []
    while frame:
        frames.append(frame)
        frame = frame.f_back
    return frames


def _stack() -> tuple[tuple[str, int], ...]:
    """Where each frame of the main thread stands; nothing in it keeps a tensor alive."""
    return tuple((frame.f_code.co_filename, frame.f_lasti) for frame in _frames())


def _place() -> str:
    """The collective that the main thread is in, if any, and the innermost line of ours."""
    collective, line = "in no collective", "in no line of ours"
    for frame in reversed(_frames()):  # the innermost of each kind stays
        path, name = Path(frame.f_code.co_filename), frame.f_code.co_name
        if path.name == "distributed_c10d.py":
            collective = f"in the collective {name}"
        elif _ROOT in path.parents and "site-packages" not in path.parts:
            line = f"at {path.relative_to(_ROOT)}:{frame.f_lineno} in {name}"
    return f"{collective}, {line}"
