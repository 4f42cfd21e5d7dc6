"""Completions from a server that speaks the OpenAI completions protocol (vLLM, SGLang, TGI, transformers serve, ...).

Requests go out by a bounded number of threads. What may pass - too many requests, a server's own failure, a hang-up, no
answer in time - is tried again after a growing pause; what will not is reported with its request. The door to httpx2.
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from threading import Event
from types import TracebackType
from typing import NamedTuple

import httpx2

from src.errors import UserError
from src.inference.sampling import Sampling

PASSING = frozenset(
    (408, 409, 425, 429, 500, 502, 503, 504, 529)
)  # HTTP statuses that a later try may not meet
REFUSED = frozenset((401, 403, 404, 405))  # these no request of this run will get past
ATTEMPTS = 6
FIRST_PAUSE = 0.5  # seconds; doubles with each try
LONGEST_PAUSE = 60.0


class RemoteRequest(NamedTuple):
    """A prompt to continue; (id, sample) names the result and seeds its randomness."""

    id: str
    sample: int
    prompt: str


class RemoteCompletion(NamedTuple):
    """A server's answer; token_count is None where the server does not count. With an error there is no text."""

    request: RemoteRequest
    text: str
    token_count: int | None
    finish: str  # stop | length
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Server:
    """Where completions come from; base_url ends before /completions, seconds limit one request."""

    base_url: str
    model_name: str
    api_key: str = ""
    seconds: float = 600.0


class Passing(Exception):
    """A failure that a later try may not meet; pause is what the server asks for, in seconds, 0 = nothing."""

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.pause = pause


class Failed(Exception):
    """A failure of this request alone."""


def complete(
    server: Server, requests: Sequence[RemoteRequest], sampling: Sampling, *, concurrency: int
) -> Iterator[RemoteCompletion]:
    """Yield completions as they come, at most `concurrency` requests being under way.

    Raises UserError when the server never answers, or refuses every request (wrong address, key or model).
    """
    waiting, running = iter(requests), set()
    with _Session(server, sampling, concurrency) as session, ThreadPoolExecutor(concurrency) as threads:
        try:
            while True:
                for request in islice(waiting, concurrency - len(running)):
                    running.add(threads.submit(session.complete, request))
                if not running:
                    return
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in finished)
        finally:
            session.stopping.set()  # wakes the threads that pause, or leaving would wait for them


class _Session:
    """The connections to a server, shared by threads."""

    def __init__(self, server: Server, sampling: Sampling, concurrency: int) -> None:
        self.server, self.sampling = server, sampling
        self.url = server.base_url.rstrip("/") + "/completions"
        self.answered, self.stopping = Event(), Event()
        self.client = httpx2.Client(
            headers={"Authorization": f"Bearer {server.api_key}"} if server.api_key else {},
            timeout=server.seconds,
            limits=httpx2.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
        )

    def __enter__(self) -> "_Session":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.client.close()

    def complete(self, request: RemoteRequest) -> RemoteCompletion:
        """One request, tried until it succeeds or is beyond hope."""
        body = request_body(self.server.model_name, request, self.sampling)
        # threads that failed together come back apart
        jitter = random.Random(f"{request.id}/{request.sample}")
        reason = ""
        for attempt in range(ATTEMPTS):
            try:
                return _read(request, self.post(body))
            except Failed as failed:
                return RemoteCompletion(request, "", None, "error", str(failed))
            except Passing as passing:
                reason = f"{passing} ({attempt + 1} tries)"
                pause = max(passing.pause, FIRST_PAUSE * 2**attempt * jitter.uniform(0.5, 1.0))
            if attempt + 1 == ATTEMPTS or self.stopping.wait(min(pause, LONGEST_PAUSE)):
                break
        if not self.answered.is_set():
            raise UserError(f"{self.url} does not answer: {reason}; is the server up, is --base_url right?")
        return RemoteCompletion(request, "", None, "error", reason)

    def post(self, body: dict[str, object]) -> httpx2.Response:
        """Send a request once. Raises Passing, Failed or UserError."""
        try:
            response = self.client.post(self.url, json=body)
        except (httpx2.UnsupportedProtocol, httpx2.InvalidURL) as problem:
            raise UserError(f"--base_url {self.server.base_url} is no address ({problem})") from None
        except (httpx2.TransportError, httpx2.DecodingError) as problem:  # a hang-up, no answer in time
            raise Passing(f"{type(problem).__name__}: {problem}") from None
        self.answered.set()
        if response.status_code in REFUSED:
            raise UserError(
                f"{self.url} answers {response.status_code} ({response.text[:200]!r}); "
                f"check --base_url, --model_name and --api_key_env"
            )
        if response.status_code in PASSING:
            raise Passing(f"status {response.status_code}", _asked_pause(response))
        if response.status_code != 200:
            raise Failed(f"status {response.status_code}: {response.text[:200]}")
        return response


def request_body(model_name: str, request: RemoteRequest, sampling: Sampling) -> dict[str, object]:
    """The json of one request. Its seed is made of (seed, id, sample): how far that repeats is the server's affair."""
    digest = hashlib.sha256(f"{sampling.seed}\0{request.id}\0{request.sample}".encode()).digest()
    body: dict[str, object] = {
        "model": model_name,
        "prompt": request.prompt,
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "seed": int.from_bytes(digest[:4], "little") >> 1,
    }
    if sampling.top_p < 1:
        body["top_p"] = sampling.top_p
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    return body


def _asked_pause(response: httpx2.Response) -> float:
    """Seconds that Retry-After asks for; 0 where it is absent or a date."""
    try:
        return max(0.0, float(response.headers.get("Retry-After", "0")))
    except ValueError:
        return 0.0


def _read(request: RemoteRequest, response: httpx2.Response) -> RemoteCompletion:
    """The completion that a response holds. Raises Passing for a body that is cut off, Failed for a foreign one."""
    try:
        values = response.json()
    except ValueError:
        raise Passing("a body that is not json") from None
    try:
        choice = values["choices"][0]
        text, finish = choice["text"], choice["finish_reason"]
        token_count = (values.get("usage") or {}).get("completion_tokens")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise Failed(f"no completion in {response.text[:200]}") from None
    return RemoteCompletion(request, text, token_count, "length" if finish == "length" else "stop")
