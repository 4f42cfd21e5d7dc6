"""src/serving/server_client.py and --backend openai against a real server, with the faults of a bad day."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import solver_evaluate
from src.errors import UserError
from src.inference.sampling import Sampling
from src.serving import server_client
from src.serving.server_client import RemoteRequest, Server
from tests.serving.fake_server import FaultyProxy, free_port, start_server, write_model

GREEDY = Sampling(temperature=0.0, max_new_tokens=8)
TAKES = ("logprobs",)  # what transformers' server does not decline
REQUESTS = [RemoteRequest(str(n), 0, f"{n}+{n}=") for n in range(6)]


class Upstream(NamedTuple):
    port: int
    model_name: str


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Upstream]:
    folder, port = tmp_path_factory.mktemp("served"), free_port()
    write_model(folder)
    process = start_server(folder, port)
    yield Upstream(port, str(folder))
    process.kill()
    process.wait()


def answers(upstream: Upstream, base_url: str, seconds: float = 30.0, concurrency: int = 3) -> dict[str, str]:
    """id -> text of REQUESTS; none may fail."""
    server = Server(base_url=base_url, model_name=upstream.model_name, seconds=seconds, asks=TAKES)
    found = list(server_client.complete(server, REQUESTS, GREEDY, concurrency=concurrency))
    assert [answer.error for answer in found] == [""] * len(found)
    assert all((answer.reply.finish == "length") == (answer.reply.token_count == 8) for answer in found)
    return {answer.request.id: answer.reply.text for answer in found}


@pytest.fixture(scope="module")
def expected(upstream: Upstream) -> dict[str, str]:
    return answers(upstream, f"http://127.0.0.1:{upstream.port}/v1")


@pytest.mark.parametrize(
    "faults", [["429", "429"], ["500"], ["502", "503"], ["hang-up"], ["torn"], ["slow"]], ids=" ".join
)
def test_faults_that_pass_change_nothing(
    upstream: Upstream, expected: dict[str, str], faults: list[str]
) -> None:
    proxy = FaultyProxy(upstream.port, faults)
    found = answers(upstream, proxy.base_url, seconds=2.0 if faults == ["slow"] else 30.0)
    proxy.stop()
    assert found == expected and len(set(found.values())) > 1
    assert set(proxy.seen.values()) == {len(faults) + 1}  # each was tried until it got through, and no more
    assert proxy.most_under_way <= 3 or faults == ["slow"]  # what the client gave up is still under way there


def test_what_the_server_takes_is_found_by_the_first_request(upstream: Upstream) -> None:
    server = Server(base_url=f"http://127.0.0.1:{upstream.port}/v1", model_name=upstream.model_name)
    (found,) = server_client.complete(server, REQUESTS[:1], GREEDY, concurrency=1)
    assert not found.error and server.asks == TAKES


def test_what_the_server_asks_for_is_waited(upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_client, "FIRST_PAUSE", 0.0)
    proxy = FaultyProxy(upstream.port, ["429", "429"])
    started = time.monotonic()
    answers(upstream, proxy.base_url, concurrency=6)
    proxy.stop()
    assert time.monotonic() - started >= 0.4  # twice Retry-After: 0.2


def test_a_bad_request_fails_alone_and_at_once(upstream: Upstream, expected: dict[str, str]) -> None:
    proxy = FaultyProxy(upstream.port, [], always={"2+2": 400})
    server = Server(base_url=proxy.base_url, model_name=upstream.model_name)
    found = {answer.request.id: answer for answer in server_client.complete(server, REQUESTS, GREEDY, concurrency=2)}
    proxy.stop()
    assert found["2"].error.startswith("status 400: 'not now'") and found["2"].reply is None
    assert {name: answer.reply.text for name, answer in found.items() if name != "2"} == {
        name: text for name, text in expected.items() if name != "2"
    }


def test_a_wrong_address_or_key_stops_the_run(upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_client, "FIRST_PAUSE", 0.01)
    proxy = FaultyProxy(upstream.port, [], always={"": 401})
    for base_url, message in (
        (f"http://127.0.0.1:{free_port()}/v1", "does not answer: ConnectError"),
        ("localhost:8000", "is no address"),
        (f"http://127.0.0.1:{upstream.port}/v2", "answers 404"),
        (proxy.base_url, "answers 401 .*--api_key_env"),
    ):
        with pytest.raises(UserError, match=message):
            list(server_client.complete(Server(base_url=base_url, model_name="m"), REQUESTS, GREEDY, concurrency=2))
    proxy.stop()


def test_a_request_says_all_that_the_sample_depends_on() -> None:
    sampling = Sampling(temperature=0.7, top_p=0.9, max_new_tokens=5, stop=("Q:",), seed=3)
    server = Server(base_url="http://here/v1", model_name="m")
    first, again, other = (
        server_client.request_body(server, RemoteRequest("a", number, "1+1="), sampling) for number in (0, 0, 1)
    )
    assert first == again and first["seed"] != other["seed"] and 0 <= first["seed"] < 2**31
    assert first | {"seed": 0} == {
        "model": "m",
        "prompt": "1+1=",
        "max_tokens": 5,
        "temperature": 0.7,
        "top_p": 0.9,
        "stop": ["Q:"],
        "seed": 0,
    }


def evaluate(upstream: Upstream, proxy: FaultyProxy, folder: Path) -> tuple[str, dict[str, object]]:
    """solver_evaluate.py's main at the proxy; samples.jsonl and results.json."""
    problems = [{"instruction": f"{n}+{n}=", "label": str(n + n)} for n in range(5)]
    (folder / "labels.json").write_text(json.dumps(problems))
    solver_evaluate.main(
        solver_evaluate.SolverEvaluateConfig(
            task="toy",
            label_file=str(folder / "labels.json"),
            log_dir=str(folder / "log"),
            backend="openai",
            base_url=proxy.base_url,
            model_name=upstream.model_name,
            max_new_tokens=8,
            num_samples=2,
            max_batch_size=4,
        )
    )
    log = folder / "log"
    return (log / "samples.jsonl").read_text(), json.loads((log / "results.json").read_text())


