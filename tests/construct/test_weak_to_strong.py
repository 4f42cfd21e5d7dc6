"""src/construct/weak_to_strong.py by the commands of data_build.py."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from src.construct import weak_to_strong
from src.construct.from_rows import normalized_question
from src.construct.solver import grader_of
from src.construct.weak_to_strong import contrast_pairs, votes
from src.data.examples import Sample, Vote, read_samples, read_votes
from src.errors import UserError
from src.evaluation.prompting import make_prompting
from src.grading.tasks import find_task
from tests.tiny import build

RULES = {"extraction": "weak-to-strong/hashes@1", "equality": "minerva-strings@1"}
GOLD = {"label": "never read", "outcome": "wrong"}


def log_dir(
    folder: Path, answers: dict[str, Sequence[str | None]], model: str, rules: dict[str, str] = RULES, **more: object
) -> str:
    """samples.jsonl of these answers by problem, with what stands beside it. Returns the samples' file."""
    folder.mkdir()
    rows = [
        {
            "id": name,
            "sample": n,
            "prompt": f"q{name}",
            "response": f"{model}{n} #### {x}",
            "answer": x,
            **more,
        }
        for name, given in answers.items()
        for n, x in enumerate(given)
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "samples.identity.json").write_text(json.dumps({"checkpoint": model}))
    (folder / "results.json").write_text(json.dumps({"rules": rules}))
    return str(folder / "samples.jsonl")


def load(path: Path) -> list[dict[str, object]]:
    return json.loads(path.read_text())


def exactly(first: str, second: str) -> bool:
    return first == second


def test_w2s_02_a_split_has_no_question_in_common(tmp_path: Path) -> None:
    rows = [{"instruction": f"How many {n}?", "output": str(n)} for n in range(20)]
    rows += [
        {"instruction": "how  MANY 3?\n", "output": "again"},
        {"instruction": "How many ３?", "output": "wide"},
    ]
    train, test = tmp_path / "train.json", tmp_path / "test.json"
    train.write_text(json.dumps(rows))
    test.write_text(json.dumps([{"instruction": "HOW MANY 7?"}]))
    parts = [tmp_path / "first.json", tmp_path / "second.json"]
    build.split(str(train), *map(str, parts))
    first, second = map(load, parts)
    questions = [{normalized_question(row["instruction"]) for row in part} for part in (first, second)]
    assert not questions[0] & questions[1] and [len(side) for side in questions] == [10, 10]
    assert sorted(first + second, key=rows.index) == rows  # every row, with all its keys
    same = [part for part in (first, second) if any(row["output"] == "again" for row in part)]
    assert len(same) == 1 and {"3", "again", "wide"} <= {row["output"] for row in same[0]}
    before = parts[0].read_bytes()
    build.split(str(train), *map(str, parts))
    assert parts[0].read_bytes() == before
    build.split(str(train), *map(str, parts), seed=2)
    for share in (0.0, 0.99, 1.0):
        with pytest.raises(UserError, match=f"--share {share} of 20 questions of .* leaves one part none"):
            build.split(str(train), *(str(tmp_path / name) for name in ("new.json", "none.json")), share=share)
    assert not (tmp_path / "new.json").exists()
    assert parts[0].read_bytes() != before
    with pytest.raises(UserError, match="1 questions of .* are in .*test.json, such as 'how many 7"):
        build.split(str(train), *map(str, parts), test_file=str(test))
    build.split(str(train), *map(str, parts), test_file=str(test), allow_overlap=True)
    assert len(load(parts[0])) + len(load(parts[1])) == 21


def test_w2s_08_full_weak_keeps_every_response_as_it_is(tmp_path: Path) -> None:
    samples = log_dir(tmp_path / "weak", {str(n): [str(n % 3) if n % 4 else None] for n in range(9)}, "w")
    build.full_weak(samples, str(tmp_path / "full.json"), weak_model="w")
    assert [(row["id"], row["output"]) for row in load(tmp_path / "full.json")] == [
        (sample.id, sample.response) for sample in read_samples(samples)
    ]
    identity = json.loads((tmp_path / "full.identity.json").read_text())
    assert identity == {"checkpoint": "w", "rules": RULES}
    with pytest.raises(UserError, match="was sampled from the model w, but m is m; give the samples of m"):
        build.full_weak(samples, str(tmp_path / "full.json"), weak_model="m")
    twice = log_dir(tmp_path / "twice", {"0": ["1", "2"]}, "w")
    with pytest.raises(UserError, match="has several samples of problem '0'"):
        build.full_weak(twice, str(tmp_path / "full.json"))


