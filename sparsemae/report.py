"""RUN/report.html: a training run to look at, in one file that needs nothing else.

Refreshed at every checkpoint. Its size is bounded: curves are thinned out, volumes are few and in
8 bits. Every word that comes from a file is escaped.
"""

import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from sparsemae.files import write_atomically
from sparsemae.reporting.curves import Curve, draw_curves
from sparsemae.reporting.page import figure, page, settings, text, tile
from sparsemae.reporting.preview import load_preview
from sparsemae.reporting.readback import RunData, read_run, smoothed
from sparsemae.reporting.viewer import STYLE, draw_viewer, script
from sparsemae.runfiles import HISTORY, METRICS, REPORT
from sparsemae.status import require_run

_ROWS = 20  # of tables of what happened
_STYLE = (
    STYLE
    + """
.curves { display: grid; gap: 18px 28px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)) }
.curves svg { max-width: none } .band { fill: var(--blue); opacity: .18 }
.main { stroke: var(--blue); stroke-width: 1.5 } polyline.points { stroke: var(--ink) }
circle.points { fill: var(--ink) } circle.main { fill: var(--blue) }
.skipped { stroke: var(--red); stroke-width: 2 } .spike { stroke: #c98a00; stroke-width: 2 }
.good b { color: #2c7a4b }
"""
)
_KINDS = {"finished": "good", "running": "", "preempted": "odd", "interrupted": "odd"}


def write_run_report(run: Path) -> Path:
    """Write the page of a run folder, whole or not at all.

    Raises:
        UserError: No run there.
        OSError: It cannot be written.
    """
    require_run(run)
    data = read_run(run)
    element, digest = script()
    parts = [
        _head(run, data),
        f"<h2>Reconstruction</h2>{draw_viewer(load_preview(run))}",
        f'<h2>Curves</h2><div class="curves">{"".join(_curves(data))}</div>',
        _odd(data),
        _history(data),
        f"<h2>Configuration</h2>{settings(_flat(data.config))}",
        element,
    ]
    name = run.resolve().name
    html = page(f"{name}: training", parts, style=_STYLE, script_hash=digest)
    write_atomically(run / REPORT, html.encode())
    return run / REPORT


def _head(run: Path, data: RunData) -> str:
    status, totals = data.status, data.totals
    state = str(status.get("state", "unknown"))
    steps = status.get("steps")
    done = max([int(s[0][-1]) for s in (data.loss, data.speed) if s.size], default=0)
    spent = totals.get("seconds", 0.0)
    share = totals.get("wait_seconds", 0.0) / spent if spent else 0.0
    speed, best = smoothed(data.speed[1]), status.get("best")
    tiles = [
        tile(text(state), _of(done, steps), _KINDS.get(state, "bad")),
        _number(smoothed(data.loss[1]), "loss, mean of the last 50 steps"),
        _number(best["val_loss"], f"best validation, step {best['step']}") if _whole(best) else "",
        _number(speed, "samples per second", "{:.3g}"),
        tile(f"{share:.1%}", "of the time waiting for data", "odd" if share > 0.1 else ""),
        tile(_span(spent), "in steps"),
        tile(_span(totals.get("validation_seconds", 0.0)), "in validation"),
        tile(_span(totals.get("save_seconds", 0.0)), "waiting for checkpoints"),
        tile(f"{data.memory / 2**30:.1f} GiB", "peak on the GPU") if data.memory else "",
        tile(_left(data, done, steps), "left") if state == "running" and spent else "",
        tile(len(data.odd), "skipped steps and spikes", "odd") if data.odd else "",
    ]
    message = status.get("message") or ""
    where = " · ".join(f"{text(str(status[key]))}" for key in ("device", "host") if status.get(key))
    ranks = status.get("world_size")
    where += f" · {ranks} ranks" if isinstance(ranks, int) and ranks > 1 else ""
    now = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
    return (
        f"<h1>{text(run.resolve().name)}</h1>"
        f'<div class="soft">sparsemae run · {where} · page written {now}</div>'
        + (f'<p class="bad"><b>{text(str(message))}</b></p>' if message else "")
        + f'<div class="tiles">{"".join(tiles)}</div>'
    )


