"""What a run is known by, and the step from which the one in a directory may be resumed.

Every flag is compared, inputs by their contents, unless src/command/flags.py names it among those that may differ: a
flag that is added is compared without a word here.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from src import parallel
from src.checkpoint import saving, storage
from src.checkpoint.tensor_files import file_hash
from src.command.config import Resume
from src.command.flags import FREE_ON_RESUME, is_path, path_in
from src.errors import UserError, on_one_line
from src.jsonfile import read_json
from src.text.tokenizer import Tokenizer

COUNTS = ("steps", "updates", "bad_steps")  # of a trainer
WEIGHTS = ("params.json", "epoch-*/params.json", "best/params.json")  # what a finished run, or a part of it, leaves


def run_fingerprint(
    trainer: str, flags: Mapping[str, object], tokenizer: Tokenizer, **derived: object
) -> dict[str, object]:
    """What must be the same when a run is resumed, as json values by name. All ranks call this and get the same.

    A flag that names files or checkpoints stands as {"path", "hash"}. derived: what follows from flags that may differ
    or have a default that depends on others; it takes the place of the flag of its name.
    """
    # as it was given or, without a flag, as the checkpoint says
    form = tokenizer.chat_facts() | {"template_args": str(tokenizer.template_args or "")}
    known = {"trainer": trainer, **flags, **form, **derived}
    compared = {name: value for name, value in known.items() if name not in FREE_ON_RESUME}
    # one reader of large files; through json, as what it is compared with was
    return parallel.from_first_rank(
        lambda: json.loads(json.dumps({name: _with_contents(name, value) for name, value in compared.items()})))


def _with_contents(name: str, value: object) -> object:
    """A flag's value; what is a path, alone or in a list, with the hash of what lies there, of the list's other words,
    and of the function of FILE.py:FUNCTION."""
    words, known = value if isinstance(value, list) else [value], []
    for word in words:
        path = path_in(name, word) if isinstance(word, str) else None
        if path and path.exists():
            found = content_hash(path, is_tokenizer=name == "tokenizer_file")
            known.append(found if is_path(name) else f"{found}:{word.partition(':')[2]}")
        else:
            known.append(word)
    if known == words:
        return value
    return {"path": ", ".join(map(str, words)), "hash": hashlib.sha256(json.dumps(known).encode()).hexdigest()}


def content_hash(path: Path, is_tokenizer: bool = False) -> str:
    """One hash for a file, a directory of data, a checkpoint or a tokenizer, the last two with all that they are read
    with; not for its name."""
    if is_tokenizer:
        parts = [file_hash(file) for file in storage.tokenizer_files(path)]
    elif path.is_file():
        return file_hash(path)
    elif not (path / "params.json").is_file():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        parts = [[str(file.relative_to(path)), file_hash(file)] for file in files]
    else:
        # where an adapter's base lies may change; what it holds is in its fingerprint
        adapter = read_json(path / "adapter.json") if (path / "adapter.json").is_file() else {}
        parts = [storage.fingerprint(path), {key: adapter[key] for key in adapter if key != "base"}]
        parts += [file_hash(file) for file in (path / "params.json", *storage.tokenizer_files(path))]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def find_start(
    folders: Sequence[str], mode: Resume, fingerprint: Mapping[str, object], total_steps: int,
    not_yet: Sequence[str] = (),
) -> int:
    """Find the step after which a run of one model in each folder resumes; 0 = it begins. Reads, and writes nothing.
    not_yet: facts that the fingerprint does not hold yet, which are not compared.

    Raises UserError for a run that was started otherwise, is damaged, or would be lost: one that is not finished where
    it is not to be resumed, and weights without anything to resume from where it is.
    """
    steps = {folder: complete_steps(folder) for folder in folders}
    if mode == "none":
        for folder, found in steps.items():
            if found and max(found) < read_state(folder, max(found))["total_steps"]:
                raise UserError(f"{folder} holds a run that stopped at step {max(found)}; continue it with --resume "
                                "auto, or choose another directory")
        return 0
    # A kill may fall between the saves of actor and critic: only a step that all hold is a state of the run
    common = set.intersection(*steps.values())
    if not common:
        _refuse_loss(steps)
        return 0
    step = max(common)
    for part, folder in enumerate(folders):
        state = read_state(folder, step)
        then = {name: value for name, value in state["run"].items() if name not in not_yet}
        _check_same(step_folder(folder, step), then, fingerprint)
        if state.get("part") != part:
            raise UserError(f"{folder} holds another model of its run than is to go on there; exchange the actor's "
                            "directory and the critic's")
    if step > total_steps:
        raise UserError(f"{folders[0]} holds a run of {step} steps, more than the {total_steps} that are asked for "
                        "now; give more --epochs or --max_steps")
    return step


def _refuse_loss(steps: Mapping[str, set[int]]) -> None:
    """Raise UserError if a run that begins in these directories would replace what was trained there."""
    for folder, found in steps.items():
        if found:
            others = " and ".join(f"{other} {_listed(at)}" for other, at in steps.items() if other != folder)
            raise UserError(f"{folder} holds {_listed(found)} of a run, but {others}; a run goes on from a step that "
                            "all its directories hold: name those that it was started with, or choose others")
        for pattern in WEIGHTS:
            for path in Path(folder).glob(pattern):
                raise UserError(f"{folder} holds trained weights ({path.relative_to(folder)}) but no step-N to resume "
                                "from; choose another directory, or remove what is there")


def _listed(steps: set[int]) -> str:
    return ", ".join(f"step-{step}" for step in sorted(steps)) or "none"


def _check_same(folder: Path, then: Mapping[str, object], now: Mapping[str, object]) -> None:
    """Raise UserError that names every fact that differs."""
    found = [
        _difference(name, then, now)
        for name in {**then, **now}
        if name not in FREE_ON_RESUME
        and ((name in then) != (name in now) or _known(then.get(name)) != _known(now.get(name)))]
    if found:
        raise UserError(f"{folder}: {'; '.join(found)}; resume with the data and flags of then, or choose another "
                        "directory (--help lists what may differ)")


def _known(value: object) -> object:
    """What two values are compared by."""
    return value["hash"] if isinstance(value, dict) and "hash" in value else value


def _difference(name: str, then: Mapping[str, object], now: Mapping[str, object]) -> str:
    """What became of a fact, in words."""
    if name not in then or name not in now:
        return f"{name} is not known {'then' if name in now else 'now'} (another version, or another trainer)"
    was, is_now = ("nothing" if each[name] in ("", [], None) else each[name] for each in (then, now))
    if isinstance(was, dict) and isinstance(is_now, dict) and was["path"] == is_now["path"]:
        return f"{name} {was['path']} had other contents"
    was, is_now = (each["path"] if isinstance(each, dict) else each for each in (was, is_now))
    return f"{name} was {on_one_line(was)} and is {on_one_line(is_now)} now"


def step_folder(folder: str, step: int) -> Path:
    """Where the training checkpoint of a step lies."""
    return Path(folder) / f"step-{step}"


def complete_steps(folder: str) -> set[int]:
    """Steps whose training checkpoints are complete: the manifest, which comes last, is there."""
    names = (path.parent.name.removeprefix("step-") for path in Path(folder).glob("step-*/manifest.json"))
    # other digits than 0 to 9 are no names of ours
    return {int(name) for name in names if name.isascii() and name.isdigit()}


def read_state(folder: str, step: int) -> dict[str, object]:
    """state.json of a step. Raises UserError for one that is damaged, or that no version of this kind wrote."""
    path = step_folder(folder, step)
    state = saving.read_facts(path)
    counts, best = state.get("loop"), state.get("best", "")
    right = {
        "run": isinstance(state.get("run"), dict),
        "loop": isinstance(counts, dict) and all(type(counts.get(name)) is int for name in COUNTS),
        "step": state.get("step") == step,
        "total_steps": type(state.get("total_steps")) is int,
        "best": best is None or type(best) in (int, float) and math.isfinite(best),
        "best_step": type(state.get("best_step")) is int}
    for name, is_right in right.items():
        if not is_right:
            raise UserError(f"{path / saving.STATE}: {name!r} is {json.dumps(state.get(name))[:60]}, not what "
                            f"a save of step {step} leaves: the file is damaged or another version's; remove {path} to "
                            "go on without it")
    return state
