"""The way from files to patches: reading, augmentation, preprocessing, and what a step waits for.

All forms hold the same volumes and are asked for the same boxes, in turn, in one process: what one
loader worker does. Voxels are compared before anything is timed.
"""

import contextlib
import itertools
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sparsemae.bench.harness import seconds_in_turn
from sparsemae.bench.readers import Box, Reader, Stored, sync_files, write_all
from sparsemae.data.loader import make_loader
from sparsemae.data.loading.affine import AugmentConfig
from sparsemae.data.loading.augment import assemble
from sparsemae.data.loading.prefetch import to_device_ahead
from sparsemae.data.loading.samples import RawBatch, Sample, SampleReader
from sparsemae.data.options import PreprocessConfig
from sparsemae.data.phantom import write_heads
from sparsemae.data.preprocess import preprocess
from sparsemae.data.store import Store
from sparsemae.models.mae import SparseMAE, masked_error
from sparsemae.models.resenc import ResEncUNet
from sparsemae.training.loop import Loss, State, StepRecord, fit
from sparsemae.training.optimizer import make_optimizer
from sparsemae.training.options import TrainConfig
from sparsemae.training.ranks import Ranks

VOLUMES = 44_000  # a published pre-training set of head MR
SEED = 0
CELL = 16  # voxels per axis of a mask cell
ALWAYS = AugmentConfig(rotation_probability=1.0, scale_probability=1.0)
AUGMENTS = {"": None, "drawn": AugmentConfig(), "all resampled": ALWAYS}

Row = dict[str, Any]

PARTS = ("preprocess", "read", "augment", "wait")


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    patches: tuple[int, ...]  # voxels per axis
    parts: tuple[str, ...]
    volumes: Path | None  # None: drawn
    count: int
    size: int  # voxels per axis of a drawn volume
    samples: int  # timed reads of each form
    batch: int
    device: torch.device
    preset: str
    workers: int
    steps: int


@dataclass
class Workspace:
    """Volumes preprocessed into two stores, float16 and float32, and what that took."""

    folder: Path
    store: Store
    exact: Store
    seconds: list[float]  # of each volume of the float16 store


def measure_data(plan: Plan, folder: Path | None) -> Iterator[Row]:
    """The rows of all parts, as they come. `folder` is where volumes are kept meanwhile."""
    with tempfile.TemporaryDirectory(prefix="bench-data-", dir=folder) as name:
        work = prepare(Path(name), plan.volumes, plan.count, plan.size)
        source = {"source": str(plan.volumes or f"drawn {plan.size}^3")}
        parts = {
            "preprocess": lambda: [preprocessing_row(work)],
            "read": lambda: read_rows(work, plan.patches, plan.samples),
            "augment": lambda: augment_rows(
                work.store, plan.patches, plan.batch, plan.samples, plan.device
            ),
            "wait": lambda: [wait_row(work.store, plan)],
        }
        for part in PARTS:
            if part in plan.parts:
                yield from (row | source for row in parts[part]())


def prepare(folder: Path, volumes: Path | None, count: int, size: int) -> Workspace:
    """Preprocess `count` drawn heads of `size`^3 voxels, or all of `volumes`, in this process."""
    sources = [volumes] if volumes else write_heads(folder / "drawn", count, SEED, size)
    store, seconds = _preprocessed(sources, folder / "store", "float16")
    exact, _ = _preprocessed(sources, folder / "exact", "float32")
    return Workspace(folder, store, exact, seconds)


def _preprocessed(sources: list[Path], path: Path, dtype: str) -> tuple[Store, list[float]]:
    times = []
    summary = preprocess(
        *(sources, path, PreprocessConfig(dtype=dtype)),
        workers=0,
        max_failures=1.0,
        validation=0.0,
        on_outcome=lambda progress, outcome: times.append(time.perf_counter()),
    )
    seconds = [end - start for start, end in itertools.pairwise(times)]
    return summary.store, seconds[1:] or seconds  # the first also loads libraries


def preprocessing_row(work: Workspace) -> Row:
    """Throughput of one process, and what the largest data sets would take of time and disk."""
    cases = list(work.store.cases)
    count = len(cases)
    each = statistics.mean(work.seconds)
    stored = sum(file.bytes for case in cases for file in case.files)
    source = sum(Path(case.source).stat().st_size for case in cases)
    index = (work.store.path / "index.json").stat().st_size
    return {
        "case": "preprocess",
        "volumes": count,
        "voxels_in": statistics.mean(float(np.prod(case.source_shape)) for case in cases),
        "voxels_out": statistics.mean(float(np.prod(case.shape)) for case in cases),
        "seconds_per_volume": each,
        "volumes_per_minute_core": 60 / each,
        "mb_source": source / count / 1e6,
        "mb_stored": stored / count / 1e6,
        "scale_volumes": VOLUMES,
        "scale_core_hours": VOLUMES * each / 3600,
        "scale_gb_source": VOLUMES * source / count / 1e9,
        "scale_gb_stored": VOLUMES * stored / count / 1e9,
        "scale_mb_index": VOLUMES * index / count / 1e6,
    }


