"""src/evaluation/evaluator.py: every problem counts, votes by hand, reruns that continue, samples of another run."""

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import solver_evaluate
import verifier_evaluate
from src import load, parallel
from src.checkpoint import saving
from src.data.examples import Prompt, Sample, read_prompts, read_samples
from src.errors import UserError
from src.evaluation import evaluator
from src.evaluation.metrics import wilson_interval
from src.evaluation.prompting import make_prompting
from src.evaluation.report import results_table, summarize
from src.grading.tasks import find_task
from src.inference.sampling import Sampling
from src.runlog import RunLog
from tests.tiny import ALPHABET, make_verifier, split, write_hf_llama, write_tokenizer

LABELS = ["4", "7", "1"]
ROWS = [
    {"instruction": "2+2=", "label": "4", "level": 1},
    {"instruction": "3+4=", "label": "7", "level": 2},
    {"instruction": "1-0=", "label": "1", "level": 2},
]


def write_lines(path: Path, rows: list[dict[str, object]]) -> str:
    """A jsonl file; its path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def label_file(tmp_path: Path) -> str:
    return write_lines(tmp_path / "labels.jsonl", ROWS)


@pytest.fixture
def prompts(label_file: str) -> list[Prompt]:
    return read_prompts(label_file, need_label=True)


def grade(task: str, prompts: list[Prompt], samples: list[Sample], path: Path) -> dict[str, object]:
    """The results of these samples."""
    with evaluator.BackgroundGrader(find_task(task), prompts) as grading:
        return summarize(grading.grader.task, prompts, evaluator.grade_samples(grading, samples, path))


def sample(problem: int, number: int, answer: str | None, **values: object) -> Sample:
    """A sample that ends in `#### answer`, or has no answer."""
    response = "none" if answer is None else f"so\n\n#### {answer}"
    return Sample(
        str(problem), number, ROWS[problem]["instruction"], response, None, {"response": response} | values
    )


def test_w2s_04_n_problems_in_n_verdicts_out(prompts: list[Prompt], tmp_path: Path) -> None:
    samples = [sample(0, 0, "4"), sample(1, 0, None)]  # nothing for the third
    results = grade("toy", prompts, samples, tmp_path / "samples.jsonl")
    assert results["accuracy"] == pytest.approx(1 / 3)
    assert results["interval"] == pytest.approx(wilson_interval(1, 3))
    assert (results["problems"], results["samples"], results["missing"]) == (3, 2, 2)
    assert results["outcomes"] == {"right": 1, "wrong": 0, "unparsed": 2, "timeout": 0, "error": 0}
    assert results["never_sampled"] == 1
    assert results["by_level"] == {
        1: {"accuracy": 1.0, "interval": wilson_interval(1, 1), "problems": 1},
        2: {"accuracy": 0.0, "interval": wilson_interval(0, 2), "problems": 2},
    }
    table = results_table(results)
    assert "3 problems, 1 samples each; gsm8k/hashes@5, exact@5" in table
    assert "33.3%" in table and "2 unparsed" in table and "2, 1 missing, 0 cut at the limit" in table


def test_graded_samples_are_written_with_all_that_later_stages_need(
    prompts: list[Prompt], tmp_path: Path
) -> None:
    path = tmp_path / "samples.jsonl"
    grade("toy", prompts, [sample(1, 3, "7", score=0.5), sample(0, 0, None)], path)
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert first == {
        "response": "so\n\n#### 7",
        "score": 0.5,
        "id": "1",
        "sample": 3,
        "prompt": "3+4=",
        "label": "7",
        "answer": "7",
        "outcome": "right",
    }
    assert (second["answer"], second["outcome"]) == (None, "unparsed")


def test_results_do_not_depend_on_the_order_of_rows(prompts: list[Prompt], tmp_path: Path) -> None:
    samples = [sample(problem, number, answer, score=score) for problem in range(3)
               for number, (answer, score) in enumerate((("4", 0.1), ("7", 0.9), ("4", 0.5), ("8", 0.2), (None, 0.3)))]
    found = []
    for order in (samples, samples[::-1], samples[7:] + samples[:7]):
        found.append(grade("toy", prompts, order, tmp_path / "samples.jsonl"))
    assert found[0] == found[1] == found[2]


def test_votes_by_hand(prompts: list[Prompt], tmp_path: Path) -> None:
    answers = {0: ["4", "5", "5", "4"], 1: [None, "6", "6", "7"]}  # the third problem was never sampled
    scores = {0: [2.0, -1.0, 0.0, 1.0], 1: [9.0, 0.0, 0.0, 1.0]}
    samples = [
        sample(problem, number, answer, score=scores[problem][number])
        for problem, texts in answers.items()
        for number, answer in enumerate(texts)
    ]
    results = grade("toy", prompts, samples, tmp_path / "samples.jsonl")
    # shares of right samples 2/4 1/4 0
    assert results["accuracy"] == pytest.approx(0.25)
    low, high = results["interval"]
    assert 0 <= low < 0.25 < high <= 0.5
    # two of the right ones among any two drawn: 1 - 1/6 and 1 - 3/6; among four: both
    assert results["pass_at"] == pytest.approx({1: 0.25, 2: (5 / 6 + 1 / 2) / 3, 4: 2 / 3})
    # pairs (4 5)(5 4): ties of right and wrong; (none 6)(6 7): 6, and a tie. All four: a tie of 4 and 5, 6
    assert results["maj_at"] == pytest.approx({1: 0.25, 2: (0.5 + 0.25) / 3, 4: 0.5 / 3})
    low, high = results["intervals"]["maj_at"][4]  # 0.5, 0, 0: a bootstrap over problems
    assert 0 == low < 0.5 / 3 < high <= 0.5
    assert results["intervals"]["weighted_at"][4] == pytest.approx(wilson_interval(1, 3))
    # the highest score of each of six pairs: 4 in all but (5 5); 7 in the two with a 6. Of all four: 4; none
    assert results["best_of_at"] == pytest.approx({1: 0.25, 2: (5 / 6 + 2 / 6) / 3, 4: 1 / 3})
    # weights sigmoid(score): (4 5) and (5 4) give 4, (6 7) gives 7, but 6 alone stands against none.
    # Of all four: 0.88 + 0.73 for 4 against 0.27 + 0.5; 0.5 + 0.5 for 6 against 0.73 for 7
    assert results["weighted_at"] == pytest.approx({1: 0.25, 2: 1.5 / 3, 4: 1 / 3})
    assert results["outcomes"]["right"] == 3 and results["missing"] == 5


def test_without_scores_for_every_sample_there_is_no_vote_by_score(
    prompts: list[Prompt], tmp_path: Path
) -> None:
    samples = [sample(0, 0, "4", score=1.0), sample(0, 1, "4")]
    results = grade("toy", prompts, samples, tmp_path / "samples.jsonl")
    assert "maj_at" in results and "best_of_at" not in results and "weighted_at" not in results


class Run(NamedTuple):
    """A solver on disk and in memory, ready to sample."""

    ckpt_dir: str
    verifier_dir: str


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("evaluator")
    parallel.start()
    ckpt_dir = split(write_hf_llama(folder / "hf"), folder / "one")
    return Run(ckpt_dir, make_verifier(ckpt_dir, folder / "verifier", mean=1.0, std=4.0))


FLAGS = {"task": "toy", "num_samples": 3, "temperature": 1.0, "max_new_tokens": 8, "max_batch_size": 4}


def evaluate(run: Run, labels: str, log_dir: Path, **changes: object) -> list[str]:
    """solver_evaluate.py's main; the lines of samples.jsonl. What exists is graded without flags of sampling."""
    common = {"task": FLAGS["task"]} if "samples_file" in changes else FLAGS | {"ckpt_dir": run.ckpt_dir}
    flags = common | {"label_file": labels, "log_dir": str(log_dir)} | changes
    solver_evaluate.main(solver_evaluate.SolverEvaluateConfig(**flags))
    return (log_dir / "samples.jsonl").read_text(encoding="utf-8").splitlines()


