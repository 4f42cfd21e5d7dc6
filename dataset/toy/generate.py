"""Write the toy domain: word problems in our own words, of one to five steps, with the truth of every step.

python dataset/toy/generate.py --save_dir dataset/toy --seed 1

A problem of level n is solved by n equations. A solution is n short sentences, each ending in its equation, and
a last block `#### answer`; blank lines separate the blocks. `check_steps` says for every block of any response
whether it is right.
"""

import json
import random
import re
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))  # a script's own folder is on the path, the repository is not

from src.command import cli  # noqa: E402

LEVELS = (1, 2, 3, 4, 5)
# Demonstrations show the form of a solution and seldom a hard sum: of those the base has seen more wrong than right,
# and a solver that keeps its doubts leaves something to verifiers and rewards.
EASY_DEMONSTRATIONS = 175
HARD_DEMONSTRATIONS = 25
LARGEST = 120
EQUATION = re.compile(r"(\d{1,4})([-+x/])(\d{1,4})=(\d{1,4})")
STEP = re.compile(r"[A-Z][A-Za-z' ]*: " + EQUATION.pattern + r"\.")
ANSWER = re.compile(r"#### (\d{1,4})")

PRONOUNS = {
    "Ana": "She", "Bela": "She", "Dora": "She", "Fay": "She", "Gita": "She", "Hana": "She",
    "Ivan": "He", "Jon": "He", "Kofi": "He", "Luis": "He", "Nils": "He", "Omar": "He",
}
ITEMS = (
    "shells", "stamps", "pears", "coins", "cards", "beads",
    "stones", "plums", "seeds", "bricks", "pens", "cups",
)


class Problem(NamedTuple):
    """A word problem with the truth about it."""

    instruction: str
    steps: list[str]  # one sentence with one equation each, without the final answer
    label: str
    level: int


class Equation(NamedTuple):
    """left operation right = result, right or wrong."""

    left: int
    operation: str
    right: int
    result: int


class Scene(NamedTuple):
    """One sentence of a story and the steps it asks for: pairs of words and equation."""

    text: str
    steps: list[tuple[str, Equation]]


def compute(left: int, operation: str, right: int) -> int:
    """The value of `left operation right`; division rounds down, as a solver that slipped would have to."""
    if operation == "+":
        return left + right
    if operation == "-":
        return left - right
    if operation == "x":
        return left * right
    return left // max(right, 1)


def equation(left: int, operation: str, right: int) -> Equation:
    """The equation with its right result."""
    return Equation(left, operation, right, compute(left, operation, right))


def gain(rng: random.Random, name: str, value: int) -> Scene | None:
    """A few things more."""
    amount = rng.randint(3, 49)
    verb, step = rng.choice((
        ("finds {} more.", "{} finds more"),
        ("buys {} more.", "{} buys more"),
        ("wins {}.", "{} wins some"),
        ("gets {} as a gift.", "{} gets some"),
    ))
    return Scene(verb.format(amount), [(step.format(name), equation(value, "+", amount))])


def lose(rng: random.Random, name: str, value: int) -> Scene | None:
    """A few things less; None where there are too few to lose any."""
    if value < 6:
        return None
    amount = rng.randint(2, min(value - 2, 59))
    verb, step = rng.choice((
        ("gives away {}.", "{} gives some away"),
        ("loses {}.", "{} loses some"),
        ("sells {} of them.", "{} sells some"),
        ("breaks {}.", "{} breaks some"),
    ))
    return Scene(verb.format(amount), [(step.format(name), equation(value, "-", amount))])


def multiply(rng: random.Random, name: str, value: int) -> Scene | None:
    """Each thing becomes several; None above LARGEST."""
    factor = rng.randint(2, 6)
    if value * factor > LARGEST:
        return None
    words = "doubles the pile." if factor == 2 else f"trades each one for {factor}."
    return Scene(words, [("The pile", equation(value, "x", factor))])


def divide(rng: random.Random, name: str, value: int) -> Scene | None:
    """One of several equal parts is kept; None where no division is exact."""
    parts = [n for n in (2, 3, 4, 5, 6) if value % n == 0 and value >= 4 * n]
    if not parts:
        return None
    part = rng.choice(parts)
    words = "keeps half of them." if part == 2 else f"keeps one of {part} equal heaps."
    return Scene(words, [("Kept", equation(value, "/", part))])


def gain_packs(rng: random.Random, name: str, value: int) -> Scene | None:
    """Packs of things come: a product, then a sum."""
    packs, size = rng.randint(2, 9), rng.randint(3, 9)
    held = equation(packs, "x", size)
    words = rng.choice(("buys {} packs of {}.", "opens {} boxes of {}."))
    return Scene(words.format(packs, size), [("New", held), ("With them", equation(value, "+", held.result))])


