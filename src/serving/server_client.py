"""Completions from a server that speaks the OpenAI protocol (vLLM, SGLang, TGI, transformers serve, ...).

Requests go out by a bounded number of threads. What may pass - too many requests, a server's own failure, a hang-up, no
answer in time - is tried again after a growing pause, and a few times so is a reply without a completion; what will not
pass is reported with its request. The door to httpx2.
"""

import hashlib
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import accumulate, islice
from threading import Event
from typing import NamedTuple

import httpx2

from src import jsonfile
from src.errors import UserError
from src.inference.sampling import Sampling

TRANSIENT = frozenset((408, 409, 425, 429))  # HTTP statuses below 500 that a later try may not meet
REFUSED = frozenset((401, 403, 404, 405))  # these no request of this run will get past
DECLINED = frozenset((400, 422, 501))  # so a server answers what it has no means for
# What is asked for where a server takes it, the most first
EXTRAS = (("logprobs", "plain"), ("logprobs",), ("plain",), ())
# Where nothing is said, vLLM and SGLang sample by the model's generation_config.json, llama.cpp from the 40 likeliest
# tokens: another distribution than the flags name
PLAIN = {"top_k": -1, "min_p": 0, "repetition_penalty": 1}
ATTEMPTS = 6
BAD_REPLY_ATTEMPTS = 3  # a server whose reply made no sense seldom does better
FIRST_PAUSE = 0.5  # seconds; doubles with each try
LONGEST_PAUSE = 60.0
ENDS = ("stop", "length")  # all other finish reasons (abort, content_filter, tool_calls, null, ...) are no ends
MOST_TOKENS = 2**31
LEAST_LOGPROB = -1e6
SHOWN = 200  # characters of a reply in a message
LARGEST_REPLY = 2**25  # bytes; 100,000 tokens with their log-probs take fewer


class RemoteRequest(NamedTuple):
    """A prompt to continue, as text or token ids; (id, sample) names the result and seeds its randomness."""

    id: str
    sample: int
    prompt: str | list[int]


class Token(NamedTuple):
    """A sampled token, as the server spells it, and its log-prob in nats."""

    text: str
    logprob: float


class Reply(NamedTuple):
    """One completion. token_count is None and tokens are empty where the server does not say."""

    text: str
    token_count: int | None
    finish: str  # one of ENDS
    tokens: tuple[Token, ...] = ()
    ids: tuple[int, ...] = ()  # of all tokens, where they were asked for

    @property
    def logprob(self) -> float | None:
        """Of all tokens, in nats, None where they are not said."""
        return sum(token.logprob for token in self.tokens) if self.tokens else None

    def first(self, n_characters: int) -> "Reply":
        """The completion up to a place in its text, with the tokens that this took, where they are known."""
        text, spelled = self.text[:n_characters], "".join(token.text for token in self.tokens)
        if n_characters >= len(self.text):
            return self
        if not spelled.startswith(text):
            return Reply(text, None, self.finish)
        ends = accumulate(len(token.text) for token in self.tokens)
        n_tokens = sum(end < n_characters for end in ends) + 1
        return Reply(text, n_tokens, self.finish, self.tokens[:n_tokens])


class RemoteCompletion(NamedTuple):
    """A server's answer, or why there is none."""

    request: RemoteRequest
    reply: Reply | None
    error: str = ""


@dataclass(kw_only=True)
class Server:
    """Where completions come from; base_url ends before /completions, seconds limit one request.

    chat: a prompt is the message of a user, which the server puts in its own template (/chat/completions), after the
    system_prompt, if there is one. stop_ids: tokens that end a completion, besides those that the server knows.
    asks: of EXTRAS what is asked for; becomes less where the server declines such requests. token_ids: they are asked
    for too, in vLLM's form, and none of it can be done without.
    """

    base_url: str
    model_name: str
    api_key: str = ""
    seconds: float = 600.0
    chat: bool = False
    system_prompt: str = ""
    stop_ids: tuple[int, ...] = ()
    asks: tuple[str, ...] = EXTRAS[0]
    token_ids: bool = False


def api_key(variable: str) -> str:
    """The key in the environment variable that --api_key_env names; empty for no name. Raises UserError."""
    key = os.environ.get(variable, "")
    if variable and variable not in os.environ:
        raise UserError(f"--api_key_env {variable}: there is no such environment variable; export the server's key")
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"--api_key_env {variable}: its value has characters that no key has, such as a new line")
    return key


class BadReply(Exception):
    """A reply that holds no completion: foreign data of any kind may come."""


class TransientFailure(Exception):
    """A failure that a later try may not meet; pause is what the server asks for, in seconds, 0 = nothing."""

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.pause = pause


class RequestFailed(Exception):
    """A failure of this request alone, with its HTTP status."""

    def __init__(self, reason: str, status: int) -> None:
        super().__init__(reason)
        self.status = status