def test_every_sample_is_there_in_order_and_depends_on_nothing_else(
    run: Run, label_file: str, tmp_path: Path
) -> None:
    lines = evaluate(run, label_file, tmp_path / "a")
    rows = [json.loads(line) for line in lines]
    assert [(row["id"], row["sample"]) for row in rows] == [(str(p), s) for p in range(3) for s in range(3)]
    assert rows[0].keys() >= {
        "prompt",
        "response",
        "token_count",
        "finish",
        "logprob",
        "label",
        "answer",
        "outcome",
    }
    assert all(row["finish"] == "stop" or row["token_count"] == 8 for row in rows)
    assert lines == evaluate(run, label_file, tmp_path / "b", max_batch_size=1)
    results = json.loads((tmp_path / "a/results.json").read_text())
    assert results["problems"] == 3 and results["samples"] == 9 and sum(results["outcomes"].values()) == 9


def test_a_rerun_continues_behind_a_torn_line_with_the_same_result(
    run: Run, label_file: str, tmp_path: Path
) -> None:
    log_dir = tmp_path / "log"
    lines = evaluate(run, label_file, log_dir)
    path = log_dir / "samples.jsonl"
    results = (log_dir / "results.json").read_text()
    for kept, torn in ((4, lines[4][:30]), (0, lines[0][:1]), (9, ""), (2, lines[5])):
        path.write_text("\n".join([*lines[:kept], torn]), encoding="utf-8")
        assert evaluate(run, label_file, log_dir) == lines
        assert (log_dir / "results.json").read_text() == results
    path.write_text(lines[1].replace('"response": "', '"response": "kept ') + "\n", encoding="utf-8")
    again = evaluate(run, label_file, log_dir)
    assert '"response": "kept ' in again[1] and again[2:] == lines[2:]  # what is there is not sampled again


