"""A solver behind HTTP: OpenAI's completions and chats with what vLLM adds (token ids, adapters that are loaded).

A request's key that is not understood is refused with status 400, never ignored.
"""

import contextlib
import itertools
import json
import secrets
import select
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import Empty
from threading import Lock, Thread
from typing import NamedTuple, NoReturn

from src import jsonfile
from src.errors import UserError
from src.evaluation.interactive import Stream
from src.inference.engine import Completion, Request, ready_to_decode, vocabulary_of
from src.inference.sampling import Sampling
from src.models.decoder import Decoder
from src.serving.jobs import Job, ServingEngine
from src.text.tokenizer import Tokenizer

LARGEST_REQUEST = 2**25  # bytes
MOST_COMPLETIONS = 1024  # of one request
LOOK_SECONDS = 1.0  # between two looks whether the caller is still there
NUMBER = (int, float)
# Key of a request -> the types it may have; null is as if it were absent
READ: dict[str, tuple[type, ...]] = {
    "model": (str,), "prompt": (str, list), "messages": (list,), "max_tokens": (int,), "max_completion_tokens": (int,),
    "temperature": NUMBER, "top_p": NUMBER, "top_k": (int,), "min_p": NUMBER, "n": (int,), "seed": (int,),
    "stop": (str, list), "stop_token_ids": (list,), "logprobs": (bool, int), "return_token_ids": (bool,),
    "stream": (bool,), "stream_options": (dict,), "user": (str,),
}
# Further keys -> the one value under which they ask for what is done anyway
NEUTRAL: dict[str, object] = {
    "echo": False, "best_of": 1, "suffix": "", "frequency_penalty": 0, "presence_penalty": 0, "repetition_penalty": 1,
    "logit_bias": {}, "ignore_eos": False, "skip_special_tokens": True, "top_logprobs": 0, "tools": [],
    "response_format": {"type": "text"}, "add_generation_prompt": True,
}


