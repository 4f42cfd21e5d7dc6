"""A user's own reward: `path/to/file.py:function`, called in a process that can be killed.

The function has the signature reward(prompt: str, response: str, label: str | None) -> float. The process is this
module too, with the file and the name of the function as its arguments.
"""

import importlib.util
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from src.errors import UserError
from src.processes.worker import Answer, Reply, Worker, serve


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
        self._worker = Worker("src.training.user_reward", (str(Path(path).resolve()), name))

    def __enter__(self) -> "UserReward":
        return self

    def __exit__(self, *error: object) -> None:
        self._worker.close()

    def score(
        self, prompts: Sequence[str], responses: Sequence[str], labels: Sequence[str | None]
    ) -> tuple[list[float], int]:
        """What the function gives for each response, and how many calls failed. Raises UserError for a response that
        it raises an exception for, or gives no number."""
        found = [self._score(*row) for row in zip(prompts, responses, labels, strict=True)]
        return [score or 0.0 for score in found], found.count(None)

    def _score(self, prompt: str, response: str, label: str | None) -> float | None:
        """None for a call that ran out of time or ended its process."""
        request = {"prompt": prompt, "response": response, "label": label}
        try:
            reply = self._worker.ask(request, self.seconds)
        except (TimeoutError, ChildProcessError):
            return None
        except UserError as trouble:
            raise UserError(f"--reward {self.place}: {trouble}") from None
        value = reply["value"]
        if not isinstance(value, float) or not math.isfinite(value):
            raise UserError(
                f"--reward {self.place}: {value} for the response {response[:60]!r}; expected a finite number"
            )
        return value


def load(path: str, name: str) -> Answer:
    """In the process: what calls that function of a Python file. Raises whatever the file raises."""
    spec = importlib.util.spec_from_file_location("user_reward_file", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name)

    def answer(request: dict[str, object]) -> Reply:
        """A number, or in words what the function raised."""
        try:
            return {"value": float(function(request["prompt"], request["response"], request["label"]))}
        except Exception as error:
            return {"value": f"raised {type(error).__name__}: {error}"}

    return answer


if __name__ == "__main__":
    serve(lambda: load(*sys.argv[1:]))
