"""recipes/judge_toy_samples.py: samples cut short are wrong, and steps are labelled by the domain's truth."""

import json
import random
from pathlib import Path

from recipes import judge_toy_samples as judging
from src.data.examples import Sample, read_step_labels

QUESTION = "Luis starts with 64 stones. He opens 9 boxes of 4. How many stones are there now?"
RIGHT = "New: 9x4=36.\n\nWith them: 64+36=100.\n\n#### 100"
SLIP = "New: 9x4=36.\n\nWith them: 64+36=90.\n\n#### 90"


def sample(number: int, response: str, outcome: str) -> Sample:
    """A graded sample of QUESTION."""
    return Sample("1", number, QUESTION, response, outcome, {"prompt": QUESTION})


def test_a_right_sample_is_cut_behind_a_step_and_wrong_for_it() -> None:
    cut = judging.cut_short(sample(0, RIGHT, "right"), "100", random.Random(1))
    assert cut is not None and cut.outcome == "wrong" and cut.response == "New: 9x4=36.\n\n#### 36"
    # nothing to leave out; and a cut that would still be right
    assert judging.cut_short(sample(0, "New: 9x4=36.\n\n#### 36", "right"), "36", random.Random(1)) is None
    assert judging.cut_short(sample(0, RIGHT, "right"), "36", random.Random(1)) is None


def test_both_files_hold_the_judged_samples_and_the_cut_ones(tmp_path: Path) -> None:
    rows = [
        {"id": "1", "sample": number, "prompt": QUESTION, "response": response, "outcome": outcome}
        for number, (response, outcome) in enumerate([(RIGHT, "right"), (SLIP, "wrong"), (SLIP, "wrong")])
    ]
    files = [tmp_path / name for name in ("samples.jsonl", "outcome.json", "steps.json")]
    files[0].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    judging.main(*map(str, files))
    judged = {
        path.stem: sorted((row.steps, row.labels) for row in read_step_labels(str(path))) for path in files[1:]
    }
    cut = "New: 9x4=36.\n\n#### 36"
    assert judged["outcome"] == sorted([([cut], [0.0]), ([RIGHT], [1.0]), ([SLIP], [0.0])])
    assert judged["steps"] == sorted(
        (text.split("\n\n"), labels)
        for text, labels in ((cut, [1.0, 0.0]), (RIGHT, [1.0, 1.0, 1.0]), (SLIP, [1.0, 0.0, 0.0]))
    )
