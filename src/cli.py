"""The command line of every entry script: `cli.run(main)` turns flags into a call of main.

A script that does several things gives its functions by name instead, `cli.run({"pairs": pairs, ...})`: the first
word of its command line picks one.

A mistake ends in one line on stderr. Exit status: 0 done, 1 main met something only the user can mend, 2 the flags
are wrong, 130 interrupted.
"""

import contextlib
import difflib
import inspect
import io
import math
import os
import re
import shutil
import signal
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Mapping
from typing import NamedTuple, NoReturn, TextIO

import fire

from src.errors import UserError, leave_for_torchrun
from src.flags import FREE_ON_RESUME, Flag, Value, flags_of, meanings_of, parse

# torchrun looks at its workers every 0.1 s and kills the others once one has failed: a rank that is still
# alive after this many seconds is the one with something to say.
GRACE_SECONDS = 2.0


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
    "fill_up_to": COUNT_OR_OFF,
    "attempts": COUNT,
    "right": COUNT,
    "wrong": COUNT,
    "similar_characters": FINITE,
    "num_samples": COUNT,
    "limit": COUNT_OR_OFF,
    "max_seq_len": COUNT_OR_OFF,
    "max_new_tokens": COUNT,
    "max_rounds": COUNT,
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
    "reward_clip": FINITE,
    "format_penalty": FINITE,
    "tis_cap": Numbers("1 or more, or 0", lambda x: 1 <= x < math.inf or x == 0),
    "max_refills": FINITE,
    "reference_refresh": COUNT_OR_OFF,
    "adam_eps": POSITIVE,
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
    "wrong_share": SHARE,
    "min_confidence": SHARE,
    "flip_confidence": SHARE,
    "gamma": SHARE,
    "gae_lambda": Numbers("a number from 0 to 1, or -1", lambda x: 0 <= x <= 1 or x == -1),
    "lora_dropout": Numbers("0 or more and less than 1", lambda x: 0 <= x < 1),
    "top_k": Numbers("0 (all) or more", lambda x: x >= 0),
    "min_p": SHARE,
    "top_p": Numbers("more than 0 and at most 1", lambda x: 0 < x <= 1),
    "max_ratio": Numbers("a number of at least 1", lambda x: 1 <= x < math.inf),
    "seed": Numbers("a whole number of 64 bits", lambda x: -(2**63) <= x < 2**63),
}


def run(main: Callable[..., None] | Mapping[str, Callable[..., None]], argv: list[str] | None = None) -> None:
    """Check argv (default: sys.argv[1:]), call main with typed values; exit as the top of this file says.

    Returns after success. An exception other than UserError and OSError is our bug and keeps its traceback.
    """
    argv = sys.argv[1:] if argv is None else argv
    guarded(lambda: _run(main, argv))


def _run(main: Callable[..., None] | Mapping[str, Callable[..., None]], argv: list[str]) -> None:
    if isinstance(main, Mapping):
        main, argv = _pick(main, argv)
    if "--help" in argv or "-h" in argv:
        _help(usage(main, width=shutil.get_terminal_size().columns))
    try:
        values = parse(main, argv)
    except UserError as error:
        _stop(2, f"error: {error}")

    def command() -> None:
        # With the values bound Fire has nothing left to parse, and without a result it has nothing to print.
        main(**values)

    fire.Fire(command, command=[])


def guarded(command: Callable[[], None]) -> None:
    """Call it; what only the user can mend ends the process with one line. Other exceptions pass."""
    _open_streams()
    try:
        command()
    except UserError as error:
        _stop(1, f"error: {error}")
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""  # a write to a full disk names no file
        _stop(1, f"error: {place}{error.strerror or error}")
    except KeyboardInterrupt:
        _stop(130, "interrupted")
    except Exception as error:
        if line := _in_words(error):
            _stop(1, f"error: {line}")
        # The death of another rank breaks the collectives of this one. Then the other has told the cause, and
        # torchrun ends this wait.
        if "RANK" in os.environ:
            time.sleep(GRACE_SECONDS)
        leave_for_torchrun(traceback.format_exc())
        raise


