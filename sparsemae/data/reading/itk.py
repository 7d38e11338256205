"""NRRD and MetaImage headers: the payload checked here, the geometry interpreted by SimpleITK.

SimpleITK fills truncated files with zeros and follows whatever path a header names. So it is handed
a header of its own, with the geometry's lines and no payload; the voxels go through our stream.
"""

import io
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from jaxtyping import Float

from sparsemae.data.codes import Findings
from sparsemae.data.reading.geometry import check_affine
from sparsemae.data.reading.header import Header, plain_shape
from sparsemae.data.reading.stream import Stream

LONGEST = 1 << 20  # bytes of header text
_NRRD_TYPES = {
    **dict.fromkeys(("signed char", "int8", "int8_t"), "i1"),
    **dict.fromkeys(("uchar", "unsigned char", "uint8", "uint8_t"), "u1"),
    **dict.fromkeys(
        ("short", "short int", "signed short", "signed short int", "int16", "int16_t"), "i2"
    ),
    **dict.fromkeys(("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"), "u2"),
    **dict.fromkeys(("int", "signed int", "int32", "int32_t"), "i4"),
    **dict.fromkeys(("uint", "unsigned int", "uint32", "uint32_t"), "u4"),
    **dict.fromkeys(
        ("longlong", "long long", "long long int", "signed long long", "signed long long int"), "i8"
    ),
    **dict.fromkeys(("int64", "int64_t"), "i8"),
    **dict.fromkeys(("ulonglong", "unsigned long long", "unsigned long long int"), "u8"),
    **dict.fromkeys(("uint64", "uint64_t"), "u8"),
    **{"float": "f4", "double": "f8"},
}
_META_TYPES = {
    **{"MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2"},
    **{"MET_INT": "i4", "MET_UINT": "u4", "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8"},
    **{"MET_LONG": "i8", "MET_ULONG": "u8", "MET_FLOAT": "f4", "MET_DOUBLE": "f8"},
}
_META_PLACE = (
    *("TransformMatrix", "Rotation", "Orientation", "CenterOfRotation"),
    *("Offset", "Origin", "Position", "ElementSpacing"),
)
_UNITS = {  # to mm
    **{"": 1.0, "mm": 1.0, "millimeter": 1.0, "?": 1.0, "cm": 10.0, "m": 1e3},
    **{"um": 1e-3, "µm": 1e-3, "micron": 1e-3, "microns": 1e-3, "micrometer": 1e-3},
}
_COMMAS = str.maketrans("(),", "   ")
_META_ORDER = ("BinaryDataByteOrderMSB", "ElementByteOrderMSB")
_NRRD_NAMES = {
    "datafile": "data file",
    "byteskip": "byte skip",
    "lineskip": "line skip",
}
T = TypeVar("T")


@dataclass(frozen=True)
class _Text:
    """The fields of a header, and where it ends."""

    fields: Mapping[str, str]
    length: int  # bytes of the stream
    findings: Findings

    def get(self, name: str, read: Callable[[str], T], default: str | None = None) -> T:
        value = self.fields.get(name, default)
        if value is None:
            raise self.findings.refuse("header.field", f"no {name!r} in it; export it again")
        try:
            return read(value)
        except (ValueError, KeyError):
            raise self.findings.refuse(
                "header.field", f"{name}: {value[:40]!r} is not supported; convert it to .nii.gz"
            ) from None

    def expect(self, name: str, *allowed: str) -> None:
        """Refuse a field that is there and says anything else."""
        self.get(name, {value: value for value in allowed}.__getitem__, allowed[0])


def read_nrrd(stream: Stream) -> Header:
    """Read an NRRD header off the stream: three axes of one number per voxel, raw or gzip."""
    _simple_itk(stream.findings)
    text = _nrrd_text(stream)
    findings = stream.findings
    shape = _shape(text, "sizes")
    letters = text.get("type", _NRRD_TYPES.__getitem__)
    orders: dict[str, Literal["<", ">"]] = {"little": "<", "big": ">"}
    order = text.get("endian", orders.__getitem__, "little" if letters[1] == "1" else None)
    packed = text.get("encoding", {"raw": False, "gzip": True, "gz": True}.__getitem__)
    text.expect("line skip", "0")
    skip = text.get("byte skip", _natural, "0")
    if packed and skip:
        raise findings.refuse("header.field", "'byte skip' in gzip; convert it to .nii.gz")
    lines = [
        "NRRD0005",
        f"type: {text.fields['type']}",
        "dimension: 3",
        f"sizes: {' '.join(map(str, shape))}",
        "encoding: raw",
        "endian: little",
        *(
            f"{name}: {text.fields[name]}"
            for name in ("space", "space dimension", "space directions", "space origin", "spacings")
            if name in text.fields
        ),
    ]
    _check_numbers(text, "space directions", 9)
    _check_numbers(text, "space origin", 3)
    _check_numbers(text, "spacings", 3, positive=True)
    units = set(text.get("space units", lambda v: v.replace('"', " ").split(), ""))
    placed = "space directions" in text.fields and "space" in text.fields
    return _header(
        text,
        stream,
        detached=text.fields.get("data file"),
        packed=packed,
        skip=skip,
        shape=shape,
        dtype=np.dtype(order + letters),
        affine=_locator(
            "NrrdImageIO", ".nrrd", "\n".join(lines) + "\n\n", _millimetres(units, text), placed
        ),
    )