def complete(
    server: Server, requests: Sequence[RemoteRequest], sampling: Sampling, *, concurrency: int
) -> Iterator[RemoteCompletion]:
    """Yield completions as they come, at most `concurrency` requests being under way. Raises UserError when the server
    never answers, or refuses every request (wrong address, key or model)."""
    waiting, running = iter(requests), set()
    client = httpx2.Client(
        headers={"Authorization": f"Bearer {server.api_key}"} if server.api_key else {},
        timeout=server.seconds,
        limits=httpx2.Limits(max_connections=concurrency, max_keepalive_connections=concurrency))
    with client, ThreadPoolExecutor(concurrency) as threads:
        session = _Session(server, sampling, client)
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

    def __init__(self, server: Server, sampling: Sampling, client: httpx2.Client) -> None:
        self.server, self.sampling, self.client = server, sampling, client
        self.url = server.base_url.rstrip("/") + ("/chat/completions" if server.chat else "/completions")
        self.answered, self.completed, self.stopping = Event(), Event(), Event()

    def complete(self, request: RemoteRequest) -> RemoteCompletion:
        """Try one request until it succeeds, or will not."""
        # threads that failed together come back apart
        jitter = random.Random(f"{request.id}/{request.sample}")
        for attempt in range(ATTEMPTS):
            try:
                reply = self.ask(request)
                self.completed.set()
                return RemoteCompletion(request, reply)
            except RequestFailed as failed:
                return RemoteCompletion(request, None, str(failed))
            except TransientFailure as problem:
                reason, asked, last = problem, problem.pause, ATTEMPTS
            except BadReply as problem:
                reason, asked, last = problem, 0.0, BAD_REPLY_ATTEMPTS
            reason = f"{reason} ({attempt + 1} tries)"
            pause = max(asked, FIRST_PAUSE * 2**attempt * jitter.uniform(0.5, 1.0))
            if attempt + 1 >= last or self.stopping.wait(min(pause, LONGEST_PAUSE)):
                break
        if not self.answered.is_set():
            raise UserError(f"{self.url} does not answer: {reason}; is the server up, is --base_url right?")
        return RemoteCompletion(request, None, reason)

    def ask(self, request: RemoteRequest) -> Reply:
        """Ask once, and again for less where what not every protocol has may be why. Raises what post() does, and
        BadReply."""
        body, server = request_body(self.server, request, self.sampling), self.server
        extras = {"logprobs": {"logprobs": True if server.chat else 1}, "plain": PLAIN}
        for asks in EXTRAS[EXTRAS.index(server.asks) :]:
            more = {key: value for name in asks for key, value in extras[name].items()}
            try:
                reply = read_reply(self.post(body | more))
            except RequestFailed as failed:
                takes = server.token_ids or asks == server.asks and self.completed.is_set()
                if failed.status not in DECLINED or takes or not asks:
                    raise
            else:
                server.asks = asks
                return reply

    def post(self, body: Mapping[str, object]) -> bytes:
        """Send a request once. -> the bytes of the reply. Raises BadReply, TransientFailure, RequestFailed or
        UserError."""
        try:
            with self.client.stream("POST", self.url, json=body) as response:
                self.answered.set()
                data = self.receive(response)
        except (httpx2.UnsupportedProtocol, httpx2.InvalidURL) as problem:
            raise UserError(f"--base_url {self.server.base_url} is no address ({problem})") from None
        except (httpx2.TransportError, httpx2.DecodingError) as problem:  # a hang-up, no answer in time
            raise TransientFailure(f"{type(problem).__name__}: {problem}") from None
        status = response.status_code
        if status in REFUSED and not self.completed.is_set():
            raise UserError(f"{self.url} answers {status} ({shown(data)}); check --base_url, --model_name and "
                            "--api_key_env")
        if status in TRANSIENT or status in REFUSED or status >= 500 and status not in DECLINED:
            raise TransientFailure(f"status {status}", _asked_pause(response))
        if status != 200:
            place = response.headers.get("Location")
            ids = "; a prompt of token ids is not for every server" if isinstance(body.get("prompt"), list) else ""
            raise RequestFailed(f"status {status}: {f'moved to {place}' if place else shown(data)}{ids}", status)
        return data

    def receive(self, response: httpx2.Response) -> bytes:
        """Read the body of a reply, which may have no end. Raises BadReply or TransientFailure."""
        data, until = bytearray(), time.monotonic() + self.server.seconds
        for chunk in response.iter_bytes():
            data += chunk
            if len(data) > LARGEST_REPLY:
                raise BadReply(f"the reply has more than {LARGEST_REPLY} bytes: {shown(bytes(data[:SHOWN]))}")
            if time.monotonic() > until:
                raise TransientFailure(f"the reply has no end within {self.server.seconds:g} s")
        return bytes(data)