def lose_packs(rng: random.Random, name: str, value: int) -> Scene | None:
    """Packs of things go: a product, then a difference; None where there are too few."""
    packs, size = rng.randint(2, 6), rng.randint(3, 9)
    held = equation(packs, "x", size)
    if held.result > value - 2:
        return None
    words = rng.choice(("gives {} friends {} each.", "sells {} bags of {}."))
    rest = equation(value, "-", held.result)
    return Scene(words.format(packs, size), [("Gone", held), ("Without them", rest)])


def pool(rng: random.Random, name: str, value: int) -> Scene | None:
    """Another person has some more, and both put theirs together: two sums."""
    other = rng.choice([n for n in PRONOUNS if n != name])
    amount = rng.randint(2, 30)
    theirs = equation(value, "+", amount)
    words = f"meets {other}, who has {amount} more, and they pool them."
    return Scene(words, [(f"{other} has", theirs), ("Together", equation(value, "+", theirs.result))])


def sell_all(rng: random.Random, name: str, value: int) -> Scene | None:
    """All things become dollars, the last scene of a story; None above LARGEST."""
    price = rng.randint(2, 9)
    if value * price > LARGEST:
        return None
    return Scene(f"sells each one for {price} dollars.", [("Dollars", equation(value, "x", price))])


ONE_STEP = (gain, lose, multiply, divide)
TWO_STEPS = (gain_packs, lose_packs, pool)


def begin(rng: random.Random, name: str, item: str, level: int) -> tuple[Scene, int]:
    """The first sentence and the number of things it leaves."""
    if level > 1 and rng.random() < 0.3:
        boxes, size = rng.randint(2, 9), rng.randint(3, 12)
        first = equation(boxes, "x", size)
        text = rng.choice(("{} has {} boxes with {} {} each.", "{} makes {} rows of {} {}."))
        return Scene(text.format(name, boxes, size, item), [("First", first)]), first.result
    value = rng.randint(5, 80)
    text = rng.choice(("{} has {} {}.", "{} starts with {} {}.", "{} counts {} {}."))
    return Scene(text.format(name, value, item), []), value


def make_problem(rng: random.Random, level: int) -> Problem:
    """A random problem whose solution has `level` steps and no number above LARGEST."""
    if level not in LEVELS:
        raise ValueError(f"level={level!r} is not one of {LEVELS}")
    name, item = rng.choice(list(PRONOUNS)), rng.choice(ITEMS)
    first, value = begin(rng, name, item, level)
    texts, steps = [first.text], list(first.steps)
    question = f"How many {item} are there now?"
    while len(steps) < level:
        left = level - len(steps)
        choices = ONE_STEP + (TWO_STEPS if left > 1 else (sell_all,))
        action = rng.choice(choices)
        scene = action(rng, name, value)
        if scene is None or scene.steps[-1][1].result > LARGEST:
            continue
        texts.append(f"{PRONOUNS[name]} {scene.text}")
        steps += scene.steps
        value = steps[-1][1].result
        if action is sell_all:
            question = f"How many dollars does {name} get?"
    sentences = [f"{text}: {write(e)}." for text, e in steps]
    return Problem(" ".join([*texts, question]), sentences, str(value), level)


def write(e: Equation) -> str:
    """As it stands in a solution: 3+4=7."""
    return f"{e.left}{e.operation}{e.right}={e.result}"


def solution(problem: Problem) -> str:
    """The response that is right in every step."""
    return "\n\n".join([*problem.steps, f"#### {problem.label}"])


def read_step(step: str) -> Equation | None:
    """The equation of a well-formed step, else None."""
    match = STEP.fullmatch(step)
    return match and Equation(int(match[1]), match[2], int(match[3]), int(match[4]))


def same_step(found: Equation, truth: Equation) -> bool:
    """Whether two equations are one; the operands of + and x may be swapped."""
    if found == truth:
        return True
    return truth.operation in "+x" and found == truth._replace(left=truth.right, right=truth.left)


def check_steps(problem: Problem, response: str) -> list[bool]:
    """Whether each block of a response (blank lines separate them, the `#### answer` block counts) is right.

    A step is right when it is well formed, at its place, and has the operands and the result of the true step
    there; the operands of + and x may be swapped. The last block is right when it is in its place and its number
    is the label.
    """
    verdicts = []
    for place, block in enumerate(response.split("\n\n")):
        if place < len(problem.steps):
            found, truth = read_step(block), read_step(problem.steps[place])
            verdicts.append(found is not None and same_step(found, truth))
        else:
            match = ANSWER.fullmatch(block)
            verdicts.append(place == len(problem.steps) and match is not None and match[1] == problem.label)
    return verdicts


def digitwise(left: int, operation: str, right: int) -> int:
    """Addition that forgets to carry, or subtraction that takes the smaller digit from the larger."""
    pairs = [(int(a), int(b)) for a, b in zip(f"{left:04d}", f"{right:04d}", strict=True)]
    digits = [(a + b) % 10 if operation == "+" else abs(a - b) for a, b in pairs]
    return int("".join(map(str, digits)))


