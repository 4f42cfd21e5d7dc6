"""The closing tables of recipes of several seeds: shares of the gap, the verdict on the difference, credit."""

import json
import runpy
from pathlib import Path

import pytest

from src.errors import UserError

RECIPES = Path(__file__).parents[2] / "recipes"


def write_samples(run_dir: Path, seed: int, row: str, right: list[bool]) -> None:
    """Graded samples of one seed, not in the order of their problems."""
    folder = run_dir / f"seed-{seed}" / f"{row}-test"
    folder.mkdir(parents=True)
    lines = [
        json.dumps(
            {"id": str(n), "sample": 0, "prompt": "q", "response": "r", "outcome": "right" if x else "wrong"}
        )
        for n, x in enumerate(right)
    ]
    (folder / "samples.jsonl").write_text("\n".join(lines[::-1]) + "\n")
    (folder / "results.json").write_text("{}")


def shares(n_right: int) -> list[bool]:
    return [n < n_right for n in range(100)]


@pytest.mark.parametrize(
    ("claimed", "verdict"), [(60, "pro beats full: +20.0%"), (41, "pro does not beat full: +1.0%")]
)
def test_the_gap_and_the_verdict(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], claimed: int, verdict: str
) -> None:
    for seed in (1, 2):
        for row, n_right in (("weak", 20), ("full", 40), ("pro", claimed), ("gold", 100)):
            write_samples(tmp_path, seed, row, shares(n_right))
    rows = ["weak", "full", "pro", "gold"]
    main = runpy.run_path(str(RECIPES / "seeds_table.py"))["main"]
    main(str(tmp_path), rows, rows, "pro", ["full", "weak"], "weak", "gold")
    text = capfd.readouterr().out
    assert "pro beats weak" in text and verdict in text and "100 test problems, 2 seeds" in text
    assert f"{(claimed - 20) / 80:.0%}" in text and "25%" in text  # of the gap: pro and full
    assert len({line.index("seeds ") for line in text.splitlines()[1:5]}) == 1
    with pytest.raises(UserError, match="found 4 --rows and 5 --names"):
        main(str(tmp_path), rows, ["weak", "full", "pro", "gold", " or not"], "pro", ["full"])
    with pytest.raises(UserError, match="0 finished seeds of other"):
        main(str(tmp_path), ["other"], ["other"], "other", [])
    for row in rows:  # a seed that is not finished counts nowhere
        write_samples(tmp_path, 3, row, [True])
        if row != rows[-1]:
            main(str(tmp_path), rows, rows, "pro", ["full", "weak"], "weak", "gold")
            assert capfd.readouterr().out == text
    with pytest.raises(UserError, match="3 finished seeds of weak"):
        main(str(tmp_path), rows, rows, "pro", ["full"])


def test_credit_is_the_mean_over_seeds(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for seed, found in ((1, 0.5), (2, 0.7)):
        folder = tmp_path / f"seed-{seed}/dpo-credit"
        folder.mkdir(parents=True)
        report = {"by_sum": {"accuracy": found}, "by_lowest_token": {"accuracy": found + 0.1}}
        report |= {"with_a_wrong_step": 9, "blindly": 0.25}
        (folder / "results.json").write_text(json.dumps(report))
    main = runpy.run_path(str(RECIPES / "credit_table.py"))["main"]
    main(str(tmp_path), ["dpo"], ["DPO"])
    text = capfd.readouterr().out
    assert "60.0%   seeds 50.0% 70.0%" in text and "70.0%   seeds 60.0% 80.0%" in text
    assert "first wrong step of 9 solutions, blindly 25.0%" in text
    with pytest.raises(UserError, match="0 finished seeds of scdpo-credit"):
        main(str(tmp_path), ["dpo", "scdpo"], ["DPO", "step-controlled DPO"])
    with pytest.raises(UserError, match="found 1 --rows and 2 --names"):
        main(str(tmp_path), ["dpo"], ["DPO", "step-controlled DPO"])
