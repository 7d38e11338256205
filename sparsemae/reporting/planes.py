"""Planes of volumes in rows on black, in grey or in colour."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from jaxtyping import Float
from numpy import ndarray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HIDDEN = "#30343b"  # where a plane has NaN: a masked voxel


def three_planes(
    volumes: Mapping[str, Float[ndarray, "D H W *rgb"]],
    spacing: Sequence[float],
    centre: Sequence[int],
) -> list[tuple[str, float, dict[str, ndarray]]]:
    """Rows for `plane_figure`: the axial, coronal and sagittal plane through a voxel of volumes.

    Args:
        volumes: By title, on one grid in RAS.
        spacing: mm.
    """
    rows = []
    for name, axis in (("axial", 2), ("coronal", 1), ("sagittal", 0)):
        across, up = (a for a in range(3) if a != axis)
        planes = {title: v.take(centre[axis], axis) for title, v in volumes.items()}
        rows.append((name, spacing[up] / spacing[across], planes))
    return rows


def plane_figure(
    rows: Sequence[tuple[str, float, Mapping[str, Float[ndarray, "across up *rgb"]]]],
    limits: tuple[float, float],
    size: tuple[float, float],
) -> "Figure":
    """Draw planes, `size` inches in all, from black at the lower limit to white at the upper.

    Planes that have colours are drawn as they are, in 8 bits each.

    Args:
        rows: The name of each, how much taller than wide a pixel is, and its planes by title; the
            titles of the first stand above all.
    """
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    figure = Figure(figsize=size, facecolor="black", layout="constrained")
    for row, (name, aspect, planes) in enumerate(rows):
        for column, (title, plane) in enumerate(planes.items()):
            axes = figure.add_subplot(len(rows), len(planes), len(planes) * row + column + 1)
            axes.set_facecolor(HIDDEN)
            axes.imshow(
                plane.swapaxes(0, 1),
                **{"cmap": "gray", "vmin": limits[0], "vmax": limits[1], "origin": "lower"},
                aspect=aspect,
                interpolation="nearest",
            )
            axes.set_xticks([])
            axes.set_yticks([])
            if row == 0:
                axes.set_title(title, color="white")
            if column == 0:
                axes.set_ylabel(name, color="white", parse_math=False)
    return figure