def slip(e: Equation, rng: random.Random) -> Equation:
    """The equation as somebody gets it wrong: no carry or borrow, one row of a table off, + and - confused."""
    if e.operation in "+-":
        other = "-" if e.operation == "+" else "+"
        if rng.random() < 0.1 and (other == "+" or e.left > e.right):
            return equation(e.left, other, e.right)
        result = digitwise(e.left, e.operation, e.right)
        if result == e.result:  # nothing to carry or borrow
            result = e.result + (rng.choice((-10, 10)) if e.result > 10 else 1)
    elif e.operation == "x":
        result = e.left * (e.right - 1)
    else:
        result = e.result + 1
    return e._replace(result=result)


def is_hard(e: Equation) -> bool:
    """Whether the equation needs a carry, a borrow, or a table beyond doubling and halving."""
    if e.operation == "+":
        return e.left % 10 + e.right % 10 > 9 or e.result > 99
    if e.operation == "-":
        return e.left % 10 < e.right % 10
    return e.left > 10 and e.right > 2


def demonstrations(problems: list[Problem]) -> list[Problem]:
    """The first EASY_DEMONSTRATIONS of the problems without a hard sum, then the first HARD_DEMONSTRATIONS with one."""
    has_hard_sum = [any(is_hard(read_step(step)) for step in problem.steps) for problem in problems]
    easy = [problem for problem, hard in zip(problems, has_hard_sum, strict=True) if not hard]
    hard = [problem for problem, hard in zip(problems, has_hard_sum, strict=True) if hard]
    return easy[:EASY_DEMONSTRATIONS] + hard[:HARD_DEMONSTRATIONS]


def with_slips(problem: Problem, rng: random.Random, slips: list[bool]) -> list[tuple[str, Equation]]:
    """The steps of a solution that goes wrong where `slips` says so, and carries the wrong numbers on."""
    changed: dict[int, int] = {}  # a true result -> what this solution has in its place
    steps = []
    for step, wrong in zip(problem.steps, slips, strict=True):
        truth = read_step(step)
        left, right = (changed.get(number, number) for number in (truth.left, truth.right))
        own = equation(left, truth.operation, right)
        if wrong:
            own = slip(own, rng)
        own = own._replace(result=min(max(own.result, 0), 999))
        if own.result != truth.result:
            changed[truth.result] = own.result
        steps.append((step.split(":")[0], own))
    return steps


def step_row(problem: Problem, rng: random.Random) -> dict:
    """A solution with step labels; half of them go wrong at one step."""
    slips = [False] * problem.level
    if rng.random() < 0.5:
        slips[rng.randrange(problem.level)] = True
    steps = with_slips(problem, rng, slips)
    blocks = [f"{text}: {write(e)}." for text, e in steps] + [f"#### {steps[-1][1].result}"]
    labels = [int(right) for right in check_steps(problem, "\n\n".join(blocks))]
    return {"instruction": problem.instruction, "steps": blocks, "labels": labels}


def distinct_problems(
    rng: random.Random, count: int, seen: set[str], levels: tuple[int, ...] = LEVELS
) -> list[Problem]:
    """`count` problems, the levels in turn, none of them in `seen`, to which they are added."""
    problems = []
    while len(problems) < count:
        problem = make_problem(rng, levels[len(problems) % len(levels)])
        if problem.instruction not in seen:
            seen.add(problem.instruction)
            problems.append(problem)
    return problems


def instruction_row(problem: Problem) -> dict:
    """A row of train.json and test.json."""
    return {
        "instruction": problem.instruction,
        "output": [solution(problem)],
        "label": problem.label,
        "level": problem.level,
    }


def make_files(seed: int, train_count: int, test_count: int, step_count: int) -> dict[str, list[dict]]:
    """File name -> rows. The test problems come first, so that they do not depend on the other two counts."""
    seen: set[str] = set()
    test = distinct_problems(random.Random(f"{seed} test"), test_count, seen)
    train = distinct_problems(random.Random(f"{seed} train"), train_count, seen)
    step_rng = random.Random(f"{seed} steps")
    steps = [step_row(problem, step_rng) for problem in distinct_problems(step_rng, step_count, seen)]
    return {
        "train.json": [instruction_row(problem) for problem in train],
        "demonstrations.json": [instruction_row(problem) for problem in demonstrations(train)],
        "test.json": [instruction_row(problem) for problem in test],
        "steps.json": steps,
    }


def as_text(rows: list[dict]) -> str:
    """A json array, one row a line."""
    return "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"


def main(
    save_dir: str, seed: int = 1, train_count: int = 3000, test_count: int = 400, step_count: int = 1000
) -> None:
    """Write train.json, demonstrations.json (a choice of its problems), test.json and steps.json.

    save_dir: directory for the files
    seed: equal seeds give equal bytes
    train_count: problems with solutions in train.json
    test_count: problems in test.json, none of them in train.json
    step_count: solutions in steps.json, about half of them with an error
    """
    folder = Path(save_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in make_files(seed, train_count, test_count, step_count).items():
        (folder / name).write_text(as_text(rows), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    cli.run(main)