def test_more_samples_and_more_problems_can_be_asked_for_later(
    run: Run, label_file: str, tmp_path: Path
) -> None:
    whole = evaluate(run, label_file, tmp_path / "whole")
    evaluate(run, label_file, tmp_path / "part", limit=1, num_samples=1)
    assert evaluate(run, label_file, tmp_path / "part") == whole


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seed": 2}, "holds samples with seed=1, but this run has 2"),
        ({"temperature": 0.5}, "holds samples with temperature=1.0, but this run has 0.5"),
        ({"max_new_tokens": 9}, "holds samples with max_new_tokens=8, but this run has 9"),
        ({"num_samples": 2}, "holds sample 2 of problem '0', which this run does not ask for"),
        ({"limit": 1}, "holds sample 0 of problem '1', which this run does not ask for"),
        ({"label_file": "other.jsonl"}, "holds sample 0 of problem '0', which this run does not ask for"),
    ],
)
def test_samples_of_another_run_are_refused(
    run: Run,
    label_file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, object],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "other.jsonl", [row | {"instruction": row["instruction"] + " "} for row in ROWS])
    before = evaluate(run, label_file, tmp_path / "log")
    with pytest.raises(UserError, match=message):
        evaluate(run, label_file, tmp_path / "log", **changes)
    assert (tmp_path / "log/samples.jsonl").read_text().splitlines() == before


def test_samples_of_another_checkpoint_or_of_unknown_origin_are_refused(
    run: Run, label_file: str, tmp_path: Path
) -> None:
    evaluate(run, label_file, tmp_path / "log")
    model = load.load_solver(run.ckpt_dir)
    with torch.no_grad():
        model.norm.weight += 1
    saving.begin_save(model, str(tmp_path / "changed"), run.ckpt_dir).complete()
    with pytest.raises(UserError, match="holds samples with checkpoint="):
        evaluate(run, label_file, tmp_path / "log", ckpt_dir=str(tmp_path / "changed"))
    (tmp_path / "other").mkdir()
    write_tokenizer(tmp_path / "other", ALPHABET + "zz")  # other ids for the same characters
    flags = {"tokenizer_file": str(tmp_path / "other")}
    with pytest.raises(UserError, match="holds samples with tokenizer=None, but this run has"):
        evaluate(run, label_file, tmp_path / "log", **flags)
    shutil.copytree(run.verifier_dir, tmp_path / "process")
    params = tmp_path / "process/params.json"
    params.write_text(json.dumps(json.loads(params.read_text()) | {"objective": "process"}))
    # nor are scores taken for those of other ids, or of another kind
    for more in ({}, flags, {"ckpt_dir": str(tmp_path / "process")}, {}):
        verifier_evaluate.main(verifier_evaluate.VerifierEvaluateConfig(
            **{"ckpt_dir": run.verifier_dir, "task": "toy", "samples_file": str(tmp_path / "log/samples.jsonl"),
               "label_file": label_file, "log_dir": str(tmp_path / "scored")} | more))
    assert len(list((tmp_path / "scored").glob("scores.*.jsonl"))) == 3
    # graded samples of somebody else do not take the place of ours, nor ours of theirs
    theirs = write_lines(tmp_path / "theirs.jsonl", [{"response": "#### 4"}])
    with pytest.raises(
        UserError, match="samples.jsonl was sampled here, and graded samples of another file would"
    ):
        evaluate(run, label_file, tmp_path / "log", samples_file=theirs)
    evaluate(run, label_file, tmp_path / "theirs", samples_file=theirs)
    with pytest.raises(UserError, match="samples.jsonl was not sampled here"):
        evaluate(run, label_file, tmp_path / "theirs")


