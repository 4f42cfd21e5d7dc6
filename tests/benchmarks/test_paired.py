"""benchmarks/paired.py: what is too far off is not compared, and ratios are medians over turns."""

from benchmarks import paired


def run(*rates: float) -> list[paired.Run]:
    """Runs of these rates by processor seconds, half of them by the clock."""
    return [{"cpu": rate, "clock": rate / 2} for rate in rates]


def test_the_fastest_side_that_agrees_is_compared() -> None:
    found = {
        "ours": run(2, 4, 6), "ours, bfloat16": run(30, 40, 50), "peer": run(1, 4, 2), "peer, fast": run(90, 90, 90)
    }
    gaps = {"ours": (0.0, 1e-4), "ours, bfloat16": (0.01, 0.02), "peer": (1e-6, 1e-4), "peer, fast": (0.5, 1e-4)}
    columns = {"cpu": lambda run: run["cpu"], "clock": lambda run: run["clock"]}
    lines = paired.table("title", found, columns, gaps).splitlines()
    assert lines[0] == "title"
    assert "too far off" in lines[5] and lines[5].startswith("peer, fast")
    # turn by turn 30, 10 and 25 times as fast
    assert lines[6] == "ours, bfloat16 / peer: x25.00 by processor seconds, x25.00 by the clock"
    assert "x25.00" in lines[4] and "x10.00" in lines[2]


def test_sides_take_turns() -> None:
    order = []
    found = paired.in_turns(["a", "b"], 2, lambda side: order.append(side) or {"side": side})
    assert order == ["a", "b", "b", "a"] and [len(runs) for runs in found.values()] == [2, 2]
