"""Over 200 answers that a policy could farm are wrong, honest ones beside them right; cheats.py has them by class."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from src.grading.grader import Grader
from tests.grading import cheats

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
REPORTS = SHARED / "reports" / "grading.jsonl"


@pytest.fixture(scope="module")
def graders() -> Iterator[dict[str, Grader]]:
    with Grader("GSM8K") as gsm8k, Grader("MATH") as math, Grader("AQuA") as choice:
        yield {"GSM8K": gsm8k, "MATH": math, "AQuA": choice}


def templates(table: str) -> list[str]:
    return [part for line in table.strip().splitlines() for part in line.split("|")]


def filled(template: str, gold: str, other: str) -> str:
    names = {"G": gold, "N": other, "⏎": "\n"}
    return re.sub(r"(?<![A-Za-z\\])[GN](?![A-Za-z])|⏎", lambda match: names[match.group()], template)


def answers(table: str) -> list[tuple[str, str, str]]:
    """(task, response, gold) for each template, gold, and way to put an answer."""
    return [
        (task, frame.replace("@", filled(template, gold, other)), gold)
        for gold, other in cheats.GOLDS
        for template in templates(table)
        for task, frames in cheats.WRAPPED.items()
        for frame in frames
    ]


def responses(table: str) -> list[tuple[str, str, str]]:
    rows = [line.partition("|") for line in table.strip().splitlines()]
    return [(task, filled(text, gold, other), gold) for gold, other in cheats.GOLDS for task, _, text in rows]


def graded_against_expectation(
    graders: dict[str, Grader], rows: list[tuple[str, str, str]], right: bool
) -> list[tuple[str, str, str]]:
    assert rows
    return [
        (task, response, gold)
        for task, response, gold in rows
        if (graders[task].grade_one(response, gold).outcome == "right") != right
    ]


def boxed(pairs: tuple[tuple[str, str], ...]) -> list[tuple[str, str, str]]:
    return [("MATH", f"\\boxed{{{answer}}}", gold) for answer, gold in pairs]


CHEATS = {
    "modified": answers(cheats.MODIFIED),
    "several": answers(cheats.SEVERAL),
    "responses": responses(cheats.RESPONSES),
    "units": boxed(cheats.UNITS),
    "products": boxed(cheats.PRODUCTS),
    "expressions": boxed(cheats.EXPRESSIONS),
    "choices": [("AQuA", response.replace("⏎", "\n"), gold) for response, gold in cheats.CHOICES],
}
HONEST = {
    "answers": answers(cheats.HONEST),
    "numbers": [("GSM8K", f"#### {answer}", gold) for answer, gold in cheats.HONEST_PAIRS] + boxed(cheats.HONEST_PAIRS),
    "expressions": boxed(cheats.HONEST_MATH),
    "responses": responses(cheats.HONEST_RESPONSES),
    "choices": [("AQuA", response, gold) for response, gold in cheats.HONEST_CHOICES],
}


def test_there_are_more_than_200_cheats_not_counting_golds_and_frames() -> None:
    assert len(templates(cheats.MODIFIED)) + len(templates(cheats.SEVERAL)) + sum(
        len(rows) for name, rows in CHEATS.items() if name not in ("modified", "several", "responses")
    ) + len(cheats.RESPONSES.strip().splitlines()) > 200


@pytest.mark.parametrize("kind", CHEATS)
def test_no_cheat_earns(graders: dict[str, Grader], kind: str) -> None:
    assert graded_against_expectation(graders, CHEATS[kind], right=False) == []


@pytest.mark.parametrize("kind", HONEST)
def test_honest_answers_beside_them_are_right(graders: dict[str, Grader], kind: str) -> None:
    assert graded_against_expectation(graders, HONEST[kind], right=True) == []


@pytest.mark.skipif(not REPORTS.is_file(), reason=f"reported answers are not at {REPORTS}")
def test_reported_answers(graders: dict[str, Grader]) -> None:
    rows = [json.loads(line) for line in REPORTS.read_text(encoding="utf-8").splitlines()]
    for expected in ("right", "wrong"):
        kept = [(row["task"], row["response"], row["gold"]) for row in rows if row["expected"] == expected]
        assert graded_against_expectation(graders, kept, right=expected == "right") == []