WEAK = {"0": ["1"], "1": ["2"], "2": [None], "3": [""], "4": ["1,000"], "5": ["7"]}
ICL = {"0": ["1"], "1": ["3"], "2": [None], "3": [""], "4": ["1000"], "5": ["7"]}


def test_w2s_11_consistency_keeps_equal_answers_and_never_reads_gold(tmp_path: Path) -> None:
    """The same bytes with gold columns, with lying ones, and without any."""
    written = []
    for name, gold in (("gold", GOLD), ("other", {"label": "1", "outcome": "right"}), ("none", {})):
        weak = log_dir(tmp_path / f"{name}_weak", WEAK, "w", **gold)
        icl = log_dir(tmp_path / f"{name}_icl", ICL, "s", **gold)
        build.weak_icl(weak, icl, str(tmp_path / name), weak_model="w", strong_model="s")
        written.append([(tmp_path / name / f"{x}.json").read_bytes() for x in ("weak", "icl", "hybrid")])
    assert written[0] == written[1] == written[2]
    weak, icl, hybrid = (load(tmp_path / "gold" / f"{name}.json") for name in ("weak", "icl", "hybrid"))
    # minerva-strings@1 drops the comma; no answer equals no answer, but is none
    assert [row["id"] for row in weak] == [row["id"] for row in icl] == ["0", "4", "5"]
    assert hybrid == [row for pair in zip(weak, icl, strict=True) for row in pair]
    assert (
        weak[0] == {"id": "0", "instruction": "q0", "output": "w0 #### 1"} and icl[0]["output"] == "s0 #### 1"
    )


def test_w2s_11_counts_say_what_the_filter_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[object] = []
    monkeypatch.setattr(weak_to_strong, "log_counts", said.append)
    weak, icl = log_dir(tmp_path / "weak", WEAK, "w"), log_dir(tmp_path / "icl", ICL, "s")
    build.weak_icl(weak, icl, str(tmp_path / "out"), dry_run=True)
    assert said == [{"kept": 3, "without an answer": 2, "of different answers": 1}]
    assert not (tmp_path / "out").exists()


def test_w2s_12_filling_up_is_asked_for_drawn_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[dict[str, int]] = []
    monkeypatch.setattr(weak_to_strong, "log_counts", said.append)
    weak = log_dir(tmp_path / "weak", {str(n): [str(n % 2)] for n in range(20)}, "w", **GOLD)
    icl = log_dir(tmp_path / "icl", {str(n): ["0"] for n in range(20)}, "s", **GOLD)
    found = {}
    for name, options in {
        "off": {}, "some": {"fill_up_to": 14}, "again": {"fill_up_to": 14}, "other": {"fill_up_to": 14, "seed": 2},
        "all": {"fill_up_to": 99}, "fewer": {"fill_up_to": 3},
    }.items():
        build.weak_icl(weak, icl, str(tmp_path / name), **options)
        found[name] = [int(row["id"]) for row in load(tmp_path / name / "weak.json")]
    agreeing = list(range(0, 20, 2))
    assert found["off"] == found["fewer"] == agreeing and found["all"] == list(range(20))
    assert len(found["some"]) == 14 and set(agreeing) < set(found["some"]) and found["some"] == sorted(found["some"])
    assert found["again"] == found["some"] != found["other"]
    assert said[0] == {"kept": 10, "of different answers": 10}
    assert said[1] == said[0] | {"kept although of different answers": 4}
    hybrid = load(tmp_path / "some/hybrid.json")
    assert [row["output"][0] for row in hybrid] == ["w", "s"] * 14


