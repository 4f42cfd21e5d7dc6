"""src/evaluation/interactive.py: solutions that stream, the answer behind them, step scores; on one rank and on two."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

import solver_evaluate
from src import parallel
from src.data.encoding import split_steps
from src.errors import UserError
from src.evaluation.interactive import Stream
from tests.tiny import make_verifier, split, write_hf_llama

ROOT = Path(__file__).resolve().parents[2]
PROBLEMS = "2+2=\n\n3+4=\\n\n" + 9999 * "2+2=" + "\n"  # the last is too long


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parallel.start()
    return write_hf_llama(tmp_path_factory.mktemp("interactive") / "hf")


def responses(ckpt_dir: str, folder: Path) -> list[str]:
    """What an evaluation of the same problems samples, under the ids that a conversation gives them."""
    rows = [{"id": "0", "instruction": "2+2="}, {"id": "2", "instruction": "3+4="}]
    (folder / "labels.json").write_text(json.dumps(rows))
    solver_evaluate.main(
        solver_evaluate.SolverEvaluateConfig(
            task="none",
            label_file=str(folder / "labels.json"),
            log_dir=str(folder / "log"),
            ckpt_dir=ckpt_dir,
            temperature=1.0,
            max_new_tokens=12,
        )
    )
    return [json.loads(line)["response"] for line in (folder / "log/samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("n", [1, 2])
def test_what_is_typed_is_answered_like_an_evaluation(hf: Path, tmp_path: Path, n: int) -> None:
    ckpt_dir = split(hf, tmp_path / "ckpt", n)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"] if n > 1 else []
    done = subprocess.run(
        [
            sys.executable,
            *torchrun,
            str(ROOT / "solver_evaluate.py"),
            "--task",
            "GSM8K",
            "--ckpt_dir",
            ckpt_dir,
            "--interactive",
            "--temperature",
            "1",
            "--max_new_tokens",
            "12",
        ],
        input=PROBLEMS,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, empty, second, long, last = done.stdout.split("problem> ")[1:]
    assert (empty, last.strip()) == ("", "") and re.match("no answer: the prompt has [0-9]+ tokens, the model's", long)
    for shown, response in zip(
        (first, second), responses(split(hf, tmp_path / "one"), tmp_path), strict=True
    ):
        assert shown.startswith(response + "\n")
        assert "answer" in shown[len(response) :]


def test_streamed_text_comes_in_pieces_and_stops_where_it_should() -> None:
    pieces = ["ab", "c", "Que", "x", "é", "Ques", "tion", "more"]
    said: list[str] = []

    def decode(tokens: list[int]) -> str:
        text = "".join(pieces[token] for token in tokens)
        return text.removesuffix("é") + "\ufffd" if text.endswith("é") else text  # half a character

    stream = Stream(decode, ["Question"], said.append)
    for token in range(len(pieces)):
        stream.add(token)
    stream.finish("abcQuexé\n")
    assert said == ["ab", "c", "Quex", "é", "\n"]  # nothing that may become the stop string is said too early


def test_a_long_stream_decodes_its_newest_tokens_alone_and_says_the_same() -> None:
    pieces = [b" a", *(bytes([byte]) for byte in "é \U0001f389".encode()), b" ", b"b", b"Quest", b"\xff"]
    said, lengths = [], []

    def decode(tokens: list[int]) -> str:
        lengths.append(len(tokens))
        return b"".join(map(pieces.__getitem__, tokens)).decode(errors="replace").removeprefix(" ")  # as sentencepiece

    tokens = random.Random(0).choices(range(len(pieces)), k=500) + [*range(9)] * 50
    stream = Stream(decode, ["Question"], said.append)
    for count, token in enumerate(tokens, 1):
        stream.add(token)
        whole = decode(tokens[:count]).rstrip("\ufffd")
        assert "".join(said) == whole.removesuffix("Quest") and lengths[-2] <= 80


def test_a_solution_longer_than_the_verifier_s_context_has_no_score(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ckpt_dir = split(hf, tmp_path / "ckpt")
    verifier_dir = make_verifier(ckpt_dir, tmp_path / "verifier", objective="process")
    params = tmp_path / "verifier/params.json"
    params.write_text(json.dumps(json.loads(params.read_text()) | {"max_seq_len": 8}))
    (tmp_path / "typed.txt").write_text("2+2=2+2=\n3+4=3+4=\n")
    with (tmp_path / "typed.txt").open() as typed:
        monkeypatch.setattr(sys, "stdin", typed)
        solver_evaluate.main(
            solver_evaluate.SolverEvaluateConfig(
                task="GSM8K",
                ckpt_dir=ckpt_dir,
                interactive=True,
                verifier_ckpt_dir=verifier_dir,
                temperature=1.0,
                max_new_tokens=12,
            )
        )
    assert capsys.readouterr().out.count("no score: longer than the verifier's context of 8 tokens") == 2


@pytest.mark.parametrize("objective", ["pairwise", "process"])
def test_scores_stand_beside_the_steps(
    hf: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    objective: str,
) -> None:
    ckpt_dir = split(hf, tmp_path / "ckpt")
    verifier_dir = make_verifier(ckpt_dir, tmp_path / "verifier", objective=objective)
    (tmp_path / "typed.txt").write_text("2+2=\n")
    with (tmp_path / "typed.txt").open() as typed:
        monkeypatch.setattr(sys, "stdin", typed)
        solver_evaluate.main(
            solver_evaluate.SolverEvaluateConfig(
                task="GSM8K",
                ckpt_dir=ckpt_dir,
                interactive=True,
                verifier_ckpt_dir=verifier_dir,
                temperature=1.0,
                max_new_tokens=12,
            )
        )
    shown = capsys.readouterr().out
    response = responses(ckpt_dir, tmp_path)[0]
    assert f"problem> {response}\n" in shown
    steps = split_steps(response) if objective == "process" else [response]
    said = shown.split("problem> ")[1]
    assert [bool(re.search(rf"0\.\d{{3}}  {re.escape(step)}", said)) for step in steps] == [True] * len(steps)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ckpt_dir": ""}, "--interactive needs --ckpt_dir"),
        ({"label_file": "a.json"}, "neither --label_file nor --log_dir"),
        ({"interactive": False, "label_file": "a.json"}, "give --label_file and --log_dir"),
        (
            {"interactive": False, "label_file": "a.json", "log_dir": "b", "verifier_ckpt_dir": "v"},
            "goes with --interactive",
        ),
    ],
)
def test_flags_that_contradict(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        solver_evaluate.main(
            solver_evaluate.SolverEvaluateConfig(
                **{"task": "GSM8K", "ckpt_dir": "one", "interactive": True} | changes
            )
        )


@pytest.mark.parametrize(
    "flags", [{"num_samples": 4}, {"compile": True}, {"limit": 3}, {"dry_run": True}, {"max_rounds": 2}])
def test_what_a_conversation_does_not_hear_is_refused(flags: dict[str, object]) -> None:
    config = solver_evaluate.SolverEvaluateConfig(task="GSM8K", ckpt_dir="c", interactive=True, **flags)
    with pytest.raises(UserError, match=f"--{[*flags][0]} has no effect: --interactive answers one problem at a time"):
        solver_evaluate.main(config)


def test_a_solver_whose_code_would_not_run_is_refused(code_base: str) -> None:
    with pytest.raises(UserError, match="writes solutions with code, which --interactive does not run"):
        solver_evaluate.main(solver_evaluate.SolverEvaluateConfig(task="toy", ckpt_dir=code_base, interactive=True))
