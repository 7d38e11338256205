"""The header of a NIfTI-1 or NIfTI-2 file, field by field: what is in it is not trusted.

nibabel parses the fields and computes the affines; what they may be is decided here and in
geometry.py.
"""

import math
import struct
from typing import Literal

import nibabel as nib
import numpy as np

from sparsemae.data.codes import Findings
from sparsemae.data.reading.container import Format, other_half
from sparsemae.data.reading.geometry import nifti_affine
from sparsemae.data.reading.header import Header, plain_shape
from sparsemae.data.reading.stream import Stream

LARGEST_OFFSET = 1 << 26  # bytes of header extensions; the largest in use are a few MiB
_DTYPES = {  # by the number in `datatype`
    **{2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8"},
    **{256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"},
}
_NAMES = {
    **{1: "single bits", 32: "complex64", 128: "RGB", 1536: "float128", 1792: "complex128"},
    **{2048: "complex256", 2304: "RGBA"},
}


def read_nifti(stream: Stream, found: Format) -> Header:
    """Read the header and its extensions off the stream; the voxels of a pair are found beside."""
    kind, size = (
        (nib.Nifti1Header, 348) if found in ("nifti1", "pair1") else (nib.Nifti2Header, 540)
    )
    block = stream.read(size)
    order = "<" if int.from_bytes(block[:4], "little") == size else ">"
    fields = kind(block, endianness=order, check=False)
    findings = stream.findings
    shape = _shape(fields, findings)
    dtype = _dtype(fields, findings, order)
    pair = found in ("pair1", "pair2")
    offset = _offset(fields, stream, 0 if pair else size + 4, order)
    slope, intercept = _scaling(fields, findings)
    return Header(
        file=other_half(findings, ".img") if pair else findings.path,
        offset=offset,
        shape=shape,
        dtype=dtype,
        slope=slope,
        intercept=intercept,
        affine=lambda findings: nifti_affine(fields, findings),
        nifti=fields,
    )


def _shape(fields: nib.Nifti1Header, findings: Findings) -> tuple[int, ...]:
    dim = [int(n) for n in fields["dim"]]
    if not 1 <= dim[0] <= 7:
        raise findings.refuse(
            "header.dims", f"{dim[0]} dimensions; a volume has three, export it again"
        )
    return plain_shape(dim[1 : 1 + dim[0]], findings)


def _dtype(fields: nib.Nifti1Header, findings: Findings, order: str) -> np.dtype:
    code = int(fields["datatype"])
    if code not in _DTYPES:
        name = _NAMES.get(code, f"unknown type {code}")
        raise findings.refuse(
            "header.dtype", f"voxels are {name}; convert it to one real number per voxel"
        )
    dtype = np.dtype(order + _DTYPES[code])
    if fields["bitpix"] != 8 * dtype.itemsize:
        findings.warn(
            "header.bitpix", f"{int(fields['bitpix'])} bits per voxel claimed, read as {dtype}"
        )
    return dtype


def _offset(fields: nib.Nifti1Header, stream: Stream, least: int, order: Literal["<", ">"]) -> int:
    """Bytes before the voxels; `least` where a single file without extensions has them, or 0."""
    findings = stream.findings
    value = float(fields["vox_offset"])
    extended = False
    if least:
        extended = stream.read(4)[0] != 0
    if value > LARGEST_OFFSET:
        raise findings.refuse(
            "header.offset", f"voxels would begin at byte {value:g}; export it again"
        )
    if not (value >= least and value.is_integer()):  # also NaN
        if extended:
            raise findings.refuse(
                "header.offset",
                f"extensions, and voxels at byte {value:g} among them; export it again",
            )
        findings.warn("header.offset_assumed", f"vox_offset {value:g} read as {least}")
        return least
    if extended:
        _pass_extensions(stream, int(value), order)
    return int(value)


def _pass_extensions(stream: Stream, end: int, order: Literal["<", ">"]) -> None:
    """Walk over the list of extensions, each with its size first; their contents are not used."""
    findings = stream.findings
    while end - stream.position >= 8:
        size = struct.unpack(order + "i", stream.read(4))[0]
        if size == 0:
            findings.warn("header.padding", "an extension of size 0 ends the list")
            return
        if size < 8 or stream.position - 4 + size > end:
            raise findings.refuse(
                "header.extension", f"an extension of {size} bytes does not fit; export it again"
            )
        stream.skip(size - 4)


def _scaling(fields: nib.Nifti1Header, findings: Findings) -> tuple[float, float]:
    """Slope and intercept; 1 and 0 where the slope is 0 or NaN, which is how none is written."""
    slope, intercept = float(fields["scl_slope"]), float(fields["scl_inter"])
    if math.isinf(slope):
        raise findings.refuse("intensity.slope", f"scl_slope is {slope}; fix the header")
    if slope == 0 or math.isnan(slope):
        if intercept != 0 and math.isfinite(intercept):
            findings.warn("intensity.slope_ignored", f"scl_inter {intercept:g} without a slope")
        return 1.0, 0.0
    if not math.isfinite(intercept):
        raise findings.refuse("intensity.slope", f"scl_inter is {intercept}; fix the header")
    return slope, intercept