def read_meta(stream: Stream) -> Header:
    """Read a MetaImage header off the stream: three axes of one number per voxel."""
    _simple_itk(stream.findings)
    text = _meta_text(stream)
    text.expect("ObjectType", "Image")
    text.expect("BinaryData", "True")
    text.expect("ElementNumberOfChannels", "1")
    text.expect("ElementToIntensityFunctionSlope", "1")
    text.expect("ElementToIntensityFunctionOffset", "0")
    shape = _shape(text, "DimSize")
    letters = text.get("ElementType", _META_TYPES.__getitem__)
    big = {"True": True, "False": False}.__getitem__
    order = ">" if any(text.get(k, big, "False") for k in _META_ORDER) else "<"
    packed = text.get("CompressedData", big, "False")
    where = text.get("ElementDataFile", str)
    lines = [
        "ObjectType = Image",
        "NDims = 3",
        "BinaryData = True",
        *(f"{name} = {text.fields[name]}" for name in _META_PLACE if name in text.fields),
        f"DimSize = {' '.join(map(str, shape))}",
        f"ElementType = {text.fields['ElementType']}",
        "ElementDataFile = LOCAL",
    ]
    for name in _META_PLACE[:3]:
        _check_numbers(text, name, 9)
    for name in _META_PLACE[3:-1]:
        _check_numbers(text, name, 3)
    _check_numbers(text, "ElementSpacing", 3, positive=True)
    units = {text.fields.get("DistanceUnits", "")}
    placed = any(name in text.fields for name in _META_PLACE[:3])
    return _header(
        text,
        stream,
        detached=None if where.upper() == "LOCAL" else where,
        packed=packed,
        skip=text.get("HeaderSize", _natural, "0"),
        shape=shape,
        dtype=np.dtype(order + letters),
        affine=_locator(
            "MetaImageIO", ".mha", "\n".join(lines) + "\n", _millimetres(units, text), placed
        ),
    )


def _lines(stream: Stream) -> list[bytes]:
    """The text at the head of the stream, each line with its end; the last may be cut."""
    return io.BytesIO(stream.peek(LONGEST)).readlines()


def _nrrd_text(stream: Stream) -> _Text:
    """The fields up to the empty line, or of the whole file where the voxels are elsewhere."""
    fields, length = {}, 0
    for line in _lines(stream):
        length += len(line)
        if not line.strip():
            break
        name, colon, value = os.fsdecode(line).partition(": ")
        if colon and not line.startswith(b"#"):
            name = name.strip().lower()
            fields[_NRRD_NAMES.get(name, name)] = value.strip()
    else:
        if "data file" not in fields:
            raise stream.findings.refuse("header.field", "the header has no end; copy it again")
    return _Text(fields, length, stream.findings)


def _meta_text(stream: Stream) -> _Text:
    """The fields up to ElementDataFile, which is the last."""
    fields, length = {}, 0
    for line in _lines(stream):
        length += len(line)
        name, _, value = os.fsdecode(line).partition("=")
        fields[name.strip()] = value.strip()
        if name.strip() == "ElementDataFile":
            return _Text(fields, length, stream.findings)
    raise stream.findings.refuse("header.field", "no 'ElementDataFile' in it; copy it again")


def _natural(value: str) -> int:
    number = int(value)
    if number < 0:
        raise ValueError(value)
    return number


