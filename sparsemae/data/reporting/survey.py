"""What there is to say about a store in numbers: one pass over index and records.

Kept are a few numbers per case and the first examples of each code, never a volume.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int

from sparsemae.data.making.case import Record
from sparsemae.data.making.ledger import FAILURES, WARNINGS, read_records
from sparsemae.data.options import PreprocessConfig
from sparsemae.data.reading.geometry import voxel_sizes
from sparsemae.data.reporting.contact import View
from sparsemae.data.store import Case, Store

EXAMPLES = 5  # of each code
DUPLICATE = "duplicate.content"
_EDGES = {"zscore": (-5.0, 6.0), "percentile": (-5.0, 5.0), "ct": (-1.0, 1.0)}  # of histograms
_BINS = 88


@dataclass
class Reason:
    """The records of one code: how many, and the first."""

    count: int = 0
    examples: list[Record] = field(default_factory=list)

    def add(self, record: Record) -> None:
        self.count += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(record)


@dataclass(frozen=True)
class Survey:
    """A store in numbers. Arrays have a row per case."""

    config: PreprocessConfig
    source_spacing: Float[np.ndarray, "cases 3"]  # mm
    source_extent: Float[np.ndarray, "cases 3"]  # mm
    shape: Int[np.ndarray, "cases 3"]  # stored voxels
    bytes: Int[np.ndarray, "cases"]  # on disk, masks included
    kinds: dict[tuple[str, str], Counter[str]]  # cases of a dataset and modality by split
    subjects: int
    excluded: int  # cases with a mask
    warned: int  # cases with any warning
    rejected: dict[str, Reason]  # by code, most frequent first
    filtered: dict[str, Reason]  # by the quality filter
    warnings: dict[str, Reason]

    @property
    def split(self) -> Counter[str]:
        return sum(self.kinds.values(), Counter())


def survey(store: Store) -> Survey:
    """Go through index, failures and warnings of a store once."""
    spacing, extent, shape, sizes = [], [], [], []
    kinds: dict[tuple[str, str], Counter[str]] = {}
    subjects, excluded = set(), 0
    for case in store.cases:
        mm = np.array(voxel_sizes(case.source_affine))
        spacing.append(mm)
        extent.append(mm * case.source_shape)
        shape.append(case.shape)
        sizes.append(sum(file.bytes for file in case.files))
        kinds.setdefault((case.dataset, case.modality), Counter())[case.split] += 1
        subjects.add((case.dataset, case.subject) if case.subject else case.id)
        excluded += case.excluded is not None
    rejected, filtered, warnings, warned = {}, {}, {}, set()
    for record in read_records(store.path, FAILURES):
        where = filtered if record.stage == "filter" else rejected
        where.setdefault(record.code, Reason()).add(record)
    for record in read_records(store.path, WARNINGS):
        warnings.setdefault(record.code, Reason()).add(record)
        warned.add(record.id)
    return Survey(
        config=store.config,
        source_spacing=np.array(spacing),
        source_extent=np.array(extent),
        shape=np.array(shape),
        bytes=np.array(sizes),
        kinds=kinds,
        subjects=len(subjects),
        excluded=excluded,
        warned=len(warned),
        rejected=_by_count(rejected),
        filtered=_by_count(filtered),
        warnings=_by_count(warnings),
    )


class Intensities:
    """Histograms of stored intensities, one per volume that is shown to it. Air is left out."""

    def __init__(self, config: PreprocessConfig):
        self.edges = np.linspace(*_EDGES[config.normalization], _BINS + 1)
        self.rows: list[np.ndarray] = []  # [bins] each

    def add(self, view: View) -> None:
        """Count the voxels of its planes as shares of the volume; the end bins hold what lies
        beyond them."""
        values = _content(view.case, view.planes)
        if values.size:
            inside = values.clip(self.edges[0], self.edges[-1])
            self.rows.append(np.histogram(inside, self.edges)[0] / values.size)


def _content(case: Case, planes: Iterable[np.ndarray]) -> Float[np.ndarray, "voxels"]:
    parts = [plane[plane != case.background].astype(np.float32) for plane in planes]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def _by_count(reasons: dict[str, Reason]) -> dict[str, Reason]:
    return dict(sorted(reasons.items(), key=lambda item: (-item[1].count, item[0])))
