"""A real completions server for tests, a proxy before it that makes the faults of a bad day, one that says anything.

The server is `transformers serve` with a tiny random Llama: of the servers that speak the protocol it is the one that
installs with what the tests need anyway and runs on a CPU.
"""

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from src import load, parallel
from src.inference.engine import Request, generate, vocabulary_of
from src.inference.sampling import Sampling


def write_model(folder: Path) -> None:
    """A random Llama with a character vocabulary, as transformers reads it."""
    characters = dict.fromkeys("0123456789+-=# \nabcdefghQuestion:Answer")
    ids = {text: index for index, text in enumerate(["<unk>", "<s>", "</s>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_server(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """Start `transformers serve` with a model directory and wait until it answers."""
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return process
        except OSError:
            time.sleep(0.2)
    process.kill()
    raise RuntimeError("transformers serve did not start; are fastapi, uvicorn and openai installed?")


Answer = Callable[[str, dict[str, object]], tuple[int, bytes | Iterable[bytes]]]


def completion(text: str = " #### 4", finish: object = "stop", **more: object) -> dict[str, object]:
    """A reply of /completions."""
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish, **more}], "usage": {"completion_tokens": 5}}


def says(values: object) -> Answer:
    """Always the same answer."""
    data = values if isinstance(values, bytes) else json.dumps(values).encode()
    return lambda path, body: (200, data)


def engine(ckpt_dir: str) -> Answer:
    """Answers with a model in this process; takes token ids."""
    parallel.start()
    model, tokenizer, lock = load.load_solver(ckpt_dir), load.load_tokenizer(ckpt_dir), Lock()

    def answer(path: str, body: dict[str, object]) -> tuple[int, bytes]:
        sampling = Sampling(temperature=body["temperature"], max_new_tokens=body["max_tokens"], seed=body["seed"])
        vocabulary = vocabulary_of(tokenizer)._replace(eos_ids=tuple(body["stop_token_ids"]))
        with lock:
            asked = [Request("0", 0, body["prompt"])]
            (found,) = generate(model, asked, sampling, max_batch_size=1, vocabulary=vocabulary)
        logprobs = {"token_logprobs": found.logprobs, "tokens": [tokenizer.decode([i]) for i in found.tokens]}
        reply = completion(found.text, found.finish, logprobs=logprobs)
        return says(reply | {"usage": {"completion_tokens": len(found.tokens)}})(path, body)

    return answer


class Answering:
    """A server on the loopback that gives each request to a function: (path, body) -> (status, data or its parts)."""

    def __init__(self, answer: Answer) -> None:
        self.bodies: list[dict[str, object]] = []
        self.paths: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.bodies.append(body)
                server.paths.append(self.path)
                status, data = answer(self.path, body)
                self.send_response(status)
                self.end_headers()
                with contextlib.suppress(OSError):  # a client may go before the end
                    for part in [data] if isinstance(data, bytes) else data:
                        self.wfile.write(part)

            def log_message(self, *words: object) -> None:
                """Keep quiet."""

        self.httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.httpd.daemon_threads = True
        self.base_url = f"http://127.0.0.1:{self.httpd.server_port}/v1"
        Thread(target=self.httpd.serve_forever, args=(0.05,), daemon=True).start()

    def __enter__(self) -> "Answering":
        return self

    def __exit__(self, *error: object) -> None:
        self.httpd.shutdown()
        self.httpd.server_close()


class FaultyProxy:
    """Forwards to a server; before a request gets through, it meets the faults in turn.

    Faults: a status ("429", "500"), "hang-up" (the connection closes), "slow" (no answer for 3 s), "torn" (half
    a body). `always` maps a piece of a prompt to a status that its requests get every time.
    """

    def __init__(self, upstream: int, faults: list[str], always: dict[str, int] | None = None) -> None:
        self.upstream, self.faults, self.always = upstream, faults, always or {}
        self.seen: Counter[bytes] = Counter()
        self.under_way = self.most_under_way = 0
        self.lock = Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                proxy.handle(self)

            def log_message(self, *words: object) -> None:
                """Keep quiet."""

        self.httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.httpd.daemon_threads = True
        self.base_url = f"http://127.0.0.1:{self.httpd.server_port}/v1"
        Thread(target=self.httpd.serve_forever, daemon=True).start()

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        """Answer one request."""
        body = handler.rfile.read(int(handler.headers["Content-Length"]))
        with self.lock:
            tries = self.seen[body]
            self.seen[body] += 1
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            refused = [status for piece, status in self.always.items() if piece in json.loads(body)["prompt"]]
            fault = str(refused[0]) if refused else self.faults[tries] if tries < len(self.faults) else ""
            self.answer(handler, body, fault)
        finally:
            with self.lock:
                self.under_way -= 1

    def answer(self, handler: BaseHTTPRequestHandler, body: bytes, fault: str) -> None:
        """Commit a fault, or pass the request on."""
        if fault == "hang-up":
            handler.close_connection = True
            handler.connection.shutdown(socket.SHUT_RDWR)
        elif fault.isdigit():
            self.reply(handler, int(fault), b"not now")
        else:
            if fault == "slow":
                time.sleep(3.0)
            connection = http.client.HTTPConnection("127.0.0.1", self.upstream, timeout=60)
            headers = {"Content-Type": "application/json"}
            connection.request("POST", handler.path, body, headers)
            response = connection.getresponse()
            data = response.read()
            self.reply(handler, response.status, data[: len(data) // 2] if fault == "torn" else data)

    def reply(self, handler: BaseHTTPRequestHandler, status: int, data: bytes) -> None:
        """Send a whole response; the client of a slow one may have gone."""
        try:
            handler.send_response(status)
            handler.send_header("Content-Length", str(len(data)))
            if status == 429:
                handler.send_header("Retry-After", "0.2")
            handler.end_headers()
            handler.wfile.write(data)
        except OSError:
            handler.close_connection = True

    def stop(self) -> None:
        """Stop listening."""
        self.httpd.shutdown()
        self.httpd.server_close()
