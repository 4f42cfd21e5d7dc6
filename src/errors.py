"""The one error type for mistakes a user can make and mend, and where a process says why it fails."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import TextIO


class UserError(Exception):
    """Something outside this code is wrong: a flag, a file, a shape.

    The message says what was found, what was expected and what to do, and names file, row and key where there are any.
    cli.run prints it as one line, without a traceback.
    """


def on_one_line(value: object) -> str:
    """A value as a message of one line shows it."""
    return str(value).replace("\n", "\\n")


@contextlib.contextmanager
def naming(where: str) -> Iterator[None]:
    """Let a UserError that is raised inside begin with the place of what it is about: a row of a file, say."""
    try:
        yield
    except UserError as problem:
        raise UserError(f"{where}: {problem}" if where else str(problem)) from None


def show_problem(line: str) -> None:
    """Write a line to standard error, where somebody reads it."""
    try:
        sys.stderr.write(line + "\n")
        sys.stderr.flush()
    except OSError:
        to_nowhere(sys.stderr)


def to_nowhere(stream: TextIO) -> None:
    """Lose what a stream holds and will be given: the interpreter would fail at its end to write it."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def leave_for_torchrun(message: str) -> None:
    """Have torchrun's final report show why this rank failed, by the file that torch's `record` would write."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        details = {"py_callstack": message, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": message, "extraInfo": details}}, file)
