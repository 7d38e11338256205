"""Every stable code under which a volume, or an entry of a list, is refused or warned about.

Records and scripts rely on the codes: one is added, never renamed. docs/bad-input.md lists them.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sparsemae.errors import UserError


class VolumeError(UserError):
    """A volume that cannot be used; `code` is short, dotted and stable, for records and scripts.

    The message is made one printable line, whatever the file's name holds.
    """

    def __init__(self, code: str, message: str):
        super().__init__(one_line(message))
        self.code = code

    def __reduce__(self):
        return VolumeError, (self.code, str(self))


@dataclass(frozen=True)
class Notice:
    """A warning: the volume is used, and this is what was found or changed."""

    code: str
    message: str  # one line with the file and what was done


@dataclass(frozen=True)
class Findings:
    """What the reading of one file comes upon: warnings are kept, a refusal is raised."""

    path: Path
    notices: list[Notice] = field(default_factory=list)
    owner: Path | None = None  # the file that was asked for, if this is its other half

    def warn(self, code: str, text: str) -> None:
        self.notices.append(Notice(code, one_line(f"{self._name()}: {text}")))

    def refuse(self, code: str, text: str) -> VolumeError:
        return VolumeError(code, f"{self._name()}: {text}")

    def half(self, path: Path) -> "Findings":
        """Findings about `path`, told with these."""
        if path == self.path:
            return self
        return Findings(path, self.notices, self.owner or self.path)

    def _name(self) -> str:
        return f"{self.path} (of {self.owner.name})" if self.owner else f"{self.path}"


def one_line(text: str) -> str:
    """`text` with what would break a line or confuse a terminal written as an escape, as \\n."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


@dataclass(frozen=True)
class Code:
    """What a code stands for: a rejected volume or entry, or one used with a warning."""

    summary: str
    remedy: str
    level: Literal["reject", "warn"]


def _reject(summary: str, remedy: str) -> Code:
    return Code(summary, remedy, "reject")


def _warn(summary: str, remedy: str) -> Code:
    return Code(summary, remedy, "warn")


_COPY = "copy it again"
_EXPORT = "export it again"