def _check_numbers(text: _Text, name: str, count: int, *, positive: bool = False) -> None:
    """SimpleITK takes what it cannot parse as 0 or 1, without a word."""
    if name not in text.fields:
        return
    numbers = text.get(
        name, lambda value: [float(n) for n in value.translate(_COMMAS).split()], None
    )
    if len(numbers) != count or not all(
        math.isfinite(n) and (n > 0 or not positive) for n in numbers
    ):
        raise text.findings.refuse(
            "geometry.affine", f"{name}: {text.fields[name][:60]!r} is invalid; fix the header"
        )


def _shape(text: _Text, name: str) -> tuple[int, ...]:
    sizes = text.get(name, lambda value: [int(n) for n in value.split()])
    dimension = text.get("dimension" if name == "sizes" else "NDims", int)
    if len(sizes) != dimension:
        raise text.findings.refuse(
            "header.dims", f"{dimension} dimensions, {len(sizes)} sizes; export it again"
        )
    if dimension != 3:
        raise text.findings.refuse(
            "header.dims", f"{dimension} dimensions; convert it to a 3D volume of one channel"
        )
    return plain_shape(sizes, text.findings)


def _millimetres(units: set[str], text: _Text) -> float:
    """Of one unit of the header."""
    if len(units) > 1 or not units <= _UNITS.keys():
        raise text.findings.refuse(
            "header.field", f"units {', '.join(sorted(units))}; convert it to millimetres"
        )
    return _UNITS[next(iter(units), "")]


def _header(
    text: _Text,
    stream: Stream,
    *,
    detached: str | None,
    packed: bool,
    skip: int,
    shape: tuple[int, ...],
    dtype: np.dtype,
    affine: Callable[[Findings], Float[np.ndarray, "4 4"]],
) -> Header:
    path = text.findings.path
    if detached is not None:
        file, begin, offset = _beside(path, detached, text.findings), 0, skip
    elif packed:
        if stream.compressed:
            raise text.findings.refuse("header.field", "compressed twice; unpack it once")
        file, begin, offset = path, text.length, 0
    else:
        file, begin, offset, packed = path, 0, text.length + skip, stream.compressed
    return Header(
        file=file,
        begin=begin,
        compressed=packed,
        offset=offset,
        shape=shape,
        dtype=dtype,
        affine=affine,
    )


def _beside(path: Path, name: str, findings: Findings) -> Path:
    """The data file a header names: in its folder or below, never elsewhere."""
    if name.upper().startswith("LIST") or "%" in name:
        raise findings.refuse(
            "header.field", "the voxels lie in several files; convert it to .nii.gz"
        )
    if os.path.isabs(name) or ".." in Path(name).parts:
        raise findings.refuse(
            "container.escape",
            f"the header points to {name}, out of its folder; put the data beside it",
        )
    return path.parent / name


def _locator(
    reader: str, extension: str, text: str, millimetres: float, placed: bool
) -> Callable[[Findings], Float[np.ndarray, "4 4"]]:
    def affine(findings: Findings) -> Float[np.ndarray, "4 4"]:
        found = _interpreted(reader, extension, text, findings)
        if not placed:
            findings.warn(
                "geometry.none", "no orientation; voxel sizes only, axes taken as left, back, up"
            )
        if millimetres != 1:
            findings.warn("geometry.units", f"converted to millimetres, of {millimetres:g} each")
            found = np.diag([*(millimetres,) * 3, 1.0]) @ found
        return check_affine(found, findings)

    return affine


def _interpreted(
    reader: str, extension: str, text: str, findings: Findings
) -> Float[np.ndarray, "4 4"]:
    """The affine that SimpleITK sees in a header, from its left-posterior-superior to RAS."""
    itk = _simple_itk(findings)
    with tempfile.TemporaryDirectory(prefix="sparsemae-") as folder:
        path = os.path.join(folder, f"header{extension}")
        with open(path, "wb") as file:
            file.write(os.fsencode(text))
        image = itk.ImageFileReader()
        image.SetFileName(path)
        image.SetImageIO(reader)
        noisy = itk.ProcessObject.GetGlobalWarningDisplay()
        itk.ProcessObject.SetGlobalWarningDisplay(False)
        try:
            image.ReadImageInformation()
        except RuntimeError:
            raise findings.refuse(
                "geometry.affine", "SimpleITK finds no valid geometry in it; fix the header"
            ) from None
        finally:
            itk.ProcessObject.SetGlobalWarningDisplay(noisy)
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def _simple_itk(findings: Findings):
    try:
        import SimpleITK
    except ImportError:
        raise findings.refuse(
            "container.itk",
            "NRRD and MetaImage files need SimpleITK; run pip install 'sparsemae[itk]'",
        ) from None
    return SimpleITK
