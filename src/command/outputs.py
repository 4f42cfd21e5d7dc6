"""Where a command may write: never over what it reads, and over what is finished only with --overwrite.

Flags are known by their names (src/command/flags.py), so that this holds for every script, before any work.
"""

from collections.abc import Mapping
from pathlib import Path

from src.command.flags import REPLACED, WRITTEN, path_in
from src.errors import UserError

# What commands leave right in a directory of theirs, by names that could also be given as an input.
LEFT = (
    "samples.jsonl", "samples.identity.json", "failures.jsonl", "results.json", "credits.jsonl", "metrics.jsonl",
    "run.json", "reference.jsonl", "weak.json", "icl.json", "hybrid.json",
)
# What shows that a directory holds a checkpoint, a finished run or finished data.
FINISHED = (
    "manifest.json", "params.json", "config.json", "adapter.json", "adapter_config.json", "consolidated.*.pth",
    "*.safetensors", "epoch-*/manifest.json", "best/manifest.json", "weak.json", "icl.json", "hybrid.json",
)


def check(values: Mapping[str, object]) -> None:
    """Raise UserError if a command with these flags, defaults among them, would destroy what must stay."""
    words = ((name, word) for name, value in values.items() for word in (value if isinstance(value, list) else [value]))
    paths = [(name, path) for name, word in words
             if isinstance(word, str) and len(word) < 4096 and (path := path_in(name, word))]
    for name, target in paths:
        if name in WRITTEN:
            if name.endswith("_file") and target.exists() and not target.is_file():  # a file would take its place
                raise UserError(f"--{name} {target} is a directory, a device or a pipe; expected the name of a file to "
                                "write")
            for other, source in paths:
                if (other, source) != (name, target):
                    _check_apart(name, target, other, source)
    if not values.get("overwrite") and not values.get("dry_run"):
        for name, target in paths:
            if name in REPLACED:
                _check_new(name, target, going_on=values.get("resume") == "auto")


def _check_apart(name: str, target: Path, other: str, source: Path) -> None:
    """Raise UserError if the target is the source, holds it where the command writes, or lies in it."""
    if other in WRITTEN and name.endswith("_dir") and other.endswith("_dir"):
        return  # the script knows which of its directories may be one
    advice = "choose another place to write to"
    if _same(target, source):
        raise UserError(f"--{name} {target} is --{other} {source} itself, which is needed; {advice}")
    if name.endswith(("_dir", "_path")):
        for left in LEFT:
            if _same(target / left, source):
                raise UserError(f"--{name} {target} would replace --{other} {source}, its {left}; {advice}")
    if name == "save_path":
        inner, outer = target.resolve(), source.resolve()
        if inner.is_relative_to(outer) or outer.is_relative_to(inner):
            raise UserError(f"--{name} {target} and --{other} {source} lie in each other; {advice}")


def _same(one: Path, other: Path) -> bool:
    """Whether two paths are one file or directory, through links of both kinds."""
    return one.resolve() == other.resolve() or one.exists() and other.exists() and one.samefile(other)


def _check_new(name: str, target: Path, *, going_on: bool) -> None:
    """Raise UserError if something finished stands where a command is going to write, and is not to be gone on with."""
    if target.is_dir():
        patterns = () if going_on or name.endswith("_file") else FINISHED
        found = next((path for pattern in patterns for path in sorted(target.glob(pattern))), None)
    else:
        found = target if target.exists() or target.is_symlink() else None
    if found:
        what = f"holds {found.relative_to(target)}, of something finished" if found != target else "exists"
        raise UserError(f"--{name} {target} {what}; choose another name, or give --overwrite to replace it")