CODES: dict[str, Code] = {
    # the file and its bytes: reading/container.py, stream.py
    "container.missing": _reject("no such file", "check the path"),
    "container.not_file": _reject("a folder, pipe or device", "name a regular file"),
    "container.link": _reject("symbolic links lead in a circle", "repair the link"),
    "container.permission": _reject("the file may not be read", "change its permissions"),
    "container.unreadable": _reject("the system cannot read it", "check the disk or the network"),
    "container.empty": _reject("a file of 0 bytes", _COPY),
    "container.lfs": _reject("a git-LFS pointer, not its content", "run `git lfs pull`"),
    "container.not_nifti": _reject(
        "the content is in no format that is read here, whatever its name", "convert it to .nii.gz"
    ),
    "container.pair": _reject("one half of a pair is missing", "put .hdr and .img side by side"),
    "container.truncated": _reject("a compressed stream that ends too early", _COPY),
    "container.damaged": _reject("the checksum or the compressed stream is wrong", _COPY),
    "container.short": _reject("fewer bytes than the header promises", _COPY),
    "container.bomb": _reject(
        "over 256 MiB of a single value in a small file", "crop it, or store it as integers"
    ),
    "container.excess": _reject(
        "over 1 MiB after the voxels inside the compressed stream, or a stream of empty parts",
        _EXPORT,
    ),
    "container.memory": _reject(
        "the machine has no memory for the voxels", "use fewer workers, or lower the voxel limit"
    ),
    "container.itk": _reject(
        "an NRRD or MetaImage file, and no SimpleITK", "run `pip install 'sparsemae[itk]'`"
    ),
    "container.escape": _reject(
        "a header that names a data file outside its folder", "put the data beside the header"
    ),
    "container.trailing": _warn(
        "bytes after the voxels or after the compressed stream; they are ignored",
        "check the size in the header",
    ),
    # the header: reading/nifti.py
    "header.magic": _reject("348 bytes of header, but not NIfTI's magic", "convert from Analyze"),
    "header.sizeof": _reject("NIfTI's magic, but another header size", _EXPORT),
    "header.dims": _reject("not three sizes of at least 2 voxels", "convert it to a 3D volume"),
    "header.frames": _reject(
        "several frames and none asked for, or one that is not there", "name a frame, or split it"
    ),
    "header.budget": _reject("more voxels than the limit", "crop it, or raise the limit"),
    "header.dtype": _reject(
        "colour, complex, 128-bit or unknown voxels", "convert to one real number per voxel"
    ),
    "header.offset": _reject("no usable place where the voxels begin", _EXPORT),
    "header.extension": _reject("header extensions that run over the voxels", _EXPORT),
    "header.field": _reject(
        "a field of an NRRD or MetaImage header that is missing or not supported",
        "convert it to .nii.gz",
    ),
    "header.offset_assumed": _warn(
        "vox_offset is not usable; voxels are taken to follow the header at once", _EXPORT
    ),
    "header.padding": _warn(
        "the list of header extensions stops early; the rest is ignored", _EXPORT
    ),
    "header.bitpix": _warn("bitpix contradicts datatype; datatype decides", _EXPORT),
    # the intensities: reading/intensity.py
    "intensity.slope": _reject(
        "slope or intercept infinite, NaN, or too large for float32", "fix scl_slope, scl_inter"
    ),
    "intensity.not_finite": _reject("over 1 % of the voxels are NaN or infinite", "replace them"),
    "intensity.constant": _reject("every voxel has the same value", "remove the file"),
    "intensity.slope_ignored": _warn(
        "an intercept without a slope; intensities are taken as stored", "fix scl_slope, scl_inter"
    ),
    "intensity.filled": _warn(
        "at most 1 % of the voxels are NaN or infinite; set to the lowest finite value",
        "replace them",
    ),
    "intensity.nearly_constant": _warn(
        "99.9 % of the voxels are equal, or all within 1e-5 of their size", "look at the image"
    ),
    "intensity.outliers": _warn(
        "a value over 100 times the 99.9th percentile; it is kept", "look at the image"
    ),
    "intensity.padding": _warn(
        "a padding value far below all others; raised to the lowest of those", "none needed"
    ),
    # the place in the world: reading/geometry.py
    "geometry.affine": _reject("the affine is singular or not finite", "fix the header"),
    "geometry.quaternion": _reject("only a qform, and that is invalid", "fix the header"),
    "geometry.pixdim": _reject("no affine, and voxel sizes of 0, NaN or less", "fix the header"),
    "geometry.spacing": _reject("voxel sizes outside 0.01 to 50 mm", "fix the header's units"),
    "geometry.sheared": _reject("axes less than 60 degrees apart", "resample to a straight grid"),
    "geometry.shear": _warn("axes more than 1 degree off square", "resample to a straight grid"),
    "geometry.forms": _warn("sform and qform disagree; the sform is used", "fix the header"),
    "geometry.fallback": _warn(
        "one of sform and qform is invalid; the other is used", "fix the header"
    ),
    "geometry.none": _warn(
        "neither sform nor qform; voxel sizes only, orientation as Analyze's", "set an sform"
    ),
    "geometry.units": _warn("metres or micrometres; converted to millimetres", "none needed"),
    # label maps and masks: reading/labels.py
    "labels.classes": _reject("a class that was not announced", "add it, or correct the map"),
    "labels.negative": _reject("negative labels", "renumber from 0"),
    "labels.fractional": _reject("labels that are not whole numbers", "give a map, no probability"),
    "labels.not_finite": _reject("NaN or infinite labels", "replace them"),
    "labels.range": _reject("labels above 2147483647", "renumber from 0"),
    "labels.shape": _reject("another shape than the image", "resample it to the image"),
    "labels.affine": _reject("another place or voxel size than the image", "resample it"),
    "labels.one_hot": _reject("one channel per class", "take the argmax over the channels"),
    "labels.empty": _warn("background only", "check the map"),
    # the channels of a case: segmentation/reading.py
    "channels.shape": _reject("another shape than the first channel", "resample to one grid"),
    "channels.affine": _reject(
        "another place or voxel size than the first channel", "resample to one grid"
    ),
    # what preparation makes of it: transforms.py
    "intensity.flat": _reject(
        "one value, or as good as one, apart from the background; or none inside the CT window",
        "remove the file",
    ),
    "intensity.clipped": _warn(
        "voxels beyond 20 times the range of the others; clipped to it", "look at the image"
    ),
    "intensity.not_hounsfield": _warn(
        "a CT window, and no voxel below 0", "choose another --normalization"
    ),
    "geometry.too_large": _reject(
        "more voxels after resampling than the limit", "choose a larger --spacing"
    ),
    # the quality filter, off unless asked for: quality.py
    "quality.field_of_view": _reject("a smaller field of view than asked for", "none needed"),
    "quality.spacing": _reject("larger voxels than asked for", "none needed"),
    "quality.slices": _reject("fewer slices with content than asked for", "none needed"),
    "quality.contrast": _reject("less contrast than asked for", "look at the image"),
    # entries of folders and lists: sources.py, finding/
    "source.missing": _reject("a list names a file or mask that is not there", "correct the list"),
    "source.outside": _reject(
        "a relative path that leaves the folder of its list by ..", "write an absolute path"
    ),
    "source.id": _reject(
        "an id that cannot be the name of a file everywhere", "use letters, digits, . _ and -"
    ),
    "source.duplicate_id": _reject("an id that a list gave to another file too", "give it another"),
    "source.conflict": _reject("a file that is listed twice, and not alike", "remove one line"),
    "source.channel": _reject(
        "no CASE_0000 with a channel of nnU-Net's dataset.json", "rename it, or add the channel"
    ),
    "source.unreadable": _reject("a folder that cannot be read", "change its permissions"),
    # volumes compared: finding/split.py
    "duplicate.content": _warn("another volume has the same voxels", "keep one of them"),
}