class Refused(Exception):
    """A request that is not answered, with its HTTP status."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Asked(NamedTuple):
    """A request as it was read: prompts in token ids, n completions to each."""

    chat: bool
    model: str
    prompts: list[list[int]]
    n: int
    job: Job
    logprobs: bool
    token_ids: bool
    stream: bool
    usage: bool  # a stream ends with it


class SolverServer:
    """Answers requests with a solver, and with the adapters on it that are loaded meanwhile."""

    def __init__(
        self, name: str, model: Decoder, tokenizer: Tokenizer, engine: ServingEngine,
        load_adapter: Callable[[str], Decoder],
    ) -> None:
        """name: the solver's, by which requests ask for it. load_adapter: the solver with the adapter of a directory
        merged; raises UserError."""
        self.name, self.tokenizer, self.engine, self._load = name, tokenizer, engine, load_adapter
        self.models: dict[str, Decoder] = {}
        self._kept: dict[str, contextlib.ExitStack] = {}
        self._lock = Lock()  # tokenizers and their templates serve one thread at a time
        self._numbers = itertools.count()
        self._put(name, model)

    def _put(self, name: str, model: Decoder) -> None:
        stack = contextlib.ExitStack()
        stack.enter_context(ready_to_decode(model, self.engine.n_slots))
        self.models[name], self._kept[name] = model, stack

    def serve(self, host: str, port: int, started: Callable[[str], None]) -> NoReturn:
        """Answer for ever. started: is told the address. Raises OSError for one that cannot be listened at."""

        class Listener(ThreadingHTTPServer):
            """Many callers may come at once."""

            request_queue_size, daemon_threads = 512, True

        http = Listener((host, port), type("Handler", (_Handler,), {"solver": self}))
        Thread(target=http.serve_forever, daemon=True).start()
        started(f"http://{host}:{http.server_port}/v1")
        self.engine.run()

    def load_adapter(self, body: Mapping[str, object]) -> str:
        """POST /v1/load_lora_adapter: serve an adapter under a name of its own."""
        name, path = (_text(body, key) for key in ("lora_name", "lora_path"))
        _only(body, ("lora_name", "lora_path"))
        with self._lock:
            if name in self.models:
                raise Refused(400, f"a model {name!r} is being served; unload it first, or choose another name")
            try:
                self._put(name, self._load(path))
            except OSError as problem:  # not of the caller's connection
                raise Refused(400, f"{path}: {problem.strerror}") from None
        return f"Success: LoRA adapter '{name}' added successfully."

    def unload_adapter(self, body: Mapping[str, object]) -> str:
        """POST /v1/unload_lora_adapter: take no more requests for it."""
        name = _text(body, "lora_name")
        _only(body, ("lora_name", "lora_int_id"))
        with self._lock:
            if name == self.name or name not in self.models:
                raise Refused(404, f"no adapter {name!r} is being served")
            del self.models[name]
            self._kept.pop(name).close()
        return f"Success: LoRA adapter '{name}' removed successfully."

    def read(self, body: Mapping[str, object], *, chat: bool) -> Asked:
        """A request to /v1/completions or /v1/chat/completions. Raises Refused, or UserError for a wrong number."""
        values = {key: value for key, value in body.items() if value is not None}
        for key, value in values.items():
            _check(key, value, chat)
        name = values.get("model", self.name)
        model = self.models.get(name)
        if model is None:
            raise Refused(404, f"no model {name!r} here; GET /v1/models lists those that are")
        prompts, context = self._prompts(values, chat), model.config.max_seq_len
        for prompt in prompts:
            if not 0 < len(prompt) < context:
                raise Refused(400, f"the prompt has {len(prompt)} tokens, expected 1 to {context - 1}: the model's "
                                   f"context is {context}")
        n, stream, options = values.get("n", 1), values.get("stream", False), values.get("stream_options", {})
        if not 1 <= n * len(prompts) <= MOST_COMPLETIONS:
            raise Refused(400, f"n={n} for {len(prompts)} prompts, expected 1 to {MOST_COMPLETIONS} completions in all")
        limit = values.get("max_completion_tokens", values.get("max_tokens", context if chat else 16))
        if limit < 1:
            raise Refused(400, f"max_tokens={limit}, expected 1 or more")
        logprobs, token_ids = values.get("logprobs", False) is not False, values.get("return_token_ids", False)
        if stream and (logprobs or token_ids):
            raise Refused(400, "logprobs and return_token_ids come with whole replies alone; leave stream out")
        _only(options, ("include_usage",))
        stop = values.get("stop", [])
        sampling = Sampling(
            temperature=values.get("temperature", 1.0), top_p=values.get("top_p", 1.0),
            top_k=max(0, values.get("top_k", 0)), min_p=values.get("min_p", 0.0), max_new_tokens=context,
            stop=(stop,) if isinstance(stop, str) else tuple(stop), seed=0)
        seed = str(values["seed"]) if "seed" in values else secrets.token_hex(16)
        requests = [Request(f"{seed}/{place}", number, prompt, min(limit, context))
                    for place, prompt in enumerate(prompts) for number in range(n)]
        vocabulary = vocabulary_of(self.tokenizer)
        ends = {*vocabulary.eos_ids, *self._ids(values.get("stop_token_ids", []), "stop_token_ids")}
        job = Job(model, requests, sampling, vocabulary._replace(eos_ids=tuple(sorted(ends))), streams=stream)
        return Asked(chat, name, prompts, n, job, logprobs, token_ids, stream, options.get("include_usage", False))

    def _prompts(self, values: Mapping[str, object], chat: bool) -> list[list[int]]:
        """The prompts of a request as token ids. A text is put after BOS; messages go into the template. A text that
        spells a control token, which other servers would read in it, is refused: here it would be ordinary pieces."""
        wanted = "messages" if chat else "prompt"
        if wanted not in values:
            raise Refused(400, f"{wanted!r} is missing")
        with self._lock:
            if chat:
                if self.tokenizer.chat is None:
                    raise Refused(400, "the checkpoint has no chat template; start the server with --chat_template")
                return [self.tokenizer.encode_rendered(self.tokenizer.chat.prompt(_messages(values["messages"])))]
            given = values["prompt"]
            several = given if isinstance(given, list) and given and isinstance(given[0], str | list) else [given]
            for token in self.tokenizer.control:
                if any(isinstance(prompt, str) and token in prompt for prompt in several):
                    raise Refused(400, f"the prompt spells {token!r}, which no text says here; send token ids, or "
                                       "messages to /v1/chat/completions")
            bos = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
            return [bos + self.tokenizer.encode(prompt) if isinstance(prompt, str) else self._ids(prompt, "prompt")
                    for prompt in several]

    def _ids(self, ids: object, key: str) -> list[int]:
        """A list of token ids that the vocabulary has."""
        if not isinstance(ids, list) or not all(type(each) is int and 0 <= each < self.tokenizer.vocab_size
                                                for each in ids):
            raise Refused(400, f"{key!r} holds something else than token ids below {self.tokenizer.vocab_size}")
        return ids

    def head(self, asked: Asked) -> dict[str, object]:
        """What every reply and every chunk of a stream begins with."""
        kind = "text_completion" if not asked.chat else "chat.completion.chunk" if asked.stream else "chat.completion"
        return {"id": f"cmpl-{next(self._numbers)}", "object": kind, "created": int(time.time()), "model": asked.model}

    def reply(self, asked: Asked, found: Sequence[Completion]) -> dict[str, object]:
        """A whole reply."""
        choices = [self._choice(asked, place, done) for place, done in enumerate(found)]
        ids = {"prompt_token_ids": asked.prompts[0]} if asked.chat and asked.token_ids else {}
        return self.head(asked) | {"choices": choices, "usage": usage(asked, found)} | ids

    def _choice(self, asked: Asked, place: int, done: Completion) -> dict[str, object]:
        logprobs = None
        if asked.logprobs:
            sampling = asked.job.sampling  # at temperature 1 the two differ by the rows of ids that are not in use
            as_sampled = sampling.temperature == 1 and not sampling.truncates
            values = done.sampled_logprobs if as_sampled else done.logprobs
            tokens = self.tokenizer.pieces(done.tokens, show_control=True)
            rows = [{"token": token, "logprob": logprob, "bytes": list(token.encode()), "top_logprobs": []}
                    for token, logprob in zip(tokens, values, strict=True)]
            logprobs = {"content": rows} if asked.chat else {
                "tokens": tokens, "token_logprobs": values, "top_logprobs": None, "text_offset": []}
        text = {"message": {"role": "assistant", "content": done.text}} if asked.chat else {"text": done.text}
        ids = {"token_ids": done.tokens} if asked.token_ids else {}
        if ids and not asked.chat:
            ids["prompt_token_ids"] = asked.prompts[place // asked.n]
        return {"index": place, **text, "logprobs": logprobs, "finish_reason": done.finish, "stop_reason": None, **ids}


class _Handler(BaseHTTPRequestHandler):
    """One connection of a caller, in a thread of its own."""

    protocol_version = "HTTP/1.1"
    timeout = 600.0  # seconds that a connection may idle
    solver: SolverServer

    def handle(self) -> None:
        """All requests of the connection, which may break off between two of them."""
        with contextlib.suppress(ConnectionError):
            super().handle()

    def do_GET(self) -> None:
        """The models, or that the server is well."""
        facts = {"object": "model", "created": 0, "owned_by": "splitrl", "root": self.solver.name}
        models = [{"id": name, **facts, "max_model_len": model.config.max_seq_len}
                  for name, model in list(self.solver.models.items())]
        pages = {"/health": {}, "/v1/models": {"object": "list", "data": models}}
        if self.path in pages:
            self._send(200, pages[self.path])
        else:
            self._send(404, _error(404, f"no page {self.path}; there are {', '.join(pages)}"))

    def do_POST(self) -> None:
        """Completions, and the adapters that they may ask for."""
        paths: dict[str, Callable[[dict[str, object]], object]] = {
            "/v1/completions": lambda body: self._complete(self.solver.read(body, chat=False)),
            "/v1/chat/completions": lambda body: self._complete(self.solver.read(body, chat=True)),
            "/v1/load_lora_adapter": self.solver.load_adapter, "/v1/unload_lora_adapter": self.solver.unload_adapter}
        try:
            length = self.headers.get("Content-Length", "")
            if not length.isdecimal() or len(length) > 9 or int(length) > LARGEST_REQUEST:
                self.close_connection = True  # what follows is not read
                raise Refused(413, f"Content-Length is {length!r:.20}, expected at most {LARGEST_REQUEST}")
            body = jsonfile.parse(self.rfile.read(int(length)), "the request")
            if self.path not in paths:
                raise Refused(404, f"no page {self.path}; there are {', '.join(paths)}")
            found = paths[self.path](body)
            if found is not None:
                self._send(200, found)
        except Refused as refused:
            self._send(refused.status, _error(refused.status, str(refused)))
        except UserError as problem:
            self._send(400, _error(400, str(problem)))
        except OSError:  # the caller has gone
            self.close_connection = True

    def _complete(self, asked: Asked) -> dict[str, object] | None:
        """A whole reply; None where it was streamed."""
        self.solver.engine.submit(asked.job)
        if asked.stream:
            self._stream(asked)
            return None
        found = {place: what for place, what in self._events(asked.job) if isinstance(what, Completion)}
        return self.solver.reply(asked, [found[place] for place in sorted(found)])

    def _events(self, job: Job) -> Iterator[tuple[int, int | Completion]]:
        """What becomes of a job until all of it has ended. Raises OSError, and cancels it, once the caller has gone,
        and Refused where it could not be decoded."""
        left, caller = len(job.requests), select.poll()
        caller.register(self.connection, select.POLLIN)
        try:
            while left:
                try:
                    place, what = job.events.get(timeout=LOOK_SECONDS)
                except Empty:
                    # not select(), which takes no file number above 1023
                    if caller.poll(0) and not self.connection.recv(1, socket.MSG_PEEK):
                        raise ConnectionAbortedError from None
                    continue
                if isinstance(what, Exception):
                    raise Refused(500, f"{type(what).__name__}: {what}")
                left -= isinstance(what, Completion)
                yield place, what
        finally:
            job.cancelled = left > 0

    def _stream(self, asked: Asked) -> None:
        """Server-sent events: text as it is certain, how each completion ends, [DONE]."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")  # its end is the end of the stream
        self.end_headers()
        head, said, found = self.solver.head(asked), [], []
        streams = [Stream(self.solver.tokenizer.decode, asked.job.sampling.stop, said.append)
                   for _ in asked.job.requests]

        def chunk(place: int, finish: str | None) -> None:
            """Send what was said since the last one."""
            text = "".join(said)
            said.clear()
            if text or finish:
                part = {"delta": {"role": "assistant", "content": text}} if asked.chat else {"text": text}
                choice = {"index": place, **part, "logprobs": None, "finish_reason": finish}
                self._event(head | {"choices": [choice]})

        try:
            for place, what in self._events(asked.job):
                if isinstance(what, Completion):
                    found.append(what)
                    streams[place].finish(what.text)
                    chunk(place, what.finish)
                else:
                    if what not in asked.job.vocabulary.eos_ids:
                        streams[place].add(what)
                    chunk(place, None)
        except Refused as refused:  # the status has been sent
            self._event(_error(refused.status, str(refused)))
            return
        if asked.usage:
            self._event(head | {"choices": [], "usage": usage(asked, found)})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, values: Mapping[str, object]) -> None:
        self.wfile.write(f"data: {json.dumps(values)}\n\n".encode())

    def _send(self, status: int, values: object) -> None:
        data = values.encode() if isinstance(values, str) else json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if isinstance(values, str) else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *words: object) -> None:
        """Say nothing of each request."""


