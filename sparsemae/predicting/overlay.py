"""A picture of a prediction: three planes of the image with the classes in colour."""

import io
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from sparsemae.files import write_atomically
from sparsemae.reporting.palette import class_colours, coloured, draw_legend
from sparsemae.reporting.planes import plane_figure, three_planes
from sparsemae.reporting.scaling import grey


def draw_overlay(
    image: Float[np.ndarray, "D H W"],
    labels: Int[np.ndarray, "D H W"],
    spacing: tuple[float, float, float],
    names: tuple[str, ...],
    path: Path,
) -> None:
    """Draw three planes through the middle of what was found, without and with the classes.

    Args:
        image, labels: On one grid, RAS.
        names: Of the classes, by number.
    """
    centre = np.array(labels.shape) // 2
    if labels.any():
        centre = np.median(np.argwhere(labels), axis=0).astype(int)
    colours = class_colours(len(names))
    low, high = np.percentile(image, (0.5, 99.5))
    rows = []
    volumes = {"image": image, "classes": labels}
    for name, aspect, planes in three_planes(volumes, spacing, centre):
        plain = grey(planes["image"], low, high)
        found = coloured(plain, planes["classes"], colours)
        rows.append((name, aspect, {"image": plain, "prediction": found}))
    figure = plane_figure(rows, (0, 255), (6.4, 9.6))
    draw_legend(figure, names, colours, [k for k in range(1, len(names)) if (labels == k).any()])
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    write_atomically(path, file.getvalue())
