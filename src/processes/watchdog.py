"""Ends a job of several ranks that hangs, saying which rank stands where, or which one is not heard of.

Every rank's watchdog looks at its main thread and tells the others, through the store of their rendezvous, where it
is and whether it gets on. So a rank that waits knows whether anybody works, which a collective's own limit does not:
that one has to be as long as the longest wait, and its message names neither step nor caller.
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import NamedTuple, Protocol

from src.errors import leave_for_torchrun, show_problem

LOOK_SECONDS = 5.0
# Without a sign of life from a watchdog, which speaks every LOOK_SECONDS: its process is stopped, or swapped out, or
# its machine gone. No call that keeps the interpreter to itself, such as parsing a large json file, takes as long.
SILENT_SECONDS = 120.0
# While no rank gets on. Every wait that is right is shorter (a worker process has 60 s to start and 120 s for a reply;
# a layer or an optimizer step on a GPU takes less), or somebody computes or says patiently() meanwhile.
STILL_SECONDS = 300.0
NOTICE_SHARE = 0.15  # of these two, after which a line says who waits for whom: within a minute, and ends nothing
# For one rank in one place while others work: a little less than torch's own limits of a collective.
LONGEST_SECONDS = {"cuda": 0.9 * 600, "cpu": 0.9 * 1800}
# until the others have seen it too, on a busy machine: torchrun kills them once this rank is gone
GRACE_SECONDS = 15.0
LEFT = "left"  # what a rank says last

_ROOT = Path(__file__).parents[2]
# who calls these is where a rank stands
_DOORS = _ROOT / "src" / "parallel.py", _ROOT / "src" / "context_parallel.py"


class Store(Protocol):
    """What is needed of torch's store. A store that is gone or does not answer raises RuntimeError."""

    def set(self, key: str, value: str) -> None:
        """Keep a value."""

    def get(self, key: str) -> bytes:
        """The value kept."""

    def check(self, keys: list[str]) -> bool:
        """Whether all keys have values."""

    def add(self, key: str, amount: int) -> int:
        """Count up; the count."""


class _Sign(NamedTuple):
    """What a rank said last: for how long it has not got on, and where it is; and when that came here."""

    text: str
    came: float
    still: float
    place: str


class _Signs:
    """What this process has done: optimizer steps, anything else that came to an end; and whether it may be slow."""

    steps = ends = patient = turns = 0


def at_step(steps: int) -> None:
    """So many optimizer steps are done; a report names it."""
    _Signs.steps = steps


def got_on() -> None:
    """Something has come to an end in a loop that waits in one place for most of its time."""
    _Signs.ends += 1


@contextlib.contextmanager
def patiently() -> Iterator[None]:
    """Inside, this rank may stand still for long with reason: a disk writes, or somebody is asked."""
    _Signs.patient += 1
    try:
        yield
    finally:
        _Signs.patient -= 1


@contextlib.contextmanager
def turn(first: int, *, of_group: bool) -> Iterator[None]:
    """Inside, rank `first` does what the others, who do nothing there, wait for at the end: through the store, for as
    long as it takes. A collective would give up after minutes, and a person, a server or a user's code may need more.
    of_group: the others are those of its tensor-parallel group, else all. Each of them calls this equally often."""
    dogs = [thread for thread in threading.enumerate() if isinstance(thread, Watchdog)][-1:]  # of this process group
    is_first = not dogs or dogs[0].rank == first
    _Signs.turns += 1
    try:
        with patiently() if is_first else contextlib.nullcontext():
            yield
        with contextlib.suppress(RuntimeError):  # the store is gone: the next collective says what is lost
            for dog in dogs:
                dog.end_turn(of_group) if is_first else dog.await_turn(first, of_group)
    finally:
        _Signs.turns -= 1


def await_all() -> None:
    """Wait until every rank has called this, or has left: through the store, as in turn()."""
    _Signs.turns += 1
    try:
        with contextlib.suppress(RuntimeError):
            for dog in [thread for thread in threading.enumerate() if isinstance(thread, Watchdog)][-1:]:
                dog.await_all()
    finally:
        _Signs.turns -= 1


def after_lost_connection() -> str:
    """What a rank whose connection to another one broke has to say: which rank has gone without a word. Empty where
    one that has gone said why, or another rank tells this. Takes as long as a rank that lives may be silent."""
    dogs = [thread for thread in threading.enumerate() if isinstance(thread, Watchdog)]
    try:
        return dogs[0].lost() if dogs else ""
    except RuntimeError:  # the store is gone too
        return f"after step {_Signs.steps} the ranks lost each other: rank 0 was killed, or a machine is gone"


