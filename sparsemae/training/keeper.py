"""What keeps a run: its checkpoints, logs, status and report, and how it goes on from them.

Only rank 0 touches the folder; what goes wrong there is raised on all ranks.
"""

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from torch import nn

from sparsemae.checkpoint import (
    Checkpoint,
    load_checkpoint,
    load_model,
    load_optimizer,
    take_snapshot,
    write_checkpoint,
)
from sparsemae.config import dump_config
from sparsemae.errors import UserError
from sparsemae.live import say
from sparsemae.runfiles import CHECKPOINTS, CONFIG, METRICS
from sparsemae.signals import INTERRUPTED, PREEMPTED
from sparsemae.training import logs
from sparsemae.training.background import Background
from sparsemae.training.exactness import conditions, differences
from sparsemae.training.folder import Status, starts_anew
from sparsemae.training.guard import Guard, LossScale
from sparsemae.training.loop import State, StepRecord
from sparsemae.training.options import TrainConfig
from sparsemae.training.progress import TrainingProgress
from sparsemae.training.ranks import Ranks
from sparsemae.training.task import Task

if TYPE_CHECKING:
    from sparsemae.training.task import AnyPreview

LONG_LOG = 4_000_000  # bytes, some 40 000 steps
_EVENTS = {0: "finished", PREEMPTED: "preempted", INTERRUPTED: "interrupted"}  # by exit code


