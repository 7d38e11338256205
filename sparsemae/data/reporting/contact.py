"""A contact sheet: middle slices of cases of a store, side by side, to see at once what is wrong.

Cases are taken evenly from the store and read one after the other, three slices each, so that time
and memory do not grow with the store. A letter P is a plane's pixels.
"""

import io
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8

from sparsemae.data.codes import one_line
from sparsemae.data.store import Case, Store
from sparsemae.errors import UserError
from sparsemae.files import write_atomically

COUNT = 60  # cases on a sheet
AXES = (2, 1, 0)  # across axial, coronal and sagittal planes

_BOX, _GAP, _LABEL, _MARGIN = 96, 2, 32, 14  # pixels
_CARD = 3 * _BOX + 2 * _GAP
_COLUMNS = 4
_LETTERS = 48  # of an id that fit on a card
_DPI = 100
_PAPER, _EMPTY, _DAMAGED = 255, 20, (120, 40, 40)
_TINT = (255, 80, 40)  # of excluded voxels


@dataclass(frozen=True)
class View:
    """The three middle planes of a case in stored intensities, as they are read from disk."""

    case: Case
    planes: Sequence[Float[np.ndarray, "P Q"]]  # axial, coronal, sagittal
    excluded: Sequence[Bool[np.ndarray, "P Q"]]
    error: str | None = None  # why there are none


def contact_sheet(store: Store, path: Path | str, *, count: int = COUNT) -> None:
    """Write a PNG with the middle slices of up to `count` cases, excluded voxels in red.

    Axial, coronal and sagittal of one case have one scale; left is left. A case whose file is
    damaged is shown as such. OSError if `path` cannot be written.
    """
    write_atomically(Path(path), draw_sheet([card(view) for view in views(store, count)]))


def views(store: Store, count: int = COUNT) -> Iterator[View]:
    """Cases evenly chosen from the store, in its order, the first and the last among them."""
    total = len(store)
    for i in np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int)).tolist():
        case = store.cases[i]
        try:
            planes = [_middle(store, case, axis, "image") for axis in AXES]
            masks = [_middle(store, case, axis, "excluded") for axis in AXES]
        except UserError as error:
            yield View(case, (), (), str(error))
        else:
            yield View(case, planes, masks)


@dataclass(frozen=True)
class Card:
    """A case as it appears on the sheet."""

    title: str
    line: str
    picture: UInt8[np.ndarray, "height width 3"]


def card(view: View) -> Card:
    """The planes in one scale and one grey scale, each in a box of its own, with two lines."""
    case = view.case
    picture = np.full((_BOX, _CARD, 3), _PAPER, np.uint8)
    boxes = [picture[:, k * (_BOX + _GAP) :][:, :_BOX] for k in range(3)]
    if view.error is not None:
        for box in boxes:
            box[...] = _DAMAGED
        return Card(_shortened(case.id), "damaged: see the page", picture)
    everything = np.concatenate([plane.ravel() for plane in view.planes]).astype(np.float32)
    low, high = np.percentile(everything, (0.5, 99.5))
    high = max(high, low + 1e-6)
    longest = max(n * mm for n, mm in zip(case.shape, case.spacing, strict=True))
    for box, axis, plane, mask in zip(boxes, AXES, view.planes, view.excluded, strict=True):
        across = [a for a in range(3) if a != axis]
        size = [max(1, round(_BOX * case.shape[a] * case.spacing[a] / longest)) for a in across]
        grey = (_scaled(plane, size) - low) / (high - low)
        red = _scaled(mask, size)[..., None] * 0.6
        pixels = (1 - red) * 255 * grey.clip(0, 1)[..., None] + red * _TINT
        _place(box, pixels.swapaxes(0, 1)[::-1])
    return Card(_shortened(case.id), _description(case), picture)


def draw_sheet(cards: Sequence[Card]) -> bytes:
    """The cards in rows, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # no pyplot: no display, no global state
    from matplotlib.image import imsave

    columns = min(_COLUMNS, len(cards))
    width, height = _CARD + _MARGIN, _LABEL + _BOX + _MARGIN
    size = np.array([columns * width, -(-len(cards) // columns) * height]) + _MARGIN
    corners = [divmod(i, columns) for i in range(len(cards))]
    corners = [(_MARGIN + row * height, _MARGIN + column * width) for row, column in corners]
    figure = Figure(figsize=(size + 0.01) / _DPI, dpi=_DPI)
    for item, (top, left) in zip(cards, corners, strict=True):
        for text, offset, style in (
            (item.title, 11, {"size": 7.5, "color": "#111"}),
            (item.line, 25, {"size": 6.5, "color": "#666"}),
        ):
            place = left / size[0], 1 - (top + offset) / size[1]
            figure.text(*place, text, parse_math=False, **style)
    agg = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a script that the font does not have
        agg.draw()
    sheet = np.array(agg.buffer_rgba())
    for item, (top, left) in zip(cards, corners, strict=True):
        sheet[top + _LABEL :, left:, :3][:_BOX, :_CARD] = item.picture
    file = io.BytesIO()
    imsave(file, sheet, format="png")
    return file.getvalue()


def _middle(store: Store, case: Case, axis: int, kind: str) -> np.ndarray:
    start, stop = [0, 0, 0], list(case.shape)
    start[axis] = case.shape[axis] // 2
    stop[axis] = start[axis] + 1
    return store.read_box(case, start, stop, kind)[0].squeeze(axis)


def _scaled(plane: np.ndarray, size: Sequence[int]) -> Float32[np.ndarray, "P Q"]:
    """Pixels as means of the area they cover: shrinking invents no pattern."""
    for axis, n in enumerate(size):
        lines = np.moveaxis(plane, axis, 0)
        sums = np.concatenate([np.zeros_like(lines[:1], np.float64), lines.cumsum(0, np.float64)])
        edges = np.linspace(0, len(lines), n + 1)
        whole = np.minimum(edges.astype(int), len(lines) - 1)
        at_edges = sums[whole] + (edges - whole)[:, None] * lines[whole]
        plane = np.moveaxis(np.diff(at_edges, axis=0) * n / len(lines), 0, axis)
    return plane.astype(np.float32)


def _place(box: UInt8[np.ndarray, "height width 3"], pixels: np.ndarray) -> None:
    """In the middle of the box, on black."""
    box[...] = _EMPTY
    top, left = ((np.array(box.shape) - pixels.shape) // 2)[:2]
    box[top:, left:][: pixels.shape[0], : pixels.shape[1]] = pixels.round()


def _description(case: Case) -> str:
    size = " x ".join(map(str, case.shape))
    mm = " x ".join(f"{s:.2g}" for s in case.spacing)
    mm = f"{case.spacing[0]:.3g}" if np.ptp(case.spacing) < 0.01 else mm
    words = [f"{size} at {mm} mm", case.modality, "validation" if case.split == "val" else ""]
    return _shortened("   ".join(filter(None, words)), 60)


def _shortened(text: str, letters: int = _LETTERS) -> str:
    """One line; the end of an id tells more than its middle."""
    text = one_line(text)
    half = (letters - 3) // 2
    return text if len(text) <= letters else f"{text[:half]}...{text[-half:]}"
