"""One answer graded honestly: five outcomes, exact rules first, sympy only in processes that can be killed."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple

from src.evaluation import equality
from src.evaluation.extract import extract_answer, task_rules
from src.evaluation.grade_pool import Pool

__all__ = ["GRADER_VERSION", "Grader", "Verdict", "extract_answer"]

GRADER_VERSION = "splitrl-1+math-verify-0.9.0"  # printed beside every score: graders differ by points
CACHE_SIZE = 200_000


class Verdict(NamedTuple):
    outcome: str  # right | wrong | unparsed | timeout | error
    answer: str | None  # what was extracted, None for unparsed


class Undecided(Exception):
    """A leaf comparison ended without a verdict."""

    def __init__(self, outcome: str) -> None:
        super().__init__(outcome)
        self.outcome = outcome  # timeout | error


class Grader:
    """Grades responses of one task. Use as a context manager; safe to call from several threads.

    seconds bounds the time of one answer. Worker processes start with the first answer that rules cannot decide.
    """

    def __init__(self, task: str, workers: int = 1, seconds: float = 5.0) -> None:
        task_rules(task)  # an unknown task stops here, not at the first response
        if workers < 1 or seconds <= 0:
            raise ValueError(f"workers={workers}, seconds={seconds}: expected a worker and a positive time")
        self.task = task
        self.seconds = seconds
        self.n_workers = workers
        self.pool = Pool(workers)
        self.cache: dict[tuple[str, str], str] = {}

    def __enter__(self) -> "Grader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.pool.stop()

    def grade(self, responses: Sequence[str], labels: Sequence[str]) -> list[Verdict]:
        """A verdict for each response against the bare label beside it. Raises ValueError if the lengths differ."""
        if len(responses) != len(labels):
            raise ValueError(
                f"{len(responses)} responses but {len(labels)} labels; expected one label a response"
            )
        if self.n_workers == 1:
            return [self.grade_one(*pair) for pair in zip(responses, labels, strict=True)]
        with ThreadPoolExecutor(self.n_workers) as threads:
            return list(threads.map(self.grade_one, responses, labels))

    def grade_one(self, response: str, label: str) -> Verdict:
        """The verdict for one response."""
        answer = extract_answer(self.task, response)
        return Verdict("unparsed", None) if answer is None else Verdict(self.compare(answer, label), answer)

    def compare(self, answer: str, label: str) -> str:
        """The outcome of a bare answer against a label: right, wrong, timeout or error."""
        outcome = self.cache.get((answer, label))
        if outcome is None:
            outcome = self.compare_uncached(answer, label)
            if len(self.cache) >= CACHE_SIZE:
                self.cache.clear()
            self.cache[answer, label] = outcome
        return outcome

    def compare_uncached(self, answer: str, label: str) -> str:
        """compare() without the cache."""
        leaf = self.leaf_until(time.monotonic() + self.seconds)
        try:
            return "right" if equality.equal(answer, label, leaf) else "wrong"
        except Undecided as undecided:
            return undecided.outcome
        except (ArithmeticError, LookupError, RecursionError, ValueError):
            return "error"  # a fault of our rules on odd input: counted and reported, but it ends no run

    def leaf_until(self, deadline: float) -> Callable[[str, str], bool]:
        """A leaf comparer that shares one deadline between all leaves of an answer."""

        def leaf(answer: str, label: str) -> bool:
            seconds = deadline - time.monotonic()
            outcome = self.pool.compare(answer, label, seconds) if seconds > 0 else "timeout"
            if outcome in ("timeout", "error"):
                raise Undecided(outcome)
            return outcome == "right"

        return leaf

    def equal(self, first: str, second: str) -> bool:
        """Whether two answers are one vote: either would be right if the other were the label."""
        return self.compare(first, second) == "right" or self.compare(second, first) == "right"
