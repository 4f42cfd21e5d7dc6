"""src/construct/steps.py and continuation.py: rollouts from every step, branches that go wrong, by a tiny model."""

import json
from pathlib import Path

import pytest

from src import load, parallel
from src.code_solutions.tool_hook import Coding
from src.construct.continuation import (
    ContinuationRequest,
    StepSampling,
    TemperatureSchedule,
    doubling_ranges,
    generate_continuations,
    generate_stepwise,
    replayable,
    split_into_steps,
    truncate_at_step,
)
from src.construct.solver import grader_of
from src.construct.steps import (
    beginnings,
    branch_points,
    choose_solutions,
    label_steps,
    step_controlled_pairs,
    truncate_everywhere,
)
from src.data.encoding import encode_prompt
from src.data.examples import Sample, read_pairs, read_samples, read_step_labels
from src.errors import UserError
from src.evaluation.evaluator import LocalSolver
from src.evaluation.prompting import make_prompting
from src.evaluation.report import type_of
from src.grading.answer_types import ANY, AnswerType
from src.grading.tasks import find_task
from src.inference.sampling import Sampling
from src.text.blocks import Marker
from src.training.preference import open_preferences
from tests.conftest import CODE_QUESTION, CODE_SOLUTION, Folders
from tests.ranks import succeed
from tests.tiny import build

RULES = {"extraction": "gsm8k/hashes@5", "equality": "exact@5"}
SOLUTION = "1+1 #### 2\n\n2+2=3 #### 3\n\na\n\n#### 4"  # until the last step its answer is another


def sample(name: str, number: int, response: str, outcome: str) -> Sample:
    values = {"id": name, "sample": number, "prompt": f"{name}+1=", "response": response, "label": "4",
              "outcome": outcome, "answer": "4"}
    return Sample(name, number, f"{name}+1=", response, outcome, values)


def log_dir(folder: Path, samples: list[Sample], rules: dict[str, str] = RULES) -> str:
    folder.mkdir()
    (folder / "samples.jsonl").write_text("".join(json.dumps(sample.values) + "\n" for sample in samples))
    (folder / "samples.identity.json").write_text(json.dumps({"checkpoint": "m"}))
    (folder / "results.json").write_text(json.dumps({"rules": rules}))
    return str(folder / "samples.jsonl")


@pytest.fixture
def solver(folders: Folders) -> LocalSolver:
    tokenizer = load.load_tokenizer(folders.one)
    return LocalSolver(load.load_solver(folders.one), tokenizer, make_prompting(find_task("toy")), 8)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (TemperatureSchedule(1.1, 0.1, 1.4), [1.1, 1.2, 1.3, 1.4, 1.4]),
        (TemperatureSchedule(1.0, 0.05, 1.3), [1.0, 1.05, 1.1, 1.15, 1.2, 1.25, 1.3, 1.3]),
        (TemperatureSchedule(1.0, 0.05, 1.2), [1.0, 1.05, 1.1, 1.15, 1.2, 1.2]),
        (TemperatureSchedule(1.1, 0.05, 1.4), [1.1, 1.15, 1.2, 1.25, 1.3, 1.35, 1.4, 1.4]),
    ],
)
def test_scdpo_13_temperatures_rise_to_their_cap(schedule: TemperatureSchedule, expected: list[float]) -> None:
    assert [schedule.at(step) for step in range(len(expected))] == pytest.approx(expected)


@pytest.mark.parametrize(("kinds", "points"), [("tcet", [1]), ("tcetcet", [1, 3, 4]), ("cet", []), ("t", [])])
def test_scdpo_12_code_is_not_left_before_its_output(kinds: str, points: list[int]) -> None:
    names = {"t": "text", "c": "code", "e": "execution"}
    solution = "".join(f"<|{names[kind]}|>{kind}<|endofblock|>" for kind in kinds)
    assert branch_points(split_into_steps(solution, Marker.END_OF_BLOCK)) == points