def call(server: Server, page: str, body: Mapping[str, object] | None = None) -> bytes:
    """What a page of a server says, once, to GET or to a body that is posted. Raises UserError."""
    url = server.base_url.rstrip("/") + page
    headers = {"Authorization": f"Bearer {server.api_key}"} if server.api_key else {}
    try:
        response = httpx2.request("POST" if body else "GET", url, json=body, headers=headers, timeout=server.seconds)
    except (httpx2.HTTPError, httpx2.InvalidURL) as problem:
        raise UserError(f"{url} does not answer: {type(problem).__name__}: {problem}") from None
    if response.status_code != 200:
        raise UserError(f"{url} answers {response.status_code} ({shown(response.content)})")
    return response.content


def request_body(server: Server, request: RemoteRequest, sampling: Sampling) -> dict[str, object]:
    """Make a request. Its seed is made of (seed, id, sample): how far that repeats is the server's affair."""
    digest = hashlib.sha256(f"{sampling.seed}\0{request.id}\0{request.sample}".encode()).digest()
    system = [{"role": "system", "content": server.system_prompt}] if server.system_prompt else []
    messages = [*system, {"role": "user", "content": request.prompt}]
    return {
        "model": server.model_name,
        **({"messages": messages} if server.chat else {"prompt": request.prompt}),
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,  # always said: a server may have a default of the model's
        "seed": int.from_bytes(digest[:4], "little") >> 1,
        **({"stop": list(sampling.stop)} if sampling.stop else {}),
        **({"stop_token_ids": list(server.stop_ids)} if server.stop_ids else {}),
        **({"return_token_ids": True} if server.token_ids else {})}


def _asked_pause(response: httpx2.Response) -> float:
    """Seconds that Retry-After asks for; 0 where it is absent or a date."""
    try:
        return max(0.0, float(response.headers.get("Retry-After", "0")))
    except ValueError:
        return 0.0


def read_reply(data: bytes) -> Reply:
    """Find the completion in a reply to /completions or /chat/completions. Raises BadReply."""
    try:
        values = jsonfile.parse(data, "the reply")
    except UserError as problem:
        kind = "the reply is a stream, which was not asked for" if data.lstrip().startswith(b"data:") else problem
        raise BadReply(f"{kind}: {shown(data)}") from None
    if values.get("error"):
        raise BadReply(f"the reply is an error: {shown(data)}")
    choices = values.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise BadReply(f"the reply has not one choice: {shown(data)}")
    choice = choices[0]
    if choice.get("index") not in (0, None):
        raise BadReply(f"the one choice has index {choice['index']!r:.50}")
    finish = choice.get("finish_reason")
    if finish not in ENDS:
        raise BadReply(f"finish_reason is {finish!r:.{SHOWN}}, which is no end")
    ids = choice.get("token_ids")
    ids = tuple(ids) if isinstance(ids, list) and all(type(each) is int for each in ids) else ()
    return Reply(_text(choice), _token_count(values.get("usage")), finish, _tokens(choice.get("logprobs")), ids)


def shown(data: bytes) -> str:
    """The beginning of a reply for a message."""
    return repr(data[:SHOWN].decode(errors="replace"))


def _text(choice: Mapping[str, object]) -> str:
    """What was written; thoughts that a server sets apart stand before it in <think>. Raises BadReply."""
    if "message" not in choice:
        return _valid(choice.get("text"))
    message = choice["message"]
    if not isinstance(message, dict):
        raise BadReply(f"the message is {message!r:.{SHOWN}}")
    thoughts = message.get("reasoning_content") or message.get("reasoning")
    content = message.get("content")
    if not thoughts:
        return _valid(content)
    thinking = f"<think>\n{_valid(thoughts)}"  # cut off within its thoughts there is no content
    return thinking if content is None else f"{thinking}\n</think>\n\n{_valid(content)}"


def _valid(text: object) -> str:
    if not isinstance(text, str):
        raise BadReply(f"the text is {text!r:.{SHOWN}}")
    return text


def _token_count(usage: object) -> int | None:
    """The number of tokens in a completion, None where nothing is said. Raises BadReply."""
    if usage is None:
        return None
    count = usage.get("completion_tokens") if isinstance(usage, dict) else -1
    if count is not None and (type(count) is not int or not 0 <= count < MOST_TOKENS):
        raise BadReply(f"usage is {usage!r:.{SHOWN}}")
    return count


def _tokens(logprobs: object) -> tuple[Token, ...]:
    """The tokens with their log-probs, in either protocol's form; none where they are not given, or make no sense."""
    if not isinstance(logprobs, dict):
        return ()
    if isinstance(content := logprobs.get("content"), list):
        rows = [row if isinstance(row, dict) else {} for row in content]
        texts, values = [row.get("token") for row in rows], [row.get("logprob") for row in rows]
    else:
        values = logprobs.get("token_logprobs")
        if not isinstance(values, list):
            return ()
        texts = logprobs.get("tokens")
        if not isinstance(texts, list) or len(texts) != len(values):
            texts = [""] * len(values)
    if not all(type(value) in (int, float) and LEAST_LOGPROB < value < 1e-3 for value in values):
        return ()
    return tuple(Token(text if isinstance(text, str) else "", value) for text, value in zip(texts, values, strict=True))
