"""Where a run stands, for a person at a terminal and for scripts."""

import shlex
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from sparsemae.data.codes import one_line
from sparsemae.errors import UserError
from sparsemae.files import is_locked
from sparsemae.kinds import Kind, kind_of
from sparsemae.reporting.readback import lines_at_end, number, status_of
from sparsemae.runfiles import CONFIG, LOCK, METRICS, TIMING

STATES = ("running", "finished", "preempted", "interrupted", "failed")  # that a run writes
KILLED, UNKNOWN = "killed", "unknown"
_WORDS = ("message", "device", "host", "store")
_RECENT = 50  # steps that loss and speed are means of
_LONGEST = 1e9  # seconds left: more is told as this


@dataclass(frozen=True)
class Status:
    """Of a run folder; None is what the folder does not tell."""

    run: str
    state: str  # of STATES, KILLED or UNKNOWN
    step: int
    steps: int | None
    checkpoint: int | None  # step of the newest
    best: dict[str, Any] | None  # step and val_loss
    loss: float | None  # mean of the last steps
    seconds_per_step: float | None  # of the last steps
    samples_per_second: float | None
    seconds_left: float | None  # of one that runs, with its validations and checkpoints
    started: float | None  # unix seconds, the first time
    updated: float | None  # unix seconds
    exit_code: int | None
    message: str
    device: str
    host: str
    world_size: int | None
    store: str  # where the data lie

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def require_run(run: Path) -> None:
    """Raise a UserError unless there is a run in the folder."""
    if not (run / CONFIG).is_file():
        raise UserError(
            f"{run}: no run there (no {CONFIG}); start one with sparsemae pretrain or finetune"
        )


def read_status(run: Path) -> Status:
    """Read status and the ends of the logs; quick, however long the run is.

    Raises:
        UserError: No run there.
    """
    require_run(run)
    found = status_of(run)
    if found.get("state") == "running" and not is_locked(run / LOCK):
        found = status_of(run)  # again: it may have ended well since
        if found.get("state") == "running":
            found["state"] = KILLED
    state = found["state"] if found.get("state") in (*STATES, KILLED) else UNKNOWN
    metrics = [line for line in lines_at_end(run / METRICS, _RECENT) if "loss" in line]
    losses = [n for line in metrics if (n := number(line["loss"])) is not None]
    step = metrics[-1]["step"] if metrics else _whole(found.get("step")) or 0
    timing, steps = lines_at_end(run / TIMING, _RECENT), _whole(found.get("steps"))
    return Status(
        run=str(run),
        state=state,
        step=step,
        steps=steps,
        checkpoint=_whole(found.get("checkpoint")),
        best=_best(found.get("best")),
        loss=_mean(losses),
        **_speed(timing, max(0, steps - step) if state == "running" and steps else None),
        started=number(found.get("started")),
        updated=number(found.get("updated")),
        exit_code=_whole(found.get("exit_code")),
        world_size=_whole(found.get("world_size")),
        **{key: one_line(str(found.get(key) or "")) for key in _WORDS},
    )


def describe(status: Status) -> str:
    """Lines for a person, the last of them what to do next."""
    kind = kind_of(Path(status.run))
    of = f" of {status.steps} ({status.step / status.steps:.0%})" if status.steps else ""
    lines = [f"{status.run}: {status.state}, step {status.step}{of}"]
    if status.message:
        lines.append(status.message)
    if status.loss is not None:
        lines.append(f"loss {status.loss:.4f} (mean of the last steps)")
    if status.best is not None:
        measure, best = kind.measure, status.best
        shown = measure.shown(best["val_loss"])
        lines.append(f"best {measure.short} {shown:.4f} at step {best['step']}")
    if status.checkpoint is not None:
        lines.append(f"newest checkpoint: step {status.checkpoint}")
    if status.seconds_per_step is not None:
        speed = f"{status.seconds_per_step:.3g} s per step"
        if status.samples_per_second is not None:
            speed += f", {status.samples_per_second:.3g} samples per second"
        if status.seconds_left is not None:
            speed += f", {timedelta(seconds=round(status.seconds_left))} left"
        lines.append(speed)
    return "\n".join([*lines, *_next(status, kind)])


def _next(status: Status, kind: Kind) -> list[str]:
    data = shlex.quote(status.store) if status.store else kind.data
    goes_on = f"sparsemae {kind.command} {data} -o {shlex.quote(status.run)} --resume"
    match status.state:
        case "killed":
            return [f"its process has ended without a word; {goes_on}"]
        case "preempted" | "interrupted":
            return [f"stopped as asked; {goes_on}"]
        case "failed":
            return [f"once the cause is gone: {goes_on}"]
        case "unknown":
            return [f"status.json is missing or damaged; {goes_on} writes it anew"]
    return []


def _speed(timing: list[dict[str, Any]], remaining: int | None) -> dict[str, float | None]:
    """Of the last steps; the time left counts what validations and checkpoints take as well."""
    steps = [line for line in timing if (number(line.get("seconds")) or 0) > 0]
    recent = steps[-_RECENT:]
    seconds = _mean([line["seconds"] for line in recent])
    samples = _mean([number(line.get("samples")) or 0.0 for line in recent])
    kinds = ("seconds", "save_seconds", "validation_seconds")
    whole = sum(number(line.get(kind)) or 0.0 for line in timing for kind in kinds)
    left = whole / len(steps) * remaining if steps and remaining is not None else None
    return {
        "seconds_per_step": seconds,
        "samples_per_second": samples / seconds if seconds and samples else None,
        "seconds_left": None if left is None else min(left, _LONGEST),
    }


def _mean(numbers: list[float]) -> float | None:
    last = numbers[-_RECENT:]
    return sum(last) / len(last) if last else None


def _best(value: Any) -> dict[str, Any] | None:
    if not isinstance(value, dict):
        return None
    step, loss = _whole(value.get("step")), number(value.get("val_loss"))
    return None if step is None or loss is None else {"step": step, "val_loss": loss}


def _whole(value: Any) -> int | None:
    """A count that is one, and no larger than a float can hold."""
    good = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53
    return value if good else None