@dataclass
class Reads:
    """One way to get patches: `run(i)` reads the i-th, `files(i)` are the files it touches."""

    name: str
    augment: str
    run: Callable[[int], object]
    files: Callable[[int], list[Path]]
    seconds: dict[str, list[float]] = field(default_factory=dict)  # by "warm" and "cold"
    disk: int = 0  # bytes that came from the disk in the cold reads


def read_rows(work: Workspace, patches: Sequence[int], samples: int) -> Iterator[Row]:
    """Patches per second and worker process, of every form, warm and cold.

    Raises:
        RuntimeError: A form gives other voxels: it is not timed.
    """
    nifti, nnunet = write_all(work.exact, work.folder, patches)
    for store in (work.store, work.exact):
        sync_files(store.path / f.file for case in store.cases for f in case.files)
    for patch in patches:
        boxes = _boxes(work.exact, patch, samples)
        forms = [Stored(work.store), Stored(work.exact), nnunet[patch], nifti]
        _check(work.exact, forms, boxes)
        ways = [*_ours(work.store, patch), *(_theirs(form, boxes) for form in forms[1:])]
        for state in ("warm", "cold"):
            _time(ways, samples, state)
        yield from _rows(ways, patch, work, forms)


def _boxes(store: Store, patch: int, samples: int) -> list[tuple[int, Box]]:
    """Case and box of the samples that a worker reads without resampling."""
    asked = []
    indices = {case.id: i for i, case in enumerate(store.cases)}
    reader = SampleReader(store, (patch,) * 3, seed=SEED)
    real = store.read_box

    class Listening:
        cases = store.cases

        @staticmethod
        def read_box(case, start, stop, kind="image"):
            box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
            asked.append((indices[case.id], box))
            return real(case, start, stop, kind)

    reader.store = Listening
    for sample in range(samples):
        reader(sample)
    return asked


def _check(store: Store, forms: Sequence[Reader], boxes: list[tuple[int, Box]]) -> None:
    for form in forms:
        allowed = [form.allowed(i) for i in range(len(store))]
        for case, box in boxes[: 2 * len(store)]:
            truth = store.read(store.cases[case])[0][box]
            found = form.read(case, box)
            error = np.abs(found.astype(np.float32) - truth).max() if found.size else np.inf
            if found.shape != truth.shape or not error <= allowed[case]:
                raise RuntimeError(
                    f"{form.name} gives other voxels of case {case}: {error:.1e} apart, "
                    f"{allowed[case]:.1e} allowed"
                )


def _ours(store: Store, patch: int) -> list[Reads]:
    """All that our worker does for a sample: drawing it, finding the case, reading its box."""
    stored = Stored(store)
    indices = {case.id: i for i, case in enumerate(store.cases)}
    ways = []
    for name, augment in AUGMENTS.items():
        reader = SampleReader(store, (patch,) * 3, seed=SEED, augment=augment)

        def files(i: int, reader: SampleReader = reader) -> list[Path]:
            return stored.files(indices[reader.case_of(i).id])

        ways.append(Reads(stored.name, name, reader, files))
    return ways


def _theirs(form: Reader, boxes: list[tuple[int, Box]]) -> Reads:
    return Reads(form.name, "", lambda i: form.read(*boxes[i]), lambda i: form.files(boxes[i][0]))


def _time(ways: list[Reads], samples: int, state: str) -> None:
    """Every way once per sample, after one that does not count, in changing order: what ran before
    leaves the processor's caches and the heap as it likes."""
    order = random.Random(SEED)
    for path in {path for way in ways for i in range(samples) for path in way.files(i)}:
        path.read_bytes()
    for i in (0, *range(samples)):
        for way in order.sample(ways, len(ways)):
            for path in way.files(i) if state == "cold" else ():
                drop_from_cache(path)
            before, began = bytes_from_disk(), time.perf_counter()
            way.run(i)
            way.seconds.setdefault(state, []).append(time.perf_counter() - began)
            way.disk += bytes_from_disk() - before if state == "cold" else 0
    for way in ways:
        del way.seconds[state][0]