def _in_words(error: Exception) -> str:
    """What a user can do about an exception that comes from too deep to be a UserError; empty for a bug."""
    first = str(error).partition("\n")[0]
    # torch's OutOfMemoryError by its name: scripts without torch come here too
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in first:
        return f"out of memory ({first or 'MemoryError'}); --dry_run says what a run takes, smaller batches take less"
    if isinstance(error, ValueError) and "embedded null" in first:
        return "the name of a file holds a NUL character; look for one in the files that name other files"
    return ""


def _open_streams() -> None:
    """Give a process that was started without standard streams (`>&-`) empty ones.

    Otherwise the next file that is opened takes the place of one, and what a library prints goes into it.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that the terminal cannot show is no reason to fail
        sys.stdout.reconfigure(errors="backslashreplace")


def show(text: str) -> None:
    """Write to standard output at once. A reader that has gone (`| head`) misses nothing. Raises UserError."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        _to_nowhere(sys.stdout)
        if not isinstance(error, BrokenPipeError):
            raise UserError(f"cannot write to standard output: {error.strerror}") from None


def show_problem(line: str) -> None:
    """Write a line to standard error, where somebody reads it."""
    try:
        sys.stderr.write(line + "\n")
        sys.stderr.flush()
    except OSError:
        _to_nowhere(sys.stderr)


def _to_nowhere(stream: TextIO) -> None:
    """Lose what a stream holds and will be given: the interpreter would fail at its end to write it."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _help(text: str) -> NoReturn:
    if _local_rank() == 0:
        show(text + "\n")
    sys.exit(0)


def _pick(
    commands: Mapping[str, Callable[..., None]], argv: list[str]
) -> tuple[Callable[..., None], list[str]]:
    """The function that the first word names, and the other words. Without one, --help lists them all."""
    if argv and argv[0] in commands:
        return commands[argv[0]], argv[1:]
    if "--help" in argv or "-h" in argv:
        _help(_commands_help(commands, width=shutil.get_terminal_size().columns))
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


def check_numbers(values: Mapping[str, Value]) -> None:
    """Raise UserError for a number that its flag cannot mean: no samples, a negative rate."""
    for name, value in values.items():
        if name in NUMBERS and not NUMBERS[name].allow(value):
            raise UserError(f"--{name} is {value}, expected {NUMBERS[name].expects}")


def usage(main: Callable[..., None], width: int) -> str:
    """The text of --help: the docstring of main's module (of a command: its own), then every flag, required first."""
    accepted = flags_of(main)
    flags = accepted.values()
    width = max(40, min(width, 100))
    about = sys.modules[main.__module__].__doc__ if main.__name__ == "main" else _about(main)
    blocks = [_reflow(inspect.cleandoc(about or ""), width)]
    for title, required in (("Required flags:", True), ("Optional flags:", False)):
        entries = [_flag_help(flag, width) for flag in flags if flag.required is required]
        blocks += ["\n".join([title, *entries])] if entries else []
    if "save_every" in accepted:  # a trainer
        free = ", ".join(name for name in FREE_ON_RESUME if name in accepted)
        blocks.append(
            _wrap(
                f"With --resume auto these may differ from what they were when the run began: {free}; the rows of a "
                "step stay as many. With anything else changed, the contents of its inputs included, a run is not "
                "resumed.",
                width,
            )
        )
    blocks.append(
        _wrap(
            "`--flag value` and `--flag=value` mean the same. A true|false flag alone means "
            "true, --noflag false. A list is several words, or one word with commas; where a text is "
            "expected too, a comma is part of it.",
            width,
        )
    )
    return "\n\n".join(blocks).lstrip()


def _about(command: Callable[..., None]) -> str:
    """A command's docstring without its lines on flags."""
    paragraphs = (inspect.getdoc(command) or "").split("\n\n")
    return "\n\n".join(text for text in paragraphs if not meanings_of(text))


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
        show_problem(line)
        sys.exit(status)
    # A trainer may catch these to save before it dies. This rank is past saving: let a kill work at once.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if _local_rank() != 0:
        # If rank 0 fails for the same reason, it prints and exits now, and torchrun kills this rank in its
        # sleep. If not, rank 0 works on or waits in a collective, and this rank's line is the one to show.
        time.sleep(GRACE_SECONDS)
    show_problem(line)
    leave_for_torchrun(line)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    # Not sys.exit: the interpreter's shutdown tears down process groups and may wait there for ranks that
    # never answer, while torchrun kills those ranks only once this process is gone.
    os._exit(status)