def n_taken(proxy: FaultyProxy) -> int:
    """The requests that ask for no more than transformers' server takes."""
    return sum(n for body, n in proxy.seen.items() if b"top_k" not in body)


def test_an_evaluation_goes_on_where_requests_failed(
    upstream: Upstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("whole", "part"):
        (tmp_path / name).mkdir()
    good = FaultyProxy(upstream.port, [])
    whole, results = evaluate(upstream, good, tmp_path / "whole")
    assert results["samples"] == 10 and results["never_sampled"] == 0
    assert n_taken(good) == 10
    assert "the server gives no log-probs" in caplog.text and len(caplog.records) == 1  # and is told once

    bad = FaultyProxy(upstream.port, ["hang-up"], always={"3+3": 503})
    monkeypatch.setattr(server_client, "FIRST_PAUSE", 0.01)
    part, results = evaluate(upstream, bad, tmp_path / "part")
    assert results["samples"] == 8 and results["never_sampled"] == 2 and results["missing"] >= 2
    assert results["problems"] == 5
    failures = [json.loads(line) for line in (tmp_path / "part/log/failures.jsonl").read_text().splitlines()]
    assert sorted((row["id"], row["sample"]) for row in failures) == [("3", 0), ("3", 1)]
    assert all("status 503 (6 tries)" in row["error"] for row in failures)
    bad.stop()

    again = FaultyProxy(upstream.port, [])
    assert evaluate(upstream, again, tmp_path / "part")[0] == whole != part
    assert n_taken(again) == 2  # what was there is not asked for again
    assert not (tmp_path / "part/log/failures.jsonl").exists()
    again.stop()
    good.stop()


def test_a_server_that_fails_everything_is_one_error(
    upstream: Upstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_client, "FIRST_PAUSE", 0.001)
    proxy = FaultyProxy(upstream.port, [], always={"": 500})
    with pytest.raises(UserError, match="none of 10 samples came; the first failed with: status 500"):
        evaluate(upstream, proxy, tmp_path)
    proxy.stop()


def test_flags_of_a_server_are_checked_before_it_is_asked(tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text('[{"instruction": "1+1=", "label": "2"}]')
    asked = {
        "task": "toy",
        "label_file": str(tmp_path / "labels.json"),
        "log_dir": str(tmp_path / "log"),
        "backend": "openai",
        "base_url": "http://127.0.0.1:1/v1",
        "model_name": "m",
    }
    for changes, message in (
        ({"model_name": ""}, "needs --base_url and --model_name"),
        ({"api_key_env": "NO_SUCH_KEY"}, "there is no such environment variable"),
        ({"top_k": 5}, "not in the OpenAI protocol"),
        ({"ckpt_dir": "somewhere"}, "give one of --ckpt_dir"),
    ):
        with pytest.raises(UserError, match=message):
            solver_evaluate.main(solver_evaluate.SolverEvaluateConfig(**asked | changes))
    solver_evaluate.main(
        solver_evaluate.SolverEvaluateConfig(**asked, dry_run=True)
    )  # plans without a server
    assert not (tmp_path / "log").exists()
