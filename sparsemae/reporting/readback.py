"""A run's files as numbers to draw. What is missing, damaged or cut off says less, no more."""

import contextlib
import json
import math
import os
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from sparsemae.runfiles import CONFIG, HISTORY, METRICS, STATUS, TIMING

_END = 2**16  # bytes of a log that are its end

Series = Float[np.ndarray, "2 n"]  # steps, values


@dataclass
class RunData:
    """What a run folder tells."""

    config: dict[str, Any]
    status: dict[str, Any]
    history: list[dict[str, Any]]
    loss: Series
    lr: Series
    grad_norm: Series
    val_loss: Series
    odd: list[dict[str, Any]]  # steps that were left out, and spikes
    speed: Series  # samples per second
    wait: Series  # share of a step
    totals: dict[str, float] = field(default_factory=dict)  # seconds of steps, waits, saves ...
    memory: int = 0  # bytes, peak on the GPU


def read_run(run: Path) -> RunData:
    """Everything but the checkpoints and the preview of a run folder."""
    metrics = {name: ([], []) for name in ("loss", "lr", "grad_norm", "val_loss")}
    odd = []
    for line in lines(run / METRICS):
        for name, (steps, values) in metrics.items():
            if (value := _number(line.get(name))) is not None:
                steps.append(line["step"])
                values.append(value)
        if line.get("skipped") or line.get("spike"):
            odd.append(line)
    speed, wait, totals, memory = ([], []), ([], []), {}, 0
    for line in lines(run / TIMING):
        seconds = _number(line.get("seconds"))
        if seconds is not None and seconds > 0:
            waited, samples = (_number(line.get(k)) or 0.0 for k in ("wait_seconds", "samples"))
            for (steps, values), value in ((speed, samples / seconds), (wait, waited / seconds)):
                steps.append(line["step"])
                values.append(value)
            memory = max(memory, int(_number(line.get("memory_bytes")) or 0))
        for key in ("seconds", "wait_seconds", "save_seconds", "validation_seconds"):
            totals[key] = totals.get(key, 0.0) + (_number(line.get(key)) or 0.0)
    return RunData(
        config=_toml(run / CONFIG),
        status=status_of(run),
        history=list(lines(run / HISTORY)),
        odd=odd,
        speed=np.array(speed, float),
        wait=np.array(wait, float),
        totals=totals,
        memory=memory,
        **{name: np.array(pair, float) for name, pair in metrics.items()},
    )


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a log, as values; each has a step."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        yield from filter(None, map(_parsed, file))


def lines_at_end(path: Path) -> list[dict[str, Any]]:
    """The last whole lines of a log, a few hundred."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _END))
        return [values for line in file if (values := _parsed(line))]
    return []


def _parsed(line: bytes) -> dict[str, Any] | None:
    with contextlib.suppress(ValueError):
        values = json.loads(line)
        if isinstance(values, dict) and isinstance(values.get("step"), int):
            return values
    return None


def status_of(run: Path) -> dict[str, Any]:
    """`status.json`, or nothing."""
    with contextlib.suppress(OSError, ValueError):
        values = json.loads((run / STATUS).read_bytes())
        if isinstance(values, dict):
            return values
    return {}


def smoothed(values: np.ndarray, count: int = 50) -> float | None:
    """The mean of the last values, None if there is none."""
    return float(values[-count:].mean()) if len(values) else None


def _number(value: Any) -> float | None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if good else None


def _toml(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        return tomllib.loads(path.read_text())
    return {}