def leave() -> None:
    """Let this process's watchdog, if there is one, say that this rank leaves, and has told why."""
    for thread in threading.enumerate():
        if isinstance(thread, Watchdog):
            thread.leave()


class Watchdog(threading.Thread):
    """Looks at the main thread of this rank from time to time, and at the others' words once it stands still."""

    def __init__(self, store: Store, rank: int, world_size: int, device: str) -> None:
        super().__init__(name="watchdog", daemon=True)
        self._store, self.rank, self._others = store, rank, [r for r in range(world_size) if r != rank]
        self._cpu, self._longest = device == "cpu", LONGEST_SECONDS[device]
        self._left = threading.Event()
        self._signs: dict[int, _Sign] = {}
        self._turns: Counter[bool] = Counter()  # by whether they were of a group alone
        self._meetings, self._has_noticed = 0, False

    def leave(self) -> None:
        """Stop watching: this rank is done, and the others shall not miss it."""
        self._left.set()
        self.join()
        with contextlib.suppress(RuntimeError):  # the store may be gone before it
            self._say(LEFT)

    def end_turn(self, of_group: bool) -> None:
        """Let the others of a turn() go on."""
        self._turns[of_group] += 1
        self._store.set(f"watchdog/turn/{of_group}/{self.rank}", str(self._turns[of_group]))

    def await_turn(self, first: int, of_group: bool) -> None:
        """Wait until rank `first` has ended its turn, or has left: the next collective says what is lost."""
        self._turns[of_group] += 1
        key, start = f"watchdog/turn/{of_group}/{first}", time.monotonic()
        while not (self._store.check([key]) and int(self._store.get(key)) >= self._turns[of_group]):
            if self._word(first) == LEFT:
                return
            time.sleep(min(0.05, max(0.0005, 0.1 * (time.monotonic() - start))))

    def await_all(self) -> None:
        """Wait until all ranks have called this as often as this one, or one has left."""
        self._meetings += 1
        key, start = f"watchdog/met/{self._meetings}", time.monotonic()
        self._store.add(key, 1)
        while self._store.add(key, 0) <= len(self._others) and LEFT not in self._words().values():
            time.sleep(min(0.05, max(0.0005, 0.1 * (time.monotonic() - start))))

    def run(self) -> None:
        """Watch until this rank leaves, or end the process."""
        seen, looked, used = None, time.monotonic(), 0.0
        since = got_on_at = looked
        with contextlib.suppress(RuntimeError):
            self._say(json.dumps({"now": looked, "still": 0.0, "place": _place()}))
        while not self._left.wait(LOOK_SECONDS):
            now, before = time.monotonic(), looked
            # where each frame of the main thread stands; nothing in it keeps a tensor alive
            stack = tuple((frame.f_code.co_filename, frame.f_lasti) for frame in _frames())
            state, looked = (_Signs.steps, _Signs.ends, stack), now
            late = now - before > 3 * LOOK_SECONDS  # this process itself was stopped, and so were the others perhaps
            if late or state != seen:
                seen, since = state, now
            used, used_before = time.process_time(), used
            # a product of large matrices, or a whole backward pass, is one place too; a GPU's is not seen here
            computes = self._cpu and used - used_before > 0.2 * (now - before)
            if late:
                self._signs.clear()
            if since == now or computes or _Signs.patient:
                got_on_at = now
            try:
                self._say(json.dumps({"now": now, "still": now - got_on_at, "place": _place()}))
                problem = self._problem(now, now - since, now - got_on_at)
                if not problem:
                    self._notice(self._problem(now, now - since, now - got_on_at, NOTICE_SHARE))
            except RuntimeError:  # the store is gone, with it the launcher, or does not answer: nothing is known
                problem = ""
            if not problem and now - since > self._longest and not _Signs.turns:
                problem = f"rank {self.rank} has not moved for {self._longest:.0f} s {_place()}"
            if problem:
                self._end(problem)
            looked = time.monotonic()

    def _say(self, text: str) -> None:
        self._store.set(f"watchdog/{self.rank}", text)

    def lost(self) -> str:
        """Which ranks say nothing any more, that did not leave; empty where there are none, or another rank tells it.
        Raises RuntimeError without the store."""
        before, until = self._words(), time.monotonic() + 2 * LOOK_SECONDS + 1
        while silent := [rank for rank, text in self._words().items() if text == before[rank] != LEFT]:
            if time.monotonic() > until:
                break
            time.sleep(0.1)
        if not silent or self._store.add(f"watchdog/told/{before[silent[0]]}", 1) > 1:
            return ""
        lost = "; ".join(f"rank {rank}, last {_sign(before[rank])['place'] or 'not yet there'}" for rank in silent)
        return f"nothing is heard any more of {lost}: its process was killed (out of memory?), or its machine is gone"

    def _words(self) -> dict[int, str]:
        """What each other rank said last."""
        return {rank: self._word(rank) for rank in self._others}

    def _word(self, rank: int) -> str:
        key = f"watchdog/{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def _notice(self, problem: str) -> None:
        """Say once what this rank waits for."""
        if problem not in ("", "-") and not self._has_noticed:
            show_problem(f"waiting: {problem}")
        self._has_noticed = bool(problem)

    def _problem(self, now: float, here: float, still: float, share: float = 1.0) -> str:
        """What is wrong with the job as far as this rank can tell; else empty.

        here: seconds that this rank has been in one place; still: those in which it has not got on either. share: of
        the seconds that are waited for a sign of life, or of getting on.
        """
        patience, longest = share * SILENT_SECONDS, share * STILL_SECONDS
        if here < 4 * LOOK_SECONDS:
            self._signs.clear()
            return ""
        self._listen(now)
        silent = [rank for rank, sign in self._signs.items() if now - sign.came > patience and sign.text != LEFT]
        places = {self.rank: _place()} | {rank: sign.place for rank, sign in self._signs.items() if rank not in silent}
        if silent:
            lost = "; ".join(f"rank {rank}, last {self._signs[rank].place or 'not yet there'}" for rank in silent)
            problem = (
                f"nothing was heard for {patience:.0f} s of {lost}: its process is stopped or swapped out, "
                f"or its machine is gone; {_listed(places)}")
        elif min([still, *(sign.still + now - sign.came for sign in self._signs.values())]) > longest:
            problem = f"no rank has got on for {longest:.0f} s: {_listed(places)}"
        else:
            return ""
        return problem if self.rank == min(places) else "-"  # one speaks

    def _listen(self, now: float) -> None:
        """Take note of what the other ranks said."""
        for rank, text in self._words().items():
            if rank not in self._signs or text != self._signs[rank].text:
                said = _sign(text)
                self._signs[rank] = _Sign(text, now, said["still"] if text != LEFT else -float("inf"), said["place"])

    def _end(self, problem: str) -> None:
        if problem != "-":
            show_problem(f"error: {problem}")
            leave_for_torchrun(f"error: {problem}")
        time.sleep(GRACE_SECONDS)
        os._exit(1)  # a thread cannot interrupt what the main one is waiting in


