"""Mask a whole volume, reconstruct it tile by tile, and draw the result."""

import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import nibabel
import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy import ndarray

from sparsemae.data.options import PreprocessConfig
from sparsemae.data.read import read_volume
from sparsemae.data.transforms import Prepared, prepare
from sparsemae.errors import UserError
from sparsemae.models.mae import SparseMAE
from sparsemae.pretrain import load_run
from sparsemae.reporting.planes import plane_figure, three_planes
from sparsemae.triples import Triple


@dataclass(frozen=True)
class Result:
    """What `reconstruct` wrote, and how good it is."""

    picture: Path
    volume: Path
    error: float  # mean squared, z-scored intensities, masked voxels
    warnings: list[str]


def reconstruct(run: Path, volume: Path, output: Path, *, seed: int = 0) -> Result:
    """Reconstruct `volume` with the newest checkpoint of `run`.

    Writes a picture and, beside it, the reconstruction in the volume's own intensities on the
    cropped and resampled RAS grid, as `OUT.png` and `OUT.nii.gz`; `output` names either.

    Raises:
        UserError: The run, the volume or the output name cannot be used.
    """
    picture, nifti = _outputs(output, volume)
    loaded = load_run(run)
    made = PreprocessConfig.model_validate_json(json.dumps(loaded.checkpoint.meta["preprocess"]))
    source = read_volume(volume, frame=made.frame, max_voxels=made.max_voxels)
    prepared, config = prepare(source, made), loaded.config
    restored, masked = reconstruct_array(
        *(loaded.mae, prepared.array, prepared.background, config.data.patch_size),
        mask_ratio=config.mask.typical,
        seed=seed,
    )
    error = float(np.mean((restored - prepared.array)[masked] ** 2))

    output.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(restored * prepared.std + prepared.mean, prepared.affine)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, nifti)
    draw(prepared, masked, restored, picture)
    return Result(picture, nifti, error, loaded.warnings)


@torch.no_grad()
def reconstruct_array(
    mae: SparseMAE,
    array: Float[ndarray, "D H W"],
    background: float,
    patch_size: Triple,
    *,
    mask_ratio: float,
    seed: int,
) -> tuple[Float[ndarray, "D H W"], Bool[ndarray, "D H W"]]:
    """The array with its masked voxels replaced by their reconstruction, and which those are.

    Patches cover the volume, the last along an axis shifted inwards; smaller volumes are padded
    with `background`. A model that decodes a fraction of the masked cells decodes all of them here.
    """
    size = np.maximum(array.shape, patch_size)
    before = (size - array.shape) // 2
    inside = tuple(slice(b, b + n) for b, n in zip(before, array.shape, strict=True))
    original = np.full(size, background, np.float32)
    original[inside] = array
    restored, masked = original.copy(), np.zeros(size, bool)
    with mae.decoding_all_masked():
        for i, corner in enumerate(product(*map(_starts, size, patch_size))):
            box = tuple(slice(c, c + p) for c, p in zip(corner, patch_size, strict=True))
            generator = torch.Generator().manual_seed(seed + i)
            masks = mae.draw_masks(1, patch_size, mask_ratio, generator=generator)
            patch = torch.from_numpy(original[box])[None, None]
            restored[box] = mae.reconstruct(patch, masks)[0, 0].numpy()
            masked[box] = masks.scored.voxels(mae.block_size)[0, 0].numpy()
    return restored[inside], masked[inside]


def draw(
    prepared: Prepared,
    masked: Bool[ndarray, "D H W"],
    restored: Float[ndarray, "D H W"],
    path: Path,
) -> None:
    """Original, masked and reconstruction in three planes through the middle."""
    original = prepared.array
    low, high = np.percentile(original, (0.5, 99.5))
    hidden = np.where(masked, np.nan, original)
    columns = {"original": original, "masked": hidden, "reconstruction": restored}
    spacing = np.linalg.norm(prepared.affine[:3, :3], axis=0)
    rows = three_planes(columns, spacing, [n // 2 for n in original.shape])
    plane_figure(rows, (low, high), (9, 9)).savefig(path, dpi=110)


def _outputs(output: Path, volume: Path) -> tuple[Path, Path]:
    """The picture and the volume that `output` names, where both can be written."""
    stem = output.name.removesuffix(".png").removesuffix(".nii.gz")
    if output.name not in (f"{stem}.png", f"{stem}.nii.gz") or not stem:
        raise UserError(f"-o {output}: the name must end in .png or .nii.gz")
    paths = output.with_name(f"{stem}.png"), output.with_name(f"{stem}.nii.gz")
    above = next(p for p in output.absolute().parents if p.exists())
    if not above.is_dir():
        raise UserError(f"-o {output}: {above} is a file; choose another -o")
    for path in paths:
        if path.is_dir():
            raise UserError(f"-o {output}: {path} is a folder; choose another -o")
        if path.exists() and volume.exists() and path.samefile(volume):
            raise UserError(f"-o {output} would replace the volume itself; choose another -o")
    return paths


def _starts(size: int, patch: int) -> list[int]:
    """Where patches begin so that they cover `size` voxels without reaching beyond."""
    return [*range(0, size - patch, patch), size - patch]
