"""The voxels of one case: every channel and the label map, on one grid."""

from pathlib import Path

from sparsemae.data.codes import VolumeError
from sparsemae.data.read import Labels, Volume, read_labels, read_volume
from sparsemae.data.reading.geometry import displacement
from sparsemae.segmentation.dataset import Classes, SegCase

MISPLACED = 0.1  # of the smallest voxel size, how far a corner of a channel may lie from the first


def read_case(case: SegCase, classes: Classes | None = None) -> tuple[list[Volume], Labels | None]:
    """Read all files of a case; without `classes`, or a label map, the images alone.

    Raises:
        VolumeError: A file is damaged, or does not lie on the grid of the first channel; the label
            map holds something that is none of `classes`.
    """
    volumes = read_channels(case.images)
    labels = None
    if classes is not None and case.label is not None:
        labels = read_labels(case.label, like=volumes[0], classes=classes.numbers)
    return volumes, labels


def read_channels(paths: tuple[Path, ...]) -> list[Volume]:
    """Read the images of a case; `VolumeError` unless all lie on the grid of the first.

    Some, but not all, may be of a single value: a contrast that was not taken, filled in.
    """
    volumes = [read_volume(path, constant=len(paths) > 1) for path in paths]
    first, *others = volumes
    if others and all(v.array.min() == v.array.max() for v in volumes):
        raise VolumeError(
            "intensity.constant", f"{first.path}: every channel has one value; remove the case"
        )
    for volume in others:
        if volume.array.shape != first.array.shape:
            raise VolumeError(
                "channels.shape",
                f"{volume.path}: shape {volume.array.shape}, that of {first.path} is "
                f"{first.array.shape}; resample the channels of a case to one grid",
            )
        apart = displacement(volume.affine, first.affine, first.array.shape)
        if apart > MISPLACED * min(first.spacing):
            raise VolumeError(
                "channels.affine",
                f"{volume.path}: lies up to {apart:.4g} mm off {first.path}; resample the channels "
                f"of a case to one grid",
            )
    return volumes
