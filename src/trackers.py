"""Who is given a run's metrics besides metrics.jsonl, as --trackers has them: TensorBoard, W&B, trackio."""

import atexit
import contextlib
import contextvars
import importlib.util
import io
import os
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from src.errors import UserError, on_one_line

Tracker = Callable[[Mapping[str, object]], None]  # is given each row of metrics.jsonl


def asked_for(words: Sequence[str]) -> dict[str, str]:
    """PROJECT[/NAME] by tracker, of words TRACKER:PROJECT[/NAME]; without a word TensorBoard, where it is installed.

    Raises UserError.
    """
    asked = {}
    for word in words or (["tensorboard"] if importlib.util.find_spec("tensorboard") else []):
        name, _, place = word.partition(":")
        if name not in OPEN or (not place.partition("/")[0]) != (name == "tensorboard") or name in asked:
            raise UserError(f"--trackers {word}: expected tensorboard, wandb:PROJECT[/NAME] or trackio:PROJECT[/NAME], "
                            "each once")
        asked[name] = place
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--trackers {word} needs the package {name}, which is not installed; pip install {name}")
    return asked


def check_trackers(words: Sequence[str]) -> None:
    """Raise UserError for trackers that would refuse a run's metrics, before there are any. Rank 0 asks."""
    for name, place in asked_for(words).items():
        if name in CHECK and os.environ.get("RANK", "0") == "0":
            contextvars.copy_context().run(CHECK[name], place)  # where trackio keeps which project is open


def _tensorboard(_: str, folder: Path, flags: Mapping[str, object], kept: int) -> Tracker:
    """Events in the run's directory. What an earlier part of the run wrote after `kept` steps disappears."""
    from torch.utils.tensorboard import SummaryWriter  # half a second and more: not for who never writes

    curves = SummaryWriter(str(folder / "tensorboard"), purge_step=kept + 1)

    def track(row: Mapping[str, object]) -> None:
        """Add a row's numbers to their curves, at the row's step."""
        for name in row.keys() - {"step", "seconds", "alarms"}:
            curves.add_scalar(name, row[name], row["step"])

    return track


def _identity(folder: Path, kept: int) -> str:
    """What a run is called at a tracker: the name that a file in its directory holds if it goes on, else a new one."""
    folder.mkdir(exist_ok=True)
    if not (kept and (folder / "id").is_file()):
        (folder / "id").write_text(uuid.uuid4().hex[:8], encoding="utf-8")
    return (folder / "id").read_text(encoding="utf-8")


def _check_wandb(place: str) -> None:
    """Raise UserError where W&B has no key, or the server knows it not. Nobody is asked for one."""
    import wandb

    try:
        mode = wandb.setup(wandb.Settings(silent=True)).settings.mode
        if mode not in ("offline", "dryrun", "disabled") and not wandb.login(prompt=False):
            raise wandb.Error("it has no key")
    except wandb.Error as problem:
        raise _refused_by_wandb(place, problem) from None


def _refused_by_wandb(place: str, problem: Exception) -> UserError:
    return UserError(f"--trackers wandb:{place}: {problem}; log in with `wandb login`, or set WANDB_MODE=offline")


def _wandb(place: str, folder: Path, flags: Mapping[str, object], kept: int) -> Tracker:
    """The run that W&B keeps for this directory; a resumed one goes on under its id. Raises UserError.

    Offline (WANDB_MODE=offline) it lies in the directory, for `wandb sync`.
    """
    import wandb  # a second and its own process: only where it is asked for

    project, _, name = place.partition("/")
    try:
        run = wandb.init(project=project, name=name or folder.resolve().name,
                         id=_identity(folder / "wandb", kept), resume="allow", dir=folder,
                         config=dict(flags), settings=wandb.Settings(console="off", silent=True))
    except wandb.Error as problem:
        raise _refused_by_wandb(place, problem) from None
    run.define_metric("*", step_metric="step")  # steps that a killed part had reached come again
    return run.log


def _trackio(place: str, folder: Path, flags: Mapping[str, object], kept: int) -> Tracker:
    """A run of trackio, in TRACKIO_DIR or at the server or Space that its variables name. Raises UserError.

    A resumed one goes on under its name, in which no other run of the project has its own unless both were given the
    same; steps that a killed part had reached come again.
    """
    name = place.partition("/")[2] or f"{folder.resolve().name}-{_identity(folder / 'trackio', kept)}"
    with contextlib.redirect_stdout(sys.stderr):  # it prints how to see the run; standard output is for tables
        run, finish = _trackio_run(place, name, config=dict(flags), resume="allow" if kept else "never")

    @atexit.register  # before it does so itself, aloud
    def end() -> None:
        """Send what is left of the run, without a word on standard output."""
        with contextlib.redirect_stdout(sys.stderr):
            finish()

    return lambda row: run.log({name: row[name] for name in row if name != "step"}, step=row["step"])


def _trackio_run(place: str, name: str, **options: object) -> tuple[Any, Callable[[], None]]:
    """An open run, and what ends it. Raises UserError."""
    import trackio

    try:
        run = trackio.init(place.partition("/")[0], name=name, auto_log_gpu=False, auto_log_cpu=False, **options)
    except Exception as problem:  # the Hub's client and its own have errors of many kinds
        raise UserError(f"--trackers trackio:{place}: {on_one_line(problem)}") from None
    return run, trackio.finish


def _check_trackio(place: str) -> None:
    """Open a run and end it: one without metrics leaves nothing. Raises UserError."""
    with contextlib.redirect_stdout(io.StringIO()):
        _trackio_run(place, "check")[1]()


OPEN = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}
CHECK = {"wandb": _check_wandb, "trackio": _check_trackio}
