"""STORE/dataset.html and STORE/contact.png: a data set to look at before any training.

One page that stands alone: no script, no network, pictures inside. Every word that comes from a
file or its name is escaped. Its size is bounded: a sample of volumes is drawn, examples are few.
"""

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sparsemae.data.codes import CODES
from sparsemae.data.making.ledger import FAILURES, PAGES, WARNINGS
from sparsemae.data.reporting.charts import bars, lines
from sparsemae.data.reporting.contact import COUNT, card, draw_sheet, views
from sparsemae.data.reporting.survey import DUPLICATE, Intensities, Reason, Survey, survey
from sparsemae.data.store import Store
from sparsemae.files import write_atomically
from sparsemae.reporting.page import anchor, figure, listing, page, settings, text, tile

KINDS = 20  # rows of the table of data sets and modalities; the rest is added up
_PAGE, _SHEET = PAGES
_REJECTED, _WARNED = "Rejected", "Used with a warning"  # sections
_FILTERED = "Left out by the quality filter"


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
    write_atomically(store.path / _PAGE, page(_name(store), parts).encode())


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
        tile(len(store), "volume stored" if len(store) == 1 else "volumes stored"),
        tile(facts.warned, "of them with a warning", "odd", _WARNED) if facts.warned else "",
        tile(rejected, "rejected", "bad" if rejected else "", _REJECTED),
        tile(filtered, "left out by the filter", "odd", _FILTERED) if filtered else "",
        tile(copies, "copies of another", "odd", _WARNED) if copies else "",
        tile(split["train"], "for training"),
        tile(split["val"], "for validation"),
        tile(facts.subjects, "subject" if facts.subjects == 1 else "subjects"),
        tile(facts.excluded, "with excluded voxels") if facts.excluded else "",
        tile(_bytes(int(facts.bytes.sum())), "on disk"),
        tile(_short(float(voxels.sum())), "voxels"),
    ]
    return (
        f"<h1>{text(_name(store))}</h1>"
        f'<div class="soft">sparsemae store <code>{store.fingerprint[:16]}</code></div>'
        f'<div class="tiles">{"".join(tiles)}</div>'
    )


def _damage(errors: Sequence[str]) -> str:
    if not errors:
        return ""
    return f"<h2>Damaged files</h2>{listing(errors)}"


def _charts(facts: Survey, intensities: Intensities) -> str:
    charts = [
        ("Source: smallest voxel size, mm", bars, facts.source_spacing.min(axis=1)),
        ("Source: largest voxel size, mm", bars, facts.source_spacing.max(axis=1)),
        ("Source: shortest field of view, mm", bars, facts.source_extent.min(axis=1)),
        ("Stored: longest axis, voxels", bars, facts.shape.max(axis=1)),
        ("Stored: million voxels", bars, facts.shape.prod(axis=1) / 1e6),
        ("Stored: MB on disk", bars, facts.bytes / 1e6),
    ]
    figures = [figure(label, draw(values, label)) for label, draw, values in charts]
    if intensities.rows:
        label = f"Stored intensities, {len(intensities.rows)} drawn; black: mean"
        figures.insert(0, figure(label, lines(intensities.edges, intensities.rows, label)))
    return (
        f'<h2>Distributions</h2><div class="charts">{"".join(figures)}</div>'
        '<p class="soft">Intensities are those of the middle slices, without air. A volume whose '
        "line runs apart from all others is worth a look.</p>"
    )


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
    rows = [(*(text(name) or "-" for name in kind), _splits(n)) for kind, n in kinds[:KINDS]]
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
            meaning = f'{text(known.summary)}<br><span class="soft">{text(known.remedy)}</span>'
        examples = listing(record.message for record in reason.examples)
        which = "all" if reason.count == len(reason.examples) else "the first"
        rows.append(
            f'<tr><td class="key"><code>{text(code)}</code></td><td class="n">{reason.count}</td>'
            f"<td>{meaning}<details><summary>{which} {len(reason.examples)}</summary>"
            f"{examples}</details></td></tr>"
        )
    return (
        f'<h2 id="{anchor(title)}">{title}</h2><p class="soft">{note}'
        f" Codes and remedies: docs/bad-input.md.</p>"
        '<table><tr><th>code</th><th class="n">volumes</th><th>meaning, and what to do</th></tr>'
        f"{''.join(rows)}</table>"
    )


def _settings(facts: Survey) -> str:
    values = facts.config.model_dump(mode="json").items()
    return f"<h2>Preprocessing</h2>{settings(values)}"


def _bytes(count: int) -> str:
    return f"{_short(float(count))}B"


def _short(number: float) -> str:
    """Three digits and a decimal prefix."""
    power = int(np.clip(np.log10(max(number, 1)) // 3, 0, 4))
    return f"{number / 1000.0**power:.3g} {'kMGT'[power - 1] if power else ''}"
