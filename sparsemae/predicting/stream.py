"""Sliding windows whose logits leave plane by plane, in memory that no length of volume changes.

Windows advance along one axis, and of that axis sums are kept for the length of one window only:
planes that no later window reaches are finished, and leave. Letters: K classes; P planes of a
window; A, B the other two axes, in order; b windows at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from sparsemae.errors import UserError
from sparsemae.predicting.windows import Windows, importance
from sparsemae.training.options import autocast
from sparsemae.triples import Triple

Network = Callable[[Float[Tensor, "b C D H W"]], Float[Tensor, "b K D H W"]]
STEP = 0.5  # nnU-Net's, of a window
MIRROR_AXES = (0, 1, 2)


@dataclass(frozen=True)
class LogitPlanes:
    """Logits plane by plane along one axis of a volume: to be gone through once, in order."""

    axis: int
    shape: Triple  # of the volume
    planes: Iterator[Float32[Tensor, "K A B"]]


def predict_logits(
    volume: Float32[np.ndarray, "C D H W"],
    networks: Network | Sequence[Network],
    patch_size: Triple,
    *,
    step: float = STEP,
    mirror_axes: Sequence[int] = MIRROR_AXES,
    device: torch.device | str = "cpu",
    sums_on: torch.device | str | None = None,
    batch_size: int = 1,
    precision: str = "fp32",
    on_window: Callable[[int, int], None] | None = None,
) -> LogitPlanes:
    """The mean logits of all windows, mirrored in all ways, of all networks, as nnU-Net has them.

    Nothing is computed before the first plane is asked for.

    Args:
        volume: Normalised, at the plan's spacing. A volume smaller than a window is padded with 0.
        networks: One or more, on `device` and in eval mode; they see windows with their axes as in
            `volume` and return one tensor.
        step: From one window to the next at the most, in windows.
        mirror_axes: Windows are flipped along all subsets of these axes of D, H, W.
        sums_on: Where sums are kept and planes given out; `device` unless given.
        batch_size: Windows a network sees at a time.
        precision: Of the networks: fp32, bf16 or fp16 (autocast); sums are always fp32.
        on_window: Called with the number of windows done, and of all.

    Raises:
        ValueError: Sizes, step, axes or a network's output are impossible.
        UserError: Logits are not finite; while planes are taken.
    """
    networks = [networks] if callable(networks) else list(networks)
    axes = sorted(set(mirror_axes))
    if not networks or batch_size < 1 or not set(axes) <= {0, 1, 2}:
        raise ValueError(
            f"{len(networks)} networks, batches of {batch_size}, mirror axes {axes}: needs at "
            f"least 1, 1, and axes among 0, 1, 2"
        )
    windows = Windows.cover(tuple(volume.shape[1:]), tuple(patch_size), step)
    flips = [tuple(a - 3 for a in subset) for n in range(4) for subset in combinations(axes, n)]
    device = torch.device(device)

    def predict(layer: list[Triple]) -> Float32[Tensor, "b K D H W"]:
        batch = torch.from_numpy(_cut(volume, windows, layer)).to(device)
        return _mean_logits(networks, batch, flips, precision)

    done = 0

    def parts(start: int) -> Iterator[tuple[Triple, Float32[Tensor, "K D H W"]]]:
        nonlocal done
        layer = windows.layer(start)
        for first in range(0, len(layer), batch_size):
            corners = layer[first : first + batch_size]
            yield from zip(corners, predict(corners), strict=True)
            done += len(corners)
            if on_window is not None:
                on_window(done, windows.count)

    planes = _finished(windows, parts, device if sums_on is None else torch.device(sums_on))
    return LogitPlanes(windows.axis, windows.shape, planes)


def sums_bytes(shape: Triple, patch_size: Triple, num_classes: int) -> int:
    """Bytes of the sums that `predict_logits` keeps on `sums_on`, for a volume of `shape`."""
    windows = Windows.cover(tuple(shape), tuple(patch_size), 1.0)
    sizes = list(windows.padded)
    sizes[windows.axis] = windows.patch_size[windows.axis]
    return 4 * int(np.prod(sizes, dtype=object)) * (num_classes + 1)


def _finished(
    windows: Windows,
    parts: Callable[[int], Iterator[tuple[Triple, Float32[Tensor, "K D H W"]]]],
    device: torch.device,
) -> Iterator[Float32[Tensor, "K A B"]]:
    """The volume's planes, each as soon as its last window is in."""
    axis, starts = windows.axis, windows.starts[windows.axis]
    across = [a for a in range(3) if a != axis]
    count, *size = (windows.patch_size[axis], *(windows.padded[a] for a in across))
    inside = [slice(windows.before[a], windows.before[a] + windows.shape[a]) for a in across]
    weight = importance(windows.patch_size).movedim(axis, 0)[:, None].to(device)  # [P, 1, a, b]
    sums, weights = None, torch.zeros(count, 1, *size, device=device)
    for start, following in zip(starts, [*starts[1:], windows.padded[axis]], strict=True):
        for corner, logits in parts(start):
            if sums is None:
                sums = torch.zeros(count, len(logits), *size, device=device)
            place = tuple(slice(corner[a], corner[a] + windows.patch_size[a]) for a in across)
            part = logits.movedim(axis + 1, 0).to(device)  # [P, K, a, b]
            sums[:, :, *place].addcmul_(part, weight)
            weights[:, :, *place] += weight
        for plane in range(following - start):
            if 0 <= start + plane - windows.before[axis] < windows.shape[axis]:
                yield _checked((sums[plane] / weights[plane])[:, *inside])
        for held in (sums, weights):
            _advance(held, following - start)


def _advance(held: Float32[Tensor, "P K A B"], by: int) -> None:
    """Drop the first `by` planes and begin as many new ones, without a second copy."""
    for first in range(by, len(held), by):
        part = held[first : first + by]
        held[first - by : first - by + len(part)] = part
    held[len(held) - by :] = 0


def _checked(plane: Float32[Tensor, "K A B"]) -> Float32[Tensor, "K A B"]:
    if not torch.isfinite(plane).all():
        raise UserError("a network's output is not finite: use precision fp32, or other weights")
    return plane


def _cut(
    volume: Float32[np.ndarray, "C D H W"], windows: Windows, corners: list[Triple]
) -> Float32[np.ndarray, "b C D H W"]:
    """The windows at `corners`, with 0 where they reach beyond the volume."""
    batch = np.zeros((len(corners), len(volume), *windows.patch_size), np.float32)
    for target, corner in zip(batch, corners, strict=True):
        place, inside = windows.places(corner)
        target[:, *inside] = volume[:, *place]
    return batch


@torch.no_grad()
def _mean_logits(
    networks: list[Network],
    batch: Float32[Tensor, "b C D H W"],
    flips: list[tuple[int, ...]],
    precision: str,
) -> Float32[Tensor, "b K D H W"]:
    total = torch.zeros((), device=batch.device)
    for flip in flips:
        for network in networks:
            with autocast(precision, batch.device):
                logits = network(batch.flip(flip))
            kept = isinstance(logits, Tensor) and (len(logits), *logits.shape[2:])
            if kept != (len(batch), *batch.shape[2:]):
                raise ValueError(
                    f"of windows {tuple(batch.shape)} a network made "
                    f"{tuple(logits.shape) if isinstance(logits, Tensor) else type(logits)}: it "
                    f"must return one tensor with as many windows and voxels"
                )
            total = total + logits.float().flip(flip)
    return total / (len(flips) * len(networks))
