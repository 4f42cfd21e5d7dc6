"""src/construct/sample_until.py: a problem is sampled until it has enough, and not once more."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from src import parallel
from src.construct.sample_until import sample_until
from src.construct.samples import without_similar
from src.data.examples import Prompt, Sample
from src.errors import UserError
from src.evaluation.evaluator import SampleRequest, SamplerOutput
from tests.conftest import CODE_QUESTION
from tests.text.files import write_json
from tests.tiny import build

# What the samples of a problem are, in order: r right, w wrong, u no answer, c cut off behind a wrong answer, f failed.
SCRIPTS = {"early": "rw", "late": "rrrrw", "never": "r" * 9, "cut": "rcuw", "failed": "rffw", "reversed": "wwwr"}
CAP = 6


def scripted(wanted: Sequence[SampleRequest]) -> Iterator[SamplerOutput]:
    """A sampler that says what the scripts say, in an order of its own."""
    for prompt, number in reversed(wanted):
        what = SCRIPTS[prompt.id][number]
        error = "no server" if what == "f" else ""
        yield SamplerOutput(prompt.id, number, what, 1, "length" if what == "c" else "stop", -1.0, error)


def outcome(prompt: Prompt, response: str) -> str:
    return {"r": "right", "w": "wrong", "c": "wrong"}.get(response, "unparsed")


def drawn(enough: tuple[int, int], before: dict[tuple[str, int], str] | None = None) -> Counter[str]:
    """How many samples of each problem are drawn."""
    parallel.start()
    before = before or {}
    prompts = [Prompt(name, name, "1", None, None) for name in SCRIPTS]
    wanted = [(prompt, n) for prompt in prompts for n in range(CAP) if n < len(SCRIPTS[prompt.id])]
    wanted = [(prompt, n) for prompt, n in wanted if (prompt.id, n) not in before]
    return Counter(found.id for found in sample_until(scripted, *enough, outcome, before)(wanted))


def test_scdpo_09_sampling_stops_at_the_thresholds_and_at_the_cap() -> None:
    assert drawn((1, 1)) == {"early": 2, "late": 5, "never": CAP, "cut": 4, "failed": 4, "reversed": 4}
    assert drawn((4, 1))["late"] == 5
    assert drawn((1, 4)) == {name: min(CAP, len(script)) for name, script in SCRIPTS.items()}


def test_a_rerun_draws_what_the_whole_run_would_have() -> None:
    before = {("early", 0): "r", ("early", 1): "w", ("late", 0): "r", ("cut", 0): "r", ("cut", 1): ""}
    assert drawn((1, 1), before) == {"late": 4, "never": CAP, "cut": 2, "failed": 4, "reversed": 4}


def test_scdpo_09_a_solver_is_asked_until_it_has_gone_wrong(code_solver: str, tmp_path: Path) -> None:
    """It goes wrong one time in three, in its code."""
    problems = [{"instruction": CODE_QUESTION, "label": "68", "id": str(n)} for n in range(3)]
    flags = {"label_file": str(write_json(tmp_path / "problems.json", problems)), "attempts": 9,
             "temperature": 0.9, "max_new_tokens": 30}
    build.attempts("toy", ckpt_dir=code_solver, log_dir=str(tmp_path / "log"), **flags)
    text = (tmp_path / "log" / "samples.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    for problem in problems:
        outcomes = [row["outcome"] for row in rows if row["id"] == problem["id"]]
        done = [n for n in range(len(outcomes)) if {"right", "wrong"} <= set(outcomes[: n + 1])]
        assert done == [len(outcomes) - 1] or len(outcomes) == 9
    assert {"right", "wrong"} <= {row["outcome"] for row in rows}
    (tmp_path / "log" / "samples.jsonl").write_text(text[: len(text) // 2])  # killed within a line
    build.attempts("toy", ckpt_dir=code_solver, log_dir=str(tmp_path / "log"), **flags)
    assert (tmp_path / "log" / "samples.jsonl").read_text() == text
    with pytest.raises(UserError, match="--temperature 0 would make all of --attempts 9 alike"):
        build.attempts("toy", ckpt_dir=code_solver, log_dir=str(tmp_path / "log"), **flags | {"temperature": 0.0})
    (tmp_path / "other").mkdir()
    write_json(tmp_path / "other" / "samples.jsonl", {"id": 0, "response": "68"})
    with pytest.raises(UserError, match="was not sampled here"):
        build.attempts("toy", ckpt_dir=code_solver, log_dir=str(tmp_path / "other"), **flags)


@pytest.mark.parametrize(("characters", "kept"), [(0, "abcde"), (5, "ade"), (1, "abde"), (100, "ae")])
def test_scdpo_09_similar_solutions_can_be_left_out(characters: int, kept: str) -> None:
    solutions = {"a": "x" * 10, "b": "y" * 12, "c": "z" * 12, "d": "x" * 30, "e": "x" * 5 + "\n\n" + "x" * 5}
    samples = [Sample("0", n, "q", text, "right", {}) for n, text in enumerate(solutions.values())]
    found = [sample.response for sample in without_similar(samples, characters)]
    assert found == [solutions[name] for name in kept]