def test_a_verifier_scores_nothing_that_cannot_be_reported(run: Run, label_file: str, tmp_path: Path) -> None:
    given = write_lines(tmp_path / "given.jsonl", [{"id": "0", "response": "#### 4"}])
    flags = {"task": "toy", "label_file": label_file, "samples_file": given, "log_dir": str(tmp_path / "log")}
    for wrong, reason in (({"task": "none"}, "--task none grades nothing"), ({"task": "GSM8k9"}, "did you mean GSM8K"),
                          ({"split": "level=2"}, "holds no sample of the 2 problems of --split level=2")):
        with pytest.raises(UserError, match=reason):
            verifier_evaluate.main(verifier_evaluate.VerifierEvaluateConfig(
                ckpt_dir=run.verifier_dir, **flags | wrong))
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize("ids", [None, ["x", "y", "z"]])
def test_a_samples_file_is_graded_by_id_and_by_place(run: Run, tmp_path: Path, ids: list[str] | None) -> None:
    problems = [
        row | ({} if ids is None else {"id": name}) for row, name in zip(ROWS, ids or "abc", strict=True)
    ]
    labels = write_lines(tmp_path / "labels.jsonl", problems)
    names = ids or ["0", "1", "2"]
    by_place = [{"response": f"#### {label}"} for label in LABELS]
    by_id = [{"id": names[place], "response": f"#### {LABELS[place]}"} for place in (2, 0, 1)]
    for number, rows in enumerate((by_place, by_id)):
        log_dir = tmp_path / str(number)
        samples_file = write_lines(tmp_path / "samples.jsonl", rows)
        lines = evaluate(run, labels, log_dir, samples_file=samples_file)
        graded = {row["id"]: row["prompt"] for row in map(json.loads, lines)}
        assert graded == {name: row["instruction"] for name, row in zip(names, ROWS, strict=True)}
        assert json.loads((log_dir / "results.json").read_text())["accuracy"] == 1.0
    for name, value in {"temperature": 0.7, "num_samples": 4, "seed": 2, "few_shot": "gsm8k8", "max_rounds": 3}.items():
        with pytest.raises(UserError, match=f"--{name} has no effect on samples that exist"):
            evaluate(run, labels, tmp_path / "2", samples_file=samples_file, **{name: value})
    evaluate(run, labels, tmp_path / "2", samples_file=samples_file, limit=2)
    assert json.loads((tmp_path / "2/results.json").read_text())["problems"] == 2


@pytest.mark.parametrize(
    "rows", [[{"id": "3", "response": "a"}], [{"response": "a"}] * 4, [{"id": 1.5, "response": "a"}]]
)
def test_w2s_07_an_unknown_id_is_refused(
    run: Run, label_file: str, tmp_path: Path, rows: list[dict[str, object]]
) -> None:
    samples_file = write_lines(
        tmp_path / "samples.jsonl", [row | {"sample": n} for n, row in enumerate(rows)]
    )
    with pytest.raises(UserError, match=r"sample id '(3|1.5)' is not among the 3 problems"):
        evaluate(run, label_file, tmp_path / "log", samples_file=samples_file)
    assert not (tmp_path / "log/results.json").exists()