class Keeper(AbstractContextManager):
    """Of a claimed run folder; used in the order restore, open, then on_step and save, then end."""

    def __init__(self, task: Task, run: Path, config: TrainConfig, ranks: Ranks, console: Console):
        self.task, self.run, self.config, self.ranks = task, run, config, ranks
        self.console, self.folder = console, run / CHECKPOINTS
        self.background, self.stack = Background(), ExitStack()
        self.newest: Path | None = None  # checkpoint; of rank 0
        self._resumed, self._warnings = False, []

    def __exit__(self, *exception):
        if exception[0] is not KeyboardInterrupt:
            with contextlib.suppress(Exception):  # told before, or about to be replaced by it
                self.background.wait()
        self.stack.close()

    def restore(self, state: State) -> None:
        """Bring `state` to the newest whole checkpoint, if there is any.

        Raises:
            UserError: It is of another run, or none is whole.
        """
        checkpoint = self.ranks.shared(self._find)
        if checkpoint is None:
            return
        path = checkpoint.path
        load_model(state.model, checkpoint.model(), path)
        load_optimizer(state.model, state.optimizer, checkpoint.optimizer(), path)
        if state.ema is not None:
            load_model(state.ema.model, checkpoint.ema(), path)
        trainer = checkpoint.meta["trainer"]
        state.step, best = checkpoint.step, trainer["best"]
        state.guard, state.scale = Guard(**trainer["guard"]), LossScale(**trainer["scale"])
        state.best = None if best is None else tuple(best)

    def open(self, state: State, stop: Callable[[], int]) -> None:
        """Start the logs at the step of `state`, and keep what the run began with.

        stop: Gives an exit code once the run is asked to stop.
        """
        if not self.ranks.main:
            return
        self.log = self.stack.enter_context(
            logs.RunLog(
                self.run, state.step, self.task.cases_of, tensorboard=self.config.tensorboard
            )
        )
        facts = {
            "steps": self.config.steps,
            "step": state.step,
            "store": self.task.origin.get("store", ""),
            "world_size": self.ranks.world_size,
            "device": str(self.ranks.device),
        }
        self.status = Status(self.run, facts)
        dump_config(self.task.config, self.run / CONFIG)
        anew = not self._resumed
        self._note(state.step, "started" if anew else "resumed")
        for warning in self._warnings:
            self._note(state.step, "warning", warning)
        if anew:
            self._write(state, None)
            self.background.wait()  # steps in the log without a checkpoint could not be resumed
        else:
            self.status.update(checkpoint=state.step, best=_best(state))
        self.progress = self.stack.enter_context(
            TrainingProgress(
                *(self.config.steps, state.step, self.console, self.task.measure), stop=stop
            )
        )
        self.progress.saved(state.step)

    def on_step(self, record: StepRecord) -> None:
        """Log and show a step."""
        if self.ranks.main:
            self.log.step(record)
            self.progress.update(record)

    def must_stop(self) -> bool:
        """Whether something could not be written: there is no sense in going on."""
        return self.ranks.main and self.background.failed

    def save(self, state: State) -> None:
        """Validate if it is time, and start writing a checkpoint; called on all ranks.

        Raises:
            OSError: This checkpoint cannot be written, or the one before could not.
            DivergedError: A weight is not finite.
        """
        model = state.model if state.ema is None else state.ema.model
        due = state.step % self.config.save_every == 0 or state.step == self.config.steps
        if due and self.task.validate is not None:
            start = time.perf_counter()
            loss = self.task.validate(model)
            if state.best is None or loss < state.best[1]:
                state.best = state.step, loss
            if self.ranks.main:
                self.log.validation(state.step, loss)
                self.log.took(
                    state.step, {"validation_seconds": round(time.perf_counter() - start, 4)}
                )
                self.progress.validated(state.step, loss)

        def write() -> None:
            start = time.perf_counter()
            self.background.wait()
            self._write(state, self._preview(model, state.step) if due else None)
            seconds = time.perf_counter() - start
            self.log.took(state.step, {"save_seconds": round(seconds, 4)})
            self.progress.saved(state.step)

        self.ranks.shared(write)

    def end(self, state: State, code: int) -> Path:
        """Finish what is being written; the newest checkpoint. Called on all ranks."""

        def finish() -> Path:
            self.background.wait()
            event = _EVENTS.get(code, _EVENTS[PREEMPTED])
            self.status.update(state=event, step=state.step, exit_code=code)
            self._note(state.step, event)
            self._report(state.step)
            return self.newest

        return self.ranks.shared(finish)

    def failed(self, state: State, error: BaseException) -> None:
        """Leave word of what ended the run."""
        if not self.ranks.main:
            return
        interrupted = isinstance(error, KeyboardInterrupt)
        code = INTERRUPTED if interrupted else 2 if isinstance(error, UserError) else 1
        event = _EVENTS.get(code, "failed")
        message = " ".join(str(error).split()) or type(error).__name__
        with contextlib.suppress(Exception):  # the disk may be full
            if not interrupted:
                with contextlib.suppress(Exception):
                    self.background.wait()
            self.status.update(state=event, step=state.step, exit_code=code, message=message)
            self._note(state.step, event, message)
            self._report(state.step)

    def _find(self) -> Checkpoint | None:
        if starts_anew(self.run):
            return None
        checkpoint, warnings = load_checkpoint(self.folder)
        self._check_same(checkpoint)
        reasons = differences(checkpoint.meta["conditions"], self.config, self.ranks)
        if reasons:
            warnings.append(f"resumed, but not bit-exact, because {', '.join(reasons)}")
        for warning in warnings:
            say(self.console, f"warning: {warning}")
        say(self.console, f"resuming at step {checkpoint.step}")
        self._resumed, self._warnings, self.newest = True, warnings, checkpoint.path
        return checkpoint

    def _check_same(self, checkpoint: Checkpoint) -> None:
        """Refuse to go on with other data, another configuration, or to a step that is over."""
        meta = checkpoint.meta
        if meta["data"] != self.task.data:
            raise UserError(
                f"{self.task.origin['store']} is not the data this run was started on "
                f"({meta['store']}): resume with that, or start a new run"
            )
        if changed := changed_keys(meta["config"], self.task.defining):
            raise UserError(
                f"{self.run}/config.toml: {', '.join(changed)} differ from what this run was "
                f"started with: change them back, or start a new run"
            )
        if checkpoint.step > self.config.steps:
            raise UserError(
                f"train.steps {self.config.steps}: {self.run} has done {checkpoint.step} steps "
                f"already; give as many or more"
            )

    def _preview(self, model: nn.Module, step: int) -> "AnyPreview | None":
        """For the report, as `_report`."""
        try:
            return self.task.preview(model, step)
        except Exception as error:
            self._note(step, "warning", f"preview: {error!r}")
            return None

    def _write(self, state: State, preview: "AnyPreview | None") -> None:
        """Copy the state, and write it beside the training."""
        trainer = {
            "guard": asdict(state.guard),
            "scale": asdict(state.scale),
            "best": state.best,
        }
        meta = {
            "trainer": trainer,
            "conditions": conditions(self.config, self.ranks),
            "config": self.task.defining,
            "data": self.task.data,
            **self.task.origin,
        }
        ema = None if state.ema is None else state.ema.model
        snapshot = take_snapshot(state.step, state.model, state.optimizer, meta, ema=ema)
        best, facts = state.best, {"step": state.step, "best": _best(state)}
        self.log.sync()

        def job() -> None:
            self.newest = write_checkpoint(
                self.folder, snapshot, keep=self.config.keep, best=best and best[0]
            )
            self.status.update(checkpoint=snapshot.step, **facts)
            self._report(snapshot.step, preview)

        self.background.start(job)

    def _report(self, step: int, preview: "AnyPreview | None" = None) -> None:
        """The page is for people: training goes on without it, and the history says so."""
        try:
            # not before it is needed: it imports what draws
            from sparsemae.report import write_run_report
            from sparsemae.reporting.preview import save_preview

            if preview is not None:
                save_preview(self.run, preview)
            if (self.run / METRICS).stat().st_size < LONG_LOG:
                write_run_report(self.run)
            else:  # elsewhere: reading it would keep this interpreter from the training for seconds
                subprocess.run(
                    [sys.executable, "-m", "sparsemae", "report", self.run.resolve()],
                    check=True,
                    capture_output=True,
                    start_new_session=True,  # signals to the group are for the training
                )
        except Exception as error:
            self._note(step, "warning", f"report.html: {error!r}")

    def _note(self, step: int, event: str, message: str = "") -> None:
        logs.note(self.run, step, event, message)


def _best(state: State) -> dict[str, Any] | None:
    return None if state.best is None else {"step": state.best[0], "val_loss": state.best[1]}


def changed_keys(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """The dotted keys of nested dicts that differ."""
    out = []
    for key in sorted(before.keys() | now.keys()):
        one, other = before.get(key), now.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            out += changed_keys(one, other, f"{prefix}{key}.")
        elif one != other:
            out.append(f"{prefix}{key}")
    return out
