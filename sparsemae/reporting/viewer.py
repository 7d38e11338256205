"""The interactive slice viewer of a report: plain canvas, the volumes inside the page."""

import base64
import gzip
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.resources import files

import numpy as np

from sparsemae.reporting.page import text
from sparsemae.reporting.palette import OPACITY
from sparsemae.reporting.views import Stored, volumes
from sparsemae.runfiles import PREVIEW

SCRIPTS = ("viewer.js", "curves.js")
STYLE = """
#viewer { outline-offset: 4px; max-width: 1100px }
.controls { display: flex; flex-wrap: wrap; gap: 8px 14px; align-items: center; padding: 8px 0;
  background: #fff }
.controls button, .controls select { font: inherit; padding: 3px 12px; border-radius: 6px;
  border: 1px solid var(--line); background: #fff; color: var(--ink); max-width: 100% }
.controls button[aria-pressed="true"] { background: var(--blue); border-color: var(--blue);
  color: #fff }
.controls input { flex: 1 1 220px; min-width: 120px }
#shown { min-width: 12em; font-variant-numeric: tabular-nums }
.views { display: grid; gap: 12px; grid-template-columns: repeat(3, minmax(0, 1fr)) }
.view { position: relative; background: #000; border-radius: 6px; overflow: hidden }
.view canvas { display: block; width: 100%; image-rendering: pixelated; cursor: ns-resize }
.view span { position: absolute; color: #ffd479; font-size: 12px; line-height: 1;
  text-shadow: 0 0 3px #000, 0 0 3px #000; pointer-events: none }
.view .left { left: 5px; top: 50% } .view .right { right: 5px; top: 50% }
.classes { display: flex; flex-wrap: wrap; gap: 2px 18px; padding: 0; list-style: none }
.classes i { display: inline-block; width: 12px; height: 12px; margin-right: 6px;
  border: 1px solid var(--line); border-radius: 3px; vertical-align: -1px }
.view .top { top: 5px; left: 50% } .view .bottom { bottom: 5px; left: 50% }
@media (max-width: 700px) { .views { grid-template-columns: minmax(0, 1fr) }
  .controls { position: sticky; top: 0; z-index: 1 } }
"""


def script() -> tuple[str, str]:
    """The page's script element, and the SHA-256 in base64 that lets a page run it."""
    folder = files("sparsemae.reporting")
    code = "".join((folder / name).read_text(encoding="utf-8") for name in SCRIPTS)
    digest = hashlib.sha256(code.encode()).digest()
    return f"<script>{code}</script>", base64.b64encode(digest).decode()


def draw_viewer(preview: Stored | None, *, damaged: bool = False) -> str:
    """The views of one slice side by side, with plane, slice and case to choose.

    Args:
        damaged: There is none because its file cannot be read.
    """
    if preview is None:
        why = f"{PREVIEW} is damaged: the next" if damaged else "No volumes to show yet: the first"
        return f'<p class="soft">{why} checkpoint of a run that trains brings them.</p>'
    shown = volumes(preview)
    colours = (255 * preview.colours).round().astype(int).tolist()
    data = {
        "views": [asdict(view) for view in preview.views],
        "shapes": {name: array.shape[1:] for name, array in shown.items()},
        "colours": colours,
        "opacity": OPACITY,
        "items": [
            {
                **{name: _packed(array[i]) for name, array in shown.items()},
                "spacing": [float(mm) for mm in preview.spacing[i]],
            }
            for i in range(len(preview.cases))
        ],
    }
    planes = "".join(
        f'<button type="button" data-plane="{plane}">{plane}</button>'
        for plane in ("axial", "coronal", "sagittal")
    )
    letters = "".join(
        f'<span class="{side}"></span>' for side in ("left", "right", "top", "bottom")
    )
    views = "".join(
        f'<figure><figcaption>{view.caption}</figcaption><div class="view">'
        f'<canvas id="{view.id}" role="img" aria-label="{view.caption}"></canvas>{letters}'
        "</div></figure>"
        for view in preview.views
    )
    return (
        f'<p class="soft" id="viewer-note">Unpacking the volumes needs JavaScript.</p>'
        f'<div id="viewer" tabindex="0" hidden><div class="controls">{planes}'
        f"{_choice(preview.cases)}"
        f'<input id="slice" type="range" min="0" value="0" aria-label="slice">'
        f'<output id="shown"></output></div><div class="views">{views}</div>'
        f"{_legend(preview, colours)}"
        f'<p class="soft">{preview.about}, at step {preview.step}; never trained on '
        "if cases are held out. Left is left. Slider, mouse wheel or arrow keys change the slice."
        f'</p></div><script type="application/json" id="volumes">{json.dumps(data)}</script>'
    )


def _legend(preview: Stored, colours: Sequence[Sequence[int]]) -> str:
    """The classes that are anywhere in the volumes, if any can be."""
    names = "".join(
        f'<li><i style="background: rgb{tuple(colours[k])}"></i>{text(preview.names[k])}</li>'
        for k in _classes(preview)
    )
    return f'<ul class="classes">{names}</ul>' if names else ""


def _classes(preview: Stored) -> Iterator[int]:
    """Their numbers, without the background."""
    some = [getattr(preview, view.classes) for view in preview.views if view.classes]
    there = np.unique(np.concatenate([np.unique(v) for v in some])) if some else []
    yield from (k for k in map(int, there) if k > 0)


def _choice(cases: Sequence[str]) -> str:
    """Of a case, if there is one."""
    if len(cases) == 1:
        return f"<span>{text(cases[0])}</span>"
    if len(set(cases)) < len(cases):  # two patches of one
        cases = [f"{i}: {case}" for i, case in enumerate(cases, start=1)]
    options = "".join(f'<option value="{i}">{text(case)}</option>' for i, case in enumerate(cases))
    return f'<select id="item" aria-label="case">{options}</select>'


def _packed(array: np.ndarray) -> str:
    """Its bytes, the last axis fastest and the low byte first."""
    plain = array.astype(array.dtype.newbyteorder("<")).tobytes()
    return base64.b64encode(gzip.compress(plain, 6, mtime=0)).decode()
