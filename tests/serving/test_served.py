"""src/serving/served.py and --backend openai: what a server is asked, and what is made of any answer."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from threading import Lock

import pytest

import solver_evaluate
from src.data.encoding import encode_prompt
from src.errors import UserError
from src.inference.sampling import Sampling
from src.serving import server_client
from src.serving.server_client import RemoteRequest, Server
from src.text.tokenizer import Tokenizer
from tests.conftest import Folders
from tests.serving.fake_server import Answering, completion, engine, free_port, says

REPORT = Path(__file__).parents[2] / "../shared/data/reports/SV1_server"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_client, "FIRST_PAUSE", 0.001)


def evaluate(folder: Path, server: Answering, **flags: object) -> list[dict[str, object]]:
    """solver_evaluate.py's main on four problems; the rows of samples.jsonl."""
    labels = folder / "labels.jsonl"
    labels.write_text(
        "".join(json.dumps({"instruction": f"{n}+{4 - n}=", "label": "4"}) + "\n" for n in range(4))
    )
    flags = {"max_new_tokens": 8, "max_batch_size": 2} | flags
    solver_evaluate.main(
        solver_evaluate.SolverEvaluateConfig(
            task="GSM8K",
            label_file=str(labels),
            log_dir=str(folder / "log"),
            backend="openai",
            base_url=server.base_url,
            model_name="m",
            **flags,
        )
    )
    return [json.loads(line) for line in (folder / "log/samples.jsonl").read_text().splitlines()]


