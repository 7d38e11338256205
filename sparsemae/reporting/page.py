"""The frame and the look that all pages share, and how words from files get into them."""

import html
from collections.abc import Iterable, Sequence

from sparsemae.data.codes import one_line

LETTERS = 400  # of a message

STYLE = """
:root { color-scheme: light; --ink: #1c2733; --soft: #5d6b7a; --line: #dfe4ea; --blue: #2f6db3;
  --red: #b3372f; --amber: #9a6700 }
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
.bad b { color: var(--red) } .odd b { color: var(--amber) }
.charts { display: grid; gap: 18px 24px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 290px), 1fr)) }
figure { margin: 0; min-width: 0 } figcaption { margin-bottom: 2px }
svg { display: block; width: 100%; height: auto; max-width: 420px }
svg text { font-size: 10px; fill: var(--soft) } svg .x { text-anchor: middle }
svg .y, svg .note { text-anchor: end } svg .grid { stroke: var(--line) }
svg .bar { fill: var(--blue) } svg polyline { fill: none }
svg .one { stroke: var(--blue); stroke-width: .7; opacity: .35 }
svg .mean { stroke: var(--ink); stroke-width: 1.6 }
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


def page(title: str, parts: Sequence[str], *, style: str = "", script_hash: str = "") -> str:
    """A whole page of parts that are HTML already; empty ones are left out.

    Args:
        style: More of it, for this page.
        script_hash: SHA-256 in base64 of the one script it may run; without, it may run none.
    """
    scripts = f"; script-src 'sha256-{script_hash}'" if script_hash else ""
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'{scripts}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}{style}</style></head>\n<body>\n"
        + "\n".join(filter(None, parts))
        + "\n</body></html>\n"
    )


def text(value: str) -> str:
    """Safe as text and inside quotes, one line, of limited length."""
    value = one_line(value)
    return html.escape(value if len(value) <= LETTERS else f"{value[: LETTERS - 1]}…")


def tile(number: int | str, label: str, kind: str = "", section: str = "") -> str:
    """A number to see first; with a section, it leads to the one that explains it."""
    inside = f"<b>{number}</b>{label}"
    if not section or not number:
        return f'<div class="tile {kind}">{inside}</div>'
    return f'<a class="tile {kind}" href="#{anchor(section)}">{inside}</a>'


def anchor(section: str) -> str:
    """What a link to a section of this title calls it."""
    return section.lower().replace(" ", "-")


def figure(label: str, content: str, legend: str = "") -> str:
    """A chart with its caption; content, and a legend after the label, are HTML."""
    return f"<figure><figcaption>{text(label)}{legend}</figcaption>{content}</figure>"


def listing(texts: Iterable[str]) -> str:
    """A list of lines of text."""
    return f"<ul>{''.join(f'<li>{text(line)}</li>' for line in texts)}</ul>"


def settings(values: Iterable[tuple[str, object]]) -> str:
    """A table of keys and plain values."""
    rows = "".join(
        f'<tr><td class="key"><code>{text(key)}</code></td><td>{text(_value(value))}</td></tr>'
        for key, value in values
    )
    return f"<table>{rows}</table>"


def _value(value: object) -> str:
    match value:
        case None:
            return "none"
        case bool():
            return str(value).lower()
        case dict():
            return ", ".join(f"{key} {_value(item)}" for key, item in value.items())
        case list():
            return ", ".join(map(_value, value))
        case float():
            return f"{value:g}"
    return str(value)
