"""Grade a file of answers, or measure the grader beside math-verify.

python benchmarks/grade.py --cases answers.jsonl --out graded.jsonl
python benchmarks/grade.py --data_dir ../shared/data

Cases are rows {"id", "task", "prediction", "gold", "form": "answer"|"response"}; task is gsm8k, math or any other name
that solver_evaluate.py knows. An answer is compared as it is, a response goes through the task's extraction first;
`correct` is the label of the comparison. The tables print agreement with the labels, false positives and negatives,
answers/s of both graders on the same rows in turn, the worst case, and the memory of the expressions' process.
"""

import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's own folder is on the path, ours is not

import math_verify  # noqa: E402

from src import runlog  # noqa: E402
from src.command import cli  # noqa: E402
from src.data.examples import Row, read_rows  # noqa: E402
from src.errors import UserError  # noqa: E402
from src.evaluation.evaluator import write_samples  # noqa: E402
from src.grading.extract import extract  # noqa: E402
from src.grading.grader import Grader  # noqa: E402

TURNS = 8       # the rows are cut in so many pieces; both graders take each piece before the next
MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


class Case(NamedTuple):
    """One answer to grade; correct is its label where it has one."""

    id: str
    task: str
    prediction: str
    gold: str
    form: str
    correct: bool | None


class Result(NamedTuple):
    """What a grader said of a case, and how long it took."""

    outcome: str
    seconds: float


Grade = Callable[[Case], str]  # -> outcome


def read_case(row: Row) -> Case:
    """A row of the cases file. Raises UserError for a missing key or an unknown form."""
    for key in ("id", "task", "prediction", "gold", "form"):
        if key not in row.values:
            raise UserError(f"{row.where}: key {key!r} is missing; found {', '.join(row.values)}")
    case = Case(*(str(row.values[key]) for key in Case._fields[:5]), row.values.get("correct"))
    if case.form not in ("answer", "response"):
        raise UserError(f"{row.where}: 'form' is {case.form!r}; expected answer or response")
    return case


@contextmanager
def our_grader(cases: Sequence[Case]) -> Iterator[Grade]:
    """The default rules of each task named in the cases, each with one process for expressions."""
    with ExitStack() as stack:
        graders = {task: stack.enter_context(Grader(task)) for task in {case.task for case in cases}}

        def grade(case: Case) -> str:
            grader = graders[case.task]
            if case.form == "answer":
                return grader.compare(case.prediction, case.gold)
            return grader.grade_one(case.prediction, case.gold).outcome

        yield grade


def math_verify_grade(case: Case) -> str:
    """math-verify as its README says: both sides parsed by its defaults, the gold as inline LaTeX."""
    gold = math_verify.parse(f"${case.gold}$")
    text = f"${case.prediction}$" if case.form == "answer" else case.prediction
    return "right" if math_verify.verify(gold, math_verify.parse(text)) else "wrong"


def timed(grade: Grade, cases: Sequence[Case]) -> list[Result]:
    """Grade the cases one after the other."""
    results = []
    for case in cases:
        started = time.perf_counter()
        outcome = grade(case)
        results.append(Result(outcome, time.perf_counter() - started))
    return results