ODD = {
    "abort": completion(finish="abort"), "null": completion(finish=None),
    "surrogate": completion(text="\ud83d #### 4"), "error": {"error": {"message": "\ud83d"}},
    "html": b"<html>\xff</html>", "deep": b"[" * 50_000,
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_reply_is_a_failed_sample_and_asked_again_a_few_times(name: str, tmp_path: Path) -> None:
    odd, good = says(ODD[name])("", {}), says(completion())("", {})
    with Answering(lambda path, body: odd if "1+3" in body["prompt"] else good) as server:
        rows = evaluate(tmp_path, server)
        assert sum("1+3" in body["prompt"] for body in server.bodies) == server_client.BAD_REPLY_ATTEMPTS
    assert [row["id"] for row in rows] == ["0", "2", "3"] and {row["outcome"] for row in rows} == {"right"}
    (failure,) = map(json.loads, (tmp_path / "log/failures.jsonl").read_text().splitlines())
    assert failure["id"] == "1" and "(3 tries)" in failure["error"]
    results = json.loads((tmp_path / "log/results.json").read_text())
    assert results["accuracy"] == 0.75 and results["never_sampled"] == 1
    with Answering(says(completion())) as server:
        assert len(evaluate(tmp_path, server)) == 4 and len(server.bodies) == 1


def test_nothing_but_odd_replies_is_one_error(tmp_path: Path) -> None:
    with (
        Answering(says(completion(finish="abort"))) as server,
        pytest.raises(UserError, match="'abort', which is no"),
    ):
        evaluate(tmp_path, server)


def test_a_reply_that_makes_sense_in_the_end_is_taken(tmp_path: Path) -> None:
    replies, lock = iter([completion(finish="abort"), [], completion()] * 4), Lock()

    def answer(path: str, body: dict[str, object]) -> tuple[int, bytes]:
        with lock:
            return says(next(replies))(path, body)

    with Answering(answer) as server:
        rows = evaluate(tmp_path, server, max_batch_size=1)
    assert {(row["response"], row["finish"]) for row in rows} == {(" #### 4", "stop")} and len(rows) == 4


@pytest.mark.parametrize("finish", ["stop", "length"])
def test_log_probs_are_asked_for_and_stored(
    finish: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logprobs = {"tokens": [" ####", " 4"], "token_logprobs": [-1.25, -0.5]}
    with Answering(says(completion(finish=finish, logprobs=logprobs))) as server:
        rows = evaluate(tmp_path, server)
    assert {(row["logprob"], row["token_count"], row["finish"]) for row in rows} == {(-1.8, 5, finish)}
    assert {body["logprobs"] for body in server.bodies} == {1} and "log-probs" not in caplog.text


@pytest.mark.parametrize(
    ("declined", "n_more"), [((), 0), (("top_k",), 1), (("logprobs",), 2), (("top_k", "logprobs"), 3)])
@pytest.mark.parametrize("at_once", [1, 8])
def test_a_server_is_asked_for_what_it_takes(
    declined: tuple[str, ...], n_more: int, at_once: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The distribution of the flags, whatever defaults it has, and log-probs."""

    def answer(path: str, body: dict[str, object]) -> tuple[int, bytes]:
        if declined and not body.keys().isdisjoint(declined):
            time.sleep(random.random() / 50)  # another request may have got through meanwhile
            return 400, b"not supported"
        tokens = {"tokens": [" ####", " 4"], "token_logprobs": [-1.25, -0.5]}
        return says(completion(logprobs=tokens if "logprobs" in body else None))(path, body)

    with Answering(answer) as server:
        rows = evaluate(tmp_path, server, max_batch_size=at_once, num_samples=2)
    assert {row["logprob"] for row in rows} == {None if "logprobs" in declined else -1.8} and not any(
        row.get("error") for row in rows)
    if at_once == 1:
        assert len(server.bodies) == 8 + n_more
    last = server.bodies[-1]
    if "top_k" not in declined:
        assert (last["top_k"], last["min_p"], last["repetition_penalty"]) == (-1, 0, 1)
    assert caplog.text.count("the server gives no log-probs") == ("logprobs" in declined)


@pytest.mark.parametrize(
    ("text", "finish", "expected"),
    [(" #### 4 Question: 5", "length", " #### 4 "), (" #### 4\nQuestion:", "stop", " #### 4\n"),
     ("Question:", "length", "")],
)
def test_a_stop_string_ends_a_sample_whatever_the_server_does(
    text: str, finish: str, expected: str, tmp_path: Path
) -> None:
    tokens = [f"{word} " for word in text.split(" ")]
    logprobs = {"tokens": tokens, "token_logprobs": [-1.0] * len(tokens)}
    with Answering(says(completion(text, finish, logprobs=logprobs))) as server:
        rows = evaluate(tmp_path, server, few_shot="gsm8k8")
        assert server.bodies[0]["stop"] == ["Question:"]
    cut = text.partition("Question:")[0] + "Question:"
    assert {(row["response"], row["finish"]) for row in rows} == {(expected, "stop")}
    assert {row["logprob"] for row in rows} == {-float(len(cut.split(" ")))}


def test_an_echo_is_cut_off_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Answering(lambda path, body: says(completion(body["prompt"] + " #### 4"))(path, body)) as server:
        rows = evaluate(tmp_path, server, few_shot="gsm8k8")
    assert {row["response"] for row in rows} == {" #### 4"}
    assert caplog.text.count("the server repeats the prompt") == 1


def test_a_chat_may_begin_with_its_problem(tmp_path: Path) -> None:
    reply = {"choices": [{"message": {"content": "0+4= 4"}, "finish_reason": "stop"}]}
    with Answering(says(reply)) as server:
        rows = evaluate(tmp_path, server, chat_template="server")
    assert {row["response"] for row in rows} == {"0+4= 4"}


def test_a_chat_server_gets_messages_with_the_demonstrations(tmp_path: Path) -> None:
    reply = {"choices": [{"message": {"content": "#### 4", "reasoning": "2+2"}, "finish_reason": "stop",
                          "logprobs": {"content": [{"token": "4", "logprob": -0.25}]}}]}
    with Answering(says(reply)) as server:
        rows = evaluate(tmp_path, server, chat_template="server", few_shot="gsm8k8")
    (message,) = server.bodies[0]["messages"]
    assert set(server.paths) == {"/v1/chat/completions"} and server.bodies[0]["logprobs"] is True
    assert (
        message["role"] == "user"
        and message["content"].count("Question:") == 9
        and "prompt" not in server.bodies[0]
    )
    assert {row["response"] for row in rows} == {"<think>\n2+2\n</think>\n\n#### 4"}
    assert {(row["logprob"], row["outcome"]) for row in rows} == {(-0.2, "right")}
    with pytest.raises(UserError, match="chat_template=server, but this run has None"):
        evaluate(tmp_path, server)


def test_a_system_prompt_is_a_message_before_the_problem(folders: Folders, tmp_path: Path) -> None:
    reply = {"choices": [{"message": {"content": "#### 4"}, "finish_reason": "stop"}]}
    with Answering(says(reply)) as server:
        evaluate(tmp_path, server, chat_template="server", system_prompt="Add.")
        system, user = server.bodies[0]["messages"]
        assert system == {"role": "system", "content": "Add."} and user["role"] == "user"
        with pytest.raises(UserError, match="system_prompt=Add., but this run has None"):
            evaluate(tmp_path, server, chat_template="server", system_prompt="none")
    template = {"chat_template": "llama-2", "tokenizer_file": folders.one, "max_new_tokens": 2}
    (tmp_path / "ours").mkdir()
    with Answering(engine(folders.one)) as server:
        evaluate(tmp_path / "ours", server, system_prompt="Add.", **template)
    tokenizer = Tokenizer(Path(folders.one), "llama-2", system_prompt="Add.")
    sent = [body["prompt"] for body in server.bodies]
    assert sorted(sent) == sorted(encode_prompt(tokenizer, f"{n}+{4 - n}=") for n in range(4))


@pytest.mark.parametrize("template", ["none", "llama-2", "mistral"])
def test_a_template_of_ours_reaches_the_server_in_token_ids(
    template: str, folders: Folders, tmp_path: Path
) -> None:
    flags = {
        "chat_template": template,
        "tokenizer_file": folders.one,
        "max_new_tokens": 12,
        "max_batch_size": 2,
    }
    with Answering(engine(folders.one)) as server:
        rows = evaluate(tmp_path, server, **flags)
    tokenizer = Tokenizer(Path(folders.one), template)
    sent = [body["prompt"] for body in server.bodies]
    assert sorted(sent) == sorted(encode_prompt(tokenizer, f"{n}+{4 - n}=") for n in range(4))
    solver_evaluate.main(
        solver_evaluate.SolverEvaluateConfig(
            task="GSM8K",
            label_file=str(tmp_path / "labels.jsonl"),
            log_dir=str(tmp_path / "own"),
            ckpt_dir=folders.one,
            **flags,
        )
    )
    own = [json.loads(line) for line in (tmp_path / "own/samples.jsonl").read_text().splitlines()]
    assert rows == own and {row["logprob"] for row in rows} != {None}


def test_a_server_without_token_ids_says_so(folders: Folders, tmp_path: Path) -> None:
    with Answering(lambda path, body: (400, b"prompt must be a string")) as server:
        with pytest.raises(
            UserError, match="prompt must be a string.*; a prompt of token ids is not for every server"
        ):
            evaluate(tmp_path, server, chat_template="llama-2", tokenizer_file=folders.one)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chat_template": "qwen"}, "--chat_template qwen with --backend openai needs --tokenizer_file"),
        ({"chat_template": "file"}, "--chat_template file with --backend openai needs --tokenizer_file"),
        ({"chat_template": "code"}, "--chat_template code runs a solution's code"),
        ({"tokenizer_file": "t"}, "in the form of a --chat_template and in token ids; .*found nothing"),
        ({"tokenizer_file": "t", "chat_template": "server"}, "in token ids; .*found server"),
        ({"tokenizer_file": "t", "chat_template": "none"}, "t does not exist"),
        ({"template_args": "x=1"}, "goes with a template that is filled in here; give --tokenizer_file"),
        ({"template_args": "x=1", "chat_template": "server"}, "goes with a template that is filled in here"),
        ({"system_prompt": "Go."}, "--system_prompt with --backend openai is a message of a chat template"),
        ({"tokenizer_file": "t", "chat_template": "none", "system_prompt": "Go."}, "is a message of a chat template"),
        *(({name: value}, f"--{name} would have no effect at a server") for name, value in
          {"top_k": 5, "min_p": 0.1, "quantize": "int8", "compile": True, "model_type": "llama", "isolation": "none",
           "max_rounds": 3}.items()),
        ({"top_k": 5, "min_p": 0.1}, "--top_k, --min_p would have no effect"),
        ({"backend": "engine", "ckpt_dir": "c"}, "--base_url says which server to ask; give --backend openai"),
        ({"backend": "engine", "ckpt_dir": "c", "base_url": ""}, "--model_name says which server"),
        ({"backend": "engine", "ckpt_dir": "c", "base_url": "", "model_name": "", "chat_template": "server"},
         "--chat_template server leaves the form to a server"),
        ({"backend": "engine", "samples_file": "s", "base_url": "", "model_name": "", "chat_template": "qwen"},
         "--chat_template has no effect on samples that exist"),
        ({"backend": "engine", "samples_file": "s", "base_url": "", "model_name": "", "system_prompt": "Go."},
         "--system_prompt has no effect on samples that exist"),
        ({"api_key_env": "BAD_KEY"}, "characters that no key has"),
    ],
)
def test_flags_without_effect_are_refused(
    changes: dict[str, object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BAD_KEY", "sk-1\nX-Evil: 1")
    (tmp_path / "labels.json").write_text('[{"instruction": "1+1=", "label": "2"}]')
    asked = {"task": "toy", "label_file": str(tmp_path / "labels.json"), "log_dir": str(tmp_path / "log"),
             "backend": "openai", "base_url": "http://127.0.0.1:1/v1", "model_name": "m"}
    with pytest.raises(UserError, match=message):
        solver_evaluate.main(solver_evaluate.SolverEvaluateConfig(**asked | changes))
    assert not (tmp_path / "log").exists()


def asked(server: Answering, seconds: float = 5.0) -> str:
    """Why one request fails."""
    address = Server(base_url=server.base_url, model_name="m", seconds=seconds)
    (found,) = server_client.complete(address, [RemoteRequest("0", 0, "1+1=")], Sampling(), concurrency=1)
    return found.error


def test_a_reply_without_end_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_client, "LARGEST_REPLY", 10_000)
    monkeypatch.setattr(server_client, "ATTEMPTS", 2)
    with Answering(lambda path, body: (200, iter(lambda: b" " * 4096, None))) as server:
        assert asked(server).startswith("the reply has more than 10000 bytes: '    ")

    def drip() -> bytes:
        time.sleep(0.05)
        return b" "

    with Answering(lambda path, body: (200, iter(drip, None))) as server:
        started = time.monotonic()
        assert (
            asked(server, 0.3).startswith("the reply has no end within 0.3 s")
            and time.monotonic() - started < 3
        )


@pytest.mark.parametrize(
    ("status", "tries", "error"),
    [(429, 6, "status 429 (6 tries)"), (500, 6, "status 500"), (520, 6, "status 520"), (400, 4, "status 400: 'no'"),
     (413, 1, "status 413: 'no'"), (422, 4, "status 422"), (204, 1, "status 204"), (302, 1, "status 302")],
)
def test_statuses(status: int, tries: int, error: str) -> None:
    with Answering(lambda path, body: (status, b"no")) as server:
        assert asked(server).startswith(error) and len(server.bodies) == tries


def test_a_refusal_in_the_middle_is_no_wrong_address() -> None:
    def answer(path: str, body: dict[str, object]) -> tuple[int, bytes]:
        return (404, b"") if len(server.bodies) in (2, 3) else says(completion())(path, body)

    with Answering(answer) as server:
        address = Server(base_url=server.base_url, model_name="m")
        requests = [RemoteRequest(str(n), 0, "1+1=") for n in range(3)]
        found = list(server_client.complete(address, requests, Sampling(), concurrency=1))
    assert [answer.error for answer in found] == [""] * 3 and len(server.bodies) == 5


def test_a_server_that_dies_leaves_what_came_and_a_count(tmp_path: Path) -> None:
    def answer(path: str, body: dict[str, object]) -> tuple[int, bytes]:
        if len(server.bodies) == 3:
            server.httpd.socket.close()  # nobody listens any more
        return says(completion())(path, body)

    with Answering(answer) as server:
        rows = evaluate(tmp_path, server, max_batch_size=1)
    failures = [json.loads(line) for line in (tmp_path / "log/failures.jsonl").read_text().splitlines()]
    assert len(rows) + len(failures) == 4 and failures and all("ConnectError" in row["error"] for row in failures)


@pytest.mark.skipif(not REPORT.is_dir(), reason="the reports are not there")
@pytest.mark.parametrize(
    ("mode", "n_right"),
    [("good", 2), ("nousage", 2), ("nul", 2), ("echo", 2),
     *((mode, 0) for mode in ("abort", "sgl", "null", "missingfinish", "content_filter", "textnull", "textlist",
                              "usagestr", "surrogate", "redirect", "err200", "ctx", "html", "id404"))],
)
def test_sv1(mode: str, n_right: int, tmp_path: Path) -> None:
    port = free_port()
    process = subprocess.Popen([sys.executable, str(REPORT / "fake.py"), str(port), mode])
    try:
        while True:
            try:
                solver_evaluate.main(
                    solver_evaluate.SolverEvaluateConfig(
                        task="GSM8K",
                        label_file=str(REPORT / "two.jsonl"),
                        log_dir=str(tmp_path / "l"),
                        backend="openai",
                        model_name="m",
                        base_url=f"http://127.0.0.1:{port}/v1",
                        max_new_tokens=16,
                    )
                )
                break
            except UserError as error:
                if "does not answer" not in str(error):
                    assert n_right == 0 and (
                        "none of 2 samples came" in str(error) or "answers 404" in str(error)
                    )
                    return
    finally:
        process.kill()
        process.wait()
    rows = [json.loads(line) for line in (tmp_path / "l/samples.jsonl").read_text().splitlines()]
    assert [row["outcome"] for row in rows] == ["right"] * n_right
