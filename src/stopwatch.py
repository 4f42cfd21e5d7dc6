"""How long certain calls take in all, be they calls to a GPU that return before their work is done."""

import contextlib
import time
from collections.abc import Iterator

import torch


class Stopwatch:
    """Adds up what measure() surrounds between start() and stop().

    On a CPU that is the time inside. Calls to a GPU only queue their work, so there it is the time that the stream they
    are queued on takes from reaching them to leaving them behind; streams that run side by side count each.
    """

    def __init__(self) -> None:
        self._running, self._seconds = False, 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def start(self) -> None:
        """Measure from zero."""
        self._running, self._seconds = True, 0.0
        self._events.clear()

    def stop(self) -> float:
        """Measure no more. -> seconds since start(); waits for a GPU to finish what was measured."""
        self._running = False
        for _, end in self._events:
            end.synchronize()
        return self._seconds + sum(begin.elapsed_time(end) for begin, end in self._events) / 1000

    @contextlib.contextmanager
    def measure(self) -> Iterator[None]:
        """Add what happens inside, if the watch is running."""
        if not self._running:
            yield
        elif torch.cuda.is_available():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        else:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began