def labelled_table(path: Path) -> str:
    """Agreement with the labels, by task and form, and answers/s."""
    cases = [read_case(row) for row in read_rows(str(path))]
    lines = [f"{len(cases)} labelled cases", f"{'':36}ours                     math-verify {version('math-verify')}"]
    results: dict[str, list[Result]] = {"ours": [], "math-verify": []}
    size = -(-len(cases) // TURNS)
    with our_grader(cases) as ours:
        for task in sorted({case.task for case in cases}):  # start the processes before the clock does
            ours(Case("", task, "x+1", "1+x", "answer", True))
        for start in range(0, len(cases), size):  # in turns: both meet the same moods of the machine
            for name, grade in (("ours", ours), ("math-verify", math_verify_grade)):
                results[name] += timed(grade, cases[start : start + size])
    for name, keep in (
        ("all", lambda case: True),
        ("gsm8k responses", lambda case: case.task == "gsm8k"),
        ("math answers", lambda case: case.task == "math" and case.form == "answer"),
        ("math responses", lambda case: case.task == "math" and case.form == "response"),
    ):
        places = [index for index, case in enumerate(cases) if keep(case)]
        cells = [summary([cases[i] for i in places], [rows[i] for i in places]) for rows in results.values()]
        lines.append(f"{name + f' ({len(places)})':24}" + "   ".join(cells))
    return "\n".join(lines)


def summary(cases: Sequence[Case], results: Sequence[Result]) -> str:
    """Agreement, false positives and negatives, speed and the slowest answer of one grader on some cases."""
    said = Counter((result.outcome == "right", case.correct) for case, result in zip(cases, results, strict=True))
    false_right, false_wrong = said[True, False], said[False, True]
    seconds = [result.seconds for result in results]
    return (f"{1 - (false_right + false_wrong) / len(cases):7.2%} fp {false_right:3d} fn {false_wrong:3d} "
            f"{len(cases) / sum(seconds):7.0f}/s worst {max(seconds):.2f} s")


def robustness_table(path: Path) -> str:
    """Hostile answers: verdicts, the slowest one, and whether the process still works after them."""
    cases = [read_case(row) for row in read_rows(str(path))]
    with our_grader(cases) as ours:
        results = timed(ours, cases)
        alive = ours(Case("", "math", "v(v+2)", "v^2+2v", "answer", True)) == "right"
    agree = sum((result.outcome == "right") == case.correct for case, result in zip(cases, results, strict=True))
    outcomes = Counter(result.outcome for result in results)
    return (f"{len(cases)} hostile cases: {agree} as labelled, outcomes {dict(outcomes)}, slowest "
            f"{max(result.seconds for result in results):.2f} s, pool {'alive' if alive else 'DEAD'} behind them, "
            f"peak of a worker {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024:.0f} MiB")


def weak_to_strong_table(path: Path) -> str:
    """Extractions and verdicts of weak-to-strong-reasoning, reproduced by the rules that carry its name."""
    rows = [row.values for row in read_rows(str(path))]
    answers = [extract("weak-to-strong/hashes@1", row["response"]).answer or "" for row in rows]
    same_answer = sum(answer == row["pred"] for answer, row in zip(answers, rows, strict=True))
    with Grader("GSM8K-weak-to-strong") as grader:
        same_verdict = sum((grader.compare(row["pred"], row["gold"]) == "right") == row["result"] for row in rows)
    return f"weak-to-strong: {same_answer} of {len(rows)} pred and {same_verdict} of {len(rows)} result reproduced"


def model_solutions_table(path: Path, test: Path) -> str:
    """is_correct of OpenAI's published model solutions, with every disagreement."""
    rows = [row.values for row in read_rows(str(path))]
    labels = [str(row.values["answer"]).rpartition("####")[2].strip() for row in read_rows(str(test))]
    lines, seconds = [], 0.0
    with Grader("GSM8K") as grader:
        for number, (row, label) in enumerate(zip(rows, labels, strict=True)):
            for model in MODELS:
                started = time.perf_counter()
                verdict = grader.grade_one(row[model]["solution"], label)
                seconds += time.perf_counter() - started
                if (verdict.outcome == "right") != row[model]["is_correct"]:
                    lines.append(f"  row {number} {model}: published {row[model]['is_correct']}, ours {verdict}, "
                                 f"label {label}, ends {row[model]['solution'][-60:]!r}")
    count = len(rows) * len(MODELS)
    head = f"GSM8K model solutions: is_correct of {count - len(lines)} of {count} reproduced, {count / seconds:.0f}/s"
    return "\n".join([head, *lines])


def gold_table(path: Path) -> str:
    """MATH's reference solutions graded against the content of their own last box, both as text and as answer."""
    rows = [row.values for row in read_rows(str(path))]
    golds = [extract("math/last-box@5", row["solution"]).answer or "" for row in rows]
    started = time.perf_counter()
    with Grader("MATH") as grader:
        verdicts = grader.grade([row["solution"] for row in rows], golds)
        seconds = time.perf_counter() - started
        answers = [grader.compare(str(row.get("answer", gold)), gold) for row, gold in zip(rows, golds, strict=True)]
    right = sum(verdict.outcome == "right" for verdict in verdicts)
    return (f"{path.name}: {right} of {len(rows)} solutions right against themselves, {answers.count('right')} bare "
            f"answers, {len(rows) / seconds:.0f}/s")


def main(cases: str = "", out: str = "", data_dir: str = "../shared/data") -> None:
    """Grade a file, or print the tables.

    cases: the answers to grade, jsonl; empty = the measurements on data_dir
    out: where the graded rows {"id", "result", "outcome", "seconds"} go; empty = a table beside math-verify
    data_dir: directory of grading/, weak_to_strong/, gsm8k/ and math/; what is not there is left out
    """
    if out and not cases:
        raise UserError("--out needs --cases, the file of answers to grade")
    if out:
        rows = [read_case(row) for row in read_rows(cases)]
        with our_grader(rows) as ours:
            results = timed(ours, rows)
        write_samples(Path(out), [
            {"id": case.id, "result": result.outcome == "right", "outcome": result.outcome,
             "seconds": round(result.seconds, 6)} for case, result in zip(rows, results, strict=True)])
        return
    if cases:
        runlog.table(labelled_table(Path(cases)))
        return
    data = Path(data_dir)
    gsm8k = (data / "gsm8k/example_model_solutions.jsonl", data / "gsm8k/test.jsonl")
    for table, *paths in (
        (labelled_table, data / "grading/cases.jsonl"),
        (robustness_table, data / "grading/robustness.jsonl"),
        (weak_to_strong_table, data / "weak_to_strong/llama2_7b_gsm8k_train_2_results.jsonl"),
        (model_solutions_table, *gsm8k),
        (gold_table, data / "math/test_5000.jsonl"),
        (gold_table, data / "math/math500.jsonl"),
    ):
        missing = [str(path) for path in paths if not path.is_file()]
        runlog.table(f"{missing[0]} is not there: left out" if missing else table(*paths))


if __name__ == "__main__":
    cli.run(main)
