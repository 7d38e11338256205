"""Where a run stands, for a person at a terminal and for scripts."""

from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from sparsemae.errors import UserError
from sparsemae.files import is_locked
from sparsemae.reporting.readback import lines_at_end, status_of
from sparsemae.runfiles import CONFIG, LOCK, METRICS, TIMING

_RECENT = 50  # steps that loss and speed are means of


@dataclass(frozen=True)
class Status:
    """Of a run folder; None is what the folder does not tell."""

    state: str  # running, finished, preempted, interrupted, failed, killed, unknown
    step: int
    steps: int | None
    checkpoint: int | None  # step of the newest
    best: dict[str, Any] | None  # step and val_loss
    loss: float | None  # mean of the last steps
    seconds_per_step: float | None
    exit_code: int | None
    message: str
    device: str
    store: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def require_run(run: Path) -> None:
    """Raise a UserError unless there is a run in the folder."""
    if not (run / CONFIG).is_file():
        raise UserError(f"{run}: no run there (no {CONFIG}); start one with sparsemae pretrain")


def read_status(run: Path) -> Status:
    """Read status and the ends of the logs; quick, however long the run is.

    Raises:
        UserError: No run there.
    """
    require_run(run)
    found = status_of(run)
    state = found.get("state", "unknown")
    held = is_locked(run / LOCK)
    if state == "running" and not held:
        state = "killed"
    steps = [line for line in lines_at_end(run / METRICS) if "loss" in line]
    losses = [line["loss"] for line in steps if line["loss"] is not None]
    times = [line["seconds"] for line in lines_at_end(run / TIMING) if "seconds" in line]
    return Status(
        state=state if isinstance(state, str) else "unknown",
        step=steps[-1]["step"] if steps else _whole(found.get("step")) or 0,
        steps=_whole(found.get("steps")),
        checkpoint=_whole(found.get("checkpoint")),
        best=found["best"] if isinstance(found.get("best"), dict) else None,
        loss=_mean(losses),
        seconds_per_step=_mean(times),
        exit_code=_whole(found.get("exit_code")),
        message=str(found.get("message") or ""),
        device=str(found.get("device") or ""),
        store=str(found.get("store") or ""),
    )


def describe(run: Path, status: Status) -> list[str]:
    """Lines for a person, the last of them what to do next."""
    of = "" if status.steps is None else f" of {status.steps} ({status.step / status.steps:.0%})"
    lines = [f"{run}: {status.state}, step {status.step}{of}"]
    if status.message:
        lines.append(status.message)
    if status.loss is not None:
        lines.append(f"loss {status.loss:.4f} (mean of the last steps)")
    if status.best is not None:
        lines.append(f"best validation {status.best['val_loss']:.4f} at step {status.best['step']}")
    if status.checkpoint is not None:
        lines.append(f"newest checkpoint: step {status.checkpoint}")
    if status.seconds_per_step is not None:
        speed = f"{status.seconds_per_step:.3g} s per step"
        if status.state == "running" and status.steps is not None:
            left = round(status.seconds_per_step * (status.steps - status.step))
            speed += f", {timedelta(seconds=left)} left"
        lines.append(speed)
    goes_on = f"sparsemae pretrain {status.store or 'STORE'} -o {run} --resume"
    match status.state:
        case "killed":
            lines.append(f"its process has ended without a word; {goes_on}")
        case "preempted" | "interrupted":
            lines.append(f"stopped as asked; {goes_on}")
        case "failed":
            lines.append(f"once the cause is gone: {goes_on}")
        case "unknown":
            lines.append(f"status.json is missing or damaged; {goes_on} writes it anew")
    return lines


def _mean(values: list[Any]) -> float | None:
    numbers = [v for v in values[-_RECENT:] if isinstance(v, int | float)]
    return sum(numbers) / len(numbers) if numbers else None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
