"""Where a volume lies: from what a header says to one affine in RAS millimetres, or a refusal.

The sform is used where it is valid, else the qform, else voxel sizes alone: nibabel's order.
"""

import itertools
import math

import nibabel as nib
import numpy as np
from jaxtyping import Float
from nibabel.spatialimages import HeaderDataError

from sparsemae.data.codes import Findings

SPACING_RANGE = (0.01, 50.0)  # mm; outside it the header's unit or number is wrong
SHEAR = 1.0  # degrees off square from which a grid is called sheared
MAX_SHEAR = 30.0
_FLAT = 1e-3  # volume of the cell of unit edges below which an affine is singular
_UNITS = {1: ("metres", 1e3), 3: ("micrometres", 1e-3)}

Affine = Float[np.ndarray, "4 4"]


def voxel_sizes(affine: Affine) -> tuple[float, float, float]:
    """Millimetres from one voxel centre to the next along each array axis."""
    x, y, z = np.sqrt((np.asarray(affine, np.float64)[:3, :3] ** 2).sum(0)).tolist()
    return x, y, z


def nifti_affine(fields: nib.Nifti1Header, findings: Findings) -> Affine:
    """The one affine of a NIfTI header, in mm and checked."""
    has_sform, has_qform = int(fields["sform_code"]) > 0, int(fields["qform_code"]) > 0
    sform = np.array(fields.get_sform(), np.float64) if has_sform else None
    qform = _qform(fields) if has_qform else None
    sound = [form for form in (sform, qform) if form is not None and _is_sound(form)]
    if sound:
        affine = sound[0]
        if len(sound) == 2:
            _compare(fields, sform, qform, findings)
        elif has_sform and has_qform:
            used, broken = ("sform", "qform") if sound[0] is sform else ("qform", "sform")
            findings.warn("geometry.fallback", f"the {broken} is invalid; the {used} is used")
    elif has_sform:
        raise findings.refuse(
            "geometry.affine", "the affine is singular or not finite; fix the header"
        )
    elif has_qform:
        raise findings.refuse(
            "geometry.quaternion", "the qform is invalid and there is no sform; fix the header"
        )
    else:
        affine = _sizes_only(fields, findings)
    return check_affine(_in_millimetres(fields, affine, findings), findings)


def check_affine(affine: Affine, findings: Findings) -> Affine:
    """`affine` as it is; `VolumeError` if it is singular or its voxels or angles are impossible."""
    if not _is_sound(affine):
        raise findings.refuse(
            "geometry.affine", "the affine is singular or not finite; fix the header"
        )
    spacing = voxel_sizes(affine)
    low, high = SPACING_RANGE
    if not all(low <= s <= high for s in spacing):
        sizes = ", ".join(f"{s:.4g}" for s in spacing)
        raise findings.refuse(
            "geometry.spacing",
            f"voxel size {sizes} mm is outside [{low}, {high}]; fix the header's units",
        )
    axes = affine[:3, :3] / spacing
    shear = max(
        math.degrees(math.asin(min(1.0, abs(float(axes[:, a] @ axes[:, b])))))
        for a, b in itertools.combinations(range(3), 2)
    )
    if shear > MAX_SHEAR:
        raise findings.refuse(
            "geometry.sheared",
            f"axes are {shear:.0f} degrees off square; resample to a straight grid",
        )
    if shear > SHEAR:
        findings.warn("geometry.shear", f"axes are {shear:.1f} degrees off square")
    return affine


def displacement(one: Affine, other: Affine, shape: tuple[int, ...]) -> float:
    """The farthest that any corner of the grid `shape` lies in `one` from where it is in `other`.

    In mm; at the corners the difference of two affine maps is largest.
    """
    corners = np.array(list(itertools.product(*((0.0, n - 1.0) for n in shape))))
    apart = nib.affines.apply_affine(one, corners) - nib.affines.apply_affine(other, corners)
    return float(np.linalg.norm(apart, axis=1).max())


def _is_sound(affine: Affine) -> bool:
    """Finite and not singular, whatever its scale."""
    with np.errstate(all="ignore"):
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        if not (np.isfinite(affine).all() and np.isfinite(spacing).all() and spacing.min() > 0):
            return False
        return bool(abs(np.linalg.det(affine[:3, :3] / spacing)) >= _FLAT)


def _qform(fields: nib.Nifti1Header) -> Affine:
    """NaN throughout where quaternion or voxel sizes are invalid."""
    fields = fields.copy()
    if fields["pixdim"][0] not in (-1, 1):  # unset: the standard takes it as 1
        fields["pixdim"][0] = 1
    try:
        with np.errstate(all="ignore"):
            return np.array(fields.get_qform(), np.float64)
    except (ValueError, HeaderDataError):
        return np.full((4, 4), np.nan)


def _compare(fields: nib.Nifti1Header, sform: Affine, qform: Affine, findings: Findings) -> None:
    shape = tuple(int(n) for n in fields["dim"][1:4])
    apart = displacement(sform, qform, shape)
    if apart > 0.5 * min(voxel_sizes(sform)):
        findings.warn(
            "geometry.forms", f"sform and qform differ by up to {apart:.4g}; the sform is used"
        )


def _sizes_only(fields: nib.Nifti1Header, findings: Findings) -> Affine:
    """As nibabel does: Analyze's orientation, the origin at the centre."""
    sizes = np.abs(np.array(fields["pixdim"][1:4], np.float64))
    if not (np.isfinite(sizes).all() and sizes.min() > 0):
        raise findings.refuse(
            "geometry.pixdim",
            f"no affine, and voxel sizes {', '.join(f'{s:g}' for s in sizes)}; fix the header",
        )
    findings.warn(
        "geometry.none", "no sform or qform; voxel sizes only, left and right as Analyze has them"
    )
    shape = np.array([int(n) for n in fields["dim"][1:4]])
    affine = np.diag([*(sizes * (-1, 1, 1)), 1.0])
    affine[:3, 3] = -affine[:3, :3] @ (shape - 1) / 2
    return affine


def _in_millimetres(fields: nib.Nifti1Header, affine: Affine, findings: Findings) -> Affine:
    code = int(fields["xyzt_units"]) & 7
    if code in _UNITS:
        name, factor = _UNITS[code]
        findings.warn("geometry.units", f"in {name}; converted to millimetres")
        affine = np.diag([factor, factor, factor, 1.0]) @ affine
    return affine
