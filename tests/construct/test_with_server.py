"""data_build.py's commands that sample, at a server: attempts, process and branch."""

import json
import re
from collections import Counter
from pathlib import Path
from threading import Lock

import pytest

from src.construct.sample_until import count_kinds
from src.data.encoding import encode_prompt
from src.data.examples import Prompt, Sample
from src.errors import UserError
from src.serving import server_client
from src.text.tokenizer import Tokenizer
from tests.conftest import Folders
from tests.construct.test_steps import SOLUTION, log_dir, sample
from tests.serving.fake_server import Answering, completion, engine, says
from tests.tiny import build


def at(server: Answering, **flags: object) -> dict[str, object]:
    """The flags of a server."""
    return {"backend": "openai", "base_url": server.base_url, "model_name": "m", "max_batch_size": 4} | flags


def rows(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("template", ["none", "llama-2"])
def test_process_goes_on_at_a_server_as_it_does_here(template: str, folders: Folders, tmp_path: Path) -> None:
    source = log_dir(tmp_path / "log", [sample(str(n), 0, SOLUTION, "right") for n in range(2)])
    flags = {"rollouts": 1, "max_new_tokens": 12, "temperature": 0.0, "chat_template": template}
    build.process("toy", source, str(tmp_path / "own"), str(tmp_path / "own.json"), folders.one, **flags)
    with Answering(engine(folders.one)) as server:
        flags |= at(server, tokenizer_file=folders.one)
        build.process("toy", source, str(tmp_path / "a"), str(tmp_path / "a.json"), **flags)
    assert rows(tmp_path / "a") == rows(tmp_path / "own") and {row["logprob"] for row in rows(tmp_path / "a")} != {None}
    assert (tmp_path / "a.json").read_text() == (tmp_path / "own.json").read_text()
    tokenizer = Tokenizer(Path(folders.one), template)
    assert encode_prompt(tokenizer, "0+1=", "1+1 #### 2\n\n") in [body["prompt"] for body in server.bodies]


def test_process_goes_on_from_text(tmp_path: Path) -> None:
    source = log_dir(tmp_path / "log", [sample("0", 0, "1+1=2\n\n#### 2", "wrong")])
    with Answering(says(completion("3+1=4\n\n#### 4"))) as server:
        build.process("toy", source, str(tmp_path / "a"), str(tmp_path / "a.json"), rollouts=3, **at(server))
    assert [body["prompt"] for body in server.bodies] == ["0+1=1+1=2\n\n"] * 3
    assert len({body["seed"] for body in server.bodies}) == 3
    assert {row["response"] for row in rows(tmp_path / "a")} == {"1+1=2\n\n3+1=4\n\n#### 4"}
    (row,) = json.loads((tmp_path / "a.json").read_text())
    assert row["labels"] == [1.0, 0.0]
    with pytest.raises(UserError, match="holds samples with model_name=m, but this run has other"):
        build.process("toy", source, str(tmp_path / "a"), str(tmp_path / "a.json"), rollouts=3,
                           **at(server, model_name="other"))


def test_a_rollout_that_failed_is_counted_and_got_by_a_rerun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_client, "FIRST_PAUSE", 0.001)
    source = log_dir(tmp_path / "log", [sample("0", 0, SOLUTION, "wrong")])
    flags = {"task": "toy", "samples_file": source, "log_dir": str(tmp_path / "a"), "rollouts": 2,
             "save_file": str(tmp_path / "a.json")}

    def answer(path: str, body: dict[str, object]) -> tuple[int, bytes]:
        return says(completion(finish="abort" if "2+2" in body["prompt"] else "stop"))(path, body)

    with Answering(answer) as server:
        build.process(**flags, **at(server))
    assert len(rows(tmp_path / "a")) == 2
    failures = [json.loads(line) for line in (tmp_path / "a/failures.jsonl").read_text().splitlines()]
    assert len(failures) == 4 and all("'abort'" in row["error"] for row in failures)
    with Answering(says(completion())) as server:
        build.process(**flags, **at(server))
        assert len(server.bodies) == 4 and len(rows(tmp_path / "a")) == 6


def test_a_branch_is_written_step_by_step(tmp_path: Path) -> None:
    """Each step is drawn at its temperature; what the server writes behind its end is dropped and drawn again."""
    source = log_dir(tmp_path / "log", [sample("0", 0, "1\n\n2\n\n#### 4", "right")])
    replies = {"0+1=1\n\n": "a\n\nlost", "0+1=1\n\na\n\n": "b\n\n#### 8", "0+1=1\n\na\n\nb\n\n": "#### 9"}

    def answer(path: str, body: dict[str, object]) -> tuple[int, bytes]:
        text = replies[body["prompt"]]
        tokens = re.findall(r"\s*\S+|\s+", text)
        logprobs = {"tokens": tokens, "token_logprobs": [-1.0] * len(tokens)}
        return says(completion(text, logprobs=logprobs) | {"usage": {"completion_tokens": len(tokens)}})(path, body)

    with Answering(answer) as server:
        build.branch("toy", source, str(tmp_path / "a"), str(tmp_path / "a.json"), temperature=1.0,
                          temperature_rise=0.25, attempts=1, pairs_a_problem=1, **at(server))
    assert [(body["prompt"], body["temperature"]) for body in server.bodies] == list(
        zip(replies, (1.0, 1.25, 1.4), strict=True)
    )
    assert all("stop" not in body for body in server.bodies)  # no server says which one it met
    (row,) = rows(tmp_path / "a")
    assert row["response"] == "1\n\na\n\nb\n\n#### 9" and row["finish"] == "stop"
    assert (row["token_count"], row["logprob"]) == (6, -6.0)
    (pair,) = json.loads((tmp_path / "a.json").read_text())
    assert (pair["prefix"], pair["chosen"], pair["rejected"]) == ("1\n\n", "2\n\n#### 4", "a\n\nb\n\n#### 9")


