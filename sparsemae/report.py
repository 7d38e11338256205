"""RUN/report.html: a training run to look at, in one file that needs nothing else.

Refreshed at every checkpoint. Its size is bounded: curves are thinned out, volumes are few and in
8 bits. Every word that comes from a file is escaped.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparsemae.files import write_atomically
from sparsemae.kinds import Measure, kind_of
from sparsemae.reporting.curves import STYLE as CURVES
from sparsemae.reporting.curves import Curve, draw_curves
from sparsemae.reporting.facts import read_facts
from sparsemae.reporting.page import anchor, figure, page, settings, text, tile
from sparsemae.reporting.preview import load_preview
from sparsemae.reporting.readback import RunData, number, read_run
from sparsemae.reporting.viewer import STYLE, draw_viewer, script
from sparsemae.runfiles import HISTORY, METRICS, PREVIEW, REPORT
from sparsemae.status import Status, read_status

_ODD = "Skipped steps and spikes"  # a section
_CASES = 64  # of a step that are named
_LONGEST = 1e9  # seconds: a clock's mistake is told as this
_STYLE = f"""{STYLE}{CURVES}
.state {{ font-size: 17px; margin: 10px 0 0 }} .state b {{ text-transform: capitalize }}
.good b {{ color: #2c7a4b }}
.tiles {{ grid-template-columns: repeat(auto-fit, minmax(max(140px, 17.5%), 1fr)) }}
.wide table {{ min-width: 560px }} .event {{ white-space: nowrap }}
.settings {{ columns: 2 400px; column-gap: 40px }} .settings tr {{ break-inside: avoid }}
"""
_KINDS = {"finished": "good", "running": "", "preempted": "odd", "interrupted": "odd"}
_MUCH = 0.1  # of the time waiting for data is worth a colour


def write_run_report(run: Path) -> Path:
    """Write the page of a run folder, whole or not at all.

    Raises:
        UserError: No run there.
        OSError: It cannot be written.
    """
    status, kind = read_status(run), kind_of(run)
    data, preview, name = read_run(run), load_preview(run), run.resolve().name
    element, digest = script()
    parts = [
        _head(name, status, data),
        _tiles(status, data, kind.measure),
        f"<h2>{kind.pictures}</h2>{draw_viewer(preview, damaged=(run / PREVIEW).exists())}",
        f'<h2>Curves</h2><div class="curves">{"".join(_curves(data, kind.measure))}</div>',
        _odd(data),
        _history(data),
        _settings("Data set and plan", read_facts(run)),
        _settings("Configuration", list(_flat(data.config))),
        element,
    ]
    html = page(f"{name}: training", parts, style=_STYLE, script_hash=digest)
    write_atomically(run / REPORT, html.encode())
    return run / REPORT


def _head(name: str, status: Status, data: RunData) -> str:
    """What runs, how far it is, and when it ends or ended."""
    of = f" of {status.steps:,} ({status.step / status.steps:.0%})" if status.steps else ""
    words = [f"step {status.step:,}{of}"]
    if status.seconds_left is not None:
        words.append(f"{_span(status.seconds_left)} left")
    elif (ended := _last(status, data)) is not None and status.state != "running":
        words.append(f"ended {_moment(ended)}")
    ranks = f"{status.world_size} ranks" if (status.world_size or 0) > 1 else ""
    where = [status.device, ranks, status.host, f"page written {_moment(time.time())}"]
    return (
        f"<h1>{text(name)}</h1>"
        f'<div class="soft">sparsemae run · {" · ".join(map(text, filter(None, where)))}</div>'
        f'<p class="state {_KINDS.get(status.state, "bad")}"><b>{status.state}</b>'
        f" · {' · '.join(words)}</p>"
        + (f'<p class="bad"><b>{text(status.message)}</b></p>' if status.message else "")
    )


def _tiles(status: Status, data: RunData, measure: Measure) -> str:
    totals, best, tiles = data.totals, status.best, []
    if status.loss is not None:
        tiles.append(tile(f"{status.loss:.4g}", "loss, mean of the last 50 steps"))
    if best is not None:
        label = f"best {measure.name}, step {best['step']:,}"
        tiles.append(tile(f"{measure.shown(best['val_loss']):.4g}", label))
    if status.samples_per_second is not None:
        tiles.append(tile(f"{status.samples_per_second:.3g}", "samples per second"))
    if spent := totals["seconds"]:
        share = totals["wait_seconds"] / spent
        tiles.append(
            tile(f"{share:.1%}", "of the time waiting for data", "odd" if share > _MUCH else "")
        )
    last = _last(status, data)
    if status.started is not None and last is not None:
        tiles.append(tile(_span(max(0.0, last - status.started)), "since the first start"))
    tiles += [
        tile(_span(spent), "in steps"),
        tile(_span(totals["validation_seconds"]), "in validation"),
        tile(_span(totals["save_seconds"]), "waiting for checkpoints"),
    ]
    if data.memory:
        tiles.append(tile(f"{data.memory / 2**30:.1f} GiB", "peak on the GPU"))
    if data.marks:
        tiles.append(tile(len(data.marks), _ODD.lower(), "odd", _ODD))
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _last(status: Status, data: RunData) -> float | None:
    """When the run was last heard of, in unix seconds; a killed one wrote logs after its status."""
    return max(filter(None, (status.updated, data.written)), default=None)


def _curves(data: RunData, measure: Measure) -> Iterator[str]:
    kinds = {kind for kind, _ in data.marks}
    marks = "".join(f', <b class="legend {kind}">{kind}</b>' for kind in sorted(kinds))
    training = Curve("training", *data.loss)
    steps, validated = data.val_loss
    validation = Curve(measure.short, steps, measure.shown(validated), kind="points")
    if measure.score:  # on a scale of its own
        yield figure("Training loss", draw_curves("loss", [training], marks=data.marks), marks)
        label = f"{measure.name[0].upper()}{measure.name[1:]}, {measure.of}"
        yield figure(label, draw_curves(measure.name, [validation], floor=0))
    else:
        legend = ': <b class="legend main">training</b>, <b class="legend points">validation</b>'
        drawn = draw_curves("loss", [training, validation], marks=data.marks)
        yield figure("Loss", drawn, legend + marks)
    lr = [Curve("learning rate", *data.lr)]
    yield figure("Learning rate", draw_curves("learning rate", lr, floor=0))
    norm = [Curve("gradient norm", *data.grad_norm)]
    drawn = draw_curves("gradient norm", norm, marks=data.marks)
    yield figure("Gradient norm before clipping", drawn, marks)
    speed = [Curve("samples per second", *data.speed)]
    yield figure("Samples per second", draw_curves("samples per second", speed, floor=0))
    wait = [Curve("%", data.wait[0], 100 * data.wait[1])]
    yield figure("Waiting for data, % of a step", draw_curves("waiting for data", wait, floor=0))


def _odd(data: RunData) -> str:
    if not data.odd:
        return ""
    rows = "".join(
        f'<tr><td class="n">{line["step"]:,}</td>'
        f"<td>{'skipped' if line.get('skipped') else 'spike'}</td>"
        f"<td>{_value(line.get('loss'))}</td><td>{_value(line.get('grad_norm'))}</td>"
        f"<td>{_names(line.get('cases'))}</td></tr>"
        for line in reversed(data.odd)
    )
    more = len(data.marks) > len(data.odd)
    which = f"The last {len(data.odd)} of {len(data.marks)}" if more else "All"
    note = (
        "Skipped: loss or gradient were not finite, so nothing was updated. Spike: the loss was "
        f"far above its running mean. {which}, newest first; in full: {METRICS}."
    )
    heads = '<th class="n">step</th><th>what</th><th>loss</th><th>gradient norm</th><th>cases</th>'
    return _table(_ODD, note, heads, rows)


def _names(cases: Any) -> str:
    """All of a step's, a line each, behind the first."""
    if not isinstance(cases, list) or not cases:
        return ""
    first, *others = (text(str(case)) for case in cases[:_CASES])
    if not others:
        return first
    left = len(cases) - 1 - len(others)
    rest = "<br>".join([*others, *([f"and {left} others"] if left else [])])
    return f"<details><summary>{first}, and {len(cases) - 1} more</summary>{rest}</details>"


def _history(data: RunData) -> str:
    if not data.history:
        return ""
    rows = "".join(
        f'<tr><td class="key">{_moment(event.get("time"))}</td>'
        f'<td class="n">{event["step"]:,}</td>'
        f'<td class="event">{text(str(event.get("event", "")))}</td>'
        f"<td>{text(str(event.get('message', '')))}</td></tr>"
        for event in reversed(data.history)
    )
    heads = '<th>time</th><th class="n">step</th><th>event</th><th></th>'
    return _table("History", f"Newest first; in full: {HISTORY}.", heads, rows)


def _table(title: str, note: str, heads: str, rows: str) -> str:
    """A section that is a table; heads and rows are HTML."""
    return (
        f'<h2 id="{anchor(title)}">{title}</h2><p class="soft">{note}</p>'
        f'<div class="wide"><table><tr>{heads}</tr>{rows}</table></div>'
    )


def _settings(title: str, values: list[tuple[str, object]]) -> str:
    """A section of keys and values; none without any."""
    return f'<h2>{title}</h2><div class="settings">{settings(values)}</div>' if values else ""


def _flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _span(seconds: float) -> str:
    """Two units say enough."""
    minutes, hours = round(min(seconds, _LONGEST) / 60), round(min(seconds, _LONGEST) / 3600)
    if seconds < 120:
        return f"{seconds:.3g} s"
    if minutes < 120:
        return f"{minutes} min"
    if hours < 48:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{hours // 24} d {hours % 24} h"


def _moment(seconds: Any) -> str:
    """Unix seconds as local time; nothing if they are none."""
    if number(seconds) is None:
        return ""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    except (OverflowError, ValueError, OSError):  # beyond the years that a clock knows
        return ""


def _value(value: Any) -> str:
    return "not finite" if number(value) is None else f"{value:.4g}"