def _sign(text: str) -> dict[str, object]:
    """What a rank said."""
    return json.loads(text) if text not in ("", LEFT) else {"still": 0.0, "place": ""}


def _listed(places: Mapping[int, str]) -> str:
    """Where ranks are, those in one place together."""
    ranks: dict[str, list[str]] = {}
    for rank, place in sorted(places.items()):
        ranks.setdefault(place, []).append(str(rank))
    return "; ".join(f"rank {', '.join(those)} {place or 'has left'}" for place, those in ranks.items())


def _frames() -> list[FrameType]:
    """The main thread's frames, innermost first, without those of this file: who waits here stands where it called."""
    frame, frames = sys._current_frames().get(threading.main_thread().ident), []
    while frame:
        frames += [frame] if frame.f_code.co_filename != __file__ else []
        frame = frame.f_back
    return frames


def _place() -> str:
    """The step, the collective that the main thread is in, if any, and the innermost line of ours."""
    collective, line = "in no collective", "in no line of ours"
    for frame in reversed(_frames()):  # the innermost of each kind stays
        path, name = Path(frame.f_code.co_filename), frame.f_code.co_name
        if path.name == "distributed_c10d.py":
            collective = f"in the collective {name}"
        elif _ROOT in path.parents and "site-packages" not in path.parts and path not in _DOORS:
            line = f"at {path.relative_to(_ROOT)}:{frame.f_lineno} in {name}"
    return f"after step {_Signs.steps} {collective}, {line}"