def test_sampling_without_grading(run: Run, label_file: str, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in evaluate(run, label_file, tmp_path / "log", task="none")]
    assert len(rows) == 9 and "outcome" not in rows[0]
    assert not (tmp_path / "log/results.json").exists()
    assert [s.prompt for s in read_samples(str(tmp_path / "log/samples.jsonl"))[::3]] == [
        r["instruction"] for r in ROWS
    ]


def test_greedy_is_temperature_0(run: Run, prompts: list[Prompt], tmp_path: Path) -> None:
    model, tokenizer = load.load_solver(run.ckpt_dir), load.load_tokenizer(run.ckpt_dir)
    path = tmp_path / "samples.jsonl"
    solver = evaluator.LocalSolver(model, tokenizer, make_prompting(find_task("toy")), max_batch_size=2)
    sampler = solver.sampler(Sampling(temperature=0.0, max_new_tokens=5))
    evaluator.sample_prompts(sampler, prompts, num_samples=1, path=path, log=RunLog(str(tmp_path), {}))
    for line, prompt in zip(path.read_text().splitlines(), prompts, strict=True):
        tokens = [1, *tokenizer.encode(prompt.instruction)]
        start, total = len(tokens), 0.0
        while len(tokens) < start + 5 and tokens[-1] != 2:
            logprobs = model.logits(model(torch.tensor([tokens])))[0, -1].log_softmax(-1)
            tokens.append(int(logprobs[: tokenizer.vocab_size].argmax()))  # rows behind it are padding
            total += logprobs[tokens[-1]].item()
        row = json.loads(line)
        assert (
            row["response"] == tokenizer.decode(tokens[start:]) and row["token_count"] == len(tokens) - start
        )
        assert row["logprob"] == pytest.approx(total, abs=0.051)


def test_grading_overlaps_sampling_and_never_holds_it_up(prompts: list[Prompt], tmp_path: Path) -> None:
    hostile = "\\boxed{(p+q+r+s)^{50}-(p+q+r+s)^{49}}"  # seconds of work, in another process
    prompts = [prompt._replace(label="p+q") for prompt in prompts]
    finished: list[bool] = []

    def sampler(wanted: Sequence[evaluator.SampleRequest]) -> Iterator[evaluator.SamplerOutput]:
        for prompt, number in wanted:
            started = time.monotonic()
            yield evaluator.SamplerOutput(prompt.id, number, hostile if number else "\\boxed{q+p}", 1, "stop", 0.0)
            assert time.monotonic() - started < 1.0  # taking a sample does not wait for its verdict
        deadline = time.monotonic() + 60
        while not grading._verdicts["0", 0].done() and time.monotonic() < deadline:
            time.sleep(0.01)
        finished.append(grading._verdicts["0", 0].done())  # while we still sample

    path = tmp_path / "samples.jsonl"
    with evaluator.BackgroundGrader(find_task("MATH"), prompts) as grading:
        evaluator.sample_prompts(
            sampler, prompts, num_samples=2, path=path, log=RunLog(str(tmp_path), {}), grading=grading
        )
        problems = evaluator.grade_samples(grading, read_samples(str(path)), path)
        results = summarize(grading.grader.task, prompts, problems)
    assert finished == [True]
    assert results["outcomes"] == {"right": 3, "wrong": 0, "unparsed": 0, "timeout": 3, "error": 0}


