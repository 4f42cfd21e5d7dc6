import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from src.errors import UserError
from src.grading import equality
from src.grading.extract import EXTRACTIONS, extract
from src.grading.grader import Grader, Undecided, Verdict
from src.grading.tasks import find_task

REPO = Path(__file__).resolve().parents[2]
SHARED = REPO.parent / "shared" / "data"
shared_data = pytest.mark.skipif(not SHARED.is_dir(), reason=f"labelled answers are not at {SHARED}")

HOSTILE = ("(p+q+r+s)^{50}-(p+q+r+s)^{49}", "p+q")       # short enough for the worker, hours for sympy
TOWER = ("x+9^{9^{9^9}}", "x+7^{7^{7^7}}")               # one power inside C code, which no alarm interrupts


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader("MATH") as grader:
        yield grader


@pytest.mark.parametrize(("task", "response", "answer"), [
    ("GSM8K", "40 + 2 = 42\n#### 42", "42"),
    ("gsm8k", "#### 1\nNo, again.\n#### $1,250.00", "$1,250.00"),
    ("GSM8K", "#### ", None),
    ("GSM8K", "The answer is 7 cats.\nQuestion: How many dogs?\nThe answer is 9.", "7 cats"),
    ("GSM8K", "We get \\boxed{12}.", "12"),
    ("GSM8K", "So **Answer:** 15", "15"),
    ("GSM8K", "The answer is **15** dollars.", "15 dollars"),
    ("GSM8K", "The answer is *15*, since 3*5 = 15 and 3 * 5 = 15.", "15, since 3*5 = 15 and 3 * 5 = 15"),
    ("GSM8K", "The **answer** is ***$15 a week.*** She", "$15 a week"),
    ("GSM8K", "**The answer is 15** __small__ apples", "15 small apples"),
    ("GSM8K", "#### `15` apples", "15 apples"),
    ("GSM8K", "#### _15_ apples", "15 apples"),
    ("MATH", "The answer is **$x=5$** here", "$x=5$ here"),
    ("MATH", "# Answer\n**Yes** for all", "Yes for all"),
    ("MATH", "The answer is h**2/m, 3* 5, 2 * x, a^* or x_ {1}", "h**2/m, 3* 5, 2 * x, a^* or x_ {1}"),
    ("GSM8K", "She has 3 left and buys 4. Now she has 7 pens.", "7"),
    ("GSM8K", "She has 3 left and buys 4. Now she has 7 pe", None),
    ("GSM8K", "It is either 3 or 4.", None),
    ("MATH", "\\boxed{1} and then $\\boxed{\\frac{a}{\\{b\\}}}$.", "\\frac{a}{\\{b\\}}"),
    ("MATH", "so $\\boxed{1}$, that is $\\boxed{\\frac{1}{", None),
    ("MATH", "so \\fbox{3}", "3"),
    ("MATH", "$\\boxed{2}$.\nFinal Answer: The final answer is $-2$. I hope it is correct.", "$-2$"),
    ("MATH", "Work.\n# Answer\n\n3/4", "3/4"),
    ("MATH", "The answer is: $4\\pi$", "$4\\pi$"),
    ("MATH", "Thus $x=5$ and $y = 2 + 3 = 5$.", "5"),
    ("MATH", "Thus $x=5$ and $y = 2 + 3 = 5$, so that", None),
    ("MATH", "The solutions are $x=-2$ and $x=1$.", "-2, 1"),
    ("MATH", "It is one of $A$, $B$, and $C$ that we want.", None),
    ("MATH", "Dividing by 5, $5x=30$ and $x=6$.", "6"),
    ("MATH", "Ans: $6$", "$6$"),
    ("MATH", "The answer is $\\frac12", None),                  # cut off inside a formula
    ("MATH", "The answer is \\(x+1", None),
    ("GSM8K", "The answer is $12", "$12"),
    ("GSM8K", "#### $-5", "$-5"),
    ("MATH", "", None),
    ("toy", "2 + 2 = 4\n#### 4", "4"),
    ("toy", "The answer is 4. \\boxed{4}", None),
])
def test_extraction_by_hand(task: str, response: str, answer: str | None) -> None:
    assert extract(find_task(task).extraction, response).answer == answer


