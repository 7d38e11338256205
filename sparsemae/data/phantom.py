"""Head-like MR volumes drawn by formula, for the demo and for tests: no patient, no download.

Anatomy is a handful of ellipsoids in mm on a smoothly bent grid; the folds of the cortex are the
zero set of band-limited noise. Arrays are [D, H, W] in RAS orientation; x, y, z are mm to the
right, front and top of the middle of the brain.
"""

from pathlib import Path

import nibabel as nib
import numpy as np
from jaxtyping import Float, Float32
from scipy import ndimage

FIELD = 208.0  # mm, edge of the drawn cube
AIR, SCALP, SKULL, FLUID, GREY, WHITE, MUSCLE = range(7)
# Relative signal of air, scalp, skull, fluid, grey, white, muscle.
CONTRASTS = (
    (0.0, 0.95, 0.12, 0.18, 0.50, 0.85, 0.45),  # T1-weighted
    (0.0, 0.60, 0.08, 1.00, 0.65, 0.40, 0.30),  # T2-weighted
    (0.0, 0.70, 0.10, 0.12, 0.75, 0.52, 0.40),  # FLAIR
)
ORIENTATIONS = ("RAS", "LPI", "PIR", "LAS", "ASL", "SRP")


def draw_head(
    seed: int, size: int = 96
) -> tuple[Float32[np.ndarray, "size size size"], Float[np.ndarray, "4 4"]]:
    """One head of `size`^3 voxels of 208 / size mm; the volume and its affine.

    Shape, folds, contrast, bias field and noise follow from `seed`. Air is exactly 0.
    """
    if size < 16:
        raise ValueError(f"size {size}: a head needs at least 16 voxels per axis")
    rng = np.random.default_rng(seed)
    step = FIELD / size
    x, y, z = _bent_grid(rng, size, step)
    labels = _anatomy(rng, x, y, z, step)
    # One contrast per seed, each tissue jittered, so that no two heads share a grey scale.
    signal = np.array(CONTRASTS[rng.integers(len(CONTRASTS))])
    signal *= rng.uniform(0.9, 1.1, signal.size)
    image = ndimage.gaussian_filter(signal.astype(np.float32)[labels], 0.45)  # partial volume
    texture = 1 + 0.04 * _noise(rng, size, 3 / step)
    bias = np.exp(0.15 * _noise(rng, size, 45 / step))
    image *= texture * bias
    level = 0.02
    real, imaginary = rng.standard_normal((2, *image.shape), dtype=np.float32) * level
    image = np.hypot(image + real, imaginary) * rng.uniform(300, 1500)
    image[labels == AIR] = 0
    affine = np.diag([step, step, step, 1.0])
    affine[:3, 3] = -step * (size - 1) / 2 + rng.uniform(-5, 5, 3)
    return image.astype(np.float32), affine


def write_heads(folder: Path, count: int, seed: int = 0, size: int = 96) -> list[Path]:
    """Draw `count` heads as `folder`/head_00.nii.gz ..., stored in changing orientations."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i in range(count):
        array, affine = draw_head(seed + i, size)
        image = nib.Nifti1Image(np.round(array).astype(np.int16), affine)
        wanted = nib.orientations.axcodes2ornt(ORIENTATIONS[i % len(ORIENTATIONS)])
        image = image.as_reoriented(
            nib.orientations.ornt_transform(nib.io_orientation(affine), wanted)
        )
        image.header.set_xyzt_units("mm")
        paths.append(folder / f"head_{i:02d}.nii.gz")
        nib.save(image, paths[-1])
    return paths


def _noise(rng: np.random.Generator, size: int, sigma: float) -> Float32[np.ndarray, "n n n"]:
    """Smooth noise of unit deviation; `sigma` in voxels. Drawn coarse where it is smooth."""
    factor = max(1, int(sigma / 2))
    coarse = size if factor == 1 else -(-size // factor) + 1
    noise = rng.standard_normal((coarse,) * 3, dtype=np.float32)
    noise = ndimage.gaussian_filter(noise, sigma / factor, mode="wrap")
    if factor > 1:
        at = np.arange(size) / factor
        for axis in range(3):
            low = at.astype(int)
            shape = [-1 if a == axis else 1 for a in range(3)]
            part = (at - low).astype(np.float32).reshape(shape)
            below, above = (np.take(noise, low + k, axis) for k in (0, 1))
            noise = below + (above - below) * part
    return (noise - noise.mean()) / noise.std()


def _bent_grid(rng: np.random.Generator, size: int, step: float) -> list[np.ndarray]:
    """x, y, z in mm of every voxel, after a small turn, a change of proportions and bending."""
    axis = ((np.arange(size) - (size - 1) / 2) * step).astype(np.float32)
    grid = np.stack(np.meshgrid(axis, axis, axis - 8, indexing="ij"))
    a, b, c = rng.uniform(-0.1, 0.1, 3)
    turn = np.array([[1, -c, b], [c, 1, -a], [-b, a, 1]])
    turn = turn / rng.uniform(0.94, 1.06, 3)[:, None]
    grid = np.tensordot(turn.astype(np.float32), grid, axes=1)
    return [g + 1.5 * _noise(rng, size, 20 / step) for g in grid]


def _ellipsoid(grid: tuple, centre: tuple, radii: tuple) -> Float32[np.ndarray, "n n n"]:
    """About the distance in mm to an ellipsoid's surface, positive inside."""
    scaled = [(g - c) / r for g, c, r in zip(grid, centre, radii, strict=True)]
    radius = np.sqrt(sum(s * s for s in scaled))
    slope = np.sqrt(sum((s / r) ** 2 for s, r in zip(scaled, radii, strict=True)))
    return (1 - radius) * radius / np.maximum(slope, 1e-3)


