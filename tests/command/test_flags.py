"""src/command/flags.py: what words a flag takes and what they become."""

import re
from typing import Literal

import pytest

from src.command.flags import Value, flags_of, parse
from src.errors import UserError


def main(
    ckpt_dir: str,
    n: int,
    lr: float = 1e-5,
    resume: bool = False,
    lora_rank: int = -1,
    template: str = "",
    seed: int = 1,
    objective: Literal["pairwise", "outcome"] = "outcome",
    files: list[str] = [],  # noqa: B006
    source: str | list[str] = "x",
    ks: list[int] = [],  # noqa: B006
    shuffle: bool = True,
    no_eval: bool = False,
) -> None:
    """Accept one flag of each kind.

    ckpt_dir: where the weights are
    n: how many shards to
      write: one a rank
    lr:
    note that seed: is not at the start of the line

    lora_rank: -1 for full training
    """


def one(*argv: str) -> Value:
    """The value of the only optional flag in argv."""
    values = parse(main, ["--ckpt_dir", "c", "--n", "2", *argv])
    assert list(values)[:2] == ["ckpt_dir", "n"] and len(values) == 3, values
    return list(values.values())[2]


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["--template", "a,b"], "a,b"),
        (["--template", "123"], "123"),
        (["--template", "7B"], "7B"),
        (["--template", "None"], "None"),
        (["--template", "[1, 2]"], "[1, 2]"),
        (["--template", ""], ""),
        (["--template="], ""),
        (["--template", "two words"], "two words"),
        (["--template=-y"], "-y"),
        (["--template=a=b"], "a=b"),
        (["--template=--lr"], "--lr"),
        (["--lr", "1e-5"], 1e-5),
        (["--lr", "3"], 3.0),
        (["--lr", "-.5"], -0.5),
        (["--lr", "-inf"], float("-inf")),
        (["--lora_rank", "-1"], -1),
        (["--lora-rank", "8"], 8),
        (["--lora-rank=8"], 8),
        (["--resume"], True),
        (["--noresume"], False),
        (["--no_resume"], False),
        (["--no-resume"], False),
        (["--resume", "false"], False),
        (["--resume=false"], False),
        (["--resume", "False"], False),
        (["--resume", "0"], False),
        (["--resume=no"], False),
        (["--resume", "true"], True),
        (["--resume", "True"], True),
        (["--resume", "1"], True),
        (["--resume", "yes"], True),
        (["--no_eval"], True),
        (["--no_no_eval"], False),
        (["--seed", "7"], 7),
        (["--objective", "pairwise"], "pairwise"),
        (["--files", "a.pth"], ["a.pth"]),
        (["--files", "a.pth,b.pth"], ["a.pth", "b.pth"]),
        (["--files", "a.pth", "b.pth"], ["a.pth", "b.pth"]),
        (["--files=a.pth", "b.pth"], ["a.pth", "b.pth"]),
        (["--files", "a,", "b"], ["a", "b"]),
        (["--files", ""], []),
        (["--files", "none"], ["none"]),
        (["--source", "a,b"], "a,b"),
        (["--source", "a,b", "c"], ["a,b", "c"]),
        (["--ks", "1,4,16"], [1, 4, 16]),
    ],
)
def test_value_and_type(argv: list[str], expected: Value) -> None:
    value = one(*argv)
    assert value == expected and type(value) is type(expected)


