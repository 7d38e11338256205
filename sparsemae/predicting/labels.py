"""From logits at a plan's spacing to class numbers in the volume as read, a plane at a time.

Letters: K classes; A, B the axes across the stream in the volume as read, a, b in its crop.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from jaxtyping import Float32, UInt
from torch import Tensor

from sparsemae.predicting.placement import Placement, Taps
from sparsemae.predicting.stream import LogitPlanes
from sparsemae.predicting.write import label_dtype

Sink = Callable[[int, Float32[np.ndarray, "K A B"]], None]


def to_labels(
    stream: LogitPlanes, placement: Placement, *, probabilities: Sink | None = None
) -> UInt[np.ndarray, "D H W"]:
    """The class with the largest logit in every voxel as read; class 0 outside the crop.

    Logits are linear between the plan's voxels, of the nearest slice along the thick axis, as in
    nnU-Net. Of equal ones the lower class wins.

    Args:
        probabilities: Called for every plane of the volume along `stream.axis`, in order, with its
            index and the softmax of its logits; outside the crop class 0 has 1.

    Raises:
        ValueError: The stream is not on the placement's grid, or has less than two classes.
    """
    if stream.shape != placement.grid.shape:
        raise ValueError(f"logits of {stream.shape} on a grid of {placement.grid.shape}")
    axis = stream.axis
    across = [a for a in range(3) if a != axis]
    box = tuple(slice(placement.start[a], placement.stop[a]) for a in across)
    sizes = tuple(placement.shape[a] for a in across)
    first = placement.start[axis]
    labels = out = None
    for index, logits in enumerate(crop_planes(stream, placement), start=first):
        if labels is None:
            classes = len(logits)
            if classes < 2:
                raise ValueError(f"logits of {classes} class; two or more tell voxels apart")
            labels = np.zeros(placement.shape, label_dtype(classes))
            out = np.moveaxis(labels, axis, 0)
            _outside(probabilities, range(first), classes, sizes)
        out[index][box] = logits.argmax(0).cpu().numpy()
        if probabilities is not None:
            plane = _background(classes, sizes)
            plane[:, *box] = logits.softmax(0).cpu().numpy()
            probabilities(index, plane)
    _outside(probabilities, range(placement.stop[axis], placement.shape[axis]), classes, sizes)
    return labels


def crop_planes(stream: LogitPlanes, placement: Placement) -> Iterator[Float32[Tensor, "K a b"]]:
    """The logits of every plane of the crop, at the spacing as read.

    Two planes of the stream are held at a time.
    """
    along, *across = (
        placement.taps(a) for a in (stream.axis, *(a for a in range(3) if a != stream.axis))
    )
    planes = enumerate(stream.planes)
    held: dict[int, Tensor] = {}
    for low, high, weight in zip(
        along.low.tolist(), along.high.tolist(), along.weight.tolist(), strict=True
    ):
        held = {index: plane for index, plane in held.items() if index >= low}
        last = high if weight else low
        while last not in held:
            index, plane = next(planes)
            if index >= low:
                for dim, taps in enumerate(across, start=1):
                    plane = _between(plane, dim, taps)
                held[index] = plane
        yield torch.lerp(held[low], held[high], weight) if weight else held[low]


def _between(plane: Float32[Tensor, "K A B"], dim: int, taps: Taps) -> Float32[Tensor, "K a b"]:
    """The plane at the positions of `taps` along one of its axes."""
    if not taps.weight.any() and np.array_equal(taps.low, np.arange(plane.shape[dim])):
        return plane
    low, high, weight = (
        torch.from_numpy(t).to(plane.device) for t in (taps.low, taps.high, taps.weight)
    )
    below = plane.index_select(dim, low)
    if not taps.weight.any():
        return below
    weight = weight.view([-1 if d == dim else 1 for d in range(3)])
    return torch.lerp(below, plane.index_select(dim, high), weight)


def _outside(sink: Sink | None, indices: range, classes: int, sizes: tuple[int, ...]) -> None:
    """Planes that the crop does not touch."""
    if sink is not None:
        for index in indices:
            sink(index, _background(classes, sizes))


def _background(classes: int, sizes: tuple[int, ...]) -> Float32[np.ndarray, "K A B"]:
    plane = np.zeros((classes, *sizes), np.float32)
    plane[0] = 1
    return plane
