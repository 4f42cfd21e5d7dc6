"""Completions from a server that speaks the OpenAI protocol (vLLM, SGLang, TGI, transformers serve, ...).

Requests go out by a bounded number of threads. What may pass - too many requests, a server's own failure, a hang-up, no
answer in time - is tried again after a growing pause, and a few times so is a reply without a completion; what will not
pass is reported with its request. The door to httpx2.
"""

import hashlib
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from threading import Event
from types import TracebackType
from typing import NamedTuple

import httpx2

from src.errors import UserError
from src.inference.reply import SHOWN, Odd, Reply, read_reply, shown
from src.inference.sampling import Sampling

PASSING = frozenset((408, 409, 425, 429))  # HTTP statuses below 500 that a later try may not meet
REFUSED = frozenset((401, 403, 404, 405))  # these no request of this run will get past
DECLINED = frozenset((400, 422, 501))  # so a server answers what it has no means for
ATTEMPTS = 6
ODD_ATTEMPTS = 3  # a server whose reply made no sense seldom does better
FIRST_PAUSE = 0.5  # seconds; doubles with each try
LONGEST_PAUSE = 60.0
LARGEST_REPLY = 2**25  # bytes; 100,000 tokens with their log-probs take fewer


class RemoteRequest(NamedTuple):
    """A prompt to continue, as text or token ids; (id, sample) names the result and seeds its randomness."""

    id: str
    sample: int
    prompt: str | list[int]


class RemoteCompletion(NamedTuple):
    """A server's answer, or why there is none."""

    request: RemoteRequest
    reply: Reply | None
    error: str = ""


@dataclass(kw_only=True)
class Server:
    """Where completions come from; base_url ends before /completions, seconds limit one request.

    chat: a prompt is the message of a user, which the server puts in its own template (/chat/completions). stop_ids:
    tokens that end a completion, beside those that the server knows. logprobs: they are asked for; becomes False where
    the server declines such requests.
    """

    base_url: str
    model_name: str
    api_key: str = ""
    seconds: float = 600.0
    chat: bool = False
    stop_ids: tuple[int, ...] = ()
    logprobs: bool = True


class Passing(Exception):
    """A failure that a later try may not meet; pause is what the server asks for, in seconds, 0 = nothing."""

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.pause = pause


class Failed(Exception):
    """A failure of this request alone, with its HTTP status."""

    def __init__(self, reason: str, status: int) -> None:
        super().__init__(reason)
        self.status = status


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
        self.url = server.base_url.rstrip("/") + ("/chat/completions" if server.chat else "/completions")
        self.answered, self.completed, self.stopping = Event(), Event(), Event()
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
        # threads that failed together come back apart
        jitter = random.Random(f"{request.id}/{request.sample}")
        for attempt in range(ATTEMPTS):
            try:
                reply = self.ask(request)
                self.completed.set()
                return RemoteCompletion(request, reply)
            except Failed as failed:
                return RemoteCompletion(request, None, str(failed))
            except (Passing, Odd) as problem:
                reason = f"{problem} ({attempt + 1} tries)"
                asked, last = (problem.pause, ATTEMPTS) if isinstance(problem, Passing) else (0, ODD_ATTEMPTS)
            pause = max(asked, FIRST_PAUSE * 2**attempt * jitter.uniform(0.5, 1.0))
            if attempt + 1 >= last or self.stopping.wait(min(pause, LONGEST_PAUSE)):
                break
        if not self.answered.is_set():
            raise UserError(f"{self.url} does not answer: {reason}; is the server up, is --base_url right?")
        return RemoteCompletion(request, None, reason)

    def ask(self, request: RemoteRequest) -> Reply:
        """One try, again without log-probs where these may be why it failed. Raises Odd, and what post() does."""
        body, extra = request_body(self.server, request, self.sampling), {"logprobs": True if self.server.chat else 1}
        if not self.server.logprobs:
            return read_reply(self.post(body))
        try:
            return read_reply(self.post(body | extra))
        except Failed as failed:
            if failed.status not in DECLINED or self.completed.is_set():
                raise
        reply = read_reply(self.post(body))
        self.server.logprobs = False
        return reply

    def post(self, body: Mapping[str, object]) -> bytes:
        """Send a request once. -> what stands in the reply. Raises Odd, Passing, Failed or UserError."""
        try:
            with self.client.stream("POST", self.url, json=body) as response:
                self.answered.set()
                data = self.receive(response)
        except (httpx2.UnsupportedProtocol, httpx2.InvalidURL) as problem:
            raise UserError(f"--base_url {self.server.base_url} is no address ({problem})") from None
        except (httpx2.TransportError, httpx2.DecodingError) as problem:  # a hang-up, no answer in time
            raise Passing(f"{type(problem).__name__}: {problem}") from None
        status = response.status_code
        if status in REFUSED and not self.completed.is_set():
            raise UserError(
                f"{self.url} answers {status} ({shown(data)}); "
                f"check --base_url, --model_name and --api_key_env"
            )
        if status in PASSING or status in REFUSED or status >= 500 and status not in DECLINED:
            raise Passing(f"status {status}", _asked_pause(response))
        if status != 200:
            place = response.headers.get("Location")
            ids = "; a prompt of token ids is not for every server" if isinstance(body.get("prompt"), list) else ""
            raise Failed(f"status {status}: {f'moved to {place}' if place else shown(data)}{ids}", status)
        return data

    def receive(self, response: httpx2.Response) -> bytes:
        """The body of a reply, which may have no end. Raises Odd or Passing."""
        data, until = bytearray(), time.monotonic() + self.server.seconds
        for chunk in response.iter_bytes():
            data += chunk
            if len(data) > LARGEST_REPLY:
                raise Odd(f"the reply has more than {LARGEST_REPLY} bytes: {shown(bytes(data[:SHOWN]))}")
            if time.monotonic() > until:
                raise Passing(f"the reply has no end within {self.server.seconds:g} s")
        return bytes(data)


def request_body(server: Server, request: RemoteRequest, sampling: Sampling) -> dict[str, object]:
    """The json of one request. Its seed is made of (seed, id, sample): how far that repeats is the server's affair."""
    digest = hashlib.sha256(f"{sampling.seed}\0{request.id}\0{request.sample}".encode()).digest()
    messages = [{"role": "user", "content": request.prompt}]
    return {
        "model": server.model_name,
        **({"messages": messages} if server.chat else {"prompt": request.prompt}),
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,  # always said: a server may have a default of the model's
        "seed": int.from_bytes(digest[:4], "little") >> 1,
        **({"stop": list(sampling.stop)} if sampling.stop else {}),
        **({"stop_token_ids": list(server.stop_ids)} if server.stop_ids else {}),
    }


def _asked_pause(response: httpx2.Response) -> float:
    """Seconds that Retry-After asks for; 0 where it is absent or a date."""
    try:
        return max(0.0, float(response.headers.get("Retry-After", "0")))
    except ValueError:
        return 0.0
