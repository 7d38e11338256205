"""Classes in pictures: a colour for each, over grey, and their names."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int, UInt8

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OPACITY = 0.45  # of a class over the image
MOST_NAMED = 24  # in a picture
_LETTER, _BESIDE = 0.09, 0.6  # inches of a letter in a legend, and of what is beside a name
_LETTERS, _LAST_LETTER = 36, "\u024f"  # of a name in a picture; the last of Latin


def class_colours(count: int) -> Float[np.ndarray, "count 3"]:
    """Of classes 0 to count - 1, told apart as well as many can be; the first is never drawn."""
    from matplotlib import colormaps

    few = colormaps["tab10" if count <= 11 else "tab20"]
    return np.array([(0.0, 0.0, 0.0), *(few(i % few.N)[:3] for i in range(count - 1))])


def coloured(
    grey: UInt8[np.ndarray, "..."],
    classes: Int[np.ndarray, "..."],
    colours: Float[np.ndarray, "count 3"],
) -> UInt8[np.ndarray, "... 3"]:
    """Grey with the classes above 0 over it."""
    share = OPACITY * (classes > 0)[..., None]
    mixed = grey[..., None] * (1 - share) + 255 * colours[classes] * share
    return mixed.round().astype(np.uint8)


def draw_legend(
    figure: "Figure",
    names: Sequence[str],
    colours: Float[np.ndarray, "count 3"],
    shown: Sequence[int],
) -> None:
    """Name the classes that a figure shows below it."""
    from matplotlib.patches import Patch

    handles = [Patch(color=colours[k], label=printable(names[k])) for k in shown[:MOST_NAMED]]
    if not handles:
        return
    longest = max(len(handle.get_label()) for handle in handles)
    room = int(figure.get_figwidth() / (_LETTER * longest + _BESIDE))
    place = {"loc": "outside lower center", "ncols": max(1, min(6, room)), "frameon": False}
    legend = figure.legend(handles=handles, **place)
    for label in legend.get_texts():
        label.set(color="white", parse_math=False)


def printable(name: str) -> str:
    """What has room in a picture, in letters that its font is sure to have."""
    name = "".join(c if c.isprintable() and c <= _LAST_LETTER else "?" for c in name)
    return name if len(name) <= _LETTERS else f"{name[: _LETTERS // 2]}…{name[-_LETTERS // 2 :]}"
