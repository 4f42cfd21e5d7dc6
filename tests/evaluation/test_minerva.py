"""src/evaluation/minerva.py: the rules that carry weak-to-strong's name give that repository's published numbers."""

import json
from pathlib import Path

import pytest

from src.evaluation.extract import extract
from src.evaluation.grade import Grader
from src.evaluation.minerva import minerva_string

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
published = SHARED / "weak_to_strong" / "llama2_7b_gsm8k_train_2_results.jsonl"


@pytest.mark.parametrize(("answer", "normal"), [
    ("1,250 dollars", "1250"), ("1,2", "12"), ("10%", "10"), ("72.", "72."), ("x = 5.00", "5"),
    ("\\frac12", "\\frac{1}{2}"),
    ("\\boxed{7}", "7"), ("12\\text{ feet}", "12"), ("$3$", "3"), ("-615,000", "-615,000"), ("sqrt3", "sqrt{3}"),
])
def test_w2s_06_normal_form_by_hand(answer: str, normal: str) -> None:
    assert minerva_string(answer) == normal


@pytest.mark.parametrize(("response", "answer"), [
    ("So 4.\n#### 4", "4"),
    ("#### 4\nand more", None),                # the key must stand on the last line
    ("So \\boxed{5}", None),
    ("The answer is 1250 dollars", "1250"),
    ("#### 4\nQuestion: another\n#### 9", "4"),
])
def test_w2s_06_extraction_by_hand(response: str, answer: str | None) -> None:
    assert extract("weak-to-strong/hashes@1", response).answer == answer


def test_the_key_of_math() -> None:
    assert extract("weak-to-strong/answer-is@1", "Thus. The answer is: \\frac12").answer == "\\frac{1}{2}"


@pytest.mark.skipif(not published.is_file(), reason=f"published results are not at {published}")
def test_w2s_06_all_published_extractions_and_verdicts_are_reproduced() -> None:
    rows = [json.loads(line) for line in published.read_text(encoding="utf-8").splitlines()]
    answers = [extract("weak-to-strong/hashes@1", row["response"]).answer or "" for row in rows]
    assert len(rows) == 7000 and answers == [row["pred"] for row in rows]
    with Grader("GSM8K-weak-to-strong") as grader:
        verdicts = [grader.compare(row["pred"], row["gold"]) == "right" for row in rows]
    assert verdicts == [row["result"] for row in rows]
