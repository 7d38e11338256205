"""STORE/dataset.html and STORE/contact.png: a data set to look at before any training.

One page that stands alone: no script, no network, pictures inside. Every word that comes from a
file or its name is escaped. Its size is bounded: a sample of volumes is drawn, examples are few.
"""

import base64
import html
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from sparsemae.data.codes import CODES, one_line
from sparsemae.data.making.ledger import FAILURES, PAGES, WARNINGS
from sparsemae.data.reporting.charts import bars, lines
from sparsemae.data.reporting.contact import COUNT, card, draw_sheet, views
from sparsemae.data.reporting.survey import DUPLICATE, Intensities, Reason, Survey, survey
from sparsemae.data.store import Store
from sparsemae.files import write_atomically

KINDS = 20  # rows of the table of data sets and modalities; the rest is added up
_LETTERS = 400  # of a message
_PAGE, _SHEET = PAGES
_REJECTED, _WARNED = "Rejected", "Used with a warning"  # sections
_FILTERED = "Left out by the quality filter"

_STYLE = """
:root { color-scheme: light; --ink: #1c2733; --soft: #5d6b7a; --line: #dfe4ea; --blue: #2f6db3 }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1320px; padding: 24px 20px 60px; background: #fff;
  color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere }
h2 { font-size: 18px; margin: 36px 0 10px }
p { margin: 4px 0 12px; max-width: 80ch }
.soft, figcaption { color: var(--soft); font-size: 13px }
.tiles { display: grid; gap: 10px; margin: 20px 0;
  grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)) }
.tile { border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px }
.tile b { display: block; font-size: 24px; line-height: 1.25; font-weight: 600 }
a.tile { color: inherit; text-decoration: none } a.tile:hover { border-color: var(--soft) }
.bad b { color: #b3372f } .odd b { color: #9a6700 }
.charts { display: grid; gap: 18px 24px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 290px), 1fr)) }
figure { margin: 0; min-width: 0 } figcaption { margin-bottom: 2px }
svg { display: block; width: 100%; height: auto; max-width: 420px }
svg text { font-size: 10px; fill: var(--soft) } svg .x { text-anchor: middle }
svg .y, svg .note { text-anchor: end } svg .grid { stroke: var(--line) }
svg .bar { fill: var(--blue) } svg polyline { fill: none }
svg .one { stroke: var(--blue); stroke-width: .7; opacity: .35 }
svg .mean { stroke: #1c2733; stroke-width: 1.6 }
.wide { overflow-x: auto }
.wide img { display: block; width: 100%; min-width: 900px; max-width: max-content;
  border: 1px solid var(--line); border-radius: 8px }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; vertical-align: top; padding: 6px 14px 6px 0; min-width: 4.6em;
  border-bottom: 1px solid var(--line); overflow-wrap: anywhere }
th { color: var(--soft); font-size: 13px; font-weight: 500 }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; width: 1%;
  overflow-wrap: normal }
code { font: 13px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace }
summary { cursor: pointer; color: var(--soft); font-size: 13px }
ul { margin: 4px 0; padding-left: 18px }
li { font-size: 13px; margin: 3px 0; overflow-wrap: anywhere }
td.key { width: 1%; white-space: nowrap; overflow-wrap: normal }
@media (max-width: 600px) { body { padding: 16px 14px 40px } td, th { padding-right: 8px } }
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_report(path: Path | str) -> None:
    """Write the page and the contact sheet of the finished store at `path`, into it.

    A sample of volumes is read; damaged ones are named on the page.

    Raises:
        UserError: There is no store.
        OSError: It cannot be written.
    """
    store = Store.open(path, complete=False)
    facts, intensities, cards, damaged = survey(store), Intensities(store.config), [], []
    for view in views(store, COUNT):
        cards.append(card(view))
        intensities.add(view)
        if view.error is not None:
            damaged.append(view.error)
    sheet = draw_sheet(cards)
    parts = [
        _head(store, facts),
        _damage(damaged),
        _charts(facts, intensities),
        _sheet(sheet, len(cards), len(store)),
        _table(facts),
        _reasons(_REJECTED, f"In full: {FAILURES}.", facts.rejected),
        _reasons(_FILTERED, f"In full: {FAILURES}.", facts.filtered),
        _reasons(_WARNED, f"In full: {WARNINGS}.", facts.warnings),
        _settings(facts),
    ]
    write_atomically(store.path / _SHEET, sheet)
    write_atomically(store.path / _PAGE, _page(_name(store), parts).encode())


def _page(title: str, parts: Sequence[str]) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(filter(None, parts))
        + "\n</body></html>\n"
    )


def _name(store: Store) -> str:
    return store.path.resolve().name


def _head(store: Store, facts: Survey) -> str:
    split, voxels = facts.split, facts.shape.prod(axis=1)
    rejected, filtered = (
        sum(reason.count for reason in reasons.values())
        for reasons in (facts.rejected, facts.filtered)
    )
    copies = facts.warnings.get(DUPLICATE, Reason()).count
    tiles = [
        _tile(len(store), "volume stored" if len(store) == 1 else "volumes stored"),
        _tile(facts.warned, "of them with a warning", "odd", _WARNED) if facts.warned else "",
        _tile(rejected, "rejected", "bad" if rejected else "", _REJECTED),
        _tile(filtered, "left out by the filter", "odd", _FILTERED) if filtered else "",
        _tile(copies, "copies of another", "odd", _WARNED) if copies else "",
        _tile(split["train"], "for training"),
        _tile(split["val"], "for validation"),
        _tile(facts.subjects, "subject" if facts.subjects == 1 else "subjects"),
        _tile(facts.excluded, "with excluded voxels") if facts.excluded else "",
        _tile(_bytes(int(facts.bytes.sum())), "on disk"),
        _tile(_short(float(voxels.sum())), "voxels"),
    ]
    return (
        f"<h1>{_text(_name(store))}</h1>"
        f'<div class="soft">sparsemae store <code>{store.fingerprint[:16]}</code></div>'
        f'<div class="tiles">{"".join(tiles)}</div>'
    )


def _tile(number: int | str, label: str, kind: str = "", section: str = "") -> str:
    """A number to see first; it leads to the section that explains it."""
    inside = f"<b>{number}</b>{label}"
    if not section or not number:
        return f'<div class="tile {kind}">{inside}</div>'
    return f'<a class="tile {kind}" href="#{_anchor(section)}">{inside}</a>'


def _anchor(section: str) -> str:
    return section.lower().replace(" ", "-")


def _damage(errors: Sequence[str]) -> str:
    if not errors:
        return ""
    return f"<h2>Damaged files</h2>{_list(errors)}"


def _charts(facts: Survey, intensities: Intensities) -> str:
    charts = [
        ("Source: smallest voxel size, mm", bars, facts.source_spacing.min(axis=1)),
        ("Source: largest voxel size, mm", bars, facts.source_spacing.max(axis=1)),
        ("Source: shortest field of view, mm", bars, facts.source_extent.min(axis=1)),
        ("Stored: longest axis, voxels", bars, facts.shape.max(axis=1)),
        ("Stored: million voxels", bars, facts.shape.prod(axis=1) / 1e6),
        ("Stored: MB on disk", bars, facts.bytes / 1e6),
    ]
    figures = [_figure(label, draw(values, label)) for label, draw, values in charts]
    if intensities.rows:
        label = f"Stored intensities, {len(intensities.rows)} drawn; black: mean"
        figures.insert(0, _figure(label, lines(intensities.edges, intensities.rows, label)))
    return (
        f'<h2>Distributions</h2><div class="charts">{"".join(figures)}</div>'
        '<p class="soft">Intensities are those of the middle slices, without air. A volume whose '
        "line runs apart from all others is worth a look.</p>"
    )


def _figure(label: str, svg: str) -> str:
    return f"<figure><figcaption>{_text(label)}</figcaption>{svg}</figure>"


def _sheet(png: bytes, drawn: int, total: int) -> str:
    which = "All volumes" if drawn == total else f"{drawn} of {total} volumes, evenly chosen"
    return (
        f'<h2>Volumes</h2><p class="soft">{which}: axial, coronal and sagittal '
        "through the middle of what is stored, left is left; excluded voxels in red.</p>"
        '<div class="wide"><img alt="middle slices of the volumes" '
        f'src="data:image/png;base64,{base64.b64encode(png).decode()}"></div>'
    )


def _table(facts: Survey) -> str:
    """Data sets and modalities, the most frequent first."""
    kinds = sorted(facts.kinds.items(), key=lambda item: (-item[1].total(), item[0]))
    rows = [(*(_text(name) or "-" for name in kind), _splits(n)) for kind, n in kinds[:KINDS]]
    if others := kinds[KINDS:]:
        rest = sum((counts for _, counts in others), Counter())
        rows.append((f"{len(others)} others", "", _splits(rest)))
    body = "".join(
        f"<tr><td>{dataset}</td><td>{modality}</td>{counts}</tr>"
        for dataset, modality, counts in rows
    )
    return (
        "<h2>Data sets and modalities</h2><table><tr><th>data set</th><th>modality</th>"
        '<th class="n">volumes</th><th class="n">training</th><th class="n">validation</th></tr>'
        f"{body}</table>"
    )


def _splits(counts: Counter[str]) -> str:
    numbers = (counts.total(), counts["train"], counts["val"])
    return "".join(f'<td class="n">{n}</td>' for n in numbers)


def _reasons(title: str, note: str, reasons: Mapping[str, Reason]) -> str:
    """A table of codes: how often, what it means, what to do, and the first examples."""
    if not reasons:
        return ""
    rows = []
    for code, reason in reasons.items():
        meaning = ""
        if (known := CODES.get(code)) is not None:
            meaning = f'{_text(known.summary)}<br><span class="soft">{_text(known.remedy)}</span>'
        examples = _list(record.message for record in reason.examples)
        which = "all" if reason.count == len(reason.examples) else "the first"
        rows.append(
            f'<tr><td class="key"><code>{_text(code)}</code></td><td class="n">{reason.count}</td>'
            f"<td>{meaning}<details><summary>{which} {len(reason.examples)}</summary>"
            f"{examples}</details></td></tr>"
        )
    return (
        f'<h2 id="{_anchor(title)}">{title}</h2><p class="soft">{note}'
        f" Codes and remedies: docs/bad-input.md.</p>"
        '<table><tr><th>code</th><th class="n">volumes</th><th>meaning, and what to do</th></tr>'
        f"{''.join(rows)}</table>"
    )


def _settings(facts: Survey) -> str:
    rows = "".join(
        f'<tr><td class="key"><code>{_text(key)}</code></td><td>{_text(_value(value))}</td></tr>'
        for key, value in facts.config.model_dump(mode="json").items()
    )
    return f"<h2>Preprocessing</h2><table>{rows}</table>"


def _value(value: object) -> str:
    match value:
        case None:
            return "none"
        case dict():
            return ", ".join(f"{key} {_value(item)}" for key, item in value.items())
        case list():
            return ", ".join(map(_value, value))
        case float():
            return f"{value:g}"
    return str(value)


def _list(texts: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{_text(text)}</li>' for text in texts)}</ul>"


def _text(text: str) -> str:
    """Safe as text and inside quotes, one line, of limited length."""
    text = one_line(text)
    return html.escape(text if len(text) <= _LETTERS else f"{text[: _LETTERS - 1]}…")


def _bytes(count: int) -> str:
    return f"{_short(float(count))}B"


def _short(number: float) -> str:
    """Three digits and a decimal prefix."""
    power = int(np.clip(np.log10(max(number, 1)) // 3, 0, 4))
    return f"{number / 1000.0**power:.3g} {'kMGT'[power - 1] if power else ''}"
