"""The command line of every entry script: `cli.run(main)` turns flags into a call of main.

A script that does several things gives its functions by name instead, `cli.run({"pairs": pairs, ...})`: the first
word of its command line picks one.

Plain Fire runs the whole job on a mistyped flag and complains afterwards, hands `--resume=false` over as a
truthy string and `--ckpt_dir a,b` as a tuple. Here every flag is read against main's annotations before any
work starts, and a mistake ends in one line on stderr. Exit status: 0 done, 1 main met something only the user
can mend, 2 the flags are wrong, 130 interrupted.
"""

import difflib
import inspect
import math
import os
import re
import shutil
import signal
import sys
import textwrap
import time
import types
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, NoReturn, Union, get_args, get_origin, get_type_hints

import fire

from src.errors import UserError

Scalar = str | int | float | bool | None
Value = Scalar | list[Scalar]

# torchrun looks at its workers every 0.1 s and kills the others once one has failed: a rank that is still
# alive after this many seconds is the one with something to say.
GRACE_SECONDS = 2.0


class Kind(NamedTuple):
    """A type one word can have: its name in --help, an example, a reader raising ValueError or KeyError."""

    name: str
    example: str
    read: Callable[[str], Scalar]


NONE = {"None": None, "none": None}
TRUTH = {
    "true": True,
    "True": True,
    "yes": True,
    "1": True,
    "false": False,
    "False": False,
    "no": False,
    "0": False,
}
KINDS: dict[object, Kind] = {
    types.NoneType: Kind("none", "none", NONE.__getitem__),
    bool: Kind("true|false", "true", TRUTH.__getitem__),
    int: Kind("whole number", "8", int),
    float: Kind("number", "1e-5", float),
    str: Kind("text", "VALUE", str),
}
# None and choices come first because anything is text; text comes before lists so that, where both are
# allowed, one word stays text.
TRY_ORDER: list[object] = [types.NoneType, Literal, bool, int, float, str, list]


class Numbers(NamedTuple):
    """The numbers a flag may hold, in words and as a test that NaN fails."""

    expects: str
    allow: Callable[[float], bool]


COUNT = Numbers("1 or more", lambda x: x >= 1)
COUNT_OR_OFF = Numbers("1 or more, or -1", lambda x: x >= 1 or x == -1)
FINITE = Numbers("0 or more", lambda x: 0 <= x < math.inf)
FINITE_OR_OFF = Numbers("0 or more, or -1", lambda x: 0 <= x < math.inf or x == -1)
POSITIVE = Numbers("more than 0", lambda x: 0 < x < math.inf)
SHARE = Numbers("a number from 0 to 1", lambda x: 0 <= x <= 1)