@pytest.mark.parametrize(("n", "points"), [(1, []), (2, []), (3, [1]), (4, [1, 2]), (7, [1, 2, 3, 4, 5])])
def test_scdpo_12_two_steps_at_least_are_left_out(n: int, points: list[int]) -> None:
    assert branch_points(["a\n\n"] * n) == points


def test_a_beginning_and_its_rest_are_the_solution() -> None:
    for item in truncate_everywhere([sample("0", 0, SOLUTION, "right")]).values():
        assert item.prefix + item.rest == SOLUTION
    found = truncate_everywhere([sample("0", 3, SOLUTION, "right")]).values()
    assert [item.prompt.id for item in found] == ["0/3/1", "0/3/2", "0/3/3"]


def test_a_beginning_that_solutions_share_is_judged_once() -> None:
    solutions = [sample("0", 0, "a\n\nb\n\n#### 4", "right"), sample("0", 1, "a\n\nc\n\n#### 5", "wrong"),
                 sample("1", 0, "a\n\n#### 4", "right")]
    names = [item.prompt.id for item in truncate_everywhere(solutions).values()]
    assert names == ["0/0/1", "0/0/2", "0/1/2", "1/0/1"]
    rollouts = [sample(name, 0, "", outcome)
                for name, outcome in zip(names, ("right", "right", "wrong", "wrong"), strict=True)]
    rows = label_steps(solutions, rollouts, hard=True)
    assert [row["labels"] for row in rows] == [[1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [1.0, 1.0]]
    soft = label_steps(solutions, rollouts, hard=False)
    assert [row["labels"] for row in soft] == [[1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0]]


def test_a_beginning_is_right_when_a_longer_one_or_a_solution_behind_it_is() -> None:
    solutions = [sample("0", 0, "a\n\nb\n\nc\n\n#### 5", "wrong"), sample("0", 1, "a\n\nd\n\n#### 4", "right"),
                 sample("0", 2, "e\n\n#### 4", "wrong")]
    rollouts = [sample(name, number, "", outcome)
                for name, outcomes in {"0/0/1": ("wrong",), "0/0/2": ("wrong",), "0/0/3": ("wrong", "right"),
                                       "0/1/2": ("wrong",)}.items()
                for number, outcome in enumerate(outcomes)]
    rows = label_steps(solutions, rollouts, hard=True)
    assert [row["labels"] for row in rows] == [[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [None, 0.0]]


def test_continuing_greedily_gives_what_was_cut_off(solver: LocalSolver) -> None:
    greedy = Sampling(temperature=0.0, max_new_tokens=12)
    (whole,) = generate_continuations(solver, [ContinuationRequest("x", 0, "1+1=", "12\n\n")], greedy)
    ids = encode_prompt(solver.tokenizer, "1+1=", "12\n\n")
    assert ids == [1, *solver.tokenizer.encode("1+1="), *solver.tokenizer.encode("12\n\n")]
    assert whole.n_tokens <= 12 and whole.end in ("eos", "length")
    (full,) = generate_continuations(solver, [ContinuationRequest("x", 0, "1+1=", "12" * 80)], greedy)
    assert (full.end, full.text) == ("context full", "")


def test_steps_do_not_depend_on_what_else_is_asked(solver: LocalSolver) -> None:
    asked = [ContinuationRequest(str(n), n % 2, f"{n}+1=", "1\n\n" * (n % 3)) for n in range(5)]
    sampling = StepSampling(TemperatureSchedule(1.0, 0.1, 1.2), max_steps=3, max_new_tokens=8, seed=7)
    together = generate_stepwise(solver, asked, sampling)
    for item in asked:
        alone = generate_stepwise(solver, [item], sampling)[item]
        assert (alone.text, alone.end) == (together[item].text, together[item].end)


def test_labels_by_hand() -> None:
    solution = sample("0", 0, SOLUTION, "wrong")
    outcomes = {1: ["right", "wrong"], 2: ["wrong", "unparsed"], 3: []}
    rollouts = [sample(f"0/0/{k}", n, "", x) for k, given in outcomes.items() for n, x in enumerate(given)]
    rollouts.append(sample("0/0/3", 0, "", "timeout"))  # the grader's own failure says nothing of the step
    (soft,) = label_steps([solution], rollouts, hard=False)
    (hard,) = label_steps([solution], rollouts, hard=True)
    assert soft["labels"] == [0.5, 0.0, None, 0.0] and hard["labels"] == [1.0, 0.0, None, 0.0]
    assert soft["steps"] == SOLUTION.split("\n\n")


def test_the_rest_of_a_solution_is_graded_by_the_type_of_its_answer() -> None:
    (cut,) = truncate_everywhere([sample("0", 0, "a\n\n#### 4", "right")]).values()
    assert type_of(cut.prompt) == ANY
    typed = sample("0", 0, "a\n\n#### 4", "right")
    typed.values.update(answer_type="number", tolerance=0.5)
    assert type_of(truncate_at_step(typed, 1).prompt) == AnswerType("number", 0.5)


def test_solutions_without_an_answer_are_judged_too() -> None:
    samples = [
        sample("0", number, f"a{number}\n\n#### 4", outcome)
        for number, outcome in enumerate(("wrong", "unparsed", "right", "error", "unparsed"))
    ]
    assert [item.sample for item in choose_solutions(samples, 3)] == [0, 1, 2]
    assert [item.sample for item in choose_solutions(samples, 9)] == [0, 1, 2, 4]
    (row,) = label_steps(samples[1:2], [], hard=True)
    assert row["labels"] == [None, 0.0]


PROCESS = {"rollouts": 3, "max_new_tokens": 12, "temperature": 1.0, "max_batch_size": 8}


def test_process_judges_steps_and_continues(folders: Folders, tmp_path: Path) -> None:
    samples = [
        sample(str(n), k, SOLUTION + "0" * k, ("right", "wrong")[k]) for n in range(2) for k in range(2)
    ]
    source, save_file = log_dir(tmp_path / "log", samples), tmp_path / "steps.json"
    process = lambda name, **more: build.process(  # noqa: E731
        "toy", source, str(tmp_path / name), str(save_file), folders.one, **PROCESS | more
    )
    process("a")
    expected, rollouts = save_file.read_bytes(), (tmp_path / "a/samples.jsonl").read_bytes()
    rows = list(read_step_labels(str(save_file)))
    assert len(rows) == 4 and all(len(row.labels) == 4 for row in rows)
    assert [row.labels[-1] for row in rows] == [1.0, 0.0, 1.0, 0.0]
    found = read_samples(str(tmp_path / "a/samples.jsonl"))
    assert len(found) == 2 * 3 * 3 and all(item.outcome for item in found)
    prefixes = {item.prompt.id: item.prefix for item in truncate_everywhere(samples).values()}
    assert all(item.response.startswith(prefixes[item.id]) for item in found)
    (tmp_path / "a/samples.jsonl").write_bytes(rollouts[: len(rollouts) // 2])  # killed within a line
    process("a")
    assert save_file.read_bytes() == expected and (tmp_path / "a/samples.jsonl").read_bytes() == rollouts
    process("a", label="soft")
    assert {label for row in read_step_labels(str(save_file)) for label in row.labels} <= {0, 1 / 3, 2 / 3, 1}
    with pytest.raises(UserError, match="holds samples with seed=1, but this run has 2"):
        process("a", seed=2)


@pytest.mark.parametrize("parting", ["\n", "\n\n", "\n \n"])
def test_process_judges_lines(folders: Folders, tmp_path: Path, parting: str) -> None:
    """Whatever stands between them; a run by paragraphs does not continue one by lines."""
    lines = SOLUTION.split("\n\n")
    source = log_dir(tmp_path / "log", [sample("0", 0, parting.join(lines), "right")])
    save_file = tmp_path / "steps.json"

    def process(step: str) -> None:
        build.process("toy", source, str(tmp_path / "a"), str(save_file), folders.one, step=step, **PROCESS)

    process("line")
    (row,) = read_step_labels(str(save_file))
    assert row.steps == lines and row.labels[-1] == 1.0
    found = read_samples(str(tmp_path / "a/samples.jsonl"))
    begins = {f"0/0/{k}": "".join(line + "\n" for line in lines[:k]) for k in (1, 2, 3)}
    assert len(found) == 3 * 3 and all(item.response.startswith(begins[item.id]) for item in found)
    message = "with --step paragraph a step is a paragraph" if parting != "\n\n" else "or with another --step"
    with pytest.raises(UserError, match=message):
        process("paragraph")


BRANCH = {"attempts": 40, "max_new_tokens": 12, "max_batch_size": 8, "steps_a_solution": 8}


def branched(folders: Folders, source: str, folder: Path, **more: object) -> list[dict[str, object]]:
    save_file = folder.with_suffix(".json")
    build.branch("toy", source, str(folder), str(save_file), folders.one, **BRANCH | more)
    return json.loads(save_file.read_text())


def test_scdpo_15_a_branch_shares_the_first_steps_and_is_wrong(folders: Folders, tmp_path: Path) -> None:
    samples = [sample(str(n), 0, SOLUTION, "right") for n in range(3)]
    source = log_dir(tmp_path / "log", samples)
    rows = branched(folders, source, tmp_path / "a")
    steps = SOLUTION.split("\n\n")
    grader = grader_of(RULES)
    with grader:
        for row in rows:
            k = row["start_steps"]
            assert row["prefix"] == "".join(f"{step}\n\n" for step in steps[:k])
            assert row["prefix"] + row["chosen"] == SOLUTION
            assert grader.grade_one(row["prefix"] + row["chosen"], "4").outcome == "right"
            assert grader.grade_one(row["prefix"] + row["rejected"], "4").outcome == "wrong"
            assert row["temperatures"][0] == 1.1 and max(row["temperatures"]) <= 1.4
    assert list(read_pairs(str(tmp_path / "a.json")))[0].prefix.endswith("\n\n")
    again = (tmp_path / "a/samples.jsonl").read_bytes()
    (tmp_path / "a/samples.jsonl").write_bytes(again[:-20])  # killed within a line
    assert branched(folders, source, tmp_path / "a") == rows
    assert (tmp_path / "a/samples.jsonl").read_bytes() == again


def test_scdpo_15_attempts_made_at_once_are_those_made_in_turn(folders: Folders, tmp_path: Path) -> None:
    """The first wrong attempt counts, however many more the cap allows; none is made beyond it, none is left out."""
    assert [list(wave) for wave in doubling_ranges(12)] == [[0], [1, 2], [3, 4, 5, 6], [7, 8, 9, 10, 11]]
    source = log_dir(tmp_path / "log", [sample(str(n), 0, SOLUTION, "right") for n in range(6)])
    found: list[dict[str, object]] = []
    for attempts in (1, 2, 3, 5, 40):
        folder = tmp_path / str(attempts)
        branched(folders, source, folder, attempts=attempts)
        rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        assert all(row in rows for row in found)
        found = rows
    assert len(found) == 12


def test_scdpo_25_a_step_may_be_a_line(folders: Folders, tmp_path: Path) -> None:
    """Solutions of chain-of-thought data have no blank lines; nothing runs in between."""
    lines = SOLUTION.replace("\n\n", "\n")
    source = log_dir(tmp_path / "log", [sample(str(n), 0, lines, "right") for n in range(3)])
    with pytest.raises(UserError, match="no right solution of three steps or more to leave"):
        branched(folders, source, tmp_path / "none")
    for row in branched(folders, source, tmp_path / "a", step="line"):
        assert row["prefix"] == "".join(f"{step}\n" for step in lines.split("\n")[: row["start_steps"]])
        assert row["prefix"] + row["chosen"] == lines
        wrong = [step for step in row["rejected"].split("\n") if step.strip()]
        assert len(wrong) == len(row["temperatures"])


def test_scdpo_10_what_never_ends_or_fills_the_context_is_not_wrong(folders: Folders, tmp_path: Path) -> None:
    """A solution whose beginning fills the context is in failures.jsonl and in no other file."""
    long = "\n\n".join(["####" + "1" * 56, "2" * 60, "3" * 60, "#### 4"])
    source = log_dir(tmp_path / "log", [sample("0", 0, SOLUTION, "right"), sample("1", 0, long, "right")])
    rows = branched(folders, source, tmp_path / "a", pairs_a_problem=2)
    failed = [json.loads(line) for line in (tmp_path / "a/failures.jsonl").read_text().splitlines()]
    assert ("1/0/2", "context full") in [
        (row["id"], row["error"].split("last: ")[1].split(",")[0]) for row in failed
    ]
    assert not {row["id"] for row in failed} & {row["id"] for row in rows}


def test_scdpo_16_noise_is_left_out_and_counted() -> None:
    right = sample("0", 0, SOLUTION, "right")
    jobs = [truncate_at_step(right, 1), truncate_at_step(right, 2)]
    found = [
        sample("0/0/1", 0, jobs[0].prefix + "5", "wrong"),
        sample("0/0/2", 0, jobs[1].prefix + "5" * 14, "wrong"),
    ]
    schedule = TemperatureSchedule(1.1, 0.1, 1.4)
    for limits, counts in (
        ((9, 99), {"kept": 2}),
        ((3, 99), {"with too many steps": 2}),  # the right solution has four
        ((9, 13), {"kept": 1, "with too long a step": 1}),
    ):
        pairs, told = step_controlled_pairs(
            jobs, found, schedule, max_steps=limits[0], max_step_characters=limits[1]
        )
        assert told == counts and len(pairs) == counts.get("kept", 0)
    assert step_controlled_pairs(jobs, found[:1], schedule, max_steps=9, max_step_characters=99)[1] == {
        "kept": 1,
        "never wrong": 1,
    }


def test_scdpo_17_the_limit_is_of_each_problem(folders: Folders, tmp_path: Path) -> None:
    solution = "#### 1\n\n2\n\n3\n\n4\n\n5\n\n#### 4"  # four points to leave it at
    source = log_dir(tmp_path / "log", [sample(str(n), 0, solution, "right") for n in range(5)])
    rows = branched(folders, source, tmp_path / "a", pairs_a_problem=2)
    by_problem = [sum(row["instruction"] == f"{n}+1=" for row in rows) for n in range(5)]
    assert by_problem == [2] * 5


def test_scdpo_18_held_out_pairs_share_no_question(folders: Folders, tmp_path: Path) -> None:
    source = log_dir(tmp_path / "log", [sample(str(n), 0, SOLUTION, "right") for n in range(5)])
    branched(folders, source, tmp_path / "a")
    tokenizer = load.load_tokenizer(folders.one)
    data, held = open_preferences(str(tmp_path / "a.json"), "", 0.4, tokenizer, max_seq_len=128)
    questions = [{tokenizer.decode(pair[0].tokens)[:4] for pair in side.samples} for side in (data, held)]
    assert [len(side) for side in questions] == [3, 2] and not questions[0] & questions[1]


def test_continuations_of_other_solutions_are_refused(tmp_path: Path) -> None:
    jobs = list(truncate_everywhere([sample("0", 0, "a\n\n#### 4", "right")]).values())
    log_dir(tmp_path / "log", [sample("0/0/1", 0, "a\n\nb", "wrong")])
    assert beginnings(jobs, str(tmp_path / "log")) == {"0/0/1": "a\n\n"}
    log_dir(tmp_path / "other", [sample("0/0/1", 0, "b\n\nb", "wrong")])
    with pytest.raises(UserError, match="holds '0/0/1' of another solution than is given"):
        beginnings(jobs, str(tmp_path / "other"))


def test_samples_of_another_scorer_are_refused(folders: Folders, tmp_path: Path) -> None:
    source = log_dir(tmp_path / "log", [sample("0", 0, SOLUTION, "right")], RULES | {"equality": "choice@5"})
    with pytest.raises(UserError, match="was graded by gsm8k/hashes@5, choice@5, but --task toy means"):
        branched(folders, source, tmp_path / "a")


def test_two_ranks_build_the_same(folders: Folders, tmp_path: Path) -> None:
    source = log_dir(tmp_path / "log", [sample("0", 0, SOLUTION, "right")])
    expected = branched(folders, source, tmp_path / "a")
    flags = {"ckpt_dir": folders.two, "task": "toy", "samples_file": source, "log_dir": tmp_path / "b",
             "save_file": tmp_path / "b.json", **BRANCH}
    succeed("data_build.py", "branch", *(f"--{name}={value}" for name, value in flags.items()), n=2)
    assert json.loads((tmp_path / "b.json").read_text()) == expected


CODE_BRANCH = {"attempts": 30, "max_new_tokens": 20, "max_batch_size": 8, "steps_a_solution": 12,
               "temperature": 0.8, "temperature_rise": 0.02, "temperature_cap": 0.9, "pairs_a_problem": 3}


def test_scdpo_15_branches_of_code_share_their_first_blocks(code_solver: str, tmp_path: Path) -> None:
    """Replayed prefixes, blocks gone on with, executions by the interpreter; what comes is a row to train on."""
    solution = sample("0", 0, CODE_SOLUTION, "right")
    values = solution.values | {"prompt": CODE_QUESTION, "label": "68"}
    solution = solution._replace(prompt=CODE_QUESTION, values=values)
    source = log_dir(tmp_path / "log", [solution])
    save_file = tmp_path / "pairs.json"
    build.branch("toy", source, str(tmp_path / "a"), str(save_file), code_solver, **CODE_BRANCH)
    rows = json.loads(save_file.read_text())
    assert rows
    tokenizer = load.load_tokenizer(code_solver)
    coding = Coding(tokenizer, 12)
    for row in rows:
        assert row["start_steps"] in (1, 3, 4)
        assert row["prefix"] == "".join(split_into_steps(CODE_SOLUTION, Marker.END_OF_BLOCK)[: row["start_steps"]])
        assert row["prefix"] + row["chosen"] == CODE_SOLUTION
        assert coding.replays(row["prefix"] + row["rejected"])
        rejected = split_into_steps(row["rejected"], Marker.END_OF_BLOCK)
        sampled = [step for step in rejected if not step.startswith(Marker.EXECUTION)]
        assert row["temperatures"] == [0.8, 0.82, 0.84, 0.86, 0.88, *[0.9] * 7][: len(sampled)]
    assert any(Marker.EXECUTION in row["rejected"] for row in rows)
    save_file.write_text(json.dumps([rows[0], rows[0] | {"instruction": "Another?"}]))
    data, _ = open_preferences(str(save_file), "", 0.5, tokenizer, max_seq_len=512)
    chosen, rejected = data.samples[0]
    assert chosen.tokens[: chosen.response_start] == rejected.tokens[: rejected.response_start]
    assert 0 < chosen.n_response < len(chosen.tokens) - chosen.response_start  # executions carry no loss


def test_scdpo_14_code_that_prints_something_else_is_not_left(code_solver: str, tmp_path: Path) -> None:
    parallel.start()
    coding = Coding(load.load_tokenizer(code_solver), 12)
    random = "".join(
        f"<|{kind}|>{content}<|endofblock|>"
        for kind, content in (
            ("code", "import random\nprint(random.random())"),
            ("execution", "0.5\n"),
            ("text", "#### 4"),
        )
    )
    solutions = sample("0", 0, CODE_SOLUTION, "right"), sample("1", 0, random, "right")
    jobs = [truncate_at_step(solution, k) for k, solution in enumerate(solutions, start=1)]
    assert [job.sample.id for job in replayable(jobs, coding)] == ["0"]


def test_step_labels_of_code_are_refused(code_solver: str, tmp_path: Path) -> None:
    source = log_dir(tmp_path / "log", [sample("0", 0, SOLUTION, "right")])
    with pytest.raises(UserError, match="no labels for blocks of code"):
        build.process("toy", source, str(tmp_path / "a"), str(tmp_path / "a.json"), code_solver)
