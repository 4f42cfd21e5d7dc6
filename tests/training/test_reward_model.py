"""src/training/reward_model.py: which rows are trained on, and in which number."""

import json
from collections import Counter
from pathlib import Path

import pytest

from src.data.examples import Pair, StepLabels
from src.errors import UserError
from src.text.tokenizer import Tokenizer
from src.training.reward_model import mix, open_data, read_rows, split_held_out
from tests.conftest import Folders
from tests.tiny import main_of

STEPS = {"instruction": "1+1=", "steps": ["a", "#### 2"], "labels": [1, 0]}
OUTCOME = {"instruction": "2+2=", "output": "#### 4", "correct": True}


def write(path: Path, *rows: dict[str, object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_last_problems_are_held_out_whole() -> None:
    rows = [Pair(str(index % 10), [f"r{index}"], [f"w{index}"]) for index in range(30)]
    (train,), held = split_held_out([lambda: rows], None, 0.25)
    assert {row.instruction for row in held()} == {"8", "9"}
    assert [len(list(side())) for side in (train, held)] == [24, 6]
    assert {row.instruction for row in split_held_out([lambda: rows], None, 0.05)[1]()} == {"9"}  # one at least
    for share, some in ((0.0, rows), (1.0, rows), (0.1, rows[:1])):
        with pytest.raises(UserError, match=r"of \d+ problems leaves nothing to train or test on"):
            list(split_held_out([lambda some=some: some], None, share)[1]())


def test_a_weight_is_whole_copies_and_a_drawn_part() -> None:
    files = [[StepLabels(f"{name}{i}", ["s"], [1.0]) for i in range(4)] for name in "ab"]
    readers = [lambda rows=rows: rows for rows in files]
    counts = Counter(row.instruction for row in mix(readers, [2.5, 0.25], seed=1))
    assert sorted(counts[f"a{i}"] for i in range(4)) == [2, 2, 3, 3]
    assert sum(counts[f"b{i}"] for i in range(4)) == 1
    assert list(mix(readers, [], seed=1)) == [*files[0], *files[1]]
    with pytest.raises(UserError, match="--weights has 1 numbers for 2 training files"):
        list(mix(readers, [1.0], seed=1))


def test_outcomes_and_steps_mix_under_the_process_objective(tmp_path: Path) -> None:
    steps, outcomes = write(tmp_path / "s.jsonl", STEPS), write(tmp_path / "o.jsonl", OUTCOME)
    assert [row[:3] for row in read_rows("process", outcomes)] == [("2+2=", ["#### 4"], [1.0])]
    assert [row[:3] for row in read_rows("process", steps)] == [("1+1=", ["a", "#### 2"], [1.0, 0.0])]
    with pytest.raises(UserError, match="s.jsonl, line 1 holds judged steps; train on them with --objective process"):
        list(read_rows("outcome", steps))


@pytest.mark.parametrize("label_tokens", ["all", "last"])
def test_held_out_outcomes_are_one_label_each(tmp_path: Path, tokenizer: Tokenizer, label_tokens: str) -> None:
    rows = [{"instruction": f"{n}", "output": "a" * (1 + 5 * n), "correct": n % 2 == 0} for n in range(8)]
    options = {"max_seq_len": 64, "label_tokens": label_tokens}
    file = write(tmp_path / "o.jsonl", *rows)
    train, held, _ = open_data("outcome", [file], [], "", 0.5, tokenizer, seed=1, **options)
    n_tokens = sum(encoded.n_response for (encoded,) in train.samples)
    assert train.report.split("; ")[1].startswith(f"{n_tokens if label_tokens == 'all' else 4} labels")
    assert held.report.split("; ")[1].startswith("4 labels, 50.0% right")


def test_no_problem_is_on_both_sides(tmp_path: Path, tokenizer: object) -> None:
    rows = [
        {"instruction": f"{i}+1=", "output": f"#### {n}", "correct": n == 1}
        for i in range(8)
        for n in range(2)
    ]
    files = [write(tmp_path / f"{part}.jsonl", *rows[part::2]) for part in range(2)]
    options = {"max_seq_len": 64, "label_tokens": "last", "balance": True}
    train, held, objective = open_data("outcome", files, [1.0, 2.0], "", 0.25, tokenizer, seed=1, **options)
    prompts = [
        {tuple(sample.tokens[: sample.response_start]) for (sample,) in data.samples}
        for data in (train, held)
    ]
    assert len(prompts[0]) == 6 and len(prompts[1]) == 2 and not prompts[0] & prompts[1]
    assert len(train.samples) == 3 * 6 and len(held.samples) == 4
    assert objective.right_weight == pytest.approx(0.5)  # the right ones are in the file that counts twice


@pytest.mark.parametrize("script, objective, names", [
    ("verifier_train", "pairwise", {"prompt": "instruction", "good": "chosen", "bad": "rejected"}),
    ("verifier_train", "outcome", {"prompt": "instruction", "completion": "output", "label": "correct"}),
    ("preference_train", "dpo", {"prompt": "instruction", "good": "chosen", "bad": "rejected"}),
    ("preference_train", "kto", {"prompt": "instruction", "completion": "output", "label": "correct"}),
])
def test_trainers_read_public_columns_under_our_names(
    folders: Folders, tmp_path: Path, script: str, objective: str, names: dict[str, str]
) -> None:
    ours = {"chosen": "#### 2", "rejected": "#### 3", "output": "#### 2", "correct": True}
    rows = [{"instruction": f"{n}+1="} | ours for n in range(4)]
    file = write(tmp_path / "theirs.jsonl", *({name: row[key] for name, key in names.items()} for row in rows))
    flags = {"ckpt_dir": folders.one, "save_dir": str(tmp_path / "out"), "objective": objective, "held_out": 0.5,
             "train_file": [file] if script == "verifier_train" else file, "dry_run": True}
    with pytest.raises(UserError, match="key 'instruction' is missing|key '.*' is missing|'correct' is None"):
        main_of(script)(**flags)
    main_of(script)(**flags, columns=[f"{name}={key}" for name, key in names.items()])
