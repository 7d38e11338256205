"""What a preview shows side by side: a grey volume in each view, and what lies over it."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True)
class View:
    """One of them; volumes are named as the preview's fields are."""

    id: str
    title: str
    caption: str
    grey: str
    visible: str = ""  # cells whose voxels are seen; those of others are hidden
    classes: str = ""  # laid over it in colour


class Stored(Protocol):
    """A preview in a few bytes per voxel, whatever it shows."""

    views: tuple[View, ...]
    step: int
    cases: tuple[str, ...]
    spacing: Float[np.ndarray, "N 3"]  # mm of a voxel here
    about: str  # a sentence for the page, before the step
    names: tuple[str, ...]  # of the classes, by number
    colours: Float[np.ndarray, "count 3"]  # of the classes

    def arrays(self) -> dict[str, np.ndarray]:
        """What is written into a file."""


def volumes(stored: Stored) -> dict[str, np.ndarray]:
    """All volumes [N, ...] that the views name."""
    names = (name for view in stored.views for name in (view.grey, view.visible, view.classes))
    return {name: getattr(stored, name) for name in dict.fromkeys(filter(None, names))}


def good_spacing(spacing: np.ndarray, count: int) -> bool:
    """Whether it is one for `count` cases."""
    return (
        spacing.shape == (count, 3)
        and spacing.dtype.kind == "f"
        and bool((np.isfinite(spacing) & (spacing > 0)).all())
    )