def _error(status: int, message: str) -> dict[str, object]:
    kind = {404: "NotFoundError", 500: "InternalServerError"}.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


def usage(asked: Asked, found: Sequence[Completion]) -> dict[str, int]:
    """The tokens of a request and of what it got."""
    read, written = sum(map(len, asked.prompts)), sum(len(done.tokens) for done in found)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def _check(key: str, value: object, chat: bool) -> None:
    """Raise Refused unless a key of a request is understood."""
    if key in NEUTRAL:
        if value != NEUTRAL[key]:
            raise Refused(400, f"{key}={value!r:.100} is not implemented; expected {NEUTRAL[key]!r} or nothing")
    elif key not in READ or key == ("prompt" if chat else "messages"):
        raise Refused(400, f"unknown key {key!r}; expected {', '.join([*READ, *NEUTRAL])}")
    elif not isinstance(value, READ[key]) or isinstance(value, bool) and bool not in READ[key] or value != value:
        raise Refused(400, f"{key} is {value!r:.100}; expected {' or '.join(kind.__name__ for kind in READ[key])}")
    elif key == "stop" and isinstance(value, list) and not all(isinstance(text, str) for text in value):
        raise Refused(400, f"stop is {value!r:.100}; expected texts")
    elif key == "logprobs" and value not in (False, True):
        raise Refused(400, f"logprobs={value} is not implemented; expected 1, those of the tokens that were sampled")


def _messages(messages: list[object]) -> list[dict[str, str]]:
    """Messages with their content as one text, which may come in parts. Raises Refused."""
    found = []
    for message in messages:
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            raise Refused(400, f"a message is {message!r:.100}; expected a role and content alone")
        parts = message["content"]
        if isinstance(parts, list) and all(isinstance(part, dict) and part.keys() == {"type", "text"} and
                                           part["type"] == "text" and isinstance(part["text"], str) for part in parts):
            message = message | {"content": "".join(part["text"] for part in parts)}
        found.append(message)
    return found


def _text(body: Mapping[str, object], key: str) -> str:
    if not isinstance(body.get(key), str) or not body[key]:
        raise Refused(400, f"{key} is {body.get(key)!r:.100}; expected a text")
    return body[key]


def _only(values: Mapping[str, object], known: Sequence[str]) -> None:
    """Raise Refused for a key that is not known, unless it is null or false."""
    for key, value in values.items():
        if key not in known and value:
            raise Refused(400, f"unknown key {key!r}; expected {', '.join(known)}")
