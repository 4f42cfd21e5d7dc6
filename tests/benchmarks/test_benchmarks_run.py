"""The benchmarks that no other test starts, each on the least that it can measure: they end, and their sides agree."""

import dataclasses
import importlib
import json
import random
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import code_runner, kill, memory, paired, ppo, precision, rows, split, verifier
from src.command.flags import bind, parse
from src.errors import UserError
from tests import tiny

DEMONSTRATIONS = Path(__file__).resolve().parents[2] / "dataset" / "toy" / "demonstrations.json"


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_precision(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    small = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    monkeypatch.setattr(precision, "SMOLLM2", precision.SMOLLM2 | small | {"vocab_size": 4100})
    monkeypatch.setattr(precision, "LENGTH", 16)
    monkeypatch.setattr(precision, "PROMPT", 4)
    precision.main(rounds=1, layers=2)
    lines = capfd.readouterr().out.splitlines()
    assert sum(line.endswith("tokens a processor second") for line in lines) == 8


@pytest.mark.parametrize(("name", "words", "peers"), [
    ("sft", "--only 'padded tiny,packed tiny,LoRA tiny'", ["trl", "peft"]),
    ("dpo", "--only tiny", ["trl"]),
    ("ppo", "--only 'GRPO tiny'", ["trl"]),
    ("decode", "--model tiny --prompts 4 --workload ragged", []),
])
def test_beside_other_libraries(
    name: str, words: str, peers: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All sides are measured in this process: each in one of its own would be imports of torch and trl above all."""
    for peer in peers:
        pytest.importorskip(peer)
    script, said = importlib.import_module(f"benchmarks.{name}"), []
    monkeypatch.setattr(ppo, "EPISODES", 16)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # as decode.py sets it, and no longer than this test

    def run_side(_: str, side: str, case: str, folder: Path, *more: str, **__: str) -> paired.Run:
        said.append(capsys.readouterr().out)
        monkeypatch.setattr(sys, "argv", ["x", "--side", side, "--only", case, "--folder", str(folder), *more])
        script.main()
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    monkeypatch.setattr(paired, "run_side", run_side)
    monkeypatch.setattr(sys, "argv", ["x", *shlex.split(words), "--repeats", "1"])
    script.main()
    text = "".join(said) + capsys.readouterr().out
    assert text.count("by processor seconds") == words.count("tiny") and "too far off" not in text, text


def test_ppo_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its peer is trl 1.12, which a Python of its own holds."""
    monkeypatch.setattr(ppo, "EPISODES", 16)
    case = ppo.CASES["PPO tiny"]
    ppo.write_model(case, tmp_path)
    assert sum(ppo.SIDES["ours"](case, tmp_path)["work"]) == 2 * ppo.EPISODES * case.response


def test_verifier(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(verifier.MODELS, "5M", (64, 2, 2, 64))
    verifier.main(rounds=1, solutions=2, samples=4)
    said = capfd.readouterr().out
    assert "training, labelled steps/s; loss gap" in said and "scoring, samples/s; score gap" in said


def test_code_runner(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    try:
        code_runner.behind("namespaces", code_runner.TRIVIAL)
    except UserError as refusal:
        pytest.skip(str(refusal))
    monkeypatch.setattr(code_runner, "SYMPY", code_runner.TRIVIAL)  # which takes long to import
    code_runner.main(runs=1)
    assert capfd.readouterr().out.count("ms/run") == len(code_runner.rows())


def test_rows(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    found = json.loads(DEMONSTRATIONS.read_text(encoding="utf-8"))[:40]
    path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    for phase in rows.PHASES:
        rows.measure(str(path), phase)
    assert capfd.readouterr().out.count(" MB ") == len(rows.PHASES)


@pytest.mark.parametrize("name", ["full, packed", "scoring 8k on 1", "PPO"])
def test_memory(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    case = memory.CASES[name]
    case = case._replace(model=(32, 2, 2, 64, 2048), tokens=min(case.tokens, 64))
    memory.prepare(case, tmp_path)
    _, script, *flags = memory.command(case, tmp_path, dry=True)
    main = importlib.import_module(script.removesuffix(".py")).main
    bind(main, parse(main, flags))()
    assert memory.predicted(capfd.readouterr().out) > 2**20


def test_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"dim": 64, "n_layers": 2, "n_heads": 16, "head_dim": 4, "ffn_dim": 64, "vocab_size": 320}
    monkeypatch.setattr(split, "CONFIG", dataclasses.replace(split.CONFIG, **small))
    split.write_model(tmp_path / "source")
    for way in ("cp", "split", "naive"):
        split.main(str(tmp_path), way=way)
        (tmp_path / "target").rename(tmp_path / way)
    names = {path.name for path in (tmp_path / "naive").iterdir()}
    assert len(names) == split.SHARDS and names < {path.name for path in (tmp_path / "split").iterdir()}
    for name in names:
        one, other = (torch.load(tmp_path / way / name) for way in ("split", "naive"))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_kill(tmp_path: Path) -> None:
    tiny.split(DEMONSTRATIONS.parent / "base", tmp_path / "split", 2)
    (tmp_path / "held.json").write_text(json.dumps(json.loads(DEMONSTRATIONS.read_text(encoding="utf-8"))[:60]))
    case = kill.Case("1 process", -1, background=False)
    moments = kill.killed_twice(case, tmp_path / "killed", ("save", "evaluation"), random.Random(1))
    assert [moment.phase for moment in moments] == ["save", "evaluation"]