# By the flag's name, whichever script has it.
NUMBERS: dict[str, Numbers] = {
    "n": COUNT,
    "num_added_tokens": FINITE,
    "certify_ranks": Numbers("1 or more each", lambda x: len(x) > 0 and all(n >= 1 for n in x)),
    "certify_layers": COUNT_OR_OFF,
    "pairs_a_problem": COUNT,
    "rows_a_problem": COUNT,
    "solutions_a_problem": COUNT,
    "steps_a_solution": COUNT,
    "characters_a_step": COUNT,
    "rollouts": COUNT,
    "shots": COUNT,
    "attempts": COUNT,
    "num_samples": COUNT,
    "limit": COUNT_OR_OFF,
    "max_seq_len": COUNT,
    "max_new_tokens": COUNT,
    "max_batch_size": COUNT,
    "accumulation_steps": COUNT,
    "rollout_batch_size": COUNT,
    "max_buffer_size": COUNT,
    "epochs": COUNT,
    "inner_epochs": COUNT,
    "minibatches": COUNT,
    "max_steps": COUNT_OR_OFF,
    "tensor_parallel_size": COUNT_OR_OFF,
    "eval_every": COUNT_OR_OFF,
    "save_every": COUNT_OR_OFF,
    "keep_last": COUNT,
    "lora_rank": COUNT_OR_OFF,
    "critic_warmup": Numbers("0 or more, or -1", lambda x: x >= -1),
    "lr": FINITE,
    "critic_lr": FINITE,
    "margin": FINITE,
    "beta": POSITIVE,
    "nll_weight": FINITE,
    "label_smoothing": Numbers("0 or more and less than 0.5", lambda x: 0 <= x < 0.5),
    "centring": FINITE,
    "weights": Numbers("more than 0 each", lambda x: all(0 < weight < math.inf for weight in x)),
    "weight_decay": FINITE,
    "temperature": FINITE,
    "temperature_rise": FINITE,
    "temperature_cap": FINITE,
    "kl_coef": FINITE_OR_OFF,
    "kl_loss_coef": FINITE,
    "entropy_coef": FINITE,
    "kl_target": Numbers("more than 0, or -1", lambda x: 0 < x < math.inf or x == -1),
    "kl_horizon": POSITIVE,
    "group_size": COUNT_OR_OFF,
    "clip_high": Numbers("more than 0, or -1", lambda x: 0 < x < math.inf or x == -1),
    "dual_clip": FINITE,
    "critic_lambda": Numbers("a number from 0 to 1, or -1", lambda x: 0 <= x <= 1 or x == -1),
    "overlong_buffer": FINITE,
    "step_bonus": Numbers("a finite number", math.isfinite),
    "reward_weights": Numbers("0 or more each", lambda x: all(0 <= weight < math.inf for weight in x)),
    "rollout_samples": FINITE,
    "missing_eos_penalty": FINITE,
    "max_grad_norm": POSITIVE,
    "clip_ratio": POSITIVE,
    "value_clip": POSITIVE,
    "lora_alpha": POSITIVE,
    "max_shard_size": POSITIVE,
    "warmup_ratio": SHARE,
    "min_lr_ratio": SHARE,
    "held_out": SHARE,
    "share": SHARE,
    "min_confidence": SHARE,
    "flip_confidence": SHARE,
    "gamma": SHARE,
    "gae_lambda": SHARE,
    "lora_dropout": Numbers("0 or more and less than 1", lambda x: 0 <= x < 1),
    "top_k": Numbers("0 (all) or more", lambda x: x >= 0),
    "min_p": SHARE,
    "top_p": Numbers("more than 0 and at most 1", lambda x: 0 < x <= 1),
    "max_ratio": Numbers("a number of at least 1", lambda x: 1 <= x < math.inf),
    "seed": Numbers("a whole number of 64 bits", lambda x: -(2**63) <= x < 2**63),
}


class Flag(NamedTuple):
    """One parameter of main; `kinds` are the members of its annotation: (int, NoneType) for `int | None`."""

    name: str
    kinds: tuple[object, ...]
    default: object
    meaning: str

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty

    @property
    def expects(self) -> str:
        return " or ".join(_describe(kind) for kind in self.kinds)

    @property
    def example(self) -> str:
        kind = (*get_args(self.kinds[0]), self.kinds[0])[0]
        return f"--{self.name} {KINDS[kind].example if kind in KINDS else kind}"


def run(main: Callable[..., None] | Mapping[str, Callable[..., None]], argv: list[str] | None = None) -> None:
    """Check argv (default: sys.argv[1:]), call main with typed values; exit as the top of this file says.

    Returns after success. An exception other than UserError and OSError is our bug and keeps its traceback.
    """
    argv = sys.argv[1:] if argv is None else argv
    if isinstance(main, Mapping):
        main, argv = _pick(main, argv)
    if "--help" in argv or "-h" in argv:
        if _local_rank() == 0:
            print(usage(main, width=shutil.get_terminal_size().columns))
        sys.exit(0)
    try:
        values = parse(main, argv)
    except UserError as error:
        _stop(2, f"error: {error}")

    def command() -> None:
        # With the values bound Fire has nothing left to parse, and without a result it has nothing to print.
        main(**values)

    try:
        fire.Fire(command, command=[])
    except UserError as error:
        _stop(1, f"error: {error}")
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""  # a write to a full disk names no file
        _stop(1, f"error: {place}{error.strerror or error}")
    except KeyboardInterrupt:
        _stop(130, "interrupted")
    except Exception:
        # The death of another rank breaks the collectives of this one. Then the other has told the cause, and
        # torchrun ends this wait.
        if "RANK" in os.environ:
            time.sleep(GRACE_SECONDS)
        raise


def _pick(
    commands: Mapping[str, Callable[..., None]], argv: list[str]
) -> tuple[Callable[..., None], list[str]]:
    """The function that the first word names, and the other words. Without one, --help lists them all."""
    if argv and argv[0] in commands:
        return commands[argv[0]], argv[1:]
    if "--help" in argv or "-h" in argv:
        if _local_rank() == 0:
            print(_commands_help(commands, width=shutil.get_terminal_size().columns))
        sys.exit(0)
    found = f"found {argv[0]!r}" if argv else "found nothing"
    near = difflib.get_close_matches(argv[0], commands, n=1) if argv else []
    hint = f"did you mean {near[0]}?" if near else "--help says what each does"
    _stop(2, f"error: the first word must be one of {', '.join(commands)}, {found}; {hint}")


