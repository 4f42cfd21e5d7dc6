"""The one error type for mistakes a user can make and mend, and what a failing rank leaves for torchrun to show."""

import contextlib
import json
import os
import time


class UserError(Exception):
    """Something outside this code is wrong: a flag, a file, a shape.

    The message says what was found, what was expected and what to do, and names file, row and key where there are any.
    cli.run prints it as one line, without a traceback.
    """


def leave_for_torchrun(message: str) -> None:
    """Have torchrun's final report show why this rank failed, by the file that torch's `record` would write."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        details = {"py_callstack": message, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": message, "extraInfo": details}}, file)