def test_w2s_21_the_report_of_a_stage_reads_gold_and_the_filter_does_not(tmp_path: Path) -> None:
    weak, icl = log_dir(tmp_path / "weak", WEAK, "w"), log_dir(tmp_path / "icl", ICL, "s")
    build.weak_icl(weak, icl, str(tmp_path / "stage"))
    rows, report = str(tmp_path / "stage/weak.json"), tmp_path / "report.json"
    with pytest.raises(UserError, match="has no outcomes; grade it first"):
        build.report(rows, weak, str(report))
    graded = [json.loads(line) for line in Path(weak).read_text().splitlines()]
    outcomes = {"0": "right", "4": "right", "5": "wrong", "1": "right"}
    lines = [json.dumps(row | {"outcome": outcomes.get(row["id"], "wrong")}) for row in graded]
    Path(weak).write_text("\n".join(lines) + "\n")
    build.report(rows, weak, str(report), dry_run=True)
    assert not report.exists()
    build.report(rows, weak, str(report))
    assert load(report) == {"problems": 6, "kept": 3, "right": 3, "right_of_kept": 2}
    with pytest.raises(UserError, match="the row of problem '0' is not made of these samples"):
        build.report(str(tmp_path / "stage/icl.json"), weak, str(report))


def test_w2s_23_consistency_and_votes_judge_by_the_kind_of_answer(tmp_path: Path) -> None:
    """Letters, truth values and numbers within a tolerance are the same answer in other words."""
    rules = {"extraction": "math/last-box@5", "equality": "typed@5"}
    kinds = {"0": ("choice", 0), "1": ("true_false", 0), "2": ("number", 0.01), "3": ("number", 0.01), "4": ("", 0)}
    answers = {
        "0": ("C and A", "A, C"), "1": ("True", "correct"), "2": ("2.001", "2"), "3": ("2.1", "2"), "4": ("x", "y"),
    }
    files = []
    for side in (0, 1):
        path = Path(log_dir(tmp_path / str(side), {k: [x[side]] for k, x in answers.items()}, "ws"[side], rules))
        given = [json.loads(line) for line in path.read_text().splitlines()]
        typed = [row | dict(zip(("answer_type", "tolerance"), kinds[row["id"]], strict=True)) for row in given]
        path.write_text("".join(json.dumps(row) + "\n" for row in typed))
        files.append(str(path))
    build.weak_icl(*files, str(tmp_path / "out"))
    assert [row["id"] for row in load(tmp_path / "out/weak.json")] == ["0", "1", "2"]
    build.vote(files[1], str(tmp_path / "votes.jsonl"))
    found = [vote._replace(negatives=["s #### no"]) for vote in read_votes(str(tmp_path / "votes.jsonl"))]
    weak = {sample.id: sample for sample in read_samples(files[0])}
    with grader_of(rules) as grader:
        pairs, _ = contrast_pairs(found, weak, grader.equal, min_confidence=0.6, flip_confidence=0.8,
                                  pairs_per_problem=1, seed=1)
    assert {row["id"]: row["weak"] for row in pairs} == {
        "0": "chosen", "1": "chosen", "2": "chosen", "3": "rejected", "4": "rejected",
    }


def test_w2s_09_demonstrations_are_the_weak_model_s_own_by_id(tmp_path: Path) -> None:
    weak, icl = log_dir(tmp_path / "weak", WEAK, "w", **GOLD), log_dir(tmp_path / "icl", ICL, "s")
    demo_file = tmp_path / "demo.json"
    build.demonstrations(weak, str(demo_file), shots=3, weak_model="w")
    rows = load(demo_file)["demonstrations"]
    given = {sample.id: sample for sample in read_samples(weak)}
    assert len({row["id"] for row in rows}) == 3
    for row in rows:
        assert (row["instruction"], row["output"]) == (given[row["id"]].prompt, given[row["id"]].response)
        assert given[row["id"]].values["answer"]
    prompt = make_prompting(find_task("GSM8K-weak-to-strong"), str(demo_file)).text("1+1?")
    shots = "".join(f"Question: {row['instruction']}\nAnswer: {row['output']}\n\n" for row in rows)
    assert prompt == shots + "Question: 1+1?\nAnswer:"
    build.demonstrations(weak, str(demo_file), shots=1, seed=3, stop=["\\n\\n", "Question:"])
    (shown,) = load(demo_file)["demonstrations"]
    assert load(demo_file)["stop"] == ["\n\n", "Question:"]
    build.weak_icl(weak, icl, str(tmp_path / "out"), demonstrations_file=str(demo_file))
    kept = {row["id"] for row in load(tmp_path / "out/weak.json")}
    assert kept == {"0", "4", "5"} - {shown["id"]}
    with pytest.raises(UserError, match="4 responses hold an answer, fewer than --shots 5"):
        build.demonstrations(weak, str(demo_file), shots=5)
    with pytest.raises(UserError, match="weak.json: found a list; expected a json object"):
        build.weak_icl(
            weak, icl, str(tmp_path / "x"), demonstrations_file=str(tmp_path / "out/weak.json")
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "x"}, "was sampled from the model x, but s is s"),
        (
            {"rules": RULES | {"equality": "exact@5"}},
            "was graded by .*minerva-strings@1 and .* by .*exact@5",
        ),
        ({"rules": {}}, "is not graded; grade it"),
        ({"answers": {"0": ["1"]}}, "problem '1' was answered by one of the two models only"),
    ],
)
def test_w2s_11_another_model_scorer_or_set_of_problems_is_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    weak = log_dir(tmp_path / "weak", WEAK, "w")
    icl = log_dir(tmp_path / "icl", **{"answers": ICL, "model": "s"} | changes)
    with pytest.raises(UserError, match=message):
        build.weak_icl(weak, icl, str(tmp_path / "out"), strong_model="s")
    assert not (tmp_path / "out").exists()


