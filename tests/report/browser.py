"""A headless browser that opens a file and is asked for what its page shows, over the DevTools protocol."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from types import TracebackType

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """One page of a file. Use as a context manager; needs CHROMIUM."""

    def __init__(self, page: Path, profile: Path) -> None:
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        command = (f"exec {CHROMIUM} --headless --no-sandbox --disable-gpu --disable-dev-shm-usage "
                   f"--user-data-dir={profile} --remote-debugging-pipe 3<&{to_browser} 4>&{from_browser}")
        self._process = subprocess.Popen(["bash", "-c", command], pass_fds=(to_browser, from_browser),
                                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(to_browser)
        os.close(from_browser)
        self._read, self._asked, self._session = b"", 0, {}
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        self._ask("Page.enable")
        self._ask("Page.navigate", url=page.as_uri())
        while self._message().get("method") != "Page.loadEventFired":
            pass

    def __enter__(self) -> "Browser":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._out)
        os.close(self._in)

    def run(self, script: str) -> object:
        """The value of an expression of JavaScript in the page; what it throws fails the test."""
        found = self._ask("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def _ask(self, method: str, **values: object) -> dict[str, object]:
        self._asked += 1
        message = {"id": self._asked, "method": method, "params": values} | self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._message()).get("id") != self._asked:
            pass
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def _message(self) -> dict[str, object]:
        while b"\0" not in self._read:
            part = os.read(self._in, 1 << 16)
            assert part, "the browser has ended"
            self._read += part
        message, _, self._read = self._read.partition(b"\0")
        return json.loads(message)