def test_extraction_names_its_rule() -> None:
    assert extract("gsm8k/last-number@5", "#### 4") == ("4", "hashes")
    assert extract("math/last-box@5", "\\boxed{") == (None, "box")
    assert extract("gsm8k/hashes@5", "4") == (None, "none")


def test_unknown_task_names_the_known_ones() -> None:
    with pytest.raises(UserError, match="'nothing'; known tasks: GSM8K, .*MATH.*json"):
        Grader("nothing")
    with pytest.raises(UserError, match="task none grades nothing"):
        Grader("none")


RULES_DECIDE = [
    ("1{,}024", "1024"), ("1 024", "1024"), ("$0.50", "1/2"), ("\\frac34", "0.75"), ("2\\frac{1}{2}", "\\frac52"),
    ("-\\dfrac{1}{2}", "\\frac{-1}{2}"), ("18 ft", "18\\text{ feet}"), ("18", "18\\text{ feet}"), ("35%", "35"),
    ("0.35", "35\\%"), ("70^\\circ", "70"), ("z = 4", "4"), ("4 = z", "z=4"), ("b, a", "a,b"),
    ("\\{5, 6\\}", "6, 5"), ("4, 5, and 6", "4,5,6"), ("\\pm 7", "7, -7"), ("t > 2", "(2,\\infty)"),
    ("1 \\le t < 4", "[1, 4)"), ("(6,8] \\cup [0,1)", "[0,1)\\cup(6,8]"), ("june", "\\text{June}"),
    ("D", "\\textbf{(D)}"),
    ("\\begin{bmatrix}1&2\\\\3&4\\end{bmatrix}", "\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}"),
    ("77_{\\text{8}}", "77_8"), ("8:05 PM", "\\text{8:05 p.m.}"), ("Bo has 6 hens", "6"), ("2 + 4 = 6 eggs", "6"),
    ("\\\\frac{1}{3}", "\\frac{1}{3}"), ("3²", "3^{2}"), ("100,200", "100, 200"), ("5\\times10^{3}", "5000"),
]
LIBRARY_DECIDES = [
    ("\\sqrt{18}", "3\\sqrt{2}"), ("(u+1)^2", "u^2+2u+1"), ("7-3i", "-3i+7"), ("\\frac{\\pi}{2}", "90^\\circ"),
    ("2x - y = 3", "y = 2x - 3"), ("1.5\\pi", "\\frac{3\\pi}{2}"), ("\\tan a\\cos a", "\\sin a"), ("6+9c", "9c + 6"),
]
DIFFERENT = [
    ("", "3"), ("4", "5"), ("1234", "12.34"), ("2500", "25\\%"), ("0.333333", "\\frac13"), ("1.4142", "\\sqrt2"),
    ("5 cm", "5 m"), ("9 ft^2", "9 ft^3"), ("a=4", "b=4"), ("77_8", "77_9"), ("77", "77_8"), ("[2,3]", "(2,3)"),
    ("(3,2)", "(2,3)"), ("2,3", "2,3,4"), ("3 or 4", "3"), ("not 3", "3"), ("\\text{odd or even}", "odd"),
    ("B", "(C)"), ("3!", "6"), ("2+4", "6"), ("\\sqrt{49}", "7"), ("7\\sqrt{2}", "7\\sqrt{3}"), ("x+1", "y+1"),
    ("x=3, y=4", "x=4, y=3"), ("2x+4y=6", "x+2y=3"), ("\\frac{1}{900!}", "\\frac{1}{901!}"), ("1:2", "2:1"),
    ("\\begin{pmatrix}1&2\\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
    ("x < 2", "x > 2"), ("-221_4", "-221_3"),
]


@pytest.mark.parametrize(("answer", "label"), RULES_DECIDE)
def test_rules_find_equal_answers_without_the_library(answer: str, label: str) -> None:
    def no_leaf(first: str, second: str) -> bool:
        raise AssertionError(f"{first} and {second} reached the library")
    assert equality.equal(answer, label, no_leaf)


@pytest.mark.parametrize(("answer", "label"), LIBRARY_DECIDES)
def test_library_finds_equal_expressions(grader: Grader, answer: str, label: str) -> None:
    assert grader.compare(answer, label) == "right"


@pytest.mark.parametrize(("answer", "label"), DIFFERENT)
def test_different_answers_are_wrong(grader: Grader, answer: str, label: str) -> None:
    assert grader.compare(answer, label) == "wrong"


@pytest.mark.parametrize(("response", "label", "right"), [
    ("\\boxed{0.001}", "0.004", False),                     # rounded to two places these were equal
    ("\\boxed{1/3}", "0.33", False),
    ("\\boxed{1,2}", "2,1,1", False),                       # a list has its members as often as they are in it
    ("\\boxed{(1, 2)}", "(2, 1)", False),
    ("\\boxed{3} and so \\boxed{4}", "4", True),            # the last box, not the first
    ("\\boxed{3} and so \\boxed{4}", "3", False),
    ("\\boxed{\\frac{1}{2}} of {all}", "0.5", True),        # braces are matched
    ("\\boxed{\\frac12}", "0.5", True),
    ("\\boxed{x^2+1}", "1+x^2", True),
    ("The answer is 27", "27", True),                       # without a box
    ("\\boxed{9^{9^{9}}}", "5", False),
])
def test_scdpo_23_scorer_where_the_published_one_errs(grader: Grader, response: str, label: str, right: bool) -> None:
    assert (grader.grade_one(response, label).outcome == "right") == right


def test_votes_count_equal_answers_in_both_directions(grader: Grader) -> None:
    assert grader.equal("2^{10}", "1024") and grader.equal("1024", "2^{10}")
    assert not grader.equal("2^{10}", "1025")


def test_every_response_gets_a_verdict() -> None:
    with Grader("toy") as grader:
        verdicts = grader.grade(["#### 4", "4", "#### 5", ""], ["4", "4", "4", "4"])
    unparsed = Verdict("unparsed", None)
    assert verdicts == [Verdict("right", "4"), unparsed, Verdict("wrong", "5"), unparsed]
    with pytest.raises(ValueError):
        grader.grade(["a", "b"], ["4"])


def test_rules_start_no_process() -> None:
    with Grader("GSM8K") as grader:
        grader.grade(["#### 4", "#### 1,000"], ["4.0", "1000"])
        assert grader.workers[0].process is None


def test_timeout_is_a_verdict_and_the_next_answer_is_graded() -> None:
    with Grader("MATH", seconds=1.5) as grader:
        responses = [f"\\boxed{{{answer}}}" for answer in (HOSTILE[0], "x(x+1)")]
        started = time.monotonic()
        verdicts = grader.grade(responses, [HOSTILE[1], "x^2+x"])
        assert [verdict.outcome for verdict in verdicts] == ["timeout", "right"]
        assert time.monotonic() - started < 20       # most of it the start of the process
        assert grader.compare(*HOSTILE) == "timeout"     # from the cache


def by_library(grader: Grader, answer: str, label: str, seconds: float = 30.0) -> object:
    """What the process says, whatever rules would."""
    return grader.ask({"answer": answer, "label": label}, seconds)


def test_a_worker_that_no_alarm_reaches_is_killed_and_replaced() -> None:
    with Grader("MATH") as grader:
        assert by_library(grader, "x+1", "1+x") == "right"
        first, started = grader.workers[0].process, time.monotonic()
        with pytest.raises(Undecided, match="timeout|error"):      # error where the memory limit strikes first
            by_library(grader, *TOWER, 1.0)
        assert time.monotonic() - started < 5
        assert by_library(grader, "x+1", "1+x") == "right"
        assert grader.workers[0].process is not first or first.poll() is None


def test_a_dead_worker_counts_as_an_error_once() -> None:
    with Grader("MATH") as grader:
        assert by_library(grader, "x+1", "1+x") == "right"
        process = grader.workers[0].process
        threading.Timer(0.5, os.kill, (process.pid, signal.SIGKILL)).start()
        with pytest.raises(Undecided, match="error"):
            by_library(grader, *HOSTILE)
        assert by_library(grader, "x+1", "1+x") == "right"
        assert process.poll() == -signal.SIGKILL


def test_worker_keeps_the_prints_of_libraries_out_of_its_replies() -> None:
    code = "import src.grading.worker as w\n" \
           "right = w.compare\n" \
           "w.compare = lambda a, b: print('{\"id\": 1, \"outcome\": \"right\"}') or right(a, b)\n" \
           "w.serve(w.start)\n"
    request = json.dumps({"id": 1, "answer": "x", "label": "y", "seconds": 5})
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, input=request + "\n", capture_output=True,
                          text=True, timeout=60, check=True)
    assert [json.loads(line) for line in done.stdout.splitlines()] == [{"id": "ready"}, {"id": 1, "outcome": "wrong"}]


