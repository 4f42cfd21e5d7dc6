"""The tables of the easy-to-hard recipe: paired differences say who beats whom, labels meet the exact truth."""

import json
from pathlib import Path

import pytest

from dataset.toy.generate import check_steps
from recipes import easy_to_hard_table as table

N = 40
RULES = {"extraction": "gsm8k/hashes@5", "equality": "exact@5"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Hard toy problems with two wrong samples that agree and one right: greedy is wrong, the scores know better."""
    problems = [problem for problem in table.toy_problems().values() if problem.level == 4][:N]
    seed = tmp_path / "seed-1"
    rows = []
    for index, problem in enumerate(problems):
        right = [*problem.steps, f"#### {problem.label}"]
        for number, steps in enumerate(([*problem.steps, "#### 9999"], [*problem.steps, "#### 9999"], right)):
            rows.append({"id": str(index), "sample": number, "prompt": problem.instruction,
                         "response": "\n\n".join(steps), "answer": steps[-1][5:],
                         "outcome": "right" if number == 2 else "wrong"})
    write(seed / "greedy", [row for row in rows if row["sample"] == 0])
    write(seed / "hard", rows)
    (seed / "hard" / "results.json").write_text(json.dumps({"rules": RULES}))
    for name in table.VERIFIERS:
        write(seed / f"{name}-hard", [row | {"step_scores": step_scores(name, row)} for row in rows])
    labelled = [{"instruction": problem.instruction, "steps": [*problem.steps, "#### 9999"],
                 "labels": [1] * len(problem.steps) + [0]} for problem in problems]
    (seed / "steps.json").write_text(json.dumps(labelled))
    return tmp_path


def step_scores(verifier: str, row: dict[str, object]) -> list[float]:
    """The process and mixed verifiers see the wrong last step, the outcome verifier nothing."""
    last = 0.1 if row["outcome"] == "wrong" and verifier != "outcome" else 0.9
    return [0.9] * row["response"].count("\n\n") + [last]


def write(folder: Path, rows: list[dict[str, object]]) -> None:
    folder.mkdir(parents=True)
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_verifier_that_sees_the_mistake_beats_the_majority(
    run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    table.main(str(run), [1])
    lines = {line.split("  ")[0]: line for line in capfd.readouterr().out.splitlines()}
    assert lines["majority"].split()[1] == "0.0%" and lines["pass"].split()[1] == "100.0%"
    for name in ("process", "mixed"):
        vote = lines[f"weighted vote, {name}"]
        assert "+100.0% (+100.0% .. +100.0%) from majority: beats it" in vote
        assert "from greedy: beats it" in lines[f"best of n, {name}"]
    assert "+0.0% (+0.0% .. +0.0%) from majority: does not beat it" in lines["weighted vote, outcome"]
    labels = next(line for line in lines.values() if line.startswith("labels by rollouts"))
    assert "100.0% of 200 (right steps 100.0%, wrong ones 100.0%; AUC 1.000)" in labels


def test_the_truth_is_the_domains() -> None:
    problem = next(iter(table.toy_problems().values()))
    assert all(check_steps(problem, "\n\n".join([*problem.steps, f"#### {problem.label}"])))
    assert table.truths(problem, ["nonsense", *problem.steps[1:], f"#### {problem.label}"])[0] is False