def _commands_help(commands: Mapping[str, Callable[..., None]], width: int) -> str:
    """The docstring of the script, then what each command does."""
    width = max(40, min(width, 100))
    module = sys.modules[next(iter(commands.values())).__module__]
    lines = [
        textwrap.fill(
            (inspect.getdoc(command) or "").partition("\n")[0],
            width,
            initial_indent=f"  {name:12}",
            subsequent_indent=" " * 14,
        )
        for name, command in commands.items()
    ]
    ending = "COMMAND --help lists the flags of a command."
    return "\n\n".join([_reflow(inspect.cleandoc(module.__doc__ or ""), width), "\n".join(lines), ending])


def parse(main: Callable[..., None], argv: list[str]) -> dict[str, Value]:
    """The flags given in argv, typed as main annotates them; defaults stay with main. Raises UserError."""
    flags = flags_of(main)
    values: dict[str, Value] = {}
    rest = list(argv)
    while rest:
        if not _looks_like_flag(rest[0]):
            raise UserError(
                f"{rest[0]!r} belongs to no flag; write --NAME before it, or quotes around "
                "a value with spaces; --help lists the flags"
            )
        head, equals, text = rest.pop(0).partition("=")
        flag, negated = _find(head, flags)
        if flag.name in values:
            raise UserError(f"--{flag.name} is given twice; keep one of them")
        words = [text] if equals else []
        takes_many = any(get_origin(kind) is list for kind in flag.kinds)
        while rest and not _looks_like_flag(rest[0]) and (takes_many or not words):
            words.append(rest.pop(0))
        if negated and words:
            raise UserError(f"{head} is followed by {words[0]!r} but takes no value; write {head} alone")
        values[flag.name] = not negated if bool in flag.kinds and not words else _read(flag, words)
    missing = [flag for flag in flags.values() if flag.required and flag.name not in values]
    if missing:
        names = ", ".join(f"--{flag.name}" for flag in missing)
        raise UserError(f"missing required {names}; write {missing[0].example}, or see --help")
    return values


def check_numbers(values: Mapping[str, Value]) -> None:
    """Raise UserError for a number that its flag cannot mean: no samples, a negative rate."""
    for name, value in values.items():
        if name in NUMBERS and not NUMBERS[name].allow(value):
            raise UserError(f"--{name} is {value}, expected {NUMBERS[name].expects}")


def flags_of(main: Callable[..., None]) -> dict[str, Flag]:
    """What main accepts, in the order of its signature, with the meanings its docstring gives."""
    hints, meanings = get_type_hints(main), _meanings(inspect.getdoc(main) or "")
    flags = {}
    for name, parameter in inspect.signature(main).parameters.items():
        hint = hints[name]
        kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        assert all((get_origin(kind) or kind) in TRY_ORDER for kind in kinds), f"{name}: cannot read {hint}"
        flags[name] = Flag(name, kinds, parameter.default, meanings.get(name, ""))
    return flags


def undocumented(main: Callable[..., None]) -> list[str]:
    """Parameters without a `name: meaning` line in main's docstring: --help cannot say what they are for."""
    return [flag.name for flag in flags_of(main).values() if not flag.meaning]


def usage(main: Callable[..., None], width: int) -> str:
    """The text of --help: the docstring of main's module (of a command: its own), then every flag, required first."""
    flags = flags_of(main).values()
    width = max(40, min(width, 100))
    about = sys.modules[main.__module__].__doc__ if main.__name__ == "main" else _about(main)
    blocks = [_reflow(inspect.cleandoc(about or ""), width)]
    for title, required in (("Required flags:", True), ("Optional flags:", False)):
        entries = [_flag_help(flag, width) for flag in flags if flag.required is required]
        blocks += ["\n".join([title, *entries])] if entries else []
    blocks.append(
        _wrap(
            "`--flag value` and `--flag=value` mean the same. A true|false flag alone means "
            "true, --noflag false. A list is several words, or one word with commas.",
            width,
        )
    )
    return "\n\n".join(blocks).lstrip()


def _about(command: Callable[..., None]) -> str:
    """A command's docstring without its lines on flags."""
    paragraphs = (inspect.getdoc(command) or "").split("\n\n")
    return "\n\n".join(text for text in paragraphs if not _meanings(text))