def _rows(ways: list[Reads], patch: int, work: Workspace, forms: Sequence[Reader]) -> list[Row]:
    """A row for each way and state; speeds beside nnU-Net's reader and nibabel."""
    size = {f.name: _mean_size(f, len(work.store)) / 1e6 for f in forms}
    rivals = {"nnunet": ways[-2], "nibabel": ways[-1]}
    rows = []
    for state in ("warm", "cold"):
        # a disk that delivered nothing was not asked: this file system keeps its pages
        kept = state == "cold" and not any(way.disk for way in ways)
        for way in ways:
            seconds = way.seconds[state]
            total = sum(seconds)
            p20, p50, p80 = np.quantile(seconds, (0.2, 0.5, 0.8)) * 1e3
            rows.append(
                {"case": "read", "form": way.name, "augment": way.augment, "patch": patch}
                | {"cache": state, "patches_per_second": None if kept else len(seconds) / total}
                | {"ms": p50, "ms_p20": p20, "ms_p80": p80, "rounds": len(seconds)}
                | {f"ratio_{n}": sum(r.seconds[state]) / total for n, r in rivals.items()}
                | {"mb_file": size[way.name], "mb_read": way.disk / len(seconds) / 1e6}
                | {"skipped": "the page cache cannot be dropped here" if kept else None}
            )
    return rows


def _mean_size(form: Reader, count: int) -> float:
    return statistics.mean(sum(p.stat().st_size for p in form.files(i)) for i in range(count))


def augment_rows(
    store: Store, patches: Sequence[int], batch: int, rounds: int, device: torch.device
) -> Iterator[Row]:
    """Milliseconds to make a batch of patches on the device, from samples that are there."""
    for patch in patches:
        runs = {}
        for name, augment in AUGMENTS.items():
            reader = SampleReader(store, (patch,) * 3, seed=SEED, augment=augment)
            batches = [_on(device, reader, batch, i) for i in range(min(rounds, 8))]
            runs[name] = _cycling(batches)
        seconds = seconds_in_turn(runs, device, rounds, collect=False)
        for name, values in seconds.items():
            p20, p50, p80 = np.quantile(values, (0.2, 0.5, 0.8)) * 1e3
            yield (
                {"case": "augment", "augment": name, "patch": patch, "batch": batch}
                | {"ms": p50, "ms_mean": 1e3 * statistics.mean(values), "ms_p20": p20}
                | {"ms_p80": p80, "rounds": len(values)}
            )


def _on(device: torch.device, reader: SampleReader, batch: int, index: int) -> RawBatch:
    samples: tuple[Sample, ...] = tuple(reader(index * batch + slot) for slot in range(batch))
    raw = RawBatch(reader.patch_size, samples)
    return raw.map(lambda array: torch.from_numpy(array).to(device))


def _cycling(batches: list[RawBatch]) -> Callable[[], object]:
    source = itertools.cycle(batches)
    return lambda: assemble(next(source))


def wait_row(store: Store, plan: Plan) -> Row:
    """The share of training steps spent waiting for data, with a real network; the first step, in
    which the workers start, does not count."""
    torch.manual_seed(SEED)
    patch, device = plan.patches[0], plan.device
    mae = SparseMAE(ResEncUNet.from_preset(plan.preset), CELL).to(device)
    config = TrainConfig(steps=plan.steps + 2, lr=1e-4)
    loader = make_loader(
        *(store, (patch,) * 3, plan.batch),
        seed=SEED,
        steps=config.steps,
        workers=plan.workers,
        augment=AugmentConfig(),
    )

    def loss_of(model: nn.Module, batch: dict[str, Any], step: int) -> Loss:
        image, generator = batch["image"], torch.Generator().manual_seed(step)
        masks = mae.draw_masks(len(image), (patch,) * 3, 0.75, generator=generator).to(device)
        return Loss(*masked_error(model(image, masks), image, masks.scored, batch["excluded"]))

    records: list[StepRecord] = []
    with contextlib.closing(to_device_ahead(loader, device)) as batches:
        state = State(mae, make_optimizer({"all": mae.parameters()}, config))
        fit(
            *(state, loss_of, batches, config),
            ranks=Ranks(torch.device(device)),
            on_step=records.append,
            save=lambda state: None,
        )
    # the first step warms up, the last has no batch to wait for
    waits, seconds = ([getattr(r, n) for r in records[1:-1]] for n in ("wait_seconds", "seconds"))
    return (
        {"case": "wait", "preset": plan.preset, "patch": patch, "batch": plan.batch}
        | {"workers": plan.workers, "steps": plan.steps, "step_seconds": statistics.median(seconds)}
        | {"wait_seconds": statistics.median(waits), "wait_share": sum(waits) / sum(seconds)}
    )


def drop_from_cache(path: Path) -> None:
    """Ask the system to forget the pages of a file that is on disk; ours alone needs no rights."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bytes_from_disk() -> int:
    """What this process had read from disks until now; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return next((int(s.split()[1]) for s in lines if s.startswith("read_bytes:")), 0)