def test_attempts_at_a_server_and_what_they_found(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seen, lock = Counter(), Lock()

    def answer(path: str, body: dict[str, object]) -> tuple[int, bytes]:
        with lock:
            seen[body["prompt"]] += 1
            n = seen[body["prompt"]]
        text = {"both": "#### 4" if n == 2 else "#### 5", "right": "#### 4", "wrong": "#### 5", "cut": "#### 5"}
        return says(completion(text[body["prompt"]], "length" if body["prompt"] == "cut" else "stop"))(path, body)

    problems = [{"instruction": name, "label": "4"} for name in ("both", "right", "wrong", "cut")]
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    with Answering(answer) as server:
        build.attempts("toy", str(tmp_path / "problems.json"), str(tmp_path / "log"), attempts=3, **at(server))
    assert seen == {"both": 2, "right": 3, "wrong": 3, "cut": 3}
    told = "problems: 1 with neither, 1 with right and wrong samples, 1 with right ones alone, 1 with wrong ones alone"
    assert told in caplog.text


def test_a_problem_without_samples_is_in_the_summary() -> None:
    problems = [Prompt(name, name, "4", None, None) for name in "ab"]
    found = [Sample("a", n, "a", "", outcome, {"finish": "stop"}) for n, outcome in enumerate(("right", "unparsed"))]
    assert count_kinds(problems, found) == {"with right ones alone": 1, "with neither": 1}


@pytest.mark.parametrize("command", ["attempts", "process", "branch"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "give one of --ckpt_dir, a solver's checkpoint, and --backend openai"),
        ({"ckpt_dir": "c", "backend": "openai"}, "give one of --ckpt_dir"),
        ({"ckpt_dir": "c", "base_url": "u"}, "--base_url says which server to ask; give --backend openai"),
        ({"backend": "openai", "base_url": "u"}, "needs --base_url and --model_name"),
        ({"backend": "openai", "base_url": "u", "model_name": "m", "chat_template": "code"}, "which no server can"),
        ({"backend": "openai", "base_url": "u", "model_name": "m", "chat_template": "qwen"}, "needs --tokenizer_file"),
    ],
)
def test_flags_of_a_server_are_checked_first(command: str, changes: dict[str, object], message: str) -> None:
    files = {"label_file": "f"} if command == "attempts" else {"samples_file": "f", "save_file": "s"}
    with pytest.raises(UserError, match=message):
        getattr(build, command)("toy", log_dir="l", **files, **changes)


@pytest.mark.parametrize("command", [build.process, build.branch])
def test_a_chat_cannot_be_gone_on_with(command: object) -> None:
    flags = {"backend": "openai", "base_url": "u", "model_name": "m", "chat_template": "server"}
    with pytest.raises(UserError, match="every answer begins anew, but here solutions are gone on with"):
        command("toy", "f", "l", "s", **flags)


SAMPLES = [sample(str(n), k, f"{n}\n\n#### {4 + k}", ("right", "wrong")[k]) for n in range(3) for k in range(2)]


def filtered(folder: Path, samples: list[Sample], name: str = "filtered.jsonl") -> str:
    """A file that somebody made of samples.jsonl: nothing beside it says how it was graded."""
    (folder / name).write_text("".join(json.dumps(sample.values) + "\n" for sample in samples))
    return str(folder / name)


def test_samples_filtered_by_hand_are_taken_if_the_task_grades_them_alike(tmp_path: Path) -> None:
    log_dir(tmp_path / "log", SAMPLES)
    with Answering(says(completion("#### 4"))) as server:
        for folder, name in ((tmp_path / "log", "b.jsonl"), (tmp_path, "a.jsonl"), (tmp_path, "samples.jsonl")):
            source, save_file = filtered(folder, SAMPLES[1:4], name), tmp_path / f"{name}.json"
            build.process("toy", source, str(tmp_path / f"log of {name}"), str(save_file), **at(server))
            assert len(json.loads(save_file.read_text())) == 3
    for changed, outcome in ((SAMPLES[0], "wrong"), (SAMPLES[1], "right"), (SAMPLES[0], "unparsed")):
        wrong = changed._replace(outcome=outcome, values=changed.values | {"outcome": outcome})
        message = f"sample '0'/{changed.sample} is {outcome} there, but {changed.outcome} by"
        with pytest.raises(UserError, match=message):
            build.process("toy", filtered(tmp_path, [SAMPLES[2], wrong], "c.jsonl"), "l", "s", **at(server))
    assert not Path("l").exists()


def test_the_limit_is_of_problems(tmp_path: Path) -> None:
    source = log_dir(tmp_path / "log", SAMPLES)
    with Answering(says(completion("#### 4"))) as server:
        for limit, n_rows in ((2, 4), (3, 6), (9, 6)):
            flags = at(server, limit=limit, rollouts=1)
            build.process("toy", source, str(tmp_path / "a"), str(tmp_path / "a.json"), **flags)
            assert len(json.loads((tmp_path / "a.json").read_text())) == n_rows
        assert len(server.bodies) == 3
