"""src/grading/answer_types.py: choices, truth, tolerances; and the extraction of letters."""

import pytest

from src.grading.answer_types import AnswerType, choice_letters
from src.grading.extract import extract
from src.grading.grader import Grader


@pytest.mark.parametrize(("text", "letters"), [
    ("C", "C"), ("(C)", "C"), ("(C) 21 apples", "C"), ("C. 21", "C"), ("\\text{(B)}", "B"), ("C and A", "AC"),
    ("ACD", "ACD"), ("A, C", "AC"), ("21", ""), ("", ""), ("apples", ""), ("Cats", ""), ("b", "B"),
    ("(b)", "B"), ("Option B", "B"), ("A or B", "AB"), ("a train", ""), ("\\text{(d)}", "D"),
])
def test_letters_by_hand(text: str, letters: str) -> None:
    assert choice_letters(text) == letters


@pytest.mark.parametrize(("response", "answer"), [
    ("So the answer is (C).", "C"),
    ("So the answer is C) 21.", "C"),
    ("Answer: **B**", "B"),
    ("Both hold. Answer: A and C", "A, C"),
    ("$\\boxed{\\text{D}}$", "D"),
    ("Option (A) is too small. It must be (E).", "E"),
    ("It may be (A) or (E).", None),       # a choice between two is none
    ("D", "D"),
    ("Option D", "D"),
    ("Of these I would choose D.", "D"),
    ("The answer is 21.", None),
    ("A train leaves the station", None),
    ("The answer is A.\nQuestion: next?\nThe answer is B.", "A"),
])
def test_letters_are_found_in_responses(response: str, answer: str | None) -> None:
    assert extract("choice/letter@5", response).answer == answer


@pytest.mark.parametrize(("kind", "tolerance", "answer", "label", "outcome"), [
    ("number", 0.0, "3.14", "3.1", "wrong"),
    ("number", 0.1, "3.14", "3.1", "right"),
    ("number", 0.01, "3.14", "3.1", "wrong"),
    ("number", 0.5, "1{,}000.5 \\text{ m}", "1000", "right"),
    ("number", 0.1, "5.05m", "x = 5 \\text{ m}", "right"),
    ("number", 0.1, "5 km", "5 m", "wrong"),
    ("number", 0.1, "3 cm", "3 cm^2", "wrong"),
    ("number", 0.1, "5 euros", "\\$5", "wrong"),
    ("number", 0.01, "49.8%", "0.5", "right"),
    ("number", 0.01, "0.5%", "0.5", "wrong"),
    ("number", 1.0, "0.498", "50%", "right"),                 # by the label's measure
    ("number", 1.0, "0.4", "50%", "wrong"),
    ("number", 0.1, "\\sqrt{4}+x", "x+2", "right"),           # no plain number: exactly
    ("true_false", 0.0, "\\text{Yes}", "True", "right"),
    ("true_false", 0.0, "no", "True", "wrong"),
    ("true_false", 0.0, "\\textbf{True}", "True", "right"),
    ("true_false", 0.0, "\\mathrm{False}.", "True", "wrong"),
    ("yes_no", 0.0, "Yes, because 3 > 2", "Yes", "right"),
    ("yes_no", 0.0, "yes and no", "Yes", "wrong"),
    ("yes_no", 0.0, "Yes or so", "Yes", "wrong"),
    ("yes_no", 0.0, "not yes", "Yes", "wrong"),
    ("true_false", 0.0, "perhaps", "perhaps", "wrong"),
    ("true_false", 0.0, "True for all n", "True", "right"),   # letters beside words are names
    ("yes_no", 0.0, "No, t is not prime", "no", "right"),
    ("yes_no", 0.0, "f is continuous", "no", "wrong"),
    ("true_false", 0.0, "(F)", "False", "right"),
    ("choice", 0.0, "(B) 4", "B", "right"),
    ("tuple", 0.0, "(1,2)", "(2,1)", "wrong"),
    ("set", 0.0, "2, 1", "1,2", "right"),
    ("interval", 0.0, "[1,2)", "[1,2]", "wrong"),
    ("", 0.0, "0.5", "\\frac12", "right"),
])
def test_typed_answers(kind: str, tolerance: float, answer: str, label: str, outcome: str) -> None:
    with Grader("OlympiadBench") as grader:
        assert grader.compare(answer, label, AnswerType(kind, tolerance)) == outcome


def test_the_type_is_part_of_the_question() -> None:
    with Grader("OlympiadBench") as grader:        # the second verdict does not come from the first one's cache
        assert grader.compare("3.14", "3.1", AnswerType("number", 0.1)) == "right"
        assert grader.compare("3.14", "3.1", AnswerType("number", 0.0)) == "wrong"
        assert grader.equal("3.14", "3.1", AnswerType("number", 0.1))