def _find(head: str, flags: dict[str, Flag]) -> tuple[Flag, bool]:
    """The flag that `--name`, `--noname` or `--no_name` stands for, and whether it is negated."""
    name = head.lstrip("-").replace("-", "_")
    if head.startswith("--"):
        if name in flags:
            return flags[name], False
        positive = name.removeprefix("no").removeprefix("_")
        if name.startswith("no") and positive in flags and bool in flags[positive].kinds:
            return flags[positive], True
    near = difflib.get_close_matches(name.lower(), flags, n=1)
    hint = f"did you mean --{near[0]}?" if near else "--help lists the flags of this script"
    raise UserError(f"unknown flag {head}; {hint}")


def _looks_like_flag(word: str) -> bool:
    """Negative numbers are values; other words with a leading dash are values only as in `--flag=-word`."""
    return word.startswith("-") and not re.match(r"-(\d|\.\d|inf$)", word)


def _read(flag: Flag, words: list[str]) -> Value:
    """The words behind a flag as the first of its kinds that fits them. Raises UserError."""
    if not words:
        dashed = f" (--{flag.name}=VALUE when it begins with a dash)" if str in flag.kinds else ""
        raise UserError(f"--{flag.name} has no value, expected {flag.expects}; write {flag.example}{dashed}")
    for kind in sorted(flag.kinds, key=lambda kind: TRY_ORDER.index(get_origin(kind) or kind)):
        try:
            return _read_as(kind, words, split=str not in flag.kinds)
        except (ValueError, KeyError):
            continue
    choices = [str(choice) for kind in flag.kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    near = difflib.get_close_matches(words[0], choices, n=1)
    hint = f"did you mean {near[0]}?" if near else f"write for example {flag.example}"
    raise UserError(f"--{flag.name} is {' '.join(words)!r}, expected {flag.expects}; {hint}")


def _read_as(kind: object, words: list[str], split: bool) -> Value:
    """The words as one kind; split: commas part the words of a list. Raises ValueError or KeyError."""
    if get_origin(kind) is list:
        parts = [part.strip() for word in words for part in word.split(",")] if split else words
        return [KINDS[get_args(kind)[0]].read(part) for part in parts if part]
    (word,) = words
    if get_origin(kind) is Literal:
        return get_args(kind)[[str(choice) for choice in get_args(kind)].index(word)]
    return KINDS[kind].read(word)


def _describe(kind: object) -> str:
    if get_origin(kind) is Literal:
        return "|".join(str(choice) for choice in get_args(kind))
    return f"list of {KINDS[get_args(kind)[0]].name}" if get_origin(kind) is list else KINDS[kind].name


def _meanings(docstring: str) -> dict[str, str]:
    """The `name: meaning` lines of a docstring; lines indented deeper than the name continue its meaning."""
    entries = re.findall(r"^( *)(\w+):(.*(?:\n\1 +.*)*)", docstring, re.MULTILINE)
    return {name: " ".join(meaning.split()) for _, name, meaning in entries}


def _flag_help(flag: Flag, width: int) -> str:
    default = ",".join(map(str, flag.default)) if isinstance(flag.default, list) else str(flag.default)
    default = default.lower() if isinstance(flag.default, bool | None) else default or "empty"
    head = f"--{flag.name}  {flag.expects}" + ("" if flag.required else f"  (default: {default})")
    return "\n".join([_wrap(head, width, margin="  "), _wrap(flag.meaning or "?", width, margin=" " * 6)])


def _reflow(text: str, width: int) -> str:
    """Prose filled to width; a paragraph with a command or an indented line stays whole, to be copied."""
    verbatim = re.compile(r"^(\s|torchrun |python )", re.MULTILINE)
    return "\n\n".join(part if verbatim.search(part) else _wrap(part, width) for part in text.split("\n\n"))


def _wrap(text: str, width: int, margin: str = "") -> str:
    return textwrap.fill(
        text,
        width,
        initial_indent=margin,
        subsequent_indent=margin,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _local_rank() -> int:
    """This process's number among those torchrun started on this machine; 0 without torchrun."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")))


def _stop(status: int, line: str) -> NoReturn:
    """Print the line and exit; under torchrun one rank a machine prints when all fail alike."""
    if "RANK" not in os.environ:
        sys.stderr.write(line + "\n")
        sys.exit(status)
    # A trainer may catch these to save before it dies. This rank is past saving: let a kill work at once.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if _local_rank() != 0:
        # If rank 0 fails for the same reason, it prints and exits now, and torchrun kills this rank in its
        # sleep. If not, rank 0 works on or waits in a collective, and this rank's line is the one to show.
        time.sleep(GRACE_SECONDS)
    sys.stderr.write(line + "\n")
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: the interpreter's shutdown tears down process groups and may wait there for ranks that
    # never answer, while torchrun kills those ranks only once this process is gone.
    os._exit(status)