def _curves(data: RunData) -> Iterator[str]:
    marks = [("skipped" if o.get("skipped") else "spike", o["step"]) for o in data.odd]
    loss = [Curve("training", *data.loss), Curve("validation", *data.val_loss, kind="points")]
    yield figure("Loss; black: validation", draw_curves("loss", loss, marks=marks))
    lr = [Curve("learning rate", *data.lr)]
    yield figure("Learning rate", draw_curves("learning rate", lr, floor=0))
    norm = [Curve("gradient norm", *data.grad_norm)]
    yield figure("Gradient norm before clipping", draw_curves("gradient norm", norm, marks=marks))
    speed = [Curve("samples per second", *data.speed)]
    yield figure("Samples per second", draw_curves("samples per second", speed, floor=0))
    wait = [Curve("share", data.wait[0], 100 * data.wait[1])]
    yield figure("Waiting for data, % of a step", draw_curves("waiting for data", wait, floor=0))


def _odd(data: RunData) -> str:
    if not data.odd:
        return ""
    rows = "".join(
        f'<tr><td class="n">{o["step"]}</td><td>{"skipped" if o.get("skipped") else "spike"}</td>'
        f"<td>{text(_value(o.get('loss')))}</td><td>{text(_value(o.get('grad_norm')))}</td>"
        f"<td>{text(', '.join(map(str, o.get('cases') or [])))}</td></tr>"
        for o in data.odd[: -_ROWS - 1 : -1]
    )
    which = f"The last {_ROWS} of {len(data.odd)}" if len(data.odd) > _ROWS else "All"
    return (
        '<h2>Skipped steps and spikes</h2><p class="soft">Skipped: loss or gradient were not '
        "finite, so nothing was updated. Spike: the loss was far above its running mean. "
        f"{which}, newest first; in full: {METRICS}.</p><table><tr>"
        '<th class="n">step</th><th>what</th><th>loss</th><th>gradient norm</th><th>cases</th></tr>'
        f"{rows}</table>"
    )


def _history(data: RunData) -> str:
    if not data.history:
        return ""
    rows = "".join(
        f'<tr><td class="key">{_moment(event.get("time"))}</td><td class="n">{event["step"]}</td>'
        f"<td>{text(str(event.get('event', '')))}</td>"
        f"<td>{text(str(event.get('message', '')))}</td></tr>"
        for event in data.history[: -_ROWS - 1 : -1]
    )
    return (
        f'<h2>History</h2><p class="soft">Newest first; in full: {HISTORY}.</p><table><tr>'
        f'<th>time</th><th class="n">step</th><th>event</th><th></th></tr>{rows}</table>'
    )


def _flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _number(value: Any, label: str, how: str = "{:.4f}") -> str:
    return "" if value is None else tile(how.format(value), label)


def _whole(best: Any) -> bool:
    return (
        isinstance(best, dict)
        and isinstance(best.get("val_loss"), float | int)
        and isinstance(best.get("step"), int)
    )


def _of(done: int, steps: Any) -> str:
    return f"step {done:,} of {steps:,}" if isinstance(steps, int) else f"step {done:,}"


def _left(data: RunData, done: int, steps: Any) -> str:
    """From the speed of late, validations and checkpoints included."""
    if not isinstance(steps, int) or not data.speed.size:
        return "unknown"
    whole = sum(data.totals.get(k, 0.0) for k in ("seconds", "save_seconds", "validation_seconds"))
    return _span(whole / max(1, data.speed.shape[1]) * (steps - done))


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return str(timedelta(seconds=round(seconds)))


def _moment(seconds: Any) -> str:
    if not isinstance(seconds, int | float):
        return ""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "not finite"
