"""When a run saves, what it keeps, and how it goes on after it was stopped.

A run's directory holds `step-N`, training checkpoints that it can be resumed from, of which the newest few are kept;
`epoch-N`, the weights of each epoch; `best`; and at the top the weights it ended with. The last three are hard links.
"""

import math
import re
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from src import parallel
from src.checkpoint import saving, storage
from src.checkpoint.saving import Save
from src.command.config import Resume, SavingFlags
from src.errors import UserError
from src.models.lora import LoraConfig
from src.processes import watchdog
from src.runlog import RunLog
from src.training.resuming import complete_steps, find_start, read_state, step_folder
from src.training.trainer import Trainer

KEPT = re.compile("(step|epoch)-[0-9]+|best|reference")  # directories that a run leaves in its own


class Trainee(NamedTuple):
    """One model of a run: its directory, its trainer, and the checkpoint that it started from. here: brings the model
    and its optimizer's state into memory, where they are not there all the time."""

    folder: str
    trainer: Trainer
    ckpt_dir: str
    here: Callable[[], AbstractContextManager[None]] = nullcontext


class Checkpointer:
    """Saves all models of a run together. Every rank makes one and calls the same methods in the same order."""

    def __init__(
        self,
        log: RunLog,
        models: Sequence[Trainee],
        flags: SavingFlags,
        *,
        lora: LoraConfig | None = None,
        tokenizer_file: str = "",
        steps_per_epoch: int,
        total_steps: int,
        run_fingerprint: Mapping[str, object],
        state: dict[str, object] | None = None,
        snapshots: Mapping[str, int] | None = None,
    ) -> None:
        """lora, tokenizer_file: of what is saved, as saving.begin_save() takes them.
        run_fingerprint: json values that must be the same when the run is resumed (resuming.run_fingerprint()).
        state: json values that change as the run goes; every save holds them, and resume() brings them back.
        snapshots: names under which the first model's weights are kept besides, each renewed every so many steps.
        """
        self._log, self._models, self._flags, self._run_fingerprint = log, models, flags, dict(run_fingerprint)
        self._lora, self._tokenizer_file = lora, tokenizer_file
        self._state = {} if state is None else state
        self._snapshots = snapshots or {}
        self._steps_per_epoch, self._total_steps = steps_per_epoch, total_steps
        self._best, self._best_step, self._stop_asked = -math.inf, 0, False
        self._saves: list[Save] = []  # under way, one a model, of this step:
        self._saved_step = 0
        signal.signal(signal.SIGTERM, self._ask_to_stop)

    def _ask_to_stop(self, signal_number: int, frame: FrameType | None) -> None:
        # only noted: a signal may come in the middle of a step, on one rank of many
        self._stop_asked = True

    def resume(self, mode: Resume) -> int:
        """Take up the newest training checkpoint that is complete for all models; how many steps are done. Raises
        UserError for an unfinished run that is not to be resumed, and for one that was started otherwise."""
        folders = [model.folder for model in self._models]
        step = find_start(folders, mode, self._run_fingerprint, self._total_steps)
        parallel.barrier()  # nobody writes before all have looked
        if not step:
            for model in self._models:  # of a finished run that is to be replaced
                found = Path(model.folder).glob("*/manifest.json")
                self._discard([path.parent for path in found if KEPT.fullmatch(path.parent.name)])
            parallel.barrier()
            return 0
        for model in self._models:
            self._load(model, step)
        self._publish_due(step)  # in case the run was killed between the save and this
        self._log.go_on_after(step)
        self._log.logger.info("resumed after step %d of %d", step, self._total_steps)
        return step

    def _load(self, model: Trainee, step: int) -> None:
        folder, stored = step_folder(model.folder, step), read_state(model.folder, step)
        for name, now in self._state.items():
            if type(stored.get(name)) is not type(now):
                raise UserError(f"{folder / saving.STATE}: {name!r} is {stored.get(name)!r}; expected the like "
                                f"of {now!r}")
        self._state.update({name: stored[name] for name in self._state})
        self._best_step = stored["best_step"]
        self._best = -math.inf if stored["best"] is None else stored["best"]
        with model.here():
            model.trainer.load(stored["loop"], saving.state_reader(folder, model.trainer.model.config))

    def measured_start(self, score: float) -> None:
        """Held-out merit of the models before the first step: only what does better becomes `best`."""
        self._best = score

    def step_done(self, number: int, score: float | None = None, stop_because: Sequence[str] = ()) -> None:
        """Save if this step is one to save after. score: held-out merit of the models now, where it was measured.

        The best one is kept as `best`. After SIGTERM to any rank this saves and ends the process with status 0.
        stop_because: reasons, alike on all ranks, to save and raise a UserError that gives them.
        A save that is written in the background counts from the first step on at whose end it is all written.
        """
        # all ranks or none: to save is to gather, and who is not there would be waited for
        stop = parallel.any_rank(self._stop_asked) or len(stop_because) > 0
        self._complete_if_written()
        # better, not as good: of equal ones the earliest is kept
        if score is not None and score > self._best:
            self._best, self._best_step = score, number
        every = self._flags.save_every
        due = every > 0 and number % every == 0 or bool(self._snapshots_of(number))
        at_end = number % self._steps_per_epoch == 0 or number == self._total_steps
        if stop or due or at_end or self._best_step == number:
            self._save(number)
        if stop and number < self._total_steps:
            self.complete()
            self._log.close_progress()
            if stop_because:
                reasons = "; ".join(stop_because)
                raise UserError(f"stopped after step {number}, saved; go on with --resume auto: {reasons}")
            self._log.logger.info("stopped by SIGTERM after step %d, saved; go on with --resume auto", number)
            sys.exit(0)

    def finish(self) -> None:
        """Put the final weights at the top of the run's directory."""
        self.complete()
        self._publish(self._total_steps, ".")
        self._log.close_progress()
        if not self._best_step and self._best > -math.inf:
            self._log.logger.warning(
                "nothing did better on held-out data than the start, %.4g, so that there is no best", self._best)
        for model in self._models:
            self._log.logger.info("saved %s", model.folder)

    def _save(self, step: int) -> None:
        self.complete()  # one save at a time: a copy of the state is in memory until it is written
        best = {"best": None if self._best == -math.inf else self._best, "best_step": self._best_step}
        saved = {"run": self._run_fingerprint, **self._state, "step": step, "total_steps": self._total_steps, **best}
        self._saved_step = step
        for part, model in enumerate(self._models):
            with model.here(), watchdog.patiently():
                state = model.trainer.state()._replace(facts={**saved, "part": part})
                self._saves.append(saving.begin_save(
                    model.trainer.model, str(step_folder(model.folder, step)), model.ckpt_dir,
                    dtype=self._flags.save_dtype, lora=self._lora, tokenizer_file=self._tokenizer_file, state=state,
                    background=self._flags.background_save))
        self._complete_if_written()

    def _complete_if_written(self) -> None:
        """Complete the save under way, if there is one and no rank would have to wait."""
        if self._saves and not parallel.any_rank(not all(save.is_written() for save in self._saves)):
            self.complete()

    def complete(self) -> None:
        """Make the save under way, if there is one, count; discard what it replaces."""
        if not self._saves:
            return
        saves, self._saves = self._saves, []
        for save, model in zip(saves, self._models, strict=True):
            with model.here(), watchdog.patiently():
                save.complete()
        for model in self._models:
            # only now that the new one counts: a kill before it leaves the old one to resume from. Later ones were of
            # this model alone, before the run was killed: it went on from one that all models have
            found = complete_steps(model.folder)
            kept = sorted(step for step in found if step <= self._saved_step)[-self._flags.keep_last :]
            self._discard([step_folder(model.folder, step) for step in found - {*kept}])
        parallel.barrier()
        self._publish_due(self._saved_step)

    def _discard(self, folders: Iterable[Path]) -> None:
        for folder in folders if parallel.rank() == 0 else ():
            storage.discard(folder)

    def _publish_due(self, step: int) -> None:
        """The links that a saved step is the source of."""
        if step == self._best_step:
            self._publish(step, "best")
        if step % self._steps_per_epoch == 0:
            self._publish(step, f"epoch-{step // self._steps_per_epoch}")
        for name in self._snapshots_of(step):
            self._publish(step, name, self._models[:1])

    def _snapshots_of(self, step: int) -> list[str]:
        """The snapshots that a step renews."""
        return [name for name, every in self._snapshots.items() if step % every == 0]

    def _publish(self, step: int, name: str, models: Sequence[Trainee] | None = None) -> None:
        if parallel.rank() == 0:
            for model in models or self._models:
                storage.publish(step_folder(model.folder, step), Path(model.folder) / name)
        parallel.barrier()
