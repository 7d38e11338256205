"""A fingerprint: what planning needs to know of the voxels of a data set; and all files are read.

As nnU-Net's extractor has it, so whatever is wrong with a file is found before training starts.
Its intensities are a random sample; here every case gives as many of its sorted voxels, evenly.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Float32
from pydantic import Field, PositiveFloat
from rich.console import Console

from sparsemae.config import Size, Strict
from sparsemae.data.codes import VolumeError, one_line
from sparsemae.data.making.workers import Lost, processes, run_jobs
from sparsemae.errors import UserError
from sparsemae.live import LiveLine
from sparsemae.planning.plan import Intensities, Spacing
from sparsemae.segmentation.dataset import Classes, Dataset, SegCase
from sparsemae.segmentation.prepare import content_box
from sparsemae.segmentation.reading import read_case

NAMED = 5  # unfit cases whose message is in the error
SAMPLES = 10_000  # voxels of a case and channel that percentiles are taken of
_CHUNK = 1 << 22  # voxels summed up at a time


class CaseFingerprint(Strict):
    """One case, cropped to where any channel is not zero."""

    id: str
    spacing: Spacing  # mm
    shape: Size  # voxels of the box that is kept
    relative_size: PositiveFloat  # of the box, 1 for the whole image


class ChannelFingerprint(Strict):
    """Of the voxels with a label above 0, every case counting alike; raw values."""

    mean: float
    std: float
    median: float
    low: float  # percentile 0.5
    high: float  # percentile 99.5
    minimum: float
    maximum: float

    @property
    def intensities(self) -> Intensities:
        """What a plan keeps of it."""
        return Intensities(mean=self.mean, std=self.std, low=self.low, high=self.high)


class Fingerprint(Strict):
    """Of the training cases of a data set. Triples have the axes of our arrays, RAS.

    It goes to JSON and back by `model_dump_json` and `model_validate_json`.
    """

    cases: tuple[CaseFingerprint, ...] = Field(min_length=1)
    channels: tuple[ChannelFingerprint, ...] = Field(min_length=1)  # in the data set's order

    @property
    def relative_size(self) -> float:
        """Median of the cases."""
        return float(np.median([case.relative_size for case in self.cases]))


def take_fingerprint(
    dataset: Dataset,
    cases: Sequence[SegCase],
    *,
    workers: int = 1,
    console: Console | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Fingerprint | None:
    """Read images and label maps of `cases`, in any order but with one result.

    Args:
        workers: Processes; 1 works in this one.
        console: Where progress is shown; None for silence.
        stopped: Asked between cases; None is returned if it was True before the last.

    Raises:
        UserError: Files are damaged, do not fit each other or the classes (up to five are named),
            or no case has a voxel of any class.
    """
    if not cases:
        raise UserError(f"{dataset.name}: no cases to plan with; name at least one")
    examine = partial(_examine, classes=dataset.classes)
    found: dict[str, _Examined | str] = {}
    with LiveLine(console or Console(quiet=True), "cases read", total=len(cases)) as line:
        results = run_jobs(examine, cases, processes(workers, len(cases)), stopped=stopped)
        for case, result in results:
            lost = isinstance(result, Lost)
            found[case.id] = f"{case.images[0]}: {result.reason}" if lost else result
            unfit = sum(isinstance(r, str) for r in found.values())
            numbers = f"{unfit} unfit" if unfit else ""
            plain = f"cases read {len(found)}/{len(cases)}  {numbers}".rstrip()
            line.update(len(found), len(cases), numbers, plain, last=len(found) == len(cases))
    if len(found) < len(cases):
        return None
    results = [found[case.id] for case in cases]
    _refuse(dataset, [r for r in results if isinstance(r, str)], len(cases))
    return Fingerprint(
        cases=tuple(r.case for r in results),
        channels=tuple(
            _pooled([r.samples[c] for r in results if r.samples], dataset)
            for c in range(len(dataset.channels))
        ),
    )


@dataclass(frozen=True)
class _Sample:
    """The voxels of one case and channel that have a label above 0."""

    values: Float32[np.ndarray, "n"]  # sorted, evenly chosen; SAMPLES of them
    mean: float
    square: float  # mean of the squared distances to the mean
    minimum: float
    maximum: float


@dataclass(frozen=True)
class _Examined:
    case: CaseFingerprint
    samples: tuple[_Sample, ...]  # one per channel; none without a label above 0


def _examine(case: SegCase, classes: Classes) -> _Examined | str:
    """One case, or why it is unfit."""
    try:
        volumes, labels = read_case(case, classes)
    except VolumeError as error:
        return str(error)
    content = np.logical_or.reduce([volume.array != 0 for volume in volumes])
    box = tuple(map(slice, *content_box(content)))
    inside = labels.array[box] > 0
    shape, whole = inside.shape, labels.array.size
    return _Examined(
        CaseFingerprint(
            id=case.id,
            spacing=volumes[0].spacing,
            shape=shape,
            relative_size=inside.size / whole,
        ),
        tuple(_sample(volume.array[box][inside]) for volume in volumes) if inside.any() else (),
    )


def _sample(values: Float32[np.ndarray, "n"]) -> _Sample:
    values.sort()
    places = (np.arange(SAMPLES) + 0.5) * (values.size / SAMPLES)
    starts = range(0, values.size, _CHUNK)
    mean = sum(values[i : i + _CHUNK].sum(dtype=np.float64) for i in starts) / values.size
    squares = (np.square(values[i : i + _CHUNK] - mean).sum() for i in starts)
    return _Sample(
        values[places.astype(np.intp)],
        float(mean),
        float(sum(squares)) / values.size,
        float(values[0]),
        float(values[-1]),
    )


def _pooled(samples: Sequence[_Sample], dataset: Dataset) -> ChannelFingerprint:
    """One channel of all cases; a case counts as much as any other, however large."""
    if not samples:
        raise UserError(
            one_line(f"{dataset.path}: all label maps are background only; check labelsTr")
        )
    values = np.concatenate([sample.values for sample in samples])
    low, median, high = np.percentile(values, (0.5, 50, 99.5)).tolist()
    means = np.array([sample.mean for sample in samples])
    mean = float(means.mean())
    variance = np.mean([s.square + (s.mean - mean) ** 2 for s in samples])
    return ChannelFingerprint(
        mean=mean,
        std=float(np.sqrt(variance)),
        median=median,
        low=low,
        high=high,
        minimum=min(sample.minimum for sample in samples),
        maximum=max(sample.maximum for sample in samples),
    )


def _refuse(dataset: Dataset, unfit: Sequence[str], total: int) -> None:
    if not unfit:
        return
    if len(unfit) == 1:
        raise UserError(one_line(unfit[0]))
    listed = " ".join(f"({i}) {message}" for i, message in enumerate(unfit[:NAMED], start=1))
    more = f" and {len(unfit) - NAMED} more" if len(unfit) > NAMED else ""
    raise UserError(
        one_line(f"{dataset.path}: {len(unfit)} of {total} cases are unfit: {listed}{more}")
    )
