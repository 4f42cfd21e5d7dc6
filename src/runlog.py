"""What a run tells: the rank-0 logger, the progress bar, metrics.jsonl and src.trackers, and run.json. Nothing else
prints.

python -m src.runlog RUN_DIR
draws the metrics of a run, which may still be going on, into RUN_DIR/metrics.png.
"""

import contextlib
import hashlib
import io
import json
import logging
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np
from tqdm import tqdm

from src.command import cli
from src.command.flags import WRITTEN, path_in
from src.errors import UserError, show_problem
from src.jsonfile import finite, write_text
from src.trackers import OPEN, Tracker, asked_for

METRICS = "metrics.jsonl"
GONE = ("the run's directory, or a file in it, is gone since the run began; bring it back, or start the run again as "
        "it was started")
LINE_SECONDS = 30.0  # between two lines of progress where there is no terminal
_FORMAT = "%(asctime)s %(message)s"


class _AboveProgressBar(logging.Handler):
    """Writes records to standard error without tearing a running progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record as a line."""
        with tqdm.external_write_mode(file=sys.stderr):
            show_problem(self.format(record))


class _Lines(io.StringIO):
    """Standard error for a progress bar where nobody sees it move: each state of the bar becomes a line."""

    def write(self, text: str) -> None:
        """What tqdm writes is a carriage return, a state, and spaces over the rest of the last one."""
        if line := text.strip():
            show_problem(line)


def logger() -> logging.Logger:
    """The framework's logger. Rank 0 speaks; other ranks keep to errors."""
    log = logging.getLogger("splitrl")
    if not log.handlers:
        handler = _AboveProgressBar()
        handler.setFormatter(logging.Formatter(_FORMAT, datefmt="%H:%M:%S"))
        log.addHandler(handler)
        log.propagate = False
        log.setLevel(logging.INFO if _is_rank_0() else logging.ERROR)
    return log


def warn_of_early_end(n_steps: int, epochs: int, max_steps: int) -> None:
    """Say that a run has fewer steps than --max_steps, which is a limit: --epochs give the rows."""
    if n_steps < max_steps:
        logger().warning("the run ends after step %d of --max_steps %d, when its rows are used up: raise --epochs %d",
                         n_steps, max_steps, epochs)


def table(text: str) -> None:
    """Show a finished table on standard output (rank 0)."""
    say(text.rstrip("\n") + "\n")


def say(text: str) -> None:
    """Show text on standard output as it is, at once (rank 0)."""
    if _is_rank_0():
        cli.show(text)


def ask(question: str) -> str | None:
    """A line typed on standard input, without its end; None when the input has ended."""
    say(question)
    line = sys.stdin.readline()
    return line.removesuffix("\n") if line else None


def _is_rank_0() -> bool:
    return os.environ.get("RANK", "0") == "0"


class Phases:
    """Seconds spent in each phase of a buffer; `with phases("sample"): ...` adds to one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time what runs inside."""
        started = time.monotonic()
        yield
        key = f"seconds_{name}"
        self.seconds[key] = round(self.seconds.get(key, 0.0) + time.monotonic() - started, 4)

    def rate(self, tokens: int) -> float:
        """Tokens a second over all phases."""
        return tokens / max(sum(self.seconds.values()), 1e-9)


class RunLog:
    """The record of one run in its directory: run.json at the start, metrics.jsonl line by line, a progress bar. Every
    rank may hold one and call it; only rank 0 writes."""

    def __init__(
        self, folder: str, flags: Mapping[str, object], facts: Mapping[str, object] | None = None,
        trackers: Sequence[str] = (),
    ) -> None:
        """facts: what run.json is to say besides, json values by name.

        trackers: who is given the metrics too, as --trackers has them. Raises UserError for one that is not installed.
        """
        self.logger = logger()
        self._folder, self._flags, self._asked = Path(folder), dict(flags), asked_for(trackers)
        self._trackers: list[Tracker] = []
        self._metrics: TextIO | None = None
        self._kept = 0  # steps of an earlier part of the run whose metrics stay
        self._bar: tqdm | None = None
        self._started = self._last_time = time.monotonic()
        self._last_tokens = 0
        if _is_rank_0():
            self._folder.mkdir(parents=True, exist_ok=True)
            record = {"command": sys.argv, "flags": dict(flags), "inputs": _hashes(flags)}
            record |= {**(facts or {}), **_environment()}
            (self._folder / "run.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    def go_on_after(self, step: int) -> None:
        """Keep the metrics of the steps up to this one, which an earlier part of the run has written."""
        self._kept = step

    def progress(self, total: int, unit: str, done: int = 0) -> None:
        """Start a progress bar of `total` units, `done` of which are over; a bar that runs already is closed. Where
        standard error is no terminal it is a line every half minute."""
        self.close_progress()
        seen = sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=done, unit=unit, disable=not _is_rank_0(),
                         file=sys.stderr if seen else _Lines(), mininterval=1.0 if seen else LINE_SECONDS,
                         miniters=1, dynamic_ncols=seen)
        self._last_time, self._last_tokens = time.monotonic(), 0

    def advance(self, by: int = 1, tokens: int = 0, **shown: float) -> None:
        """Move the bar; `tokens` processed since the last call become tokens/s, `shown` follows it."""
        if self._bar is None:
            return
        self._last_tokens += tokens
        rate = self._last_tokens / max(time.monotonic() - self._last_time, 1e-9)
        values = {name: f"{value:.4g}" for name, value in shown.items()}
        self._bar.set_postfix(values | ({"tok/s": f"{rate:.0f}"} if tokens else {}), refresh=False)
        self._bar.update(by)

    def close_progress(self) -> None:
        """End the progress bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def metrics(self, step: int, alarms: Mapping[str, str] | None = None, **values: float) -> None:
        """Append one line to metrics.jsonl: the step, the seconds since the start, and these values, null for NaN.

        alarms: what is wrong at this step by name, and what to do; they stand in the line and in its picture.
        Raises UserError when the run's directory has vanished.
        """
        if _is_rank_0():
            path = self._folder / METRICS
            if self._metrics is None:  # what follows the kept steps was of a part that is run again
                rows = read_metrics(path) if self._kept and path.is_file() else []
                write_text(path, "".join(_line(row) for row in rows if row["step"] <= self._kept))
                self._metrics = path.open("a", encoding="utf-8")
                self._trackers = [OPEN[name](place, self._folder, self._flags, self._kept)
                                  for name, place in self._asked.items()]
            if not path.exists():  # the open file would go on being written where nobody looks
                raise UserError(f"{self._folder}: {GONE}")
            row = {"step": step, "seconds": round(time.monotonic() - self._started, 3), **values}
            row |= {"alarms": dict(alarms)} if alarms else {}
            self._metrics.write(_line(row))
            self._metrics.flush()
            try:
                for track in self._trackers:
                    track(row)
            except FileNotFoundError:  # TensorBoard opens its file when it has something to write
                raise UserError(f"{self._folder}: {GONE}") from None

    def rows(self, name: str, rows: Sequence[Mapping[str, object]]) -> None:
        """Write rows as a jsonl file of this name in the run's directory, in place of an older one."""
        if _is_rank_0() and rows:
            path = self._folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(map(_line, rows)), encoding="utf-8")


