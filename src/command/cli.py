"""The command line of every entry script: `cli.run(main)` turns flags into a call of main.

A script that does several things gives its functions by name instead, `cli.run({"pairs": pairs, ...})`: the first
word of its command line picks one.

A mistake ends in one line on stderr. Exit status: 0 done, 1 something is wrong that only the user can mend, 2 the
flags are wrong, 130 interrupted.
"""

import contextlib
import inspect
import io
import os
import re
import shutil
import signal
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Mapping
from typing import NoReturn

import fire

from src.command import outputs
from src.command.flags import (
    CONFIG,
    FIRST,
    FREE_ON_RESUME,
    Flag,
    bind,
    config_of,
    flags_of,
    meanings_of,
    parse,
    suggestion,
)
from src.errors import UserError, leave_for_torchrun, show_problem, to_nowhere
from src.processes import watchdog

# torchrun looks at its workers every 0.1 s and kills the others once one has failed: a rank that is still
# alive after this many seconds is the one with something to say.
GRACE_SECONDS = 2.0


def run(main: Callable[..., None] | Mapping[str, Callable[..., None]], argv: list[str] | None = None) -> None:
    """Check argv (default: sys.argv[1:]), call main with typed values; exit as the top of this file says. Returns after
    success. An exception other than UserError and OSError is our bug and keeps its traceback."""
    argv = sys.argv[1:] if argv is None else argv
    guarded(lambda: _run(main, argv))


def _run(main: Callable[..., None] | Mapping[str, Callable[..., None]], argv: list[str]) -> None:
    if isinstance(main, Mapping):
        main, argv = _pick(main, argv)
    if "--help" in argv or "-h" in argv:
        _help(usage(main, width=shutil.get_terminal_size().columns))
    try:
        values = parse(main, argv)
        call = bind(main, values)
    except UserError as error:
        _stop(2, f"error: {error}")
    first = os.environ.get("RANK", "0") == "0"
    if values.get("dry_run") and not first:
        return  # a plan is one rank's to make and to show
    if first:  # the others must not look at what it has started to write
        outputs.check({name: flag.default for name, flag in flags_of(main).items()} | values)

    def command() -> None:
        """What Fire calls: with the values bound it has nothing left to parse, without a result nothing to print."""
        call()

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
        if "RANK" in os.environ:
            if _is_lost_connection(error):
                lost = watchdog.after_lost_connection()
                _stop(1, lost and f"error: {lost}")
            time.sleep(GRACE_SECONDS)  # another rank may print the cause, after which torchrun ends this wait
        leave_for_torchrun(traceback.format_exc())
        raise


def _is_lost_connection(error: Exception) -> bool:
    """Whether a collective has failed as it does when another rank dies, in the words of gloo or by NCCL's errors."""
    kinds = ("DistBackendError", "DistNetworkError")  # by their names: scripts without torch come here too
    return isinstance(error, RuntimeError) and ("gloo/transport" in str(error) or type(error).__name__ in kinds)


def _in_words(error: Exception) -> str:
    """What a user can do about an exception that comes from too deep to be a UserError; empty for a bug."""
    first = str(error).partition("\n")[0]
    # torch's OutOfMemoryError by its name: scripts without torch come here too
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in first:
        return f"out of memory ({first or 'MemoryError'}); --dry_run says what a run takes, smaller batches take less"
    if isinstance(error, RuntimeError) and first.startswith("Symlink loop"):
        return f"{first}: each of these links stands for another"
    if isinstance(error, ValueError) and "embedded null" in first:
        return "the name of a file holds a NUL character; look for one in the files that name other files"
    return ""


def _open_streams() -> None:
    """Give a process that was started without standard streams (`>&-`) empty ones. Otherwise the next file that is
    opened takes the place of one, and what a library prints goes into it."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that the terminal cannot show is no reason to fail
        sys.stdout.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper):  # nor is what is typed in another encoding
        sys.stdin.reconfigure(errors="replace")


def show(text: str) -> None:
    """Write to standard output at once. A reader that has gone (`| head`) misses nothing. Raises UserError."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        to_nowhere(sys.stdout)
        if not isinstance(error, BrokenPipeError):
            raise UserError(f"cannot write to standard output: {error.strerror}") from None


def _help(text: str) -> NoReturn:
    if _local_rank() == 0:
        show(text + "\n")
    sys.exit(0)


def _pick(commands: Mapping[str, Callable[..., None]], argv: list[str]) -> tuple[Callable[..., None], list[str]]:
    """The function that the first word names, and the other words. Without one, --help lists them all."""
    if argv and argv[0] in commands:
        return commands[argv[0]], argv[1:]
    if "--help" in argv or "-h" in argv:
        _help(_commands_help(commands, width=shutil.get_terminal_size().columns))
    found = f"found {argv[0]!r}" if argv else "found nothing"
    advice = suggestion(argv[0] if argv else "", commands, "--help says what each does")
    _stop(2, f"error: the first word must be one of {', '.join(commands)}, {found}; {advice}")


