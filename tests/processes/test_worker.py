"""src/processes/worker.py with real processes of this module's own."""

import gc
import os
import resource
import signal
import time

import pytest

from src.errors import UserError
from src.processes.worker import Answer, Worker, serve


def start() -> Answer:
    """What the tests below ask for."""
    print("loading")

    def answer(request: dict[str, object]) -> dict[str, object]:
        print('{"id": 1, "said": "forged"}', flush=True)
        do = request["do"]
        if do == "hang":
            time.sleep(60)
        if do == "stray":  # past standard output, to where the replies go
            os.write(3, b'warning: 1\n[]\n{"id": 99, "said": "late"}\n')
        if isinstance(do, int):
            os.kill(os.getpid(), do)
        return {"said": do if do != "much" else "\u00e9\U0001f600\ud800" + "x" * 300_000}

    return answer


def test_a_worker_outlives_its_processes() -> None:
    worker = Worker("tests.processes.test_worker")
    assert worker.process is None
    assert worker.ask({"do": "a"}, 30.0) == {"id": 1, "said": "a"}
    first = worker.process
    assert worker.ask({"do": "stray"}, 30.0)["said"] == "stray" and worker.process is first
    assert worker.ask({"do": "much"}, 30.0)["said"] == "\u00e9\U0001f600?" + "x" * 300_000
    with pytest.raises(TimeoutError, match="no reply within 0.5 s"):
        worker.ask({"do": "hang"}, 0.5)
    assert first.poll() == -signal.SIGKILL and worker.process is not None
    with pytest.raises(TimeoutError, match="processor time"):
        worker.ask({"do": int(signal.SIGPROF)}, 30.0)
    with pytest.raises(ChildProcessError, match="status -15"):
        worker.ask({"do": int(signal.SIGTERM)}, 30.0)
    assert worker.ask({"do": "b"}, 30.0)["said"] == "b"
    last = worker.process
    last.kill()
    last.wait()
    assert worker.ask({"do": "c"}, 30.0)["said"] == "c"  # a death between two requests is nobody's
    last = worker.process
    del worker
    gc.collect()
    assert last.poll() == -signal.SIGKILL


def test_a_process_with_a_thousand_open_files_is_answered_too() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(2048, hard)), hard))
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(1024)]
    try:
        assert Worker("tests.processes.test_worker").ask({"do": "a"}, 30.0)["said"] == "a"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for number in opened:
            os.close(number)


@pytest.mark.parametrize("arguments, message", [(("x",), "expected no arguments"), (("die",), "status 3")])
def test_a_process_that_cannot_begin_says_why(arguments: tuple[str], message: str) -> None:
    worker = Worker("tests.processes.test_worker", arguments)
    with pytest.raises(UserError, match=f"did not start .*{message}.*python -m tests.processes.test_worker"):
        worker.ask({"do": "a"}, 30.0)
    assert worker.process is None
    worker.close()


def refuse() -> Answer:
    """A start that fails."""
    raise ValueError("expected no arguments")


if __name__ == "__main__":
    import sys

    if sys.argv[1:] == ["die"]:
        sys.exit(3)
    serve(refuse if sys.argv[1:] else start)