def _line(row: Mapping[str, object]) -> str:
    """A row of a jsonl file, NaN and infinity as null: readers other than Python's refuse a file for one of them."""
    return json.dumps(finite(row), allow_nan=False) + "\n"


def read_metrics(path: Path) -> list[dict[str, object]]:
    """The rows of a metrics file that have a step. Others are left out with a warning.

    The last line may be torn: the run was killed, or is writing it.
    """
    lines, rows, odd = path.read_bytes().split(b"\n"), [], []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not math.isfinite(row["step"]):
                raise ValueError
            rows.append(row)
        except (ValueError, TypeError, LookupError, OverflowError, RecursionError):
            odd += [number] if line.strip() and number < len(lines) else []
    if odd:
        logger().warning("%s: %d lines without a step are left out, the first is line %d", path, len(odd), odd[0])
    return rows


def draw(folder: Path) -> Path:
    """Draw the metrics of a run. Returns the PNG. Raises UserError for a directory without any."""
    from src.plot import plot_run  # matplotlib costs half a second: not for every run

    path, picture = folder / METRICS, folder / "metrics.png"
    rows = read_metrics(path) if path.is_file() else []
    if not rows:
        raise UserError(f"{folder} holds no {METRICS} with a line in it; give the directory of a run that has begun")
    try:
        plot_run(rows, str(folder), picture)
    except ValueError:
        raise UserError(f"{path} holds no number to draw beside the steps; is it of another program?") from None
    return picture


def _hashes(flags: Mapping[str, object]) -> dict[str, list[str]]:
    """SHA-256 of the files that a run reads, by flag, a reward's FILE.py among them: a later change of theirs shows."""
    hashes: dict[str, list[str]] = {}
    for name, value in flags.items():
        for word in value if isinstance(value, list) else [value]:
            path = path_in(name, word) if isinstance(word, str) and name not in WRITTEN else None
            if path and path.is_file():
                with path.open("rb") as file:
                    hashes.setdefault(name, []).append(hashlib.file_digest(file, "sha256").hexdigest())
    return hashes


def _environment() -> dict[str, object]:
    """Versions, revision and machine, for run.json."""
    import torch  # seconds: not for those who only log, such as a process of a user's reward

    here, cpus = Path(__file__).parent, Path("/proc/cpuinfo")
    place, revision = "", ""
    with contextlib.suppress(OSError):  # no git on this machine
        git = subprocess.run(["git", "rev-parse", "--show-prefix", "HEAD"], cwd=here, capture_output=True, text=True,
                             check=False)
        place, _, revision = git.stdout.partition("\n")
    said = cpus.read_text(encoding="utf-8", errors="replace") if cpus.is_file() else ""
    named = re.search(r"^model name\s*: (.*)$", said, re.MULTILINE)
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "revision": revision.strip() if place == "src/" else "",  # else of a repository around an unpacked archive
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        # what decides which kernels multiply, and so the last bits of a run
        "processor": {"name": named[1] if named else platform.processor(),
                      "instructions": torch.backends.cpu.get_cpu_capability(),
                      "onednn": torch.backends.mkldnn.is_available(), "mkl": torch.backends.mkl.is_available()}}


def main(arguments: Sequence[str]) -> None:
    """Draw the picture and say where it is."""
    if len(arguments) != 1:
        raise UserError(f"found {len(arguments)} arguments; expected one: python -m src.runlog RUN_DIR")
    table(f"wrote {draw(Path(arguments[0]))}")


if __name__ == "__main__":
    cli.guarded(lambda: main(sys.argv[1:]))
