"""src/report/: the page of a run, clicked through in a browser where there is one."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import solver_evaluate
from src.errors import UserError
from src.report.page import LARGEST, answer_span, write_report
from tests.report.browser import CHROMIUM, Browser

ROOT = Path(__file__).resolve().parents[2]
PROBLEMS = [
    {"id": "a", "instruction": "One and one?", "label": "2", "level": 1, "subject": "sums"},
    {"id": "b", "instruction": "A thousand </script> times 1,234?", "label": "1234000", "level": 2, "subject": "times"},
    {"id": "c", "instruction": "Three and three?", "label": "6", "level": 1, "subject": "sums"},
]
FIRST = {"a": ["1+1=2\n#### 2", "it is 3\n#### 3"], "b": ["#### 1,234,000", "so\n#### 7"], "c": ["no idea", "#### 5"]}
SECOND = {"a": ["#### 9", "#### 8"], "b": ["#### 1234000", "#### 1,234,000"], "c": ["#### 6", "#### 6"]}


def evaluate(folder: Path, responses: dict[str, list[str]]) -> Path:
    """What solver_evaluate.py leaves of these responses, graded."""
    folder.mkdir()
    (folder / "labels.json").write_text(json.dumps(PROBLEMS), encoding="utf-8")
    rows = [{"id": name, "sample": place, "response": text, "finish": "stop" if place else "length", "token_count": 9}
            for name, texts in responses.items() for place, text in enumerate(texts)]
    (folder / "given.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    command = [sys.executable, "solver_evaluate.py", "--task", "GSM8K", "--log_dir", folder / "log", "--label_file",
               folder / "labels.json", "--samples_file", folder / "given.jsonl"]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and f"look at     {folder}/log/report.html" in done.stdout, done.stderr
    return folder / "log"


@pytest.fixture(scope="module")
def evaluations(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("report")
    return evaluate(folder / "first", FIRST), evaluate(folder / "second", SECOND)


@pytest.fixture
def rl_run(tmp_path: Path) -> Path:
    """A run of two buffers, the second with an alarm."""
    folder = tmp_path / "run"
    (folder / "rollouts").mkdir(parents=True)
    rows = [{"step": step, "seconds": 60.0 * step, "reward": step / 4, "kl": 0.1, "policy_loss": float("nan"),
             "seconds_sample": 2.0} for step in (1, 2)]
    rows[1]["alarms"] = {"far away": "lower --lr"}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for step in (1, 2):
        row = {"id": "a", "prompt": "One and one?", "label": "2", "response": "it is 2", "rewards": {"rule": 1.0},
               "kl": 0.3, "tokens": 3, "finished": True, "learned": True, "pieces": ["it", " is", f" {step}"],
               "token_kl": [0.1, -0.4, 0.6], "advantages": [1.0, 0.0, -1.0]}
        (folder / f"rollouts/step-{step:06}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    return folder


def page_data(page: Path) -> dict[str, object]:
    """The json that stands in a page."""
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"(?:src|href)=|https?://(?!www\.w3\.org/2000/svg)", text)  # it needs nothing else
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)[1])


def test_where_an_answer_was_read() -> None:
    assert answer_span("we have 1,234 and #### $1,234,000", "1234000") == (24, 33)
    assert answer_span("12 then 2 and 0.2", "2") == (8, 9)  # neither in 12 nor in 0.2
    assert answer_span(r"so \boxed{\frac{1}{2}}", r"\frac{1}{2}") == (10, 21)
    assert answer_span("one half", "1/2") is None
    assert answer_span(40 * "!" + " The answer is " + 60 * "!", 60 * "!") == (55, 115)  # without trying every way


def test_a_page_holds_the_figures_and_every_problem(evaluations: tuple[Path, Path]) -> None:
    data = page_data(evaluations[0] / "report.html")
    [run] = data["runs"]
    results = json.loads((evaluations[0] / "results.json").read_text(encoding="utf-8"))
    figures = {figure["label"]: figure["value"] for figure in run["figures"]}
    assert figures["accuracy"] == results["accuracy"] == pytest.approx(1 / 3)
    assert figures["samples"] == "2 right, 3 wrong, 1 unparsed"
    assert [problem["level"] for problem in data["problems"]] == [1, 2, 1]
    first = data["problems"][1]["runs"][0][0]
    assert first["response"][slice(*first["span"])] == "1,234,000"
    assert first["reason"] == "1,234,000 equals 1234000, read by hashes"


def test_a_missing_sample_is_wrong_in_a_comparison_too(evaluations: tuple[Path, Path], tmp_path: Path) -> None:
    for run, folder in zip(evaluations, ("first", "second"), strict=True):
        shutil.copytree(run, tmp_path / folder)
    rows = (tmp_path / "second/samples.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "second/samples.jsonl").write_text("".join(rows[:-1]), encoding="utf-8")  # one right of two
    told = page_data(write_report(tmp_path / "second", tmp_path / "first"))["comparison"]
    assert told.startswith("Of 3 problems that both have, the second run solves 1 more often and 2 less often: -16.7%")


def test_a_problem_without_samples_is_unsolved_in_a_comparison(evaluations: tuple[Path, Path], tmp_path: Path) -> None:
    """One of three solved, and the two others lost; of other label files only what both have is compared."""
    less = evaluate(tmp_path / "less", {"a": SECOND["a"]})
    told = page_data(write_report(evaluations[1], less))["comparison"]
    assert told.startswith("Of 3 problems that both have, the second run solves 0 more often and 2 less often: -66.7%")
    (results := json.loads((less / "results.json").read_text())).update(problems=4)
    (less / "results.json").write_text(json.dumps(results))
    assert page_data(write_report(evaluations[1], less))["comparison"].startswith("Of 1 problems that both have")


def shown(folder: Path, outcomes: str, *, rules: str = "gsm8k/last-number@5", **values: object) -> Path:
    """A graded evaluation, a letter for the one sample of each problem: r right, w wrong."""
    folder.mkdir()
    results = {"samples_a_problem": 1, "rules": {"extraction": rules}}
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    rows = [{"id": str(place), "prompt": f"{place}?", "response": "it is 7", "answer": "7", "label": "7",
             "outcome": {"r": "right", "w": "wrong"}[letter], **values} for place, letter in enumerate(outcomes)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.mark.parametrize("before, after, told", [
    ("rwww", "rwww", "+0.0% (95% interval of the paired difference -70.0% .. +70.0%)"),  # 2 of 4 by Wilson, as -1 .. 1
    ("rrrr", "wwww", "-100.0% (95% interval of the paired difference -100.0% .. -2.0%)"),
    ("wwwwwwwwww", "wwwwwwwwwr", "+10.0% (95% interval of the paired difference +0.0% .. +30.0%)"),
])
def test_a_paired_difference_may_be_negative(before: str, after: str, told: str, tmp_path: Path) -> None:
    page = write_report(shown(tmp_path / "before", before), shown(tmp_path / "after", after))
    assert page_data(page)["comparison"].endswith(f": {told}.")


def test_other_problems_of_the_same_ids_are_not_compared(tmp_path: Path) -> None:
    first = shown(tmp_path / "first", "rw")
    second = shown(tmp_path / "second", "ww", prompt="another?")
    rows = (second / "samples.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (second / "samples.jsonl").write_text(rows[0] + rows[1].replace("another?", "1?"), encoding="utf-8")
    data = page_data(write_report(first, second))
    assert data["comparison"].startswith("Of 1 problems that both have") and data["n_problems"] == 3
    assert [(problem["prompt"], [len(samples) for samples in problem["runs"]]) for problem in data["problems"]] == [
        ("0?", [1, 0]), ("1?", [1, 1]), ("another?", [0, 1])]


def test_a_script_marks_the_answer_behind_characters_of_two_halves(tmp_path: Path) -> None:
    page = write_report(shown(tmp_path / "run", "r", response="\U0001d465 = \U0001f600 7"))
    [[sample]] = page_data(page)["problems"][0]["runs"]
    halves = sample["response"].encode("utf-16-le")
    assert halves[2 * sample["span"][0] : 2 * sample["span"][1]].decode("utf-16-le") == "7"


def test_levels_are_found_in_columns_of_other_names(tmp_path: Path) -> None:
    labels, folder = tmp_path / "labels.json", shown(tmp_path / "run", "r", prompt="1+6?")
    labels.write_text(json.dumps([{"question": "1+6?", "label": "7", "difficulty": 3}]), encoding="utf-8")
    flags = {"label_file": str(labels), "columns": ["question=instruction", "difficulty=level"]}
    (folder / "run.json").write_text(json.dumps({"flags": flags}), encoding="utf-8")
    assert page_data(write_report(folder))["problems"][0]["level"] == 3
    solver_evaluate.main(solver_evaluate.SolverEvaluateConfig(
        task="GSM8K", samples_file=str(folder / "samples.jsonl"), log_dir=str(tmp_path / "log"), **flags))
    assert page_data(tmp_path / "log/report.html")["problems"][0]["level"] == 3


def test_what_an_older_version_graded_has_a_page(tmp_path: Path) -> None:
    page = write_report(shown(tmp_path / "run", "r", rules="gsm8k/last-number@1"))
    assert page_data(page)["problems"][0]["runs"][0][0]["reason"] == "7 equals 7, read by gsm8k/last-number@1"


def test_figures_beside_samples_of_another_kind_have_a_page(tmp_path: Path) -> None:
    folder = shown(tmp_path / "run", "r")
    (folder / "results.json").write_text(json.dumps({"with_a_wrong_step": 1}), encoding="utf-8")
    assert page_data(write_report(folder))["problems"] == []


def test_a_large_evaluation_leaves_problems_out_evenly(evaluations: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "results.json").write_bytes((evaluations[0] / "results.json").read_bytes())
    rows = ({"id": str(place), "sample": 0, "prompt": "p", "response": f"{place} " + "\u00e9<" * 3000, "label": "1",
             "answer": None, "outcome": "unparsed"} for place in range(900))
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    page = write_report(tmp_path)
    data = page_data(page)
    kept = [int(problem["id"]) for problem in data["problems"]]
    assert 0.5 * LARGEST < page.stat().st_size <= LARGEST and data["n_problems"] == 900
    gaps = {after - before for before, after in zip(kept, kept[1:], strict=False)}
    assert kept[0] == 0 and kept[-1] == 899 and max(gaps) - min(gaps) <= 1


def test_a_training_run_has_no_problems(rl_run: Path) -> None:
    labels = rl_run / "labels.json"
    labels.write_text(json.dumps([{"messages": [{"role": "user", "content": "a"}]}]), encoding="utf-8")
    (rl_run / "run.json").write_text(json.dumps({"flags": {"label_file": str(labels)}}), encoding="utf-8")
    assert page_data(write_report(rl_run))["problems"] == []


def test_runs_that_cannot_be_shown_are_refused(evaluations: tuple[Path, Path], rl_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds neither results.json nor metrics.jsonl"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="have no problem in common"):
        write_report(rl_run, evaluations[0])


needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium")


@needs_browser
def test_problems_are_filtered_and_opened(evaluations: tuple[Path, Path], tmp_path: Path) -> None:
    with Browser(evaluations[0] / "report.html", tmp_path) as page:
        rows = "[...document.querySelectorAll('#problems > tr.row')].map((row) => row.cells[0].textContent).join()"
        assert page.run(rows) == "a,b,c" and page.run("document.querySelectorAll('.chart polyline').length") == 2

        def choose(label: str, value: str) -> object:
            return page.run(f"""(() => {{ const box = document.querySelector('select[aria-label="{label}"]');
                box.value = "{value}"; box.dispatchEvent(new Event("change")); return {rows}; }})()""")

        assert choose("any outcome", "none right") == "c" and choose("any outcome", "some right") == "a,b"
        assert choose("any level", "2") == "b" and choose("any level", "") == "a,b"
        assert choose("any subject", "sums") == "a" and choose("any subject", "") == "a,b"
        search = "(() => { const box = document.querySelector('input'); box.value = 'TIMES'; " \
                 f"box.dispatchEvent(new Event('input')); return {rows}; }})()"
        assert page.run(search) == "b"
        page.run("document.querySelector('#problems > tr.row').click()")
        marks = "[...document.querySelectorAll('.sample mark')].map((mark) => mark.textContent).join('|')"
        assert page.run(marks) == "1,234,000|7"
        assert "</script>" in page.run("document.querySelector('.problem').textContent")
        page.run("document.querySelector('#problems > tr.row').click()")
        assert page.run("document.querySelectorAll('.detail').length") == 0


@needs_browser
def test_two_runs_are_compared(evaluations: tuple[Path, Path], tmp_path: Path) -> None:
    page_file = write_report(*evaluations)
    with Browser(page_file, tmp_path) as page:
        told = page.run("document.querySelector('#comparison').textContent")
        assert "Of 3 problems that both have, the second run solves 2 more often and 1 less often: +33.3%" in told
        found = page.run("""(() => { const box = document.querySelector('select'); box.value = "lost";
            box.dispatchEvent(new Event("change")); return document.querySelector('#problems').textContent; })()""")
        assert found == "aA 1 of 2 rightB 0 of 2 rightOne and one?2"


@needs_browser
def test_a_sample_that_is_missing_is_not_right(evaluations: tuple[Path, Path], tmp_path: Path) -> None:
    for run, folder in zip(evaluations, ("first", "second"), strict=True):
        shutil.copytree(run, tmp_path / folder)
    rows = (tmp_path / "second/samples.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "second/samples.jsonl").write_text("".join(rows[:3]), encoding="utf-8")  # one right of b, none of c
    with Browser(write_report(tmp_path / "first", tmp_path / "second"), tmp_path / "profile") as page:
        def found(kind: str) -> str:
            return page.run(f"""(() => {{ const box = document.querySelector('select'); box.value = "{kind}";
                box.dispatchEvent(new Event("change"));
                return document.querySelector('#problems').textContent; }})()""")

        assert found("gained") == "" and found("lost") == "aA 1 of 2 rightB 0 of 2 rightOne and one?2"
        assert found("all right") == "" and "bA 1 of 2 rightB 1 of 2 right" in found("some right")
        assert found("none right") == "cA 0 of 2 rightB 0 of 2 rightThree and three?6"


@needs_browser
def test_curves_alarms_and_tokens_of_a_run(rl_run: Path, tmp_path: Path) -> None:
    with Browser(write_report(rl_run), tmp_path) as page:
        titles = page.run("[...document.querySelectorAll('.chart h3')].map((title) => title.textContent).join()")
        assert titles == "reward,kl,seconds_sample"  # a metric without a number has no picture
        assert page.run("document.querySelectorAll('.chart .alert').length") == 3
        token = "document.querySelectorAll('#rollouts .step')[1].title"
        assert page.run(token) == "advantage 0"
        page.run("""(() => { const [buffer, by] = document.querySelectorAll('.controls select');
            buffer.selectedIndex = 0; buffer.dispatchEvent(new Event("change"));
            by.value = "token_kl"; by.dispatchEvent(new Event("change")); })()""")
        assert page.run(token) == "KL -0.4"
        assert page.run("document.querySelector('#rollouts pre').textContent") == "it is 1"