def test_threads_share_a_grader() -> None:
    pairs = [(f"({n}+x)^2", f"x^2+{2 * n}x+{n * n + n % 2}") for n in range(1, 25)]
    responses, labels = [f"\\boxed{{{answer}}}" for answer, _ in pairs], [label for _, label in pairs]
    with Grader("MATH", workers=2) as grader:
        verdicts = grader.grade(responses, labels)
    assert [verdict.outcome for verdict in verdicts] == ["wrong" if n % 2 else "right" for n in range(1, 25)]


@pytest.mark.parametrize("answer", [
    "__import__('os').mkdir('made_by_an_answer')", "open('made_by_an_answer','w')", "exit()",
    "[x for x in range(10**9)]", "\\text{exec(open('made_by_an_answer','w'))}+x", "{" * 3000, "\\frac{1}{" * 200,
    "=" * 3999, "The final answer is" * 200, "\x00", "\\(" * 1900, "9" * 200_000,
])
def test_hostile_answers_are_wrong_and_leave_nothing(grader: Grader, answer: str) -> None:
    started = time.monotonic()
    assert grader.compare(answer, "x^2+7") == "wrong"
    assert time.monotonic() - started < 10
    assert not (REPO / "made_by_an_answer").exists()


@pytest.mark.parametrize("piece", [
    "answer is **", "** _", "answer is ", "Answer: A, ", "(A) ", "#### ", "#### 1\n",
    "The final answer is ", "\\boxed{", "$", "1, ", "[ ", "-", "Q: a\n", "\\\\", "\n", "A: ", "$a$ and ", "\\(",
])
def test_extraction_is_linear(piece: str) -> None:
    for extraction in EXTRACTIONS:
        started = time.process_time()
        extract(extraction, piece * (200_000 // len(piece)) + ".")
        assert time.process_time() - started < 5


@pytest.mark.parametrize(("response", "letters"), [("Answer: ${}5", None), ("Answer: A{}or B", "A, B")])
def test_blanks_next_to_letters_take_no_time(response: str, letters: str | None) -> None:
    started = time.process_time()
    assert extract("choice/letter@5", response.format(20_000 * " ")).answer == letters
    assert time.process_time() - started < 1


def labelled(name: str) -> list[dict[str, str | bool]]:
    return [json.loads(line) for line in (SHARED / "grading" / name).read_text().splitlines()]


def outcomes(rows: list[dict[str, str | bool]], seconds: float) -> list[str]:
    with Grader("MATH", seconds=seconds) as math, Grader("GSM8K") as gsm8k:
        graders = {"math": math, "gsm8k": gsm8k}
        return [
            graders[row["task"]].compare(row["prediction"], row["gold"]) if row["form"] == "answer"
            else graders[row["task"]].grade_one(row["prediction"], row["gold"]).outcome
            for row in rows
        ]


@shared_data
def test_agreement_with_labelled_answers() -> None:
    rows = labelled("cases.jsonl")
    found = [outcome == "right" for outcome in outcomes(rows, seconds=5.0)]
    wrong = [row["id"] for row, right in zip(rows, found, strict=True) if right != row["correct"]]
    false_right = [row["id"] for row, right in zip(rows, found, strict=True) if right and not row["correct"]]
    assert len(wrong) <= 0.01 * len(rows), wrong
    assert len(false_right) <= 0.005 * sum(not row["correct"] for row in rows), false_right


@shared_data
def test_hostile_collection_is_survived() -> None:
    rows = labelled("robustness.jsonl")
    with Grader("MATH", seconds=1.0) as math, Grader("GSM8K", seconds=1.0) as gsm8k:
        for row in rows:
            grader = math if row["task"] == "math" else gsm8k
            started = time.monotonic()
            outcome = (grader.compare(row["prediction"], row["gold"]) if row["form"] == "answer"
                       else grader.grade_one(row["prediction"], row["gold"]).outcome)
            assert (outcome == "right") == row["correct"], row["id"]
            assert time.monotonic() - started < 8, row["id"]        # the limit and one start of a process
        assert math.compare("v(v+2)", "v^2+2v") == "right"


def test_of_a_solution_with_code_the_last_text_is_read() -> None:
    response = "<|code|>print(2)<|endofblock|><|execution|>2<|endofblock|><|text|>So it is.<|endofblock|>"
    with Grader("GSM8K") as grader:
        assert grader.answer("It is 2.") == "2" and grader.answer(response) is None
        assert grader.grade_one(response, "2") == Verdict("unparsed", None)


def test_a_long_response_is_searched_in_a_process_under_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    long = "So on and on. " * 5000
    with Grader("MATH", seconds=4.0) as math, Grader("MATH-weak-to-strong") as published:
        assert math.grade_one(long + "\\boxed{x(x+1)}", "x^2+x") == Verdict("right", "x(x+1)")
        assert published.grade_one(long + "\nThe answer is: 1,250", "1250") == Verdict("right", "1250")
        assert math.answer(long + "#### 4") == "4" and math.answer(long) is None
        monkeypatch.setattr(math, "seconds", 1e-4)
        assert math.grade_one(long + "\\boxed{4}", "4") == Verdict("timeout", None)


@pytest.mark.parametrize("piece", [
    " ", ". ", "; ", "$ ", "$", "\\(", "\\[", "\\sqrt(", "√(", "sqrt(", "²", "½", "1=", "x=", "*", "\\boxed{1} or ",
    "1 ", "111 ", "0.3", "0.\\overline{3}", "one ", "two hundred ", "minus ", "1 million ", "km/", "\\\\[1", "\\text{",
    "\\frac{", "x\\ne1,", "\\pm", "\\sin{{}", "\\text{{}", "x<1,", "{a\\choose ", "a\\cdot ", "(1,2) or ",
])
def test_comparison_of_the_longest_answers_takes_no_time(piece: str) -> None:
    started = time.process_time()
    for before, after in (("", ""), ("1", " x")):
        answer = before + piece * (3900 // len(piece)) + after
        for label in ("5", "x+1", "\\$5"):
            assert not equality.equal(answer, label, lambda first, second: False)
        equality.equal("5", answer, lambda first, second: False)
    assert time.process_time() - started < 5
