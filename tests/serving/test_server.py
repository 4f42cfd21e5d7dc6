"""solver_evaluate.py --serve: a real process answers as a local run does, and refuses what it does not know."""

import contextlib
import http.client
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch import Tensor

import checkpoint_split
import solver_evaluate
from src import load
from src.checkpoint import saving
from src.errors import UserError
from src.models.lora import LoraConfig
from tests.conftest import TOY_BASE

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def serving(ckpt_dir: str, *flags: str) -> Iterator[str]:
    """A server process of its own; its address."""
    command = [sys.executable, "solver_evaluate.py", "--ckpt_dir", ckpt_dir, "--serve", "0", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        said = ""
        while "serving" not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        yield said.split()[-1]
    finally:
        process.kill()
        process.communicate()


def post(base_url: str, page: str, **body: object) -> tuple[int, str]:
    """The status of a reply and its text."""
    host, _, path = base_url.removeprefix("http://").partition("/")
    connection = http.client.HTTPConnection(host, timeout=100)
    connection.request("POST" if body else "GET", f"/{path}{page}", json.dumps(body) if body else None)
    response = connection.getresponse()
    return response.status, response.read().decode()


def answer(base_url: str, page: str = "/completions", **body: object) -> dict[str, object]:
    """A reply that must be a good one."""
    status, text = post(base_url, page, **body)
    assert status == 200, text
    return json.loads(text)


@pytest.fixture(scope="module")
def solver(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The toy's base: a real tokenizer."""
    folder = str(tmp_path_factory.mktemp("served") / "base")
    checkpoint_split.main(checkpoint_split.SplitConfig(ckpt_file=str(TOY_BASE), save_path=folder, n=1))
    return folder


@pytest.fixture(scope="module")
def base_url(solver: str) -> Iterator[str]:
    with serving(solver, "--max_batch_size", "3", "--chat_template", "llama-2") as address:
        yield address


def test_an_evaluation_at_it_gives_the_text_of_a_local_one(solver: str, base_url: str, tmp_path: Path) -> None:
    labels = tmp_path / "labels.jsonl"
    labels.write_text("".join(json.dumps({"instruction": f"{n} pens and {n * 7} more?", "label": "4"}) + "\n"
                              for n in range(7)))
    rows = []
    for name, flags in (("here", {"ckpt_dir": solver}),
                        ("there", {"backend": "openai", "base_url": base_url, "model_name": solver})):
        solver_evaluate.main(solver_evaluate.SolverEvaluateConfig(
            task="GSM8K", label_file=str(labels), log_dir=str(tmp_path / name), max_new_tokens=24, max_batch_size=5,
            **flags))
        rows.append([json.loads(line) for line in (tmp_path / name / "samples.jsonl").read_text().splitlines()])
    here, there = rows
    assert len(here) == 7 and any(row["response"] for row in here)
    for one, other in zip(here, there, strict=True):
        assert abs(one.pop("logprob") - other.pop("logprob")) < 0.11
        assert one == other


def test_ids_streams_chats_and_many_at_once_say_the_same(solver: str, base_url: str) -> None:
    models = answer(base_url, "/models")
    assert [model["id"] for model in models["data"]] == [solver]
    tokenizer = load.load_tokenizer(solver)
    asked = {"prompt": "Ana has 7 pens.", "max_tokens": 9, "n": 2, "seed": 5, "temperature": 1.5}
    found = answer(base_url, **asked, return_token_ids=True, logprobs=1)
    ids = [choice["token_ids"] for choice in found["choices"]]
    assert ids[0] != ids[1] and found["usage"]["completion_tokens"] == sum(map(len, ids))
    for choice in found["choices"]:
        assert choice["text"] == tokenizer.decode(choice["token_ids"])
        assert len(choice["logprobs"]["token_logprobs"]) == len(choice["token_ids"])
        assert choice["prompt_token_ids"] == [tokenizer.bos_id, *tokenizer.encode(asked["prompt"])]
    greedy = answer(base_url, **asked | {"temperature": 0, "n": 1}, logprobs=1)["choices"][0]
    assert " " in greedy["text"] and "".join(greedy["logprobs"]["tokens"]) == greedy["text"]
    # the same by token ids, whatever else decodes meanwhile, and as a stream
    by_ids = asked | {"prompt": found["choices"][0]["prompt_token_ids"]}
    with ThreadPoolExecutor(8) as threads:
        others = [threads.submit(answer, base_url, **by_ids | {"seed": seed}) for seed in range(5, 13)]
    texts = [choice["text"] for choice in found["choices"]]
    assert [choice["text"] for choice in others[0].result()["choices"]] == texts
    assert len({other.result()["choices"][0]["text"] for other in others}) > 1
    status, text = post(base_url, "/completions", **asked, stream=True, stream_options={"include_usage": True})
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    chunks = [json.loads(event) for event in events[:-1]]
    streamed = ["", ""]
    for choice in (chunk["choices"][0] for chunk in chunks[:-1]):
        streamed[choice["index"]] += choice["text"]
    assert (status, events[-1], streamed, len(chunks) > 4) == (200, "[DONE]", texts, True)
    assert chunks[-1]["usage"] == found["usage"]

    message = [{"role": "user", "content": "Ana?"}]
    chat = answer(base_url, "/chat/completions", messages=message, max_tokens=9, temperature=0, return_token_ids=True)
    shown = load.load_tokenizer(solver, solver_evaluate.SolverEvaluateConfig(chat_template="llama-2"))
    raw = answer(base_url, prompt=shown.encode_rendered(shown.chat.prompt(message)), max_tokens=9, temperature=0)
    assert chat["choices"][0]["message"]["content"] == raw["choices"][0]["text"]
    parts = [{"role": "user", "content": [{"type": "text", "text": text} for text in ("An", "a?")]}]
    assert answer(base_url, "/chat/completions", messages=parts, max_tokens=9, temperature=0)["usage"] == chat["usage"]
    parts[0]["content"][0]["type"] = "image"
    assert post(base_url, "/chat/completions", messages=parts)[0] == 400
    assert chat["usage"] == raw["usage"] and len(chat["choices"][0]["token_ids"]) == raw["usage"]["completion_tokens"]


REFUSED = {
    "best": ({"best_of": 2}, 400, "best_of=2 is not implemented"),
    "unknown": ({"grammar": "x"}, 400, "unknown key 'grammar'"),
    "kind": ({"max_tokens": "9"}, 400, "max_tokens is '9'; expected int"),
    "bool": ({"temperature": True}, 400, "temperature is True"),
    "nan": ({"temperature": float("nan")}, 400, "temperature is nan"),
    "negative": ({"temperature": -1}, 400, "expected 0 (greedy), or 1e-30 to 1e30"),
    "cold": ({"temperature": 1e-300}, 400, "expected 0 (greedy), or 1e-30 to 1e30"),
    "hot": ({"temperature": 10**400}, 400, "expected 0 (greedy), or 1e-30 to 1e30"),
    "no int64": ({"top_k": 10**30}, 400, "expected 0 (all tokens) or more"),
    "many": ({"n": 2000}, 400, "expected 1 to 1024 completions"),
    "ids": ({"prompt": [1, 10**6]}, 400, "something else than token ids"),
    "control": ({"prompt": ["1+1=", "[INST] 1+1= [/INST]</s>"]}, 400, "the prompt spells '</s>', which no text says"),
    "long": ({"prompt": [1] * 100_000}, 400, "the model's context is"),
    "top": ({"logprobs": 5}, 400, "logprobs=5 is not implemented"),
    "model": ({"model": "other"}, 404, "no model 'other'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_refused(name: str, base_url: str) -> None:
    body, status, reason = REFUSED[name]
    found = post(base_url, "/completions", **{"prompt": "1+1=", "max_tokens": 2} | body)
    error = json.loads(found[1])["error"]
    assert (found[0], error["code"]) == (status, status) and reason in error["message"]


def write_adapter(solver: str, folder: Path, names: str, change: Callable[[Tensor], Tensor]) -> None:
    """An adapter on a solver, the parameters of these names changed, as ours and as PEFT's."""
    model = load.load_solver(solver)
    lora = LoraConfig(rank=2, alpha=8.0, dropout=0.0, targets=("wq", "w2"))
    load.put_lora_on(model, lora, seed=1)
    for name, parameter in model.named_parameters():
        if names in name:
            change(parameter.data)
    saving.begin_save(model, str(folder / "ours"), solver, lora=lora).complete()
    checkpoint_split.main(checkpoint_split.SplitConfig(
        ckpt_file=str(folder / "ours"), save_path=str(folder / "peft"), format="peft"))


def test_it_outlives_a_request_that_cannot_be_decoded(solver: str, base_url: str, tmp_path: Path) -> None:
    write_adapter(solver, tmp_path, "lora_", lambda weights: weights.fill_(1e30))  # their product is infinite
    assert post(base_url, "/load_lora_adapter", lora_name="broken", lora_path=str(tmp_path / "peft"))[0] == 200
    asked = {"prompt": "Ana has 7 pens.", "max_tokens": 4}
    status, text = post(base_url, "/completions", **asked, model="broken")
    assert status == 500 and "NaN" in json.loads(text)["error"]["message"]
    status, text = post(base_url, "/completions", **asked, model="broken", stream=True)
    assert status == 200 and json.loads(text.removeprefix("data: "))["error"]["code"] == 500
    assert answer(base_url, **asked, temperature=10**20)["usage"]["completion_tokens"]  # more than an int64 holds
    assert post(base_url, "/unload_lora_adapter", lora_name="broken")[0] == 200


def test_flags_of_another_use_are_refused(solver: str) -> None:
    for flags, reason in (({"label_file": "rows.json"}, "--label_file has no effect on a server"),
                          ({"serve": "here"}, "needs a port"), ({"ckpt_dir": ""}, "--ckpt_dir")):
        with pytest.raises(UserError, match=reason):
            solver_evaluate.main(
                solver_evaluate.SolverEvaluateConfig(**{"serve": "0", "ckpt_dir": solver} | flags))


def test_a_caller_that_hangs_up_holds_no_slot(base_url: str) -> None:
    host = base_url.removeprefix("http://").partition("/")[0]
    for _ in range(8):  # more than there are slots
        connection = http.client.HTTPConnection(host)
        connection.request("POST", "/v1/completions", json.dumps({"prompt": "1", "max_tokens": 10**6, "n": 9}))
        connection.close()
    assert answer(base_url, prompt="1+1=", max_tokens=3, temperature=0)["choices"][0]["finish_reason"] in (
        "stop", "length")


def test_an_adapter_of_peft_answers_under_its_own_name(solver: str, base_url: str, tmp_path: Path) -> None:
    write_adapter(solver, tmp_path, "lora_b", lambda weights: weights.normal_(std=0.3))
    assert post(base_url, "/load_lora_adapter", lora_name="tuned", lora_path=str(tmp_path / "peft"))[0] == 200
    asked = {"prompt": "Ana has 7 pens.", "max_tokens": 12, "temperature": 0, "logprobs": 1}
    with serving(str(tmp_path / "ours")) as alone:
        expected = answer(alone, **asked)["choices"][0]
    found = answer(base_url, model="tuned", **asked)["choices"][0]
    assert found["text"] == expected["text"] != answer(base_url, **asked)["choices"][0]["text"]
    assert found["logprobs"]["token_logprobs"] == pytest.approx(expected["logprobs"]["token_logprobs"], abs=1e-4)
    for wrong in (str(tmp_path), "x" * 300):  # no adapter, and no name that a file can have
        assert post(base_url, "/load_lora_adapter", lora_name="t", lora_path=wrong)[0] == 400
    assert post(base_url, "/unload_lora_adapter", lora_name="tuned")[0] == 200
    assert post(base_url, "/completions", model="tuned", prompt="1")[0] == 404
