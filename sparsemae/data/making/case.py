"""One volume on its way into a store: read, prepare, compress. What a worker process runs.

The outcome is plain data, so that it can cross processes and machines and be written as one line.
"""

import contextlib
import hashlib
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32

from sparsemae.data.codes import Findings, Notice, VolumeError, one_line
from sparsemae.data.finding.scan import split_suffix
from sparsemae.data.options import PreprocessConfig
from sparsemae.data.preparing.quality import assess
from sparsemae.data.read import read_mask, read_volume
from sparsemae.data.reading.container import other_half
from sparsemae.data.reading.geometry import voxel_sizes
from sparsemae.data.sources import Source
from sparsemae.data.store import Case, encode_blocks, verify, write_image, write_mask
from sparsemae.data.transforms import prepare
from sparsemae.errors import UserError

DETACHED = {".mhd": (".raw", ".zraw"), ".nhdr": (".raw", ".raw.gz")}  # voxels, as usually named


@dataclass(frozen=True)
class Job:
    """A source to turn into a case of the store at `store`."""

    source: Source
    stamp: str  # of the source's files, see `stamp_of`
    store: Path
    config: PreprocessConfig
    known: "Outcome | None" = None  # stored already: kept as it is if its files are whole


@dataclass(frozen=True, kw_only=True)
class Record:
    """A line of failures.jsonl or warnings.jsonl: what was found in a source."""

    id: str
    path: str
    size: int | None  # bytes; None where there is no such file
    mtime: float | None  # seconds since 1970
    stamp: str  # see `stamp_of`
    stage: str  # find, read, preprocess, filter, worker or commit
    code: str  # see docs/bad-input.md, or "unexpected.<exception>"
    message: str
    seconds: float  # spent on the source until then


@dataclass(frozen=True)
class Outcome:
    """What became of a source: a stored case with its warnings, or a failure."""

    id: str
    stamp: str
    case: Case | None = None
    failure: Record | None = None
    warnings: tuple[Record, ...] = ()
    made: bool = True  # False: it was stored already, and is whole


def process(job: Job) -> Outcome:
    """Prepare and store one volume.

    Trouble with the store, such as a full disk, is not the volume's fault: it is raised.
    """
    if job.known is not None and verify(job.store, job.known.case):
        return replace(job.known, made=False)
    began = time.perf_counter()
    stage = "read"
    try:
        volume = read_volume(
            job.source.path, frame=job.config.frame, max_voxels=job.config.max_voxels
        )
        masks = {
            name: read_mask(path, volume)
            for name in ("excluded", "anatomy")
            if (path := getattr(job.source, name)) is not None
        }
        stage = "preprocess"
        content = content_of(volume.array)
        ready = prepare(volume, job.config, **masks)
        if job.config.filter is not None:
            stage = "filter"
            assess(ready, volume, job.config.filter)
    except Exception as error:
        return failed(job, stage, error, time.perf_counter() - began)
    image = write_image(job.store, job.source.id, ready.array[None], job.config.dtype)
    mask = None
    if ready.excluded is not None:
        mask = write_mask(job.store, job.source.id, ready.excluded[None])
    notices = (*volume.warnings, *ready.warnings)
    case = Case(
        id=job.source.id,
        **asdict(image),
        excluded=mask,
        shape=ready.array.shape,
        spacing=voxel_sizes(ready.affine),
        affine=_rows(ready.affine),
        background=ready.background,
        mean=ready.mean,
        std=ready.std,
        crop_start=ready.crop_start,
        crop_stop=ready.crop_stop,
        foreground=encode_blocks(ready.foreground),
        source=os.path.abspath(job.source.path),
        stamp=job.stamp,
        source_shape=volume.array.shape,
        source_affine=_rows(volume.affine),
        content=content,
        warnings=tuple(notice.code for notice in notices),
        **metadata(job.source),
    )
    seconds = time.perf_counter() - began
    named = (job.source.id, job.source.path, job.stamp)
    warnings = tuple(record_of(*named, "read", notice, seconds) for notice in notices)
    return Outcome(job.source.id, job.stamp, case, warnings=warnings)


def failed(job: Job, stage: str, error: Exception | Notice, seconds: float) -> Outcome:
    """The failure of a source, under its code, or under the name of an exception we did not see
    coming: the rest of the run goes on."""
    if isinstance(error, Exception) and not isinstance(error, VolumeError):
        code = f"unexpected.{type(error).__name__}"
        text = error if isinstance(error, UserError) else f"{job.source.path}: {error!r}"
        error = Notice(code, one_line(str(text)))
    record = record_of(job.source.id, job.source.path, job.stamp, stage, error, seconds)
    return Outcome(job.source.id, job.stamp, failure=record)


def record_of(
    case_id: str, path: Path, stamp: str, stage: str, notice: Notice | VolumeError, seconds: float
) -> Record:
    """A warning or an error about a source as a line of the records."""
    try:
        status = path.stat()
        size, mtime = status.st_size, status.st_mtime
    except OSError:
        size = mtime = None
    return Record(
        id=case_id,
        path=str(path),
        size=size,
        mtime=mtime,
        stamp=stamp,
        stage=stage,
        code=notice.code,
        message=notice.message if isinstance(notice, Notice) else str(notice),
        seconds=round(seconds, 3),
    )


def metadata(source: Source) -> dict[str, Any]:
    """What a case keeps of where it comes from."""
    names = ("subject", "session", "modality", "dataset")
    return {name: getattr(source, name) or "" for name in names}


def stamp_of(source: Source) -> str:
    """Size and time of the source's files: equal as long as nobody has changed them."""
    named = (source.path, source.excluded, source.anatomy)
    return stamp_of_files([path for path in named if path is not None])


def stamp_of_files(paths: Sequence[Path]) -> str:
    """Size and time of files, and of those that hold the voxels of a header among them."""
    return "+".join(map(_stamp, [*paths, *(o for path in paths for o in _other_files(path))]))


def content_of(array: Float32[np.ndarray, "D H W"]) -> str:
    """A hash of shape and voxels: equal for copies of a volume, in whatever file or orientation."""
    digest = hashlib.sha256(repr(array.shape).encode())
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:32]


def _other_files(path: Path) -> list[Path]:
    stem, suffix = split_suffix(path.name)
    match suffix.removesuffix(".gz"):
        case ".hdr" | ".img" as half:
            with contextlib.suppress(VolumeError):  # there is none
                return [other_half(Findings(path), ".img" if half == ".hdr" else ".hdr")]
    beside = [path.with_name(stem + ending) for ending in DETACHED.get(suffix, ())]
    return [other for other in beside if other.is_file()]


def _stamp(path: Path) -> str:
    try:
        status = path.stat()
    except OSError:
        return "missing"
    return f"{status.st_size}-{status.st_mtime_ns}"


def _rows(affine: Float[np.ndarray, "4 4"]) -> tuple[tuple[float, ...], ...]:
    return tuple(map(tuple, affine.tolist()))
