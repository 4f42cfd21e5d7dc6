"""Weak-to-strong from end to end on a tiny taught model: the files of each step are what the next one reads."""

import hashlib
import json
import subprocess
from pathlib import Path

import pytest

from src import parallel
from src.checkpoint import storage
from src.errors import UserError
from src.evaluation.prompting import make_prompting
from src.grading.tasks import find_task
from tests.test_entries import PROBLEMS, teach, write_json
from tests.tiny import build, main_of, split, write_hf_llama

SOLVER_TRAIN = main_of("solver_train", "ckpt_dir", "save_dir", "train_file")
EVALUATE = main_of("solver_evaluate", "task", "label_file", "log_dir", "ckpt_dir")

STAGES = Path(__file__).parents[1] / "recipes" / "stages.sh"
TRAIN = {"lr": 1e-5, "max_batch_size": 4}
SAMPLE = {"max_new_tokens": 12, "max_batch_size": 80}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the pipeline has run, the weak model's training to stage II."""
    parallel.start()
    folder = tmp_path_factory.mktemp("weak")
    teach(write_hf_llama(folder / "hf"))
    base = split(folder / "hf", folder / "base")
    solver_train, evaluate = SOLVER_TRAIN, EVALUATE
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_json(folder / "train.json", PROBLEMS)
        build.split("train.json", "train_1.json", "train_2.json", share=0.25)
        solver_train(base, "weak", "train_1.json", **TRAIN)
        evaluate("toy", "train_2.json", "log/weak", "weak", **SAMPLE)
        evaluate("toy", "train_2.json", "log/icl", base, temperature=1.0, **SAMPLE)  # so that they differ
        build.full_weak("log/weak/samples.jsonl", "full_weak.json", weak_model="weak")
        build.weak_icl(
            "log/weak/samples.jsonl", "log/icl/samples.jsonl", "stage_1", weak_model="weak", strong_model=base
        )
        for name in ("weak", "icl", "hybrid"):
            solver_train(base, f"plus/{name}", f"stage_1/{name}.json", **TRAIN)
        for name in ("weak", "icl"):
            evaluate("toy", "train_2.json", f"log/2/{name}", f"plus/{name}", temperature=0.7, **SAMPLE)
        build.weak_icl(
            "log/2/weak/samples.jsonl", "log/2/icl/samples.jsonl", "stage_2", weak_model="plus/weak",
            strong_model="plus/icl",
        )
        solver_train(base, "plus/hybrid_2", "stage_2/hybrid.json", **TRAIN)
        evaluate("toy", "train_2.json", "log/plus", "plus/hybrid", num_samples=10, temperature=1.0, **SAMPLE)
        build.vote("log/plus/samples.jsonl", "votes.jsonl", strong_model="plus/hybrid")
        build.contrast(
            "votes.jsonl",
            "log/weak/samples.jsonl",
            "pairs.json",
            weak_model="weak",
            strong_model="plus/hybrid",
        )
        main_of("preference_train", "ckpt_dir", "save_dir", "train_file")(
            "plus/hybrid", "pro", "pairs.json", held_out=0.3, lora_rank=4, lr=1e-4, max_batch_size=2
        )
    return folder