def test_samples_of_unknown_origin_are_refused(tmp_path: Path) -> None:
    samples = log_dir(tmp_path / "weak", WEAK, "w")
    (tmp_path / "weak/samples.identity.json").unlink()
    with pytest.raises(UserError, match="has no samples.identity.json beside it, so its model is unknown"):
        build.full_weak(samples, str(tmp_path / "full.json"))


def samples_of(answers: Sequence[str | None], name: str = "0") -> list[Sample]:
    return [Sample(name, n, f"q{name}", f"{n} #### {x}", None, {"answer": x}) for n, x in enumerate(answers)]


def test_w2s_16_votes_by_hand() -> None:
    (vote,) = votes(samples_of(["2", "1", "1", None, "2", "1", "", "3", "1", "1"]), exactly)
    assert (vote.answer, vote.confidence) == ("1", 0.5)
    assert len(vote.positives) == 5 and len(vote.negatives) == 5
    assert all(text.endswith("#### 1") for text in vote.positives)


def test_w2s_16_ties_go_to_the_first_seen_and_nothing_is_no_answer() -> None:
    (tie,) = votes(samples_of(["2", "1", "1", "2"]), exactly)
    (again,) = votes(list(reversed(samples_of(["2", "1", "1", "2"]))), exactly)
    assert tie.answer == again.answer == "2" and tie == again
    (mostly_none,) = votes(samples_of([None, None, "", "5"]), exactly)
    assert (mostly_none.answer, mostly_none.confidence) == ("5", 0.25)
    (none,) = votes(samples_of([None, ""]), exactly)
    assert (none.answer, none.confidence, len(none.positives), len(none.negatives)) == (None, 0.0, 0, 2)


def test_w2s_16_every_vote_counts_in_the_file(tmp_path: Path) -> None:
    answers = {str(n): [str((n * k) % 3) if k % 4 else None for k in range(10)] for n in range(6)}
    samples = log_dir(tmp_path / "strong", answers, "s", **GOLD)
    build.vote(samples, str(tmp_path / "votes.jsonl"), strong_model="s")
    found = read_votes(str(tmp_path / "votes.jsonl"))
    assert [vote.id for vote in found] == list(answers)
    for vote in found:
        assert len(vote.positives) + len(vote.negatives) == 10
        assert vote.confidence * 10 == pytest.approx(len(vote.positives))
    short = log_dir(tmp_path / "short", {"0": ["1", "1"], "1": ["1"]}, "s")
    with pytest.raises(UserError, match="problem '1' has 1 samples, others 2"):
        build.vote(short, str(tmp_path / "votes.jsonl"))


