"""A user's own reward: `path/to/file.py:function`, called in a process that can be killed.

The function has the signature reward(prompt: str, response: str, label: str | None) -> float.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from src.errors import UserError
from src.evaluation.grade_pool import Worker


class UserReward:
    """Calls the function for each response. Use as a context manager.

    A call that takes longer than `seconds`, or that ends its process, is worth 0.
    Raises UserError for a file or function that is not there.
    """

    def __init__(self, place: str, seconds: float = 10.0) -> None:
        path, _, name = place.rpartition(":")
        if not Path(path).is_file() or not name.isidentifier():
            raise UserError(
                f"--reward {place!r} is neither verifier nor rule nor FILE.py:FUNCTION with a file that exists"
            )
        self.place, self.seconds = place, seconds
        self._worker = Worker("src.evaluation.reward_worker", (str(Path(path).resolve()), name))

    def __enter__(self) -> "UserReward":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._worker.stop()

    def score(
        self, prompts: Sequence[str], responses: Sequence[str], labels: Sequence[str | None]
    ) -> tuple[list[float], int]:
        """The function's word on each response, and how many calls failed. Raises UserError for a response that it
        raises an exception for, or gives no number."""
        found = [self._score(*row) for row in zip(prompts, responses, labels, strict=True)]
        return [score or 0.0 for score in found], found.count(None)

    def _score(self, prompt: str, response: str, label: str | None) -> float | None:
        """None for a call that ran out of time or ended its process."""
        request = {"prompt": prompt, "response": response, "label": label}
        try:
            outcome = self._worker.ask(request, self.seconds)
        except RuntimeError as trouble:
            raise UserError(f"--reward {self.place}: {trouble}") from None
        if outcome in ("timeout", "error"):
            return None
        if outcome.startswith("raised") or not math.isfinite(float(outcome)):
            raise UserError(
                f"--reward {self.place}: {outcome} for the response {response[:60]!r}; expected a finite number"
            )
        return float(outcome)
