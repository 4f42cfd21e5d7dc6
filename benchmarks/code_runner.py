"""How many solutions with code run a second, isolated, beside plain Python processes that run the same code.

python benchmarks/code_runner.py [--runs 60]

Each row is measured with one and with two solutions at a time; all rows in turns, twice, the better of the two.
The last column is processor time of a run, children included, which a busy machine hardly changes.
"""

import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src import runlog  # noqa: E402
from src.code_solutions.runner import Execution, run  # noqa: E402
from src.command import cli  # noqa: E402

TRIVIAL, SYMPY = "print(1 + 1)", "import sympy\nprint(sympy.Integer(1) + 1)"


class Row(NamedTuple):
    """What is measured: a name and a function that runs once."""

    name: str
    once: Callable[[], None]


class Speed(NamedTuple):
    """Runs a second, and milliseconds of processor time a run."""

    rate: float
    cpu: float


def plain(code: str) -> None:
    """The same code without walls, limits or a fresh folder."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout == b"2\n"


def behind(isolation: str, *blocks: str) -> None:
    """One run of ours."""
    execution = run(blocks, isolation=isolation)
    assert execution == Execution("2\n", "ok"), execution


def measure(once: Callable[[], None], runs: int, at_a_time: int) -> Speed:
    """Start the function in so many threads until it has run so many times."""
    cpu, began = processor_time(), time.monotonic()
    with ThreadPoolExecutor(at_a_time) as threads:
        for done in [threads.submit(once) for _ in range(runs)]:
            done.result()
    return Speed(runs / (time.monotonic() - began), 1000 * (processor_time() - cpu) / runs)


def processor_time() -> float:
    """Seconds of this process and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def rows() -> list[Row]:
    """The rows that this machine and user can run."""
    kinds = ["none", "namespaces"]
    if shutil.which("bwrap") and os.getuid() != 0:
        kinds.append("bubblewrap")
    found = [Row("plain python -c", lambda: plain(TRIVIAL))]
    found += [Row(f"isolation {kind}", lambda kind=kind: behind(kind, TRIVIAL)) for kind in kinds]
    found.append(Row("namespaces, 3 blocks replayed", lambda: behind("namespaces", *[TRIVIAL] * 4)))
    found.append(Row("plain python -c, imports sympy", lambda: plain(SYMPY)))
    found.append(Row("namespaces, imports sympy", lambda: behind("namespaces", SYMPY)))
    return found


def main(runs: int = 60) -> None:
    """Measure how many solutions with code run a second.

    runs: runs of a measurement of a trivial program; a sixth of it for one that imports sympy
    """
    table = rows()
    speeds: dict[tuple[str, int], list[Speed]] = {}
    for _ in range(2):
        for row in table:
            row.once()
            for at_a_time in (1, 2):
                count = max(1, runs // 6) if "sympy" in row.name else runs
                speeds.setdefault((row.name, at_a_time), []).append(measure(row.once, count, at_a_time))
    lines = [f"{'':32}{'1 at a time':>14}{'2 at a time':>14}{'processor time':>18}"]
    for row in table:
        one, two = (max(speeds[row.name, at_a_time]) for at_a_time in (1, 2))
        cpu = min(speed.cpu for at_a_time in (1, 2) for speed in speeds[row.name, at_a_time])
        lines.append(f"{row.name:32}{one.rate:12.1f}/s{two.rate:12.1f}/s{cpu:12.0f} ms/run")
    lines.append(f"load of the machine {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")
    runlog.table("\n".join(lines))


if __name__ == "__main__":
    cli.run(main)
