"""A user's own reward: `path/to/file.py:function`, called in a process that can be killed.

The function is called once for all responses of a buffer, with lists by name: `prompts`, `completions`, and every
column of the prompts' file (`label`, `level`, ...; None where a row lacks it). It names those it wants, or takes
`**columns`, and returns a number for each response, or these and a dictionary of numbers for the log. A function with a
parameter `response` is called for each response instead, with those of prompt, response and label that it names, or
all three in this order if it has other names for them. The process is this module too, with the file and the name of
the function as its arguments.
"""

import importlib.util
import inspect
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from src import runlog
from src.data.examples import OF_PROMPT, Prompt
from src.errors import UserError
from src.processes.worker import Answer, Reply, Worker, serve

Columns = Mapping[str, Sequence[object]]
OF_RESPONSE = ("prompt", "response", "label")


class UserScores(NamedTuple):
    """What a function gives for each response, how many of them it failed at, and its numbers for the log."""

    values: list[float]
    n_failed: int
    stats: Mapping[str, float]


class UserReward:
    """Calls the function for all responses together. Use as a context manager.

    A call that takes longer than 6 + n / 10 times `seconds` for n responses, or that ends its process, is followed by
    one for each response; one of these that takes longer than `seconds`, or ends its process, is worth 0.
    Raises UserError for a file or function that is not there.
    """

    def __init__(self, place: str, seconds: float = 10.0) -> None:
        path, _, name = place.rpartition(":")
        if not Path(path).is_file() or not name.isidentifier():
            raise UserError(f"--reward {place!r} is neither verifier, rule nor code, nor FILE.py:FUNCTION with a file "
                            "that exists")
        self.place, self.seconds = place, seconds
        self._worker = Worker("src.training.user_reward", (str(Path(path).resolve()), name))

    def __enter__(self) -> "UserReward":
        return self

    def __exit__(self, *error: object) -> None:
        self._worker.close()

    def begin(self) -> None:
        """Wait until the function can be asked. Raises UserError for a file that does not load, or lacks it."""
        try:
            self._worker.begin()
        except UserError as trouble:
            raise UserError(f"--reward {self.place}: {trouble}") from None

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> UserScores:
        """The rewards of responses to prompts. Raises UserError where the function raises, or gives anything but a
        finite number for each."""
        columns = _columns(prompts, responses)
        try:
            values, stats = self._ask(columns, (6 + len(responses) / 10) * self.seconds)
            return UserScores(values, 0, stats)
        except (TimeoutError, ChildProcessError) as trouble:
            runlog.logger().warning("--reward %s: %s; it is asked for one response at a time", self.place, trouble)
        found: list[float | None] = []
        for row in range(len(responses)):
            try:
                found += self._ask({name: values[row : row + 1] for name, values in columns.items()}, self.seconds)[0]
            except (TimeoutError, ChildProcessError):
                # worth 0, and counted for the log: one response must not end the run
                found.append(None)
        return UserScores([value or 0.0 for value in found], found.count(None), {})

    def _ask(self, columns: Columns, seconds: float) -> tuple[list[float], dict[str, float]]:
        """One call: its numbers, and those for the log. Raises as Worker.ask() does, and UserError."""
        n = len(columns["prompts"])
        self.begin()
        reply = self._worker.ask({"columns": columns}, seconds)
        if "raised" in reply:
            raise UserError(f"--reward {self.place} raised {reply['raised']}; it is called with lists under the names "
                            f"{', '.join(columns)}")
        values, stats = reply["values"], reply["stats"]
        if len(values) != n:
            raise UserError(f"--reward {self.place} gave {len(values)} numbers for {n} responses; expected one each")
        for value, text in zip(values, columns["completions"], strict=True):
            if not math.isfinite(value):
                raise UserError(
                    f"--reward {self.place}: {value} for the response {text[:60]!r}; expected a finite number")
        for name, value in stats.items():
            if not math.isfinite(value):
                raise UserError(f"--reward {self.place}: {value} for {name!r} of the log; expected a finite number")
        return values, stats


def check(places: Iterable[str]) -> None:
    """Raise UserError for a function that is not there or does not load, before models are read. Rank 0 asks."""
    for place in places:
        with UserReward(place) as reward:
            if os.environ.get("RANK", "0") == "0":
                reward.begin()


def _columns(prompts: Sequence[Prompt], responses: Sequence[str]) -> Columns:
    """What the function is called with: lists as long as the responses."""
    known: dict[str, Sequence[object]] = {
        "prompts": [prompt.instruction for prompt in prompts],
        "completions": list(responses),
        **{name: [getattr(prompt, name) for prompt in prompts] for name in OF_PROMPT}}
    names = dict.fromkeys(name for prompt in prompts for name in prompt.others if name not in known)
    columns = known | {name: [prompt.others.get(name) for prompt in prompts] for name in names}
    return json.loads(json.dumps(columns, default=str))  # parquet may hold dates


def load(path: str, name: str) -> Answer:
    """In the process: what calls that function of a Python file. Raises whatever the file raises."""
    sys.path.insert(0, str(Path(path).parent))  # for what the file imports from beside it
    spec = importlib.util.spec_from_file_location("user_reward_file", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up there
    spec.loader.exec_module(module)
    function = getattr(module, name)

    def answer(request: dict[str, object]) -> Reply:
        """Its numbers, or in words what the function raised."""
        try:
            values, stats = _call(function, request["columns"])
            return {"values": [float(value) for value in values],
                    "stats": {str(key): float(value) for key, value in stats.items()}}
        except Exception as error:
            # a stranger's code may raise anything; the run says what, in one line
            return {"raised": f"{type(error).__name__}: {error}"}

    return answer


def _call(function: Callable[..., object], columns: Columns) -> tuple[Sequence[object], Mapping[str, object]]:
    """The numbers that the function gives for the responses, and those for the log."""
    wanted = inspect.signature(function).parameters
    if "response" in wanted:
        rows = list(zip(columns["prompts"], columns["completions"], columns["label"], strict=True))
        others = [parameter for name, parameter in wanted.items() if name not in OF_RESPONSE]
        if any(parameter.default is parameter.empty for parameter in others):  # it has names of its own for the others
            return [function(*row) for row in rows], {}
        named = [dict(zip(OF_RESPONSE, row, strict=True)) for row in rows]
        return [function(**{name: row[name] for name in OF_RESPONSE if name in wanted}) for row in named], {}
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in wanted.values())
    found = function(**{name: values for name, values in columns.items() if takes_all or name in wanted})
    return found if isinstance(found, tuple) else (found, {})


if __name__ == "__main__":
    serve(lambda: load(*sys.argv[1:]))
