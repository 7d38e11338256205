"""A picture of a prediction: three planes of the image with the classes in colour."""

import io
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from sparsemae.files import write_atomically
from sparsemae.reporting.palette import OPACITY, class_colours, draw_legend


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
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    centre = np.array(labels.shape) // 2
    if labels.any():
        centre = np.median(np.argwhere(labels), axis=0).astype(int)
    low, high = np.percentile(image, (0.5, 99.5))
    colours = class_colours(len(names))
    figure = Figure(figsize=(11, 7.6), facecolor="black", layout="constrained")
    for column, (plane, axis) in enumerate((("axial", 2), ("coronal", 1), ("sagittal", 0))):
        across, up = (a for a in range(3) if a != axis)
        grey, classes = (v.take(centre[axis], axis).T for v in (image, labels))
        for row in range(2):
            axes = figure.add_subplot(2, 3, 3 * row + column + 1)
            shape = {"origin": "lower", "aspect": spacing[up] / spacing[across]}
            axes.imshow(grey, cmap="gray", vmin=low, vmax=high, **shape)
            if row:
                found = np.ma.masked_equal(classes, 0)
                limits = {"vmin": -0.5, "vmax": len(names) - 0.5, "interpolation": "nearest"}
                axes.imshow(found, cmap=ListedColormap(colours), alpha=OPACITY, **limits, **shape)
            else:
                axes.set_title(plane, color="white")
            axes.set_axis_off()
    shown = [k for k in range(1, len(names)) if (labels == k).any()]
    draw_legend(figure, names, colours, shown)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    write_atomically(path, file.getvalue())
