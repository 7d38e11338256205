"""A run's files as numbers to draw. What is missing, damaged or cut off says less, no more."""

import contextlib
import json
import os
import tomllib
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from sparsemae.runfiles import CONFIG, HISTORY, METRICS, STATUS, TIMING

KEPT = 20  # events and odd steps, the newest
_ENDS = (2**16, 2**20, 2**24)  # bytes of a log that are its end, if lines are short, long, huge
_LARGEST = 1e100  # beyond, a number is as good as infinite

Series = Float[np.ndarray, "2 n"]  # steps, values


@dataclass(frozen=True)
class RunData:
    """What a run folder tells."""

    config: dict[str, Any]
    history: list[dict[str, Any]]  # the newest
    loss: Series
    lr: Series
    grad_norm: Series
    val_loss: Series
    odd: list[dict[str, Any]]  # steps that were left out and spikes, the newest
    marks: list[tuple[str, int]]  # "skipped" or "spike" and step, all of them
    speed: Series  # samples per second
    wait: Series  # share of a step
    totals: dict[str, float]  # seconds of steps, waits, saves, validations
    memory: int  # bytes, peak on the GPU
    written: float | None  # unix seconds of the last line


def read_run(run: Path) -> RunData:
    """Everything but status, checkpoints and preview of a run folder."""
    metrics = {name: (array("d"), array("d")) for name in ("loss", "lr", "grad_norm", "val_loss")}
    odd, marks = deque(maxlen=KEPT), []
    for line in lines(run / METRICS):
        for name, (steps, values) in metrics.items():
            if (value := number(line.get(name))) is not None:
                steps.append(line["step"])
                values.append(value)
        if line.get("skipped") or line.get("spike"):
            odd.append(line)
            marks.append(("skipped" if line.get("skipped") else "spike", line["step"]))
    return RunData(
        config=_toml(run / CONFIG),
        history=list(deque(lines(run / HISTORY), KEPT)),
        odd=list(odd),
        marks=marks,
        **{name: _series(pair) for name, pair in metrics.items()},
        **_times(run),
    )


def _times(run: Path) -> dict[str, Any]:
    speed, wait = ((array("d"), array("d")) for _ in range(2))
    totals = dict.fromkeys(("seconds", "wait_seconds", "save_seconds", "validation_seconds"), 0.0)
    memory, written = 0, None
    for line in lines(run / TIMING):
        numbers = {key: value for key in line if (value := number(line[key])) is not None}
        if (seconds := numbers.get("seconds", 0.0)) > 0:
            for pair, key in ((speed, "samples"), (wait, "wait_seconds")):
                if key in numbers:
                    pair[0].append(line["step"])
                    pair[1].append(numbers[key] / seconds)
            memory = max(memory, int(numbers.get("memory_bytes", 0)))
        for key in totals:
            totals[key] += numbers.get(key, 0.0)
        written = numbers.get("time", written)
    return {
        "speed": _series(speed),
        "wait": _series(wait),
        "totals": totals,
        "memory": memory,
        "written": written,
    }


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a log, as values; each has a step."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        yield from filter(None, map(parsed, file))


def lines_at_end(path: Path, count: int) -> list[dict[str, Any]]:
    """The last whole lines of a log: more than `count`, if it has so many, and not much more."""
    found = []
    with contextlib.suppress(OSError), path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        for length in _ENDS:
            file.seek(max(0, size - length))
            found = [values for line in file if (values := parsed(line))]
            if len(found) > 2 * count or length >= size:
                break
    return found


def parsed(line: bytes) -> dict[str, Any] | None:
    """The values of a line of a log; None if it is damaged or cut off."""
    with contextlib.suppress(ValueError, RecursionError):
        values = json.loads(line)
        if isinstance(values, dict) and isinstance(step := values.get("step"), int):
            return values if 0 <= step < 2**53 else None
    return None


def status_of(run: Path) -> dict[str, Any]:
    """`status.json`, or nothing."""
    return read_json(run / STATUS)


def read_json(path: Path) -> dict[str, Any]:
    """The values of a file, or nothing."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        values = json.loads(path.read_bytes())
        if isinstance(values, dict):
            return values
    return {}


def number(value: Any) -> float | None:
    """The value, if it is a finite number."""
    good = isinstance(value, int | float) and not isinstance(value, bool)
    return value if good and abs(value) < _LARGEST else None


def _series(pair: Iterable[array]) -> Series:
    return np.stack([np.asarray(numbers) for numbers in pair])


def _toml(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError, RecursionError):
        return tomllib.loads(path.read_text(encoding="utf-8"))
    return {}