def test_several_flags_in_any_order() -> None:
    argv = ["--resume", "--files", "a", "b", "--lr", "-1", "--noshuffle", "--n=8", "--ckpt-dir", "7B"]
    assert parse(main, argv) == {
        "resume": True,
        "files": ["a", "b"],
        "lr": -1.0,
        "shuffle": False,
        "n": 8,
        "ckpt_dir": "7B",
    }


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--lora_rnk", "8"], "unknown flag --lora_rnk; did you mean --lora_rank?"),
        (["--lora-rnk=8"], "unknown flag --lora-rnk; did you mean --lora_rank?"),
        (["-lr", "8"], "unknown flag -lr; did you mean --lr?"),
        (["--nolr"], "unknown flag --nolr; did you mean --lr?"),
        (["--zzz"], "unknown flag --zzz; --help lists the flags of this script"),
        (["--", "--trace"], "unknown flag --; --help lists the flags of this script"),
        (["--lr"], "--lr has no value, expected number; write --lr 1e-5"),
        (["--lr", "--resume"], "--lr has no value, expected number; write --lr 1e-5"),
        (
            ["--template", "-y"],
            "--template has no value, expected text; write --template VALUE "
            "(--template=VALUE when it begins with a dash)",
        ),
        (["--files"], "--files has no value, expected list of text; write --files VALUE"),
        (["--lr", "abc"], "--lr is 'abc', expected number; write for example --lr 1e-5"),
        (
            ["--lora_rank", "1.5"],
            "--lora_rank is '1.5', expected whole number; write for example --lora_rank 8",
        ),
        (
            ["--lora_rank", "1e3"],
            "--lora_rank is '1e3', expected whole number; write for example --lora_rank 8",
        ),
        (["--lora_rank="], "--lora_rank is '', expected whole number; write for example --lora_rank 8"),
        (["--seed", "x"], "--seed is 'x', expected whole number; write for example --seed 8"),
        (["--ks", "1,b"], "--ks is '1,b', expected list of whole number; write for example --ks 8"),
        (["--files", "\n"], "--files is '\\n', expected list of text"),
        (["--ks", ",,"], "--ks is ',,', expected list of whole number"),
        (["--resume", "maybe"], "--resume is 'maybe', expected true|false; write for example --resume true"),
        (
            ["--noresume", "true"],
            "--noresume is followed by 'true' but takes no value; write --noresume alone",
        ),
        (["--noresume=true"], "--noresume is followed by 'true' but takes no value; write --noresume alone"),
        (["--objective", "pair"], "--objective is 'pair', expected pairwise|outcome; did you mean pairwise?"),
        (["--objective", "x"], "--objective is 'x', expected pairwise|outcome; write for example"),
        (["--lr", "1", "--lr", "2"], "--lr is given twice; keep one of them"),
        (["--resume", "--noresume"], "--resume is given twice; keep one of them"),
        (["out"], "'out' belongs to no flag; write --NAME before it"),
        (["--lr", "1", "2"], "'2' belongs to no flag; write --NAME before it, or quotes"),
    ],
)
def test_mistake(argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        parse(main, ["--ckpt_dir=c", "--n=2", *argv])


def test_missing_required_flags_are_all_named() -> None:
    message = "missing required --ckpt_dir, --n; write --ckpt_dir VALUE, or see --help"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        parse(main, ["--lr", "1"])


def test_typo_is_reported_before_what_is_missing() -> None:
    with pytest.raises(UserError, match="did you mean --ckpt_dir"):
        parse(main, ["--ckpt_dri", "x"])


def test_meanings() -> None:
    flags = flags_of(main)
    assert flags["n"].meaning == "how many shards to write: one a rank"
    assert flags["lora_rank"].meaning == "-1 for full training"
    documented = {"ckpt_dir", "n", "lora_rank"}  # lr has a line but no words
    assert {name for name, flag in flags.items() if flag.meaning} == documented


@pytest.mark.parametrize("word", ["a\0b", "\udcff", "caf\udce9/x"])
@pytest.mark.parametrize("form", [["--template", "{}"], ["--files=a,{}"], ["--{}", "1"], ["{}"]])
def test_names_that_are_no_text_are_refused(word: str, form: list[str]) -> None:
    with pytest.raises(UserError, match="holds a NUL or is not UTF-8") as problem:
        parse(main, ["--ckpt_dir", "c", "--n", "2", *(part.format(word) for part in form)])
    str(problem.value).encode()