def test_a_response_that_was_cut_off_votes_and_is_never_learnt(tmp_path: Path) -> None:
    whole = log_dir(tmp_path / "whole", {"0": ["1"], "1": ["2"], "2": ["3"]}, "w")
    rows = [json.loads(line) for line in Path(whole).read_text().splitlines()]
    rows[1]["finish"], rows[2]["finish"] = "length", "stop"
    Path(whole).write_text("".join(json.dumps(row) + "\n" for row in rows))
    build.full_weak(whole, str(tmp_path / "full.json"))
    assert [row["id"] for row in load(tmp_path / "full.json")] == ["0", "2"]
    with pytest.raises(UserError, match="2 responses hold an answer, fewer than --shots 3"):
        build.demonstrations(whole, str(tmp_path / "shown.json"), shots=3)
    icl = log_dir(tmp_path / "icl", {"0": ["1"], "1": ["2"], "2": ["3"]}, "s")
    build.weak_icl(whole, icl, str(tmp_path / "both"))
    assert [row["id"] for row in load(tmp_path / "both" / "icl.json")] == ["0", "2"]
    three = samples_of(["1", "1", "2"])
    three[1].values["finish"] = "context_full"
    (vote,) = votes(three, exactly)
    assert (vote.positives, vote.negatives) == (["0 #### 1"], ["2 #### 2"]) and vote.confidence == pytest.approx(2 / 3)


def one_vote(confidence: float) -> Vote:
    """Ten samples, those of the majority saying 1."""
    right = round(10 * confidence)
    positives, negatives = ([f"s{n} #### {x}" for n in range(k)] for k, x in ((right, 1), (10 - right, 2)))
    return Vote("0", "q0", "1", confidence, positives, negatives)


@pytest.mark.parametrize("confidence", [0.5, 0.6, 0.7, 0.8, 1.0])
@pytest.mark.parametrize("answer", ["1", "2", None])
@pytest.mark.parametrize("pairs_a_problem", [1, 3])
def test_w2s_17_truth_table(confidence: float, answer: str | None, pairs_a_problem: int) -> None:
    weak = Sample("0", 0, "q0", f"weak #### {answer}", None, {"answer": answer})
    pairs, _ = contrast_pairs(
        [one_vote(confidence)], {"0": weak}, exactly, min_confidence=0.6, flip_confidence=0.8,
        pairs_per_problem=pairs_a_problem, seed=42,
    )
    agrees = answer == "1"
    wanted = 0.6 <= confidence < 1.0 if agrees else confidence >= 0.8  # unanimous and right: too easy
    available = round(10 * (1 - confidence)) if agrees else round(10 * confidence)
    assert len(pairs) == (min(pairs_a_problem, available) if wanted else 0)
    for pair in pairs:
        assert pair["chosen"].endswith("#### 1") and not pair["rejected"].endswith("#### 1")
        assert (pair["chosen"] == weak.response) is agrees and (
            pair["rejected"] == weak.response
        ) is not agrees
    assert len({(pair["chosen"], pair["rejected"]) for pair in pairs}) == len(pairs)


def test_w2s_17_one_side_is_the_named_weak_model_s(tmp_path: Path) -> None:
    answers = {str(n): ["1"] * 8 + ["2"] * 2 for n in range(12)}
    weak = log_dir(tmp_path / "weak", {str(n): [str(1 + n % 2)] for n in range(12)}, "w", **GOLD)
    other = log_dir(tmp_path / "other", {str(n): [str(1 + n % 2)] for n in range(12)}, "x")
    votes_file, save_file = str(tmp_path / "votes.jsonl"), tmp_path / "pairs.json"
    build.vote(log_dir(tmp_path / "strong", answers, "s"), votes_file)
    build.contrast(votes_file, weak, str(save_file), weak_model="w", strong_model="s")
    pairs = load(save_file)
    assert [row["weak"] for row in pairs] == ["chosen", "rejected"] * 6
    for row in pairs:
        sides = row["chosen"], row["rejected"]
        assert [side.startswith("w0") for side in sides] == [
            row["weak"] == "chosen",
            row["weak"] == "rejected",
        ]
    before = save_file.read_bytes()
    build.contrast(votes_file, weak, str(save_file))
    assert save_file.read_bytes() == before
    with pytest.raises(UserError, match="was sampled from the model x, but w is w"):
        build.contrast(votes_file, other, str(save_file), weak_model="w")
    with pytest.raises(UserError, match="was sampled from the model s, but t is t"):
        build.contrast(votes_file, weak, str(save_file), strong_model="t")


def test_a_file_that_is_no_votes(tmp_path: Path) -> None:
    weak = log_dir(tmp_path / "weak", WEAK, "w")
    with pytest.raises(UserError, match="line 1: expected a 'confidence' from 0 to 1 and lists of texts"):
        build.contrast(weak, weak, str(tmp_path / "pairs.json"))
