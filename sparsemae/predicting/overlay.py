"""A picture of a prediction: three planes of the image with the classes in colour."""

import io
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from sparsemae.files import write_atomically
from sparsemae.reporting.palette import class_colours, coloured, draw_legend
from sparsemae.reporting.planes import three_planes
from sparsemae.reporting.scaling import grey


def draw_overlay(
    image: Float[np.ndarray, "D H W"],
    labels: Int[np.ndarray, "D H W"],
    spacing: tuple[float, float, float],
    names: tuple[str, ...],
    path: Path,
) -> None:
    """Draw the planes through the middle of what was found, the image above and with classes below.

    Args:
        image, labels: On one grid, RAS.
        names: Of the classes, by number.
    """
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    centre = np.array(labels.shape) // 2
    if labels.any():
        centre = np.median(np.argwhere(labels), axis=0).astype(int)
    low, high = np.percentile(image, (0.5, 99.5))
    colours = class_colours(len(names))
    figure = Figure(figsize=(11, 7.6), facecolor="black", layout="constrained")
    rows = three_planes({"image": image, "classes": labels}, spacing, centre)
    for column, (name, aspect, planes) in enumerate(rows):
        plain = grey(planes["image"], low, high)
        for row, plane in enumerate((plain, coloured(plain, planes["classes"], colours))):
            axes = figure.add_subplot(2, 3, 3 * row + column + 1)
            limits = {"cmap": "gray", "vmin": 0, "vmax": 255, "interpolation": "nearest"}
            axes.imshow(plane.swapaxes(0, 1), origin="lower", aspect=aspect, **limits)
            if row == 0:
                axes.set_title(name, color="white")
            axes.set_axis_off()
    draw_legend(figure, names, colours, [k for k in range(1, len(names)) if (labels == k).any()])
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    write_atomically(path, file.getvalue())
