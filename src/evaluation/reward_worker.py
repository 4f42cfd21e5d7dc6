"""The process that calls a user's reward function; started by user_reward, never imported.

Arguments: a Python file and the name of a function in it. One JSON line in, {"id", "prompt", "response", "label"}, one
out, {"id", "outcome"}: the number, or "raised" and what the function raised. The first line out says "ready" with an
empty outcome, or with what kept the file from loading.
"""

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from typing import TextIO


def load(path: str, name: str) -> Callable[[str, str, str | None], float]:
    """The function of that name in a Python file. Raises whatever the file raises, AttributeError without it."""
    spec = importlib.util.spec_from_file_location("user_reward_file", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def private_stdout() -> TextIO:
    """The real standard output under another number; what the user's code prints goes to standard error."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return replies


def reply(replies: TextIO, request: object, outcome: str) -> None:
    """Write one reply."""
    replies.write(json.dumps({"id": request, "outcome": outcome}) + "\n")


def main(path: str, name: str) -> None:
    """Answer requests until standard input ends."""
    replies = private_stdout()
    try:
        function = load(path, name)
    except Exception as error:  # whatever a stranger's file raises is told, not lost
        reply(replies, "ready", f"{type(error).__name__}: {error}")
        return
    reply(replies, "ready", "")
    for line in sys.stdin:
        request = json.loads(line)
        try:
            value = float(function(request["prompt"], request["response"], request["label"]))
            reply(replies, request["id"], repr(value))
        except Exception as error:
            reply(replies, request["id"], f"raised {type(error).__name__}: {error}")


if __name__ == "__main__":
    main(*sys.argv[1:])