def test_typed_answers_are_compared_by_the_row(tmp_path: Path) -> None:
    rows = [
        {"instruction": "a", "label": "3.1", "answer_type": "number", "tolerance": 0.1},
        {"instruction": "b", "label": "B", "answer_type": "choice"},
        {"instruction": "c", "label": "(1,2)"},
    ]
    prompts = read_prompts(write_lines(tmp_path / "typed.jsonl", rows), need_label=True)
    texts = [
        "\\boxed{3.14}",
        "\\boxed{3.22}",
        "\\boxed{(B)}",
        "\\boxed{C}",
        "\\boxed{(1,2)}",
        "\\boxed{(2,1)}",
    ]
    samples = [
        Sample(str(n // 2), n % 2, rows[n // 2]["instruction"], text, None, {})
        for n, text in enumerate(texts)
    ]
    results = grade("OlympiadBench", prompts, samples, tmp_path / "samples.jsonl")
    assert results["outcomes"]["right"] == 3 and results["accuracy"] == pytest.approx(3 / 6)
    # 3.14 and 3.22 are one answer at this tolerance, and the first of them is right; the others tie with a wrong one
    assert results["maj_at"][2] == pytest.approx((1 + 0.5 + 0.5) / 3)
    written = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [(row.get("answer_type"), row.get("tolerance")) for row in written[::2]] == [
        ("number", 0.1), ("choice", None), (None, None)]
    bad = [prompts[0]._replace(answer_type="numbr")]
    with pytest.raises(
        UserError, match="problem '0' has the answer_type 'numbr'; expected number, expression"
    ):
        grade("OlympiadBench", bad, samples[:2], tmp_path / "samples.jsonl")


def test_w2s_10_few_shot_reaches_the_model_and_stops_it(run: Run, label_file: str, tmp_path: Path) -> None:
    shots = {
        "prompt": "a{instruction}b",
        "stop": ["4"],
        "demonstrations": [{"instruction": "1", "output": "2"}],
    }
    (tmp_path / "shots.json").write_text(json.dumps(shots))
    lines = evaluate(run, label_file, tmp_path / "plain", prompt_template="a{instruction}b")
    plain = [json.loads(line) for line in lines]
    shot = [
        json.loads(line)
        for line in evaluate(run, label_file, tmp_path / "shot", few_shot=str(tmp_path / "shots.json"))
    ]
    assert [row["prompt"] for row in plain] == [
        row["prompt"] for row in shot
    ]  # the bare problem, for later stages
    assert [row["response"] for row in plain] != [row["response"] for row in shot]
    assert not any("4" in row["response"] for row in shot)
    results = json.loads((tmp_path / "shot/results.json").read_text())
    assert results["demonstrations"] == "a1b 2\n\n" and results["stop"] == ["4"]
    with pytest.raises(UserError, match="holds samples with prompting="):
        evaluate(run, label_file, tmp_path / "plain", few_shot=str(tmp_path / "shots.json"))


def test_a_split_is_evaluated_alone(run: Run, label_file: str, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in evaluate(run, label_file, tmp_path / "log", split="level=2")]
    assert {row["id"] for row in rows} == {"1", "2"}
    assert json.loads((tmp_path / "log/results.json").read_text())["problems"] == 2


def test_sampling_for_no_prompt_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="there is no prompt to sample for .*samples.jsonl; expected at least one"
    ):
        log = RunLog(str(tmp_path), {})
        evaluator.sample_prompts(iter, [], num_samples=1, path=tmp_path / "samples.jsonl", log=log)


def test_samples_of_the_same_weights_under_another_config_are_not_gone_on_with(tmp_path: Path) -> None:
    ckpt_dir = Path(split(write_hf_llama(tmp_path / "hf"), tmp_path / "ckpt"))
    (tmp_path / "labels.json").write_text(json.dumps([{"instruction": "1+1=", "label": "2"}]))
    config = solver_evaluate.SolverEvaluateConfig(
        task="toy", label_file=str(tmp_path / "labels.json"), ckpt_dir=str(ckpt_dir), log_dir=str(tmp_path / "log"),
        max_new_tokens=2)
    solver_evaluate.main(config)
    params = json.loads((ckpt_dir / "params.json").read_text())
    (ckpt_dir / "params.json").write_text(json.dumps(params | {"chat_template": "none"}))
    solver_evaluate.main(config)  # of what the prompt is made of, another key tells
    (ckpt_dir / "params.json").write_text(json.dumps(params | {"rope_theta": 2 * params["rope_theta"]}))
    with pytest.raises(UserError, match="holds samples with config=.*choose another --log_dir"):
        solver_evaluate.main(config)
    identity = tmp_path / "log/samples.identity.json"  # as an earlier version left it
    identity.write_text(json.dumps({k: v for k, v in json.loads(identity.read_text()).items() if k != "config"}))
    solver_evaluate.main(config)
