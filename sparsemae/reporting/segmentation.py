"""A few labelled patches and what a network makes of them: image, reference and prediction."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float, Float32, Int, UInt8, UInt16

from sparsemae.reporting.palette import class_colours
from sparsemae.reporting.scaling import averaged, factors, greys
from sparsemae.reporting.views import View, good_spacing

_IGNORED = (1.0, 1.0, 1.0)  # colour of voxels whose class nobody knows
_COARSEST = 8  # voxels along an axis that become one, at most


@dataclass(frozen=True)
class SegmentationPreview:
    """Patches with axes R, A, S, their reference labels, and those that the model gives them."""

    step: int
    cases: tuple[str, ...]
    image: Float32[np.ndarray, "N D H W"]  # one channel
    reference: Int[np.ndarray, "N D H W"]
    prediction: Int[np.ndarray, "N D H W"]
    names: tuple[str, ...]  # of all that may stand in the reference, by number
    ignore: bool  # the last name stands for voxels of unknown class
    spacing: Float[np.ndarray, "N 3"]  # mm


@dataclass(frozen=True)
class StoredSegmentation:
    """Such a preview with images in 8 bits, each case on a grey scale of its own."""

    step: int
    cases: tuple[str, ...]
    image: UInt8[np.ndarray, "N D H W"]
    reference: UInt16[np.ndarray, "N D H W"]
    prediction: UInt16[np.ndarray, "N D H W"]
    names: tuple[str, ...]
    ignore: bool
    spacing: Float[np.ndarray, "N 3"]  # mm of a voxel here

    views: ClassVar[tuple[View, ...]] = (
        View("image", "image", "image", grey="image"),
        View("reference", "reference", "reference", grey="image", classes="reference"),
        View("prediction", "prediction", "prediction", grey="image", classes="prediction"),
    )
    about: ClassVar[str] = "Fixed patches around voxels of a class, first channel"

    @property
    def colours(self) -> Float[np.ndarray, "n 3"]:
        """Of the names, from 0 to 1."""
        known = class_colours(len(self.names) - self.ignore)
        return np.concatenate([known, [_IGNORED] * self.ignore]) if self.ignore else known

    def arrays(self) -> dict[str, np.ndarray]:
        """What is written into a file."""
        kept = {name: getattr(self, name) for name in ("image", "reference", "prediction")}
        words = {"cases": np.array(self.cases), "names": np.array(self.names)}
        return {"step": self.step, "ignore": self.ignore, "spacing": self.spacing, **kept, **words}

    @classmethod
    def of(cls, preview: SegmentationPreview, most: int) -> "StoredSegmentation":
        """With at most `most` voxels per volume; of labels that become one, the middle counts."""
        shape = preview.image.shape[1:]
        fewer = factors(shape, tuple(math.gcd(n, _COARSEST) for n in shape), most)
        middle = (slice(None), *(slice(f // 2, None, f) for f in fewer))
        (image,) = greys(averaged(preview.image, fewer))
        return cls(
            step=preview.step,
            cases=preview.cases,
            image=image,
            reference=preview.reference[middle].astype(np.uint16),
            prediction=preview.prediction[middle].astype(np.uint16),
            names=preview.names,
            ignore=preview.ignore,
            spacing=preview.spacing * np.array(fewer),
        )

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "StoredSegmentation | None":
        """What `arrays` gave; None if its parts do not go together."""
        stored = cls(
            step=int(arrays["step"]),
            cases=tuple(map(str, arrays["cases"])),
            image=arrays["image"],
            reference=arrays["reference"],
            prediction=arrays["prediction"],
            names=tuple(map(str, arrays["names"])),
            ignore=bool(arrays["ignore"]),
            spacing=arrays["spacing"],
        )
        image, classes = stored.image, (stored.reference, stored.prediction)
        whole = (
            image.ndim == 4
            and image.size > 0
            and image.dtype == np.uint8
            and all(v.dtype == np.uint16 and v.shape == image.shape for v in classes)
            and all(v.max() < len(stored.names) for v in classes)
            and len(stored.cases) == len(image)
            and good_spacing(stored.spacing, len(image))
        )
        return stored if whole else None
