"""src/grading/published_rules.py: weak-to-strong's rules give that repository's published numbers."""

import json
import random
import re
import time
from pathlib import Path

import pytest

from src.grading.extract import extract
from src.grading.grader import Grader
from src.grading.published_rules import inside_dollars, minerva_string, unwrapped

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


@pytest.mark.parametrize("piece", [
    "The answer is ", "The answer is -", "#### ", "$", "$a", "\\text{", "\\text{a", "frac", "sqrt", ".", "####",
    "=", "\n",
])
@pytest.mark.parametrize("tail", ["", "\n", "\n}", "}", "x"])
def test_w2s_extraction_is_linear(piece: str, tail: str) -> None:
    started = time.monotonic()
    for extraction in ("weak-to-strong/hashes@1", "weak-to-strong/answer-is@1"):
        extract(extraction, "#### " + piece * (80_000 // len(piece)) + tail)
        extract(extraction, piece * (80_000 // len(piece)) + tail)
    minerva_string(piece * (80_000 // len(piece)) + tail)
    assert time.monotonic() - started < 2       # 80,000 characters took 10 s


PIECES = (
    "#### ", "The answer is ", "The answer is: ", "-", "3", "4.5", ".", " ", "\n", "$", "\\text{", "}", "a", "Question",
    "1,000", "=", "\\boxed{", "frac12", "sqrt3", "%", "\r", "{", "$$",
)


def published_string(answer: str) -> str:
    """The two places where that repository's own expressions are quadratic, as it has them."""
    text = re.sub(r"^.*?\$(.+?)\$.*$", r"\1", answer)
    return re.sub(r"\\text\{(.*?)\}", r"\1", text)


def test_w2s_the_linear_forms_say_what_the_published_expressions_say() -> None:
    random_pieces = random.Random(1)
    for _ in range(5000):
        text = "".join(random_pieces.choices(PIECES, k=random_pieces.randint(1, 9)))
        assert unwrapped(inside_dollars(text), "\\text{") == published_string(text)
        published = re.search(r"The answer is \D*?(-?\d+(?:\.\d+)?)", text.split("Question")[0].strip().strip("."))
        ours = extract("weak-to-strong/hashes@1", text).answer if "####" not in text else None
        if ours is not None:
            assert published is not None and ours == minerva_string(published.group(1))
