"""src/evaluation/credit.py: credits by hand, and that a solution's add up to its reward."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import preference_evaluate
from src import load
from src.data.batch import make_batch
from src.data.examples import StepLabels
from src.errors import UserError
from src.evaluation.credit import Credit, credit, report_credit, token_logprobs
from src.evaluation.scoring import encode_solutions
from src.text.tokenizer import Tokenizer
from src.training.reference import response_sums
from tests.conftest import Folders

ROWS = [
    StepLabels("1+1=", ["1+1=2", "abc", "#### 2"], [1, 1, 1]),
    StepLabels("2+2=", ["2+2=5", "#### 5"], [0, 0]),
    StepLabels("a", ["b c", "d", "e", "#### 1"], [1, None, 0, 0]),
]


def test_scdpo_24_token_credits_add_up_to_the_sequence_reward(folders: Folders, tokenizer: Tokenizer) -> None:
    """Eq. 7: beta times the log-ratio of each token; here of a model and the same one with other weights."""
    policy, reference = load.load_solver(folders.one), load.load_solver(folders.one)
    with torch.no_grad():
        reference.norm.weight.mul_(1.3)
    encoded = encode_solutions(ROWS, tokenizer, policy.config.max_seq_len, "paragraph")
    said = [list(token_logprobs(model, encoded, max_batch_size=2)) for model in (policy, reference)]
    with torch.no_grad():
        sums = [response_sums(model, make_batch(encoded)) for model in (policy, reference)]
    rewards = 0.3 * (sums[0] - sums[1])
    for row, each, new, old, reward in zip(ROWS, encoded, *said, rewards.tolist(), strict=True):
        found = credit(each, new, old, 0.3, tokenizer)
        assert found.reward == pytest.approx(reward, abs=1e-4) and abs(reward) > 0.01
        assert sum(found.step_credits) == pytest.approx(found.reward, abs=1e-9)
        assert len(found.step_credits) == len(found.step_lowest) == len(row.steps)
        assert len(found.tokens) == len(found.credits) == each.n_response
        assert min(found.credits) == min(found.step_lowest)
    alone = list(token_logprobs(policy, encoded[2:], max_batch_size=1))
    assert_close(torch.tensor(alone[0]), torch.tensor(said[0][2]), rtol=1e-5, atol=1e-5)
    lengths = [len(each.tokens) for each in encoded]
    assert encode_solutions(ROWS, tokenizer, sorted(lengths)[1], "paragraph").count(None) == 1
    with torch.no_grad():
        policy.norm.weight[3] = float("nan")
    with pytest.raises(UserError, match="2 solutions: the model's logits are NaN"):
        list(token_logprobs(policy, encoded, max_batch_size=2))
    with pytest.raises(UserError, match="each of the 3 solutions is longer than the model's context of 9 tokens"):
        encode_solutions(ROWS, tokenizer, 9, "line")


def test_both_solvers_can_read_what_is_compared(folders: Folders, tmp_path: Path) -> None:
    """The reference's context is shorter: beyond it, what it says of a token means nothing."""
    shutil.copytree(folders.one, tmp_path / "short")
    lengths = [len(each.tokens) for each in encode_solutions(ROWS, load.load_tokenizer(folders.one), 128, "paragraph")]
    params = json.loads((tmp_path / "short/params.json").read_text())
    (tmp_path / "short/params.json").write_text(json.dumps(params | {"max_seq_len": max(lengths) - 1}))
    (tmp_path / "steps.json").write_text(json.dumps([row._asdict() for row in ROWS]))
    preference_evaluate.main(preference_evaluate.CreditConfig(
        ckpt_dir=folders.one, reference_ckpt_dir=str(tmp_path / "short"), steps_file=str(tmp_path / "steps.json"),
        log_dir=str(tmp_path / "log")))
    report = json.loads((tmp_path / "log/results.json").read_text())
    assert (report["solutions"], report["too_long"]) == (2, 1)


def credited(*steps: list[float]) -> Credit:
    flat = [value for step in steps for value in step]
    return Credit([""] * len(flat), flat, [sum(step) for step in steps], [min(step) for step in steps])


def test_report_by_hand() -> None:
    found = [
        credited([0.1], [0.2], [0.3]),  # right: nothing to find, but its reward counts
        credited(
            [-0.4, 0.5], [-0.1, -0.1]
        ),  # the lowest token is in the first step, the least sum in the second
        credited([0.1], [0.0], [-1.0, 0.8], [-0.1]),  # found both ways
    ]
    report = report_credit(ROWS, found)
    assert (report["solutions"], report["with_a_wrong_step"]) == (3, 2)
    assert report["blindly"] == pytest.approx((1 / 2 + 1 / 4) / 2)
    assert report["by_sum"]["accuracy"] == 0.5 and report["by_lowest_token"]["accuracy"] == 1.0
    assert report["reward_auc"] == 1.0
    with pytest.raises(UserError, match="none of the 1 solutions has a wrong step"):
        report_credit(ROWS[:1], found[:1])