def _commands_help(commands: Mapping[str, Callable[..., None]], width: int) -> str:
    """The docstring of the script, then what each command does."""
    width, margin = max(40, min(width, 100)), max(map(len, commands)) + 4
    lines = [textwrap.fill((inspect.getdoc(command) or "").partition("\n")[0], width,
                           initial_indent=f"  {name}".ljust(margin), subsequent_indent=" " * margin)
             for name, command in commands.items()]
    about = inspect.cleandoc(sys.modules["__main__"].__doc__ or "")
    ending = "COMMAND --help lists the flags of a command."
    return "\n\n".join([_reflow(about, width), "\n".join(lines), ending])


def usage(main: Callable[..., None], width: int) -> str:
    """The text of --help: the docstring of main's module (of a command: its own), then every flag, required ones first,
    then five that matter most, then by group."""
    accepted = flags_of(main)
    flags = accepted.values()
    width = max(40, min(width, 100))
    about = sys.modules[main.__module__].__doc__ if main.__name__ == "main" else main.__doc__
    paragraphs = inspect.cleandoc(about or "").split("\n\n")
    blocks = [_reflow("\n\n".join(text for text in paragraphs if not meanings_of(text)), width)]
    first = [name for name in FIRST if name in accepted and not accepted[name].required][:5] if config_of(main) else []
    places = {name: place for place, name in enumerate(first)}
    groups: dict[str, list[str]] = {}
    for flag in sorted(flags, key=lambda flag: (not flag.required, places.get(flag.name, len(first)))):
        group = "Required flags" if flag.required else "Look at these first" if flag.name in first else flag.group
        groups.setdefault(group, []).append(_flag_help(flag, width))
    blocks += ["\n".join([f"{title}:", *entries]) for title, entries in groups.items()]
    if "save_every" in accepted:  # a trainer
        free = ", ".join(name for name in FREE_ON_RESUME if name in accepted)
        blocks.append(_wrap(
            f"With --resume auto these may differ from what they were when the run began: {free}; the rows of a step "
            "stay as many. With anything else changed, the contents of its inputs included, a run is not resumed.",
            width))
    blocks += [_wrap(text, width) for text in (
        "Where a path is read, hf:ORG/NAME[@REVISION] is a checkpoint at the Hugging Face Hub, and "
        "hf:ORG/NAME[@REVISION][:CONFIG][:SPLIT] rows.",
        f"--config FILE: {CONFIG}.",
        "`--flag value` and `--flag=value` mean the same. A true|false flag alone means true, --noflag false. A list "
        "is several words, or one word with commas; where a text is expected too, and in a list of FILE, a comma is "
        "part of it.")]
    return "\n\n".join(blocks).lstrip()


def _flag_help(flag: Flag, width: int) -> str:
    default = ",".join(map(str, flag.default)) if isinstance(flag.default, list) else str(flag.default)
    default = default.lower() if isinstance(flag.default, bool) else default or "empty"
    head = f"--{flag.name}  {flag.expects}" + ("" if flag.required else f"  (default: {default})")
    return "\n".join([_wrap(head, width, margin="  "), _wrap(flag.meaning or "?", width, margin=" " * 6)])


def _reflow(text: str, width: int) -> str:
    """Prose filled to width; a paragraph with a command or an indented line stays whole, to be copied."""
    verbatim = re.compile(r"^(\s|torchrun |python )", re.MULTILINE)
    return "\n\n".join(part if verbatim.search(part) else _wrap(part, width) for part in text.split("\n\n"))


def _wrap(text: str, width: int, margin: str = "") -> str:
    return textwrap.fill(text, width, initial_indent=margin, subsequent_indent=margin, break_long_words=False,
                         break_on_hyphens=False)


def _local_rank() -> int:
    """This process's number among those torchrun started on this machine; 0 without torchrun."""
    number = os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0"))
    return int(number) if number.isdecimal() else 0


def _stop(status: int, line: str) -> NoReturn:
    """Print the line and exit; under torchrun one rank a machine prints when all fail alike. Empty: another rank has
    said why this one ends."""
    if "RANK" not in os.environ:
        show_problem(line)
        sys.exit(status)
    # A trainer may catch these to save before it dies. This rank is past saving: let a kill work at once.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if not line or _local_rank() != 0:
        # If rank 0 fails for the same reason, it prints and exits now, and torchrun kills this rank in its
        # sleep. If not, rank 0 works on or waits in a collective, and this rank's line is the one to show. A rank
        # with nothing to say is killed in it too: ending by itself it could pass for the one that failed first.
        time.sleep(GRACE_SECONDS)
    if line:
        show_problem(line)
        leave_for_torchrun(line)
    watchdog.leave()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    # Not sys.exit: the interpreter's shutdown tears down process groups and may wait there for ranks that
    # never answer, while torchrun kills those ranks only once this process is gone.
    os._exit(status)
