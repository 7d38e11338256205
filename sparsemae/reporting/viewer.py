"""The interactive slice viewer of a report: plain canvas, the volumes inside the page."""

import base64
import gzip
import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files

import numpy as np

from sparsemae.reporting.page import text
from sparsemae.reporting.preview import StoredPreview
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
.view .top { top: 5px; left: 50% } .view .bottom { bottom: 5px; left: 50% }
@media (max-width: 700px) { .views { grid-template-columns: minmax(0, 1fr) }
  .controls { position: sticky; top: 0; z-index: 1 } }
"""

_VIEWS = {
    "original": "original",
    "masked": "masked: what the encoder sees",
    "reconstruction": "reconstruction of the masked cells",
}


def script() -> tuple[str, str]:
    """The page's script element, and the SHA-256 in base64 that lets a page run it."""
    folder = files("sparsemae.reporting")
    code = "".join((folder / name).read_text(encoding="utf-8") for name in SCRIPTS)
    digest = hashlib.sha256(code.encode()).digest()
    return f"<script>{code}</script>", base64.b64encode(digest).decode()


def draw_viewer(preview: StoredPreview | None, *, damaged: bool = False) -> str:
    """Three views of one slice, with plane, slice and case to choose.

    Args:
        damaged: There is none because its file cannot be read.
    """
    if preview is None:
        why = f"{PREVIEW} is damaged: the next" if damaged else "No volumes to show yet: the first"
        return f'<p class="soft">{why} checkpoint of a run that trains brings them.</p>'
    data = {
        "shape": preview.original.shape[1:],
        "grid": preview.visible.shape[1:],
        "items": [
            {
                "original": _packed(preview.original[i]),
                "reconstruction": _packed(preview.reconstruction[i]),
                "visible": _packed(preview.visible[i].astype(np.uint8)),
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
        f'<figure><figcaption>{caption}</figcaption><div class="view">'
        f'<canvas id="{name}" role="img" aria-label="{caption}"></canvas>{letters}</div></figure>'
        for name, caption in _VIEWS.items()
    )
    return (
        f'<p class="soft" id="viewer-note">Unpacking the volumes needs JavaScript.</p>'
        f'<div id="viewer" tabindex="0" hidden><div class="controls">{planes}'
        f"{_choice(preview.cases)}"
        f'<input id="slice" type="range" min="0" value="0" aria-label="slice">'
        f'<output id="shown"></output></div><div class="views">{views}</div>'
        f'<p class="soft">Fixed patches with fixed masks, at step {preview.step}; never trained on '
        "if cases are held out. Left is left. Slider, mouse wheel or arrow keys change the slice."
        f'</p></div><script type="application/json" id="volumes">{json.dumps(data)}</script>'
    )


def _choice(cases: Sequence[str]) -> str:
    """Of a case, if there is one."""
    if len(cases) == 1:
        return f"<span>{text(cases[0])}</span>"
    if len(set(cases)) < len(cases):  # two patches of one
        cases = [f"{i}: {case}" for i, case in enumerate(cases, start=1)]
    options = "".join(f'<option value="{i}">{text(case)}</option>' for i, case in enumerate(cases))
    return f'<select id="item" aria-label="case">{options}</select>'


def _packed(array: np.ndarray) -> str:
    return base64.b64encode(gzip.compress(array.tobytes(), 6, mtime=0)).decode()
