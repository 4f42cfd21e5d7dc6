"""One answer graded honestly: five outcomes, exact rules first, sympy only in processes that can be killed."""

import queue
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from src.errors import UserError
from src.grading.answer_types import ANY, EQUALITIES, AnswerType
from src.grading.extract import Extraction, extract
from src.grading.tasks import Task, find_task
from src.processes.worker import Worker

GRADER_VERSION = "splitrl-5+math-verify-0.9.0"  # printed with every score: graders differ by points
MAX_LENGTH = 50_000  # characters of a response that are searched without a limit of time
CACHE_SIZE = 200_000


class Verdict(NamedTuple):
    """What the grader says of one response."""

    outcome: str  # right | wrong | unparsed | timeout | error
    answer: str | None  # what was extracted, None for unparsed


class Undecided(Exception):
    """A search or a comparison ended without a verdict."""

    def __init__(self, outcome: str) -> None:
        super().__init__(outcome)
        self.outcome = outcome  # timeout | error


class Grader:
    """Grades responses of one task, by its name or as it is. Use as a context manager; safe to call from threads.

    seconds bounds the time of one answer; half of it in processor time already ends one. Worker processes start with
    the first answer that rules cannot decide.
    Raises UserError for an unknown task or one that grades nothing.
    """

    def __init__(self, task: str | Task, workers: int = 1, seconds: float = 5.0) -> None:
        self.task = find_task(task) if isinstance(task, str) else task
        if not self.task.graded:
            raise UserError(f"task {self.task.name} grades nothing; name the task of the answers")
        self.same = EQUALITIES[self.task.equality]
        self.seconds = seconds
        self.workers = [Worker("src.grading.worker") for _ in range(workers)]
        self.idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self.workers:
            self.idle.put(worker)
        self.cache: dict[tuple[str, str, AnswerType], str] = {}

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self.workers:
            worker.close()

    def grade(
        self, responses: Sequence[str], labels: Sequence[str], types: Sequence[AnswerType] = ()
    ) -> list[Verdict]:
        """A verdict for each response against its bare label. types: how each label is compared by a task of typed
        answers; none = by its shape."""
        rows = zip(responses, labels, types or [ANY] * len(labels), strict=True)
        with ThreadPoolExecutor(len(self.workers)) as threads:
            return list(threads.map(lambda row: self.grade_one(*row), rows))

    def grade_one(self, response: str, label: str, answer_type: AnswerType = ANY) -> Verdict:
        """The verdict for one response."""
        try:
            answer = self.extract(response).answer
        except Undecided as undecided:
            return Verdict(undecided.outcome, None)
        if answer is None:
            return Verdict("unparsed", None)
        return Verdict(self.compare(answer, label, answer_type), answer)

    def answer(self, response: str) -> str | None:
        """The answer of a response; None where none is found, or none in time."""
        try:
            return self.extract(response).answer
        except Undecided:
            return None

    def extract(self, response: str) -> Extraction:
        """The answer of a response; of a long one in a process that can be killed. Raises Undecided where it has to."""
        if len(response) <= MAX_LENGTH:
            return extract(self.task.extraction, response)
        found = self.ask({"extraction": self.task.extraction, "response": response}, self.seconds)
        return Extraction(*found)

    def compare(self, answer: str, label: str, answer_type: AnswerType = ANY) -> str:
        """The outcome of a bare answer against a label: right, wrong, timeout or error."""
        key = answer, label, answer_type
        if key not in self.cache:
            if len(self.cache) >= CACHE_SIZE:
                self.cache.clear()
            self.cache[key] = self._compare(*key)
        return self.cache[key]

    def _compare(self, answer: str, label: str, answer_type: AnswerType) -> str:
        deadline = time.monotonic() + self.seconds  # of all expressions of an answer together

        def leaf(answer: str, label: str) -> bool:
            """Whether math-verify finds two expressions equal, in the time that is left."""
            seconds = deadline - time.monotonic()
            if seconds <= 0:
                raise Undecided("timeout")
            return self.ask({"answer": answer, "label": label}, seconds) == "right"

        try:
            return "right" if self.same(answer, label, answer_type, leaf) else "wrong"
        except Undecided as undecided:
            return undecided.outcome
        except (ArithmeticError, LookupError, RecursionError, ValueError):
            return "error"  # a fault of our rules on odd input: counted and reported, but it ends no run

    def ask(self, request: Mapping[str, object], seconds: float) -> object:
        """What the next free process finds within so many seconds. Raises Undecided where it finds nothing."""
        worker = self.idle.get()
        try:
            outcome = worker.ask({"seconds": seconds, **request}, seconds)["outcome"]
        except TimeoutError:
            outcome = "timeout"
        except ChildProcessError:
            outcome = "error"
        finally:
            self.idle.put(worker)
        if outcome in ("timeout", "error"):
            raise Undecided(outcome)
        return outcome

    def equal(self, first: str, second: str, answer_type: AnswerType = ANY) -> bool:
        """Whether two answers are one vote: either would be right if the other were the label."""
        return any(self.compare(*pair, answer_type) == "right" for pair in ((first, second), (second, first)))