def _anatomy(rng: np.random.Generator, x, y, z, step: float) -> np.ndarray:
    grid = (x, y, z)
    brain = _ellipsoid(grid, (0, 0, 4), (66, 83, 60))
    brain = np.minimum(brain, z + 34 + 0.10 * np.abs(x))  # the base is flat
    brain = np.minimum(brain, _ellipsoid(grid, (0, -6, 0), (69, 84, 80)))
    cerebellum = _ellipsoid(grid, (0, -42, -36), (46, 30, 21))
    stem = np.maximum(
        _ellipsoid(grid, (0, -14, -34), (15, 14, 22)),
        _ellipsoid(grid, (0, -20, -75), (7, 7, 65)),  # spinal cord
    )
    inner = np.maximum(np.maximum(brain + 2, cerebellum + 3), stem + 3)  # inside of the skull
    head = np.maximum(
        _ellipsoid(grid, (0, 0, 2), (78, 97, 74)),
        np.maximum(
            _ellipsoid(grid, (0, 30, -52), (58, 56, 62)),  # face and jaw
            _ellipsoid(grid, (0, -20, -95), (52, 54, 120)),  # neck
        ),
    )
    nose = _ellipsoid(grid, (0, 90, -46), (11, 17, 19))
    head = np.maximum(head, nose)

    labels = np.full(x.shape, AIR, np.int8)
    labels[head > 0] = SCALP
    labels[(head > 5) & (z < -30)] = MUSCLE
    labels[(inner > -8) & (head > 3)] = SKULL
    labels[(inner > -5.5) & (inner < -2.5) & (head > 3) & (z > -30)] = SCALP  # marrow
    labels[inner > 0] = FLUID
    _face(grid, head, labels)
    _cortex(rng, grid, brain, labels, step)
    leaves = np.sin((z + 36 + 0.35 * np.hypot(y + 30, z + 36)) * (2 * np.pi / 7))
    labels[cerebellum > 0] = GREY
    labels[(cerebellum > 2) & (leaves > 0.55)] = WHITE
    labels[(cerebellum > 11) & (leaves > -0.4)] = WHITE
    labels[stem > 0] = WHITE
    labels[_ellipsoid(grid, (0, -31, -38), (5, 5, 9)) > 0] = FLUID  # fourth ventricle
    return labels


def _face(grid: tuple, head: np.ndarray, labels: np.ndarray) -> None:
    """Eyes, sinuses and mouth, where no brain is."""
    outside = (labels != FLUID) & (head > 3)
    for side in (-1, 1):
        eye = _ellipsoid(grid, (side * 31, 66, -34), (12, 12, 12))
        labels[(eye > -3) & outside] = SCALP
        labels[(eye > 0) & outside] = FLUID
        sinus = _ellipsoid(grid, (side * 20, 62, -62), (12, 15, 13))
        labels[(sinus > 0) & outside] = SKULL
    mouth = _ellipsoid(grid, (0, 52, -88), (26, 24, 7))
    labels[(mouth > 0) & outside] = SKULL


def _cortex(rng, grid: tuple, brain: np.ndarray, labels: np.ndarray, step: float) -> None:
    """Cerebrum with folds, deep grey matter and ventricles."""
    x, y, z = grid
    folds = _noise(rng, x.shape[0], 4.5 / step) + 0.1 * _noise(rng, x.shape[0], 9 / step)
    gap = np.abs(folds) * 4.0  # about mm to the nearest fold
    reach = np.clip((27 - brain) / 7, 0, 1)  # folds end 27 mm below the surface
    midline = np.abs(x + 0.5) + np.clip(-(z - 14 - 0.003 * y * y), 0, 99) * 0.6
    depth = np.minimum(brain, np.minimum(gap + 40 * (1 - reach), midline))
    labels[brain > 0] = FLUID
    labels[(brain > 0) & (depth > 0.6)] = GREY
    labels[(brain > 0) & (depth > 3.6)] = WHITE
    deep = (brain > 18) & (_ellipsoid(grid, (0, 2, 2), (40, 44, 30)) > 0)
    labels[deep] = WHITE
    for side in (-1, 1):
        for centre, radii in (
            ((side * 11, -10, 2), (9, 15, 9)),  # thalamus
            ((side * 25, 6, 3), (7, 20, 11)),  # putamen
            ((side * 16, 22, 9), (5, 11, 8)),  # caudate
        ):
            labels[_ellipsoid(grid, centre, radii) > 0] = GREY
        arch = 16 - 0.006 * (y + 4) ** 2
        horn = 1 - ((x - side * (8 + 0.004 * y * y)) / 6) ** 2 - ((z - arch) / 8) ** 2
        labels[(horn > 0) & (y > -42) & (y < 36)] = FLUID
    labels[(np.abs(x) < 2.5) & (_ellipsoid(grid, (0, -4, 0), (9, 16, 11)) > 0)] = FLUID