@pytest.fixture(scope="module")
def few_shot(path: Path) -> Path:
    """The same folder when a strong model that reads demonstrations has gone through stage I with two of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        solver_train, evaluate = SOLVER_TRAIN, EVALUATE
        samples, shown = "log/weak/samples.jsonl", "demonstrations.json"
        build.demonstrations(samples, shown, shots=2, weak_model="weak", prompt_template="a {instruction}\\nb",
                                  stop=["\na"])
        text = make_prompting(find_task("toy"), shown).text
        write_json(
            path / "context.json",
            [
                {"instruction": form(row["instruction"]), "output": f" #### {int(row['label']) + n}{tail}"}
                for row in PROBLEMS
                for n in (0, 1)  # right every other time
                for form, tail in ((str, ""), (text, "\n\na 1+1=\nb #### 2"))
            ],
        )
        solver_train("base", "reader", "context.json", lr=5e-3, epochs=12, max_batch_size=16)
        evaluate("toy", "train_2.json", "log/shown", "reader", few_shot=shown, **SAMPLE | {"max_new_tokens": 24})
        build.weak_icl(samples, "log/shown/samples.jsonl", "stage_1_shown", weak_model="weak",
                            strong_model="reader", demonstrations_file=shown)
        solver_train("reader", "plus/shown", "stage_1_shown/hybrid.json", **TRAIN)
        evaluate("toy", "train_2.json", "log/plus_shown", "plus/shown", num_samples=4, temperature=1.0, **SAMPLE)
        build.vote("log/plus_shown/samples.jsonl", "votes_shown.jsonl", strong_model="plus/shown")
    return path


def rows(file: Path) -> list[dict[str, object]]:
    text = file.read_text()
    return json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]


def test_w2s_22_every_step_has_left_its_file(path: Path) -> None:
    train_2, weak, samples = (
        rows(path / x) for x in ("train_2.json", "full_weak.json", "log/weak/samples.jsonl")
    )
    assert len(train_2) == len(weak) == len(samples) == 12
    assert {row["instruction"] for row in weak} == {row["instruction"] for row in train_2}
    stage_1 = {name: rows(path / f"stage_1/{name}.json") for name in ("weak", "icl", "hybrid")}
    assert 0 < len(stage_1["weak"]) == len(stage_1["icl"]) < 12
    assert stage_1["hybrid"] == [
        row for pair in zip(stage_1["weak"], stage_1["icl"], strict=True) for row in pair
    ]
    assert len(rows(path / "votes.jsonl")) == 12 and rows(path / "pairs.json")
    storage.check_complete(path / "pro")


def test_w2s_22_every_run_names_its_inputs_by_hash(path: Path) -> None:
    for name, file in (("weak", "train_1.json"), ("plus/hybrid", "stage_1/hybrid.json"), ("pro", "pairs.json")):
        hashes = json.loads((path / name / "run.json").read_text())["inputs"]
        assert hashlib.sha256((path / file).read_bytes()).hexdigest() in json.dumps(hashes)


def test_w2s_22_a_recipe_skips_what_is_done(tmp_path: Path) -> None:
    recipe = f"""source {STAGES}
    work() {{ echo worked >> {tmp_path}/log; [ "$1" = ends ] && touch {tmp_path}/done; }}
    stage one {tmp_path}/done work fails || true
    stage one {tmp_path}/done work ends
    stage one {tmp_path}/done work ends"""
    said = subprocess.run(["bash", "-c", recipe], check=True, capture_output=True, text=True).stdout
    assert (tmp_path / "log").read_text() == "worked\n" * 2
    assert said.splitlines() == ["== one", "== one", f"== one: done before ({tmp_path}/done)"]


def test_w2s_13_stage_1_starts_from_the_base_each_time(path: Path) -> None:
    for name in ("weak", "icl", "hybrid", "hybrid_2"):
        manifest = json.loads((path / f"plus/{name}/manifest.json").read_text())
        assert manifest["source"] == str(path / "base")
        assert fingerprint_at_start(path, f"plus/{name}") == storage.fingerprint(path / "base")


def fingerprint_at_start(path: Path, name: str) -> str:
    """The fingerprint of the checkpoint that a run says it began with."""
    run = json.loads((path / name / "run.json").read_text())
    return storage.fingerprint(Path(run["flags"]["ckpt_dir"]))


def test_w2s_14_the_second_round_s_filter_reads_both_models_of_the_first(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weak, icl, hybrid = (rows(path / f"stage_2/{name}.json") for name in ("weak", "icl", "hybrid"))
    given = {row["id"]: row["response"] for row in rows(path / "log/2/weak/samples.jsonl")}
    assert 0 < len(weak) == len(icl) and all(given[row["id"]] == row["output"] for row in weak)
    assert hybrid == [row for pair in zip(weak, icl, strict=True) for row in pair]
    monkeypatch.chdir(path)
    with pytest.raises(UserError, match="was sampled from the model"):
        build.weak_icl(
            "log/2/weak/samples.jsonl", "log/2/icl/samples.jsonl", "other", strong_model="base"
        )


def test_w2s_18_the_reference_is_the_stage_1_model(path: Path) -> None:
    run = json.loads((path / "pro/run.json").read_text())
    assert run["reference"]["fingerprint"] == storage.fingerprint(path / "plus/hybrid")
    first = json.loads((path / "pro/metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(0.693147, abs=1e-6)


def test_w2s_17_votes_of_another_model_or_scorer_are_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(path)
    with pytest.raises(UserError, match="log/icl/samples.jsonl was sampled from the model .* but weak is"):
        build.contrast("votes.jsonl", "log/icl/samples.jsonl", "other.json", weak_model="weak")
    EVALUATE(
        "MATH", "train_2.json", "log/math", samples_file="log/weak/samples.jsonl"
    )
    with pytest.raises(UserError, match="has no samples.identity.json beside it"):
        build.contrast("votes.jsonl", "log/math/samples.jsonl", "other.json")
    assert not (path / "other.json").exists()


def test_w2s_10_demonstrations_go_through_the_whole_pipeline(few_shot: Path) -> None:
    shown = {row["id"] for row in json.loads((few_shot / "demonstrations.json").read_text())["demonstrations"]}
    samples = {row["id"]: row for row in rows(few_shot / "log/shown/samples.jsonl")}
    kept = rows(few_shot / "stage_1_shown/icl.json")
    assert len(shown) == 2 and len(samples) == 12 and kept and not shown & {row["id"] for row in kept}
    for row in kept:  # it wrote as it was shown, was stopped before the next problem, and is learnt as a bare answer
        response = samples[row["id"]]["response"]
        assert response.startswith(" #") and response.endswith("\n") and "a" not in response
        assert row["output"] == response.strip() and row["instruction"] == samples[row["id"]]["prompt"]
    votes = rows(few_shot / "votes_shown.jsonl")
    assert len(votes) == 12 and all("\n" not in text for vote in votes for text in vote["positives"])
