"""The toy domain: its files are reproducible and disjoint, and step labels agree with arithmetic done here."""

import importlib.util
import json
import os
import random
import re
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch

import checkpoint_split
from src import load, parallel
from src.checkpoint.sources import open_source
from src.errors import UserError

TOY = os.path.join(os.path.dirname(__file__), "..", "..", "dataset", "toy")
FILES = ("train.json", "demonstrations.json", "test.json", "steps.json")


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(name, os.path.join(TOY, f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = load_script("generate")


def read_text(name: str) -> str:
    with open(os.path.join(TOY, name), encoding="utf-8", newline="") as file:
        return file.read()


def read_rows(name: str) -> list[dict]:
    return json.loads(read_text(name))


def is_true(step: str) -> bool:
    """Whether the arithmetic of one sentence holds; division has to be exact."""
    left, operation, right, result = re.search(r"(\d+)([-+x/])(\d+)=(\d+)\.$", step).groups()
    left, right, result = int(left), int(right), int(result)
    if operation == "/":
        return result * right == left
    return {"+": left + right, "-": left - right, "x": left * right}[operation] == result


def hand_made_problem():
    """Ana has 12 shells, finds 7 more, gives 4 friends 2 each: 12+7=19, 4x2=8, 19-8=11."""
    steps = ["Ana finds more: 12+7=19.", "Gone: 4x2=8.", "Without them: 19-8=11."]
    return generate.Problem("", steps, "11", 3)


@pytest.mark.parametrize("name", FILES)
def test_committed_files_equal_a_fresh_generation(name):
    rows = generate.make_files(seed=1, train_count=3000, test_count=400, step_count=1000)[name]
    assert read_text(name) == generate.as_text(rows)


def test_seeds_differ():
    first, second = (generate.make_files(seed, 10, 10, 10) for seed in (1, 2))
    assert first["test.json"] != second["test.json"]


def test_demonstrations_are_training_problems_one_in_eight_with_a_hard_sum():
    rows, train = read_rows("demonstrations.json"), read_rows("train.json")
    assert all(row in train for row in rows)
    assert len({row["instruction"] for row in rows}) == len(rows) == 200
    assert {row["level"] for row in rows} == set(generate.LEVELS)
    equations = [[generate.read_step(step) for step in row["output"][0].split("\n\n")[:-1]] for row in rows]
    assert [any(map(generate.is_hard, own)) for own in equations] == [False] * 175 + [True] * 25


def test_the_base_opens_as_a_llama_whose_tokenizer_fits():
    source = open_source(os.path.join(TOY, "base"))
    assert source.config.dtype == "bfloat16"
    model = sentencepiece.SentencePieceProcessor(model_file=str(source.tokenizer_files[0]))
    assert model.vocab_size() == source.config.vocab_size


def test_instructions_are_distinct_and_the_files_disjoint():
    own = [name for name in FILES if name != "demonstrations.json"]
    instructions = [row["instruction"] for name in own for row in read_rows(name)]
    assert len(instructions) == len(set(instructions)) == 4400


def test_levels_are_balanced():
    for name in ("train.json", "test.json"):
        rows = read_rows(name)
        assert all(sum(row["level"] == level for row in rows) == len(rows) // 5 for level in generate.LEVELS)


@pytest.mark.parametrize("name", ("train.json", "test.json"))
def test_every_solution_is_right(name):
    for row in read_rows(name):
        (output,) = row["output"]
        *steps, answer = output.split("\n\n")
        assert len(steps) == row["level"]
        assert all(is_true(step) for step in steps)
        assert answer == f"#### {row['label']}" == f"#### {steps[-1].split('=')[1][:-1]}"
        problem = generate.Problem(row["instruction"], steps, row["label"], row["level"])
        assert generate.check_steps(problem, output) == [True] * (len(steps) + 1)


def test_step_labels():
    rows = read_rows("steps.json")
    wrong = sum(not all(row["labels"]) for row in rows)
    assert 400 < wrong < 600
    for row in rows:
        assert len(row["steps"]) == len(row["labels"]) and set(row["labels"]) <= {0, 1}
        for step, label in zip(row["steps"][:-1], row["labels"], strict=False):
            assert not label or is_true(step)
        if all(row["labels"]):
            assert row["steps"][-1] == f"#### {row['steps'][-2].split('=')[1][:-1]}"


def test_some_first_errors_are_true_equations():
    """They are labelled wrong because the problem calls for another step: arithmetic alone cannot find them."""
    rows = [row for row in read_rows("steps.json") if 0 in row["labels"]]
    first_errors = [row["steps"][row["labels"].index(0)] for row in rows]
    misread = [step for step in first_errors if is_true(step)]
    assert 10 < len(misread) < len(first_errors) / 2


def test_check_steps_by_hand():
    check, problem = generate.check_steps, hand_made_problem()
    right = "Ana finds more: 12+7=19.\n\nGone: 4x2=8.\n\nWithout them: 19-8=11.\n\n#### 11"
    assert check(problem, right) == [True] * 4
    assert check(problem, right.replace("12+7", "7+12").replace("4x2", "2x4")) == [True] * 4
    # a slip at the first step spoils those that build on it, not the one that does not
    slipped = "Ana finds more: 12+7=18.\n\nGone: 4x2=8.\n\nWithout them: 18-8=10.\n\n#### 10"
    assert check(problem, slipped) == [False, True, False, False]
    assert check(problem, right.replace("19-8=11", "8-19=11")) == [True, True, False, True]
    assert check(problem, right.replace("Gone: 4x2=8.", "Gone: 4+4=8.")) == [True, False, True, True]
    # malformed, missing and superfluous blocks
    assert check(problem, right.replace("Gone: ", "")) == [True, False, True, True]
    assert check(problem, right.replace("=8.", "=8")) == [True, False, True, True]
    assert check(problem, "Ana finds more: 12+7=19.\n\n#### 11") == [True, False]
    assert check(problem, right + "\n\n#### 11") == [True] * 4 + [False]
    assert check(problem, "") == [False]


def test_one_problem_per_level():
    rng = random.Random(7)
    for level in generate.LEVELS:
        problem = generate.make_problem(rng, level)
        assert problem.level == level == len(problem.steps)
    with pytest.raises(ValueError, match="level=6"):
        generate.make_problem(rng, 6)


def test_a_slip_never_gives_the_true_equation():
    rng = random.Random(3)
    for row in read_rows("test.json"):
        for step in row["output"][0].split("\n\n")[:-1]:
            truth = generate.read_step(step)
            assert generate.slip(truth, rng) != truth


def test_tokenizer_round_trip():
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=os.path.join(TOY, "base", "tokenizer.model"))
    texts = [row["instruction"] for name in FILES for row in read_rows(name)]
    texts += [row["output"][0] for name in FILES[:2] for row in read_rows(name)]
    texts += ["\n\n".join(row["steps"]) for row in read_rows("steps.json")]
    texts += ["a\nb", "\n\n", "\n\n\n", " two  spaces ", "tab\t", "Zoë: 3½ ÷ 2"]
    for text in texts:
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text
        assert tokenizer.unk_id() not in tokens


@pytest.mark.parametrize("judged", [False, True])
def test_sums_are_right_or_judged(judged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(TOY)
    sys.modules.pop("generate", None)
    load_script("make_sums").main(str(tmp_path / "sums.json"), rows=200, judged=judged)
    rows = json.loads((tmp_path / "sums.json").read_text())
    assert len(rows) == 200 and len({row["instruction"] for row in rows}) == (200 if judged else 1)
    labels = [label for row in rows for label in row.get("labels", [])]
    if judged:
        assert 0.45 < sum(labels) / len(labels) < 0.55
        assert all(is_true(step) == bool(label) for row in rows
                   for step, label in zip(row["steps"], row["labels"], strict=True))
    else:
        assert all(is_true(f"{one}.") for row in rows for one in row["output"].rstrip(".").split(". "))


def test_a_deep_model_says_what_its_base_says(tmp_path: Path) -> None:
    base, deep = str(tmp_path / "base"), str(tmp_path / "deep")
    checkpoint_split.main(checkpoint_split.SplitConfig(ckpt_file=os.path.join(TOY, "base"), save_path=base))
    load_script("make_layers").main(os.path.join(TOY, "base"), deep, layers=6)
    load_script("make_layers").main(os.path.join(TOY, "base"), str(tmp_path / "weak"), layers=3)
    assert [load.load_config(folder).n_layers for folder in (deep, str(tmp_path / "weak"))] == [6, 3]
    tokens = torch.tensor([[1, 5, 40, 100, 7, 300]])
    parallel.start()
    with torch.no_grad():
        said = [model.logits(model(tokens)) for model in map(load.load_solver, (base, deep))]
    torch.testing.assert_close(*said, rtol=0, atol=0)
    with pytest.raises(UserError, match="--layers is 4, but .* has 4; expected fewer, at least 1, or more"):
        load_script("make_layers").main(os.path.join(TOY, "base"), deep, layers=4)
