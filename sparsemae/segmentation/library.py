"""nnU-Net's augmentation by nnU-Net's own library, batchgeneratorsv2, where that is installed.

It works on the CPU, in the loader's processes, and draws from the global random numbers of torch
and numpy: they are seeded for every sample, and left as they were found.
"""

import importlib.util
import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float32, Int16

from sparsemae.data.loading.affine import AugmentConfig
from sparsemae.segmentation.resampling import ANISOTROPIC
from sparsemae.training.randomness import seed_step, seeds_restored
from sparsemae.triples import Triple

PACKAGE = "batchgeneratorsv2"
_ZOOM = 0.85  # nnU-Net reads a patch larger by this, for what rotation and scaling may need


def has_library() -> bool:
    """Whether batchgeneratorsv2 can be used."""
    return importlib.util.find_spec(PACKAGE) is not None


def slice_axis(patch_size: Triple) -> int | None:
    """The axis with so few voxels beside the others that slices are not mixed; None if none has.

    Source: nnunetv2 2.8.1, dummy 2D augmentation.
    """
    least = int(np.argmin(patch_size))
    return least if max(patch_size) > ANISOTROPIC * patch_size[least] else None


class LibraryAugmentation:
    """nnU-Net's chain for one patch size; see nnunetv2 2.8.1 `get_training_transforms`.

    Attributes:
        needed: Voxels of the box that a patch is made of.
    """

    def __init__(self, patch_size: Triple, config: AugmentConfig, masked: Sequence[bool]):
        slices = slice_axis(patch_size)
        # the library takes the first axis for that of the slices
        self._order = (
            [0, 1, 2] if slices is None else [slices, *(a for a in range(3) if a != slices)]
        )
        self._back = [self._order.index(axis) for axis in range(3)]
        self._masked = [i for i, on in enumerate(masked) if on]
        self.needed = _needed(patch_size, config, slices)
        ordered = [patch_size[axis] for axis in self._order]
        self._chain = _chain(ordered, config, self._masked, flat=slices is not None)

    def __call__(
        self, image: Float32[np.ndarray, "C D H W"], labels: Int16[np.ndarray, "1 D H W"], seed: int
    ) -> tuple[Float32[np.ndarray, "C d h w"], Int16[np.ndarray, "d h w"]]:
        """A patch from a box of `needed` voxels; labels of -1 are beyond the case."""
        order = [0, *(axis + 1 for axis in self._order)]
        image, labels = (torch.from_numpy(a.transpose(order).copy()) for a in (image, labels))
        for channel in self._masked:
            labels[0][(image[channel] == 0) & (labels[0] == 0)] = -1
        with seeds_restored():
            seed_step(seed, 0, 0)
            out = self._chain(image=image, segmentation=labels)
        image, labels = out["image"], out["segmentation"][0]
        image = image.permute(0, *(axis + 1 for axis in self._back)).contiguous().numpy()
        return image, labels.permute(self._back).contiguous().numpy().astype(np.int16)


def _needed(patch_size: Triple, config: AugmentConfig, slices: int | None) -> Triple:
    """As nnU-Net's `get_patch_size`: turned about each axis alone, and zoomed."""
    angle = math.radians(min(90.0, 180.0 if slices is not None else config.rotation))
    size = np.array(patch_size, float)
    for axis in range(3) if slices is None else [slices]:
        one, other = (a for a in range(3) if a != axis)
        a, b = patch_size[one], patch_size[other]
        size[one] = max(size[one], abs(a * math.cos(angle)) + abs(b * math.sin(angle)))
        size[other] = max(size[other], abs(a * math.sin(angle)) + abs(b * math.cos(angle)))
    size /= _ZOOM
    if slices is not None:
        size[slices] = patch_size[slices]
    return tuple(size.astype(int).tolist())


def _chain(patch_size: list[int], config: AugmentConfig, masked: list[int], *, flat: bool):
    from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
    from batchgeneratorsv2.transforms.intensity.contrast import BGContrast, ContrastTransform
    from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
    from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
    from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
    from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
    from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
    from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
    from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
    from batchgeneratorsv2.transforms.utils.nnunet_masking import MaskImageTransform
    from batchgeneratorsv2.transforms.utils.pseudo2d import (
        Convert2DTo3DTransform,
        Convert3DTo2DTransform,
    )
    from batchgeneratorsv2.transforms.utils.random import RandomTransform
    from batchgeneratorsv2.transforms.utils.remove_label import RemoveLabelTansform

    angle = math.pi if flat else math.radians(config.rotation)
    spatial = SpatialTransform(
        patch_size[1:] if flat else patch_size,
        patch_center_dist_from_border=0,
        random_crop=False,
        p_elastic_deform=0,
        p_rotation=config.rotation_probability,
        rotation=(-angle, angle),
        p_scaling=config.scale_probability,
        scaling=config.scale,
        p_synchronize_scaling_across_axes=1,
        bg_style_seg_sampling=False,
        border_mode_seg="constant",
        padding_value_seg=-1,
    )
    each = {"synchronize_channels": False, "p_per_channel": 1}
    half = {"synchronize_channels": False, "p_per_channel": 0.5}
    contrast, gamma = BGContrast((0.75, 1.25)), BGContrast((0.7, 1.5))
    noise = GaussianNoiseTransform((0, 0.1), p_per_channel=1, synchronize_channels=True)
    blur = GaussianBlurTransform((0.5, 1.0), synchronize_axes=False, benchmark=False, **half)
    coarse = SimulateLowResolutionTransform(
        (0.5, 1), synchronize_axes=True, ignore_axes=(0,) if flat else None, **half
    )
    inverted, straight = (
        GammaTransform(gamma, p_invert_image=p, p_retain_stats=1, **each) for p in (1, 0)
    )
    steps = [Convert3DTo2DTransform(), spatial, Convert2DTo3DTransform()] if flat else [spatial]
    steps += [
        RandomTransform(noise, 0.1),
        RandomTransform(blur, 0.2),
        RandomTransform(MultiplicativeBrightnessTransform(contrast, **each), 0.15),
        RandomTransform(ContrastTransform(contrast, preserve_range=True, **each), 0.15),
        RandomTransform(coarse, 0.25),
        RandomTransform(inverted, 0.1),
        RandomTransform(straight, 0.3),
    ]
    if config.mirror:
        steps.append(MirrorTransform(allowed_axes=(0, 1, 2)))
    if masked:
        steps.append(MaskImageTransform(masked, channel_idx_in_seg=0, set_outside_to=0))
    return ComposeTransforms([*steps, RemoveLabelTansform(-1, 0)])
