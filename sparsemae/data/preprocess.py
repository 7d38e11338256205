"""From NIfTI files to a store: RAS, crop to the non-zero box, resample, z-score, compress.

Mean and std come from the source grid, where background is exactly 0; they are applied after
resampling, so that air stays one value: it compresses, and padding continues it without an edge.
Letters: D, H, W voxels of one volume.
"""

import json
import math
import multiprocessing
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float32
from scipy import ndimage

from sparsemae.data.codes import VolumeError
from sparsemae.data.read import (
    Volume,
    find_volumes,
    read_volume,
    volume_name,
    voxel_sizes,
)
from sparsemae.data.store import Case, Store, StoreWriter, write_array
from sparsemae.errors import UserError

Triple = tuple[float, float, float]

FAILURES = "failures.jsonl"
MAX_VOXELS = 2**29  # 2 GiB of float32; a whole-body CT at 0.8 mm still fits


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A source that did not enter the store; one line of failures.jsonl."""

    id: str
    path: str
    code: str  # as `VolumeError.code`, or "unexpected.<exception>"
    message: str
    stage: str  # "read" or "preprocess"
    seconds: float


@dataclass(frozen=True)
class Prepared:
    """A volume ready for a store or a network; see `Case` for the fields."""

    array: Float32[np.ndarray, "D H W"]
    affine: Float[np.ndarray, "4 4"]
    background: float
    mean: float
    std: float
    crop_start: tuple[int, int, int]
    crop_stop: tuple[int, int, int]


@dataclass(frozen=True)
class Summary:
    """What `preprocess` did."""

    store: Store
    ok: int
    rejected: int
    failures: tuple[Failure, ...]


def preprocess(
    sources: Sequence[Path],
    store: Path,
    *,
    spacing: float | Triple | None = 1.0,
    workers: int = 1,
    overwrite: bool = False,
    on_case: Callable[[int, int, Case | Failure], None] | None = None,
) -> Summary:
    """Turn every volume under `sources` into a case of a new store.

    `spacing` is in mm, one number or left-right, posterior-anterior, inferior-superior; None keeps
    each volume's own. A volume that cannot be used becomes a line of STORE/failures.jsonl and the
    rest goes on. `on_case(done, total, outcome)` is called after each. `UserError` when nothing can
    be read from `sources`, written to `store`, or when every volume was rejected.
    """
    target = _target_spacing(spacing)
    if workers < 1:
        raise UserError(f"workers {workers}: give at least 1")
    paths = find_volumes(sources)
    _refuse_overlap(sources, Path(store))
    writer = StoreWriter(store, spacing=target, overwrite=overwrite)
    record = writer.path / FAILURES
    record.unlink(missing_ok=True)
    jobs = [
        _Job(path, case_id, writer.path, target)
        for path, case_id in zip(paths, case_ids(paths), strict=True)
    ]
    failures = []
    for done, outcome in enumerate(_outcomes(jobs, workers), start=1):
        if isinstance(outcome, Case):
            writer.add(outcome)
        else:
            failures.append(outcome)
            with open(record, "a") as file:
                file.write(json.dumps(asdict(outcome)) + "\n")
        if on_case is not None:
            on_case(done, len(jobs), outcome)
    if not writer.cases:
        raise UserError(
            f"none of the {len(jobs)} volumes can be used, see {record}; "
            f"the first: {failures[0].message}"
        )
    return Summary(writer.commit(), len(writer.cases), len(failures), tuple(failures))


def prepare(volume: Volume, spacing: Triple | None) -> Prepared:
    """Crop to the non-zero box, resample to `spacing` mm (None keeps it), z-score.

    Raises:
        VolumeError: `geometry.too_large` or `intensity.flat`.
    """
    cropped, start, stop = crop_nonzero(volume.array)
    array, affine = cropped, np.array(volume.affine)
    affine[:3, 3] += affine[:3, :3] @ start
    if spacing is not None:
        try:
            array, affine = resample(array, affine, spacing)
        except ValueError as error:
            raise VolumeError(
                "geometry.too_large", f"{volume.path}: {error}; choose a larger --spacing"
            ) from None
    try:
        array, background, mean, std = zscore(array, cropped)
    except ValueError as error:
        raise VolumeError("intensity.flat", f"{volume.path}: {error}; remove the file") from None
    return Prepared(array, affine, background, mean, std, start, stop)


def crop_nonzero(
    array: Float[np.ndarray, "D H W"],
) -> tuple[Float[np.ndarray, "d h w"], tuple[int, int, int], tuple[int, int, int]]:
    """The smallest box that holds every non-zero voxel (a view), its start and its stop."""
    nonzero = array != 0
    start, stop = [], []
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        hit = np.flatnonzero(nonzero.any(axis=others))
        if hit.size == 0:
            raise ValueError("every voxel is zero: nothing to crop to")
        start.append(int(hit[0]))
        stop.append(int(hit[-1]) + 1)
    box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
    return array[box], tuple(start), tuple(stop)


def zscore(
    array: Float[np.ndarray, "D H W"], source: Float[np.ndarray, "d h w"] | None = None
) -> tuple[Float32[np.ndarray, "D H W"], float, float, float]:
    """(array - mean) / std of every voxel, with the statistics of the non-zero voxels of `source`.

    `source` is `array` itself if None. Returns the array, what 0 became in it, mean and std.
    ValueError if the non-zero voxels all have one value.
    """
    source = array if source is None else source
    values = source[source != 0].astype(np.float64)
    if values.size == 0 or values.min() == values.max():
        raise ValueError("all non-zero voxels have one value: no contrast to normalise")
    mean = float(values.mean())
    values -= mean
    std = math.sqrt(float(values @ values) / values.size)
    shift, scale = np.float32(mean), np.float32(std)
    out = array.astype(np.float32)
    out -= shift
    out /= scale
    return out, float(-shift / scale), mean, std


def resample(
    array: Float[np.ndarray, "D H W"], affine: Float[np.ndarray, "4 4"], spacing: Triple
) -> tuple[Float32[np.ndarray, "d h w"], Float[np.ndarray, "4 4"]]:
    """Cubic spline resampling to `spacing` mm; the array and its affine.

    The new grid is centred on the old field of view, and edges continue with the nearest value.
    Overshoot is clipped to the input's range. An axis within 0.1 % of its spacing is left alone.
    ValueError if the result would have more than `MAX_VOXELS` voxels.
    """
    old = voxel_sizes(affine)
    steps = [
        1.0 if abs(new - s) <= 1e-3 * s else new / s for new, s in zip(spacing, old, strict=True)
    ]  # new voxel size in old voxels
    shape = [max(1, round(n / step)) for n, step in zip(array.shape, steps, strict=True)]
    if math.prod(shape) > MAX_VOXELS:
        raise ValueError(f"{tuple(shape)} is more than {MAX_VOXELS} voxels at {spacing} mm")
    low, high = array.min(), array.max()
    out, origin = array.astype(np.float32, copy=False), np.zeros(3)
    for axis in np.argsort(shape / np.array(array.shape)):  # axes that shrink first
        n, m, step = array.shape[axis], shape[axis], steps[axis]
        if step != 1.0:
            origin[axis] = ((n - 1) - (m - 1) * step) / 2
            weights = _spline_weights(n, m, step, origin[axis])
            out = np.moveaxis(np.tensordot(weights, out, axes=(1, axis)), 0, axis)
    if all(step == 1.0 for step in steps):
        return out, affine
    out = np.clip(out, low, high, out=np.ascontiguousarray(out))
    moved = np.array(affine, dtype=np.float64)
    moved[:3, 3] += affine[:3, :3] @ origin
    moved[:3, :3] *= steps
    return out, moved


def case_ids(paths: Sequence[Path]) -> list[str]:
    """File names without extension; where two agree, with their folders below the common one."""
    names = [volume_name(path) for path in paths]
    groups = defaultdict(list)
    for i, name in enumerate(names):
        groups[name].append(i)
    parents = [Path(os.path.abspath(path)).parent for path in paths]
    for name, group in groups.items():
        if len(group) > 1:
            root = os.path.commonpath([parents[i] for i in group])
            for i in group:
                names[i] = "_".join((*parents[i].relative_to(root).parts, name))
    seen: set[str] = set()
    for i, name in enumerate(names):
        count = 2
        while names[i] in seen:  # x.nii beside x.nii.gz, or a_b/c beside a/b_c
            names[i] = f"{name}-{count}"
            count += 1
        seen.add(names[i])
    return names


@dataclass(frozen=True)
class _Job:
    path: Path
    case_id: str
    store: Path
    spacing: Triple | None


def _outcomes(jobs: Sequence[_Job], workers: int) -> Iterator[Case | Failure]:
    """One outcome per job, in order with one worker, as they finish with more."""
    if workers == 1:
        yield from map(_process, jobs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context) as pool:
        futures = [pool.submit(_process, job) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _process(job: _Job) -> Case | Failure:
    """Prepare and store one volume. Trouble with the store (a full disk) is not a case's failure:
    it is raised."""
    began = time.perf_counter()
    stage = "read"
    try:
        volume = read_volume(job.path)
        stage = "preprocess"
        ready = prepare(volume, job.spacing)
    except Exception as error:
        code = getattr(error, "code", f"unexpected.{type(error).__name__}")
        message = str(error) if isinstance(error, UserError) else f"{job.path}: {error!r}"
        return Failure(
            id=job.case_id,
            path=str(job.path),
            code=code,
            message=message,
            stage=stage,
            seconds=round(time.perf_counter() - began, 3),
        )
    file, size, crc32 = write_array(job.store, job.case_id, ready.array[None])
    return Case(
        id=job.case_id,
        file=file,
        shape=ready.array.shape,
        spacing=voxel_sizes(ready.affine),
        affine=_rows(ready.affine),
        background=ready.background,
        mean=ready.mean,
        std=ready.std,
        crop_start=ready.crop_start,
        crop_stop=ready.crop_stop,
        source=os.path.abspath(job.path),
        source_shape=volume.array.shape,
        source_affine=_rows(volume.affine),
        bytes=size,
        crc32=crc32,
    )


def _spline_weights(n: int, m: int, step: float, origin: float) -> Float32[np.ndarray, "m n"]:
    """Weights of n samples in the cubic spline through them at origin + step * (0 .. m-1).

    The 3D spline is a product of three of these: the same numbers as
    `scipy.ndimage.affine_transform(order=3, mode="nearest")`, by three matrix products.
    """
    return ndimage.affine_transform(
        np.eye(n), [step, 1.0], [origin, 0.0], (m, n), order=3, mode="nearest"
    ).astype(np.float32)


def _rows(affine: Float[np.ndarray, "4 4"]) -> tuple[tuple[float, ...], ...]:
    return tuple(map(tuple, affine.tolist()))


def _target_spacing(spacing: float | Triple | None) -> Triple | None:
    if spacing is None:
        return None
    target = tuple(map(float, spacing if isinstance(spacing, Sequence) else (spacing,) * 3))
    if len(target) != 3 or not all(math.isfinite(s) and s > 0 for s in target):
        raise UserError(f"spacing {spacing}: give one positive number of mm, three, or keep")
    return target


def _refuse_overlap(sources: Sequence[Path], store: Path) -> None:
    inner = store.resolve()
    for source in map(Path, sources):
        folder = source.resolve()
        if folder == inner or folder in inner.parents or inner in folder.parents:
            raise UserError(f"store {store} and source {source} overlap; choose another -o")
