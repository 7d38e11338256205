"""nnU-Net's random changes of intensity, without its libraries: drawn by workers, done on a device.

Noise, blur, brightness, contrast, low resolution and gamma, in this order, with the probabilities
and ranges of nnunetv2 2.8.1's `get_training_transforms`. All that is random is drawn beforehand.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

NOISE, BLUR, BRIGHTNESS, CONTRAST, COARSE, INVERTED_GAMMA, GAMMA = (
    0.1,
    0.2,
    0.15,
    0.15,
    0.25,
    0.1,
    0.3,
)
_HALF = 0.5  # probability of a channel, where a change is drawn for each
_REACH = 4  # standard deviations that a blur's kernel reaches
_TINY = 1e-7


@dataclass(frozen=True)
class IntensityDraw:
    """What is done to one patch; a value per channel, None for no change of that kind."""

    noise: tuple[float, int] | None  # standard deviation, the same in all channels, and a seed
    blur: tuple[tuple[float, float, float] | None, ...]  # voxels along each axis
    brightness: tuple[float, ...] | None  # factors
    contrast: tuple[float, ...] | None  # factors around the mean
    coarse: tuple[float | None, ...]  # fraction of the voxels along each axis that is kept
    inverted_gamma: tuple[float, ...] | None  # exponents, of the negative
    gamma: tuple[float, ...] | None
    masked: tuple[bool, ...]  # channels whose voxels of exactly 0 show nothing, and stay so


def draw_intensity(rng: np.random.Generator, masked: Sequence[bool]) -> IntensityDraw:
    """Draw the changes of a patch with a channel for each of `masked`, see there."""
    channels = len(masked)
    happens = rng.random(7) < (NOISE, BLUR, BRIGHTNESS, CONTRAST, COARSE, INVERTED_GAMMA, GAMMA)
    noise, blur, brightness, contrast, coarse, inverted, gamma = happens
    chosen = rng.random((2, channels)) < _HALF
    sigmas, scales = rng.uniform(0.5, 1.0, (channels, 3)), rng.uniform(0.5, 1.0, channels)
    spread, seed = rng.uniform(0, 0.1), int(rng.integers(2**62))
    bright, contrasts = (_around_one(rng, 0.75, 1.25, channels) for _ in range(2))
    gammas = [_around_one(rng, 0.7, 1.5, channels) for _ in range(2)]
    return IntensityDraw(
        noise=(float(spread), seed) if noise else None,
        blur=tuple(
            tuple(sigma) if blur and on else None
            for sigma, on in zip(sigmas.tolist(), chosen[0], strict=True)
        ),
        brightness=bright if brightness else None,
        contrast=contrasts if contrast else None,
        coarse=tuple(
            scale if coarse and on else None
            for scale, on in zip(scales.tolist(), chosen[1], strict=True)
        ),
        inverted_gamma=gammas[0] if inverted else None,
        gamma=gammas[1] if gamma else None,
        masked=tuple(masked),
    )


def _around_one(rng, low: float, high: float, count: int) -> tuple[float, ...]:
    """Below 1 as often as above, as batchgenerators' `BGContrast`."""
    below = rng.random(count) < _HALF
    return tuple(np.where(below, rng.uniform(low, 1, count), rng.uniform(1, high, count)).tolist())


def change(patch: Float[Tensor, "C D H W"], drawn: IntensityDraw, slices: int | None) -> None:
    """Do the drawn changes, in place; `slices` is an axis whose voxels are not merged."""
    outside = [
        channel == 0 if on else None for channel, on in zip(patch, drawn.masked, strict=True)
    ]
    if drawn.noise is not None:
        spread, seed = drawn.noise
        generator = torch.Generator(patch.device).manual_seed(seed)
        shape, device = patch.shape, patch.device
        patch += spread * torch.randn(shape, generator=generator, device=device, dtype=patch.dtype)
    for i, channel in enumerate(patch):
        if drawn.blur[i] is not None:
            channel.copy_(_blurred(channel, drawn.blur[i]))
        if drawn.brightness is not None:
            channel *= drawn.brightness[i]
        if drawn.contrast is not None:
            _stretch(channel, drawn.contrast[i])
        if drawn.coarse[i] is not None:
            channel.copy_(_coarsened(channel, drawn.coarse[i], slices))
        if drawn.inverted_gamma is not None:
            channel.copy_(-_gamma(-channel, drawn.inverted_gamma[i]))
        if drawn.gamma is not None:
            channel.copy_(_gamma(channel, drawn.gamma[i]))
        if outside[i] is not None:
            channel.masked_fill_(outside[i], 0)


def _blurred(channel: Tensor, sigmas: tuple[float, float, float]) -> Tensor:
    out = channel[None, None]
    for axis, sigma in enumerate(sigmas):
        reach = max(1, round(_REACH * sigma))
        offsets = torch.arange(-reach, reach + 1, device=channel.device, dtype=channel.dtype)
        kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
        shape = [1, 1, 1, 1, 1]
        shape[2 + axis] = len(offsets)
        padding = [0, 0, 0, 0, 0, 0]
        padding[2 * (2 - axis)] = padding[2 * (2 - axis) + 1] = reach
        out = F.conv3d(F.pad(out, padding, "replicate"), (kernel / kernel.sum()).view(shape))
    return out[0, 0]


def _stretch(channel: Tensor, factor: float) -> None:
    """More or less contrast around the mean, inside the range there was."""
    low, high, mean = channel.min(), channel.max(), channel.mean()
    channel.sub_(mean).mul_(factor).add_(mean)
    torch.clamp(channel, low, high, out=channel)


def _coarsened(channel: Tensor, scale: float, slices: int | None) -> Tensor:
    """To fewer voxels and back: the nearest of them down, linear up."""
    size = [n if a == slices else max(1, round(n * scale)) for a, n in enumerate(channel.shape)]
    small = F.interpolate(channel[None, None], size, mode="nearest-exact")
    return F.interpolate(small, channel.shape, mode="trilinear", align_corners=False)[0, 0]


def _gamma(channel: Tensor, exponent: float) -> Tensor:
    """To a power within its range; mean and standard deviation stay."""
    mean, std, low = channel.mean(), channel.std(), channel.min()
    span = (channel.max() - low).clamp(min=_TINY)
    out = ((channel - low) / span) ** exponent * span + low
    return (out - out.mean()) / out.std().clamp(min=_TINY) * std + mean
