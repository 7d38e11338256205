"""Prediction: label maps of whole volumes, on the grid and with the header of the images."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from sparsemae.data.codes import VolumeError
from sparsemae.data.read import Volume
from sparsemae.errors import UserError
from sparsemae.files import TEMPORARY
from sparsemae.live import LiveLine, say
from sparsemae.models.resenc import ResEncUNet
from sparsemae.predicting.ensemble import Ensemble, load_ensemble
from sparsemae.predicting.inputs import find_cases
from sparsemae.predicting.labels import Sink, to_labels
from sparsemae.predicting.overlay import draw_overlay
from sparsemae.predicting.placement import place
from sparsemae.predicting.record import LABELS, OVERLAY, PROBABILITY_MAPS, Record
from sparsemae.predicting.stream import MIRROR_AXES, STEP, predict_logits
from sparsemae.predicting.write import label_dtype, write_like
from sparsemae.segmentation.dataset import SegCase, read_dataset
from sparsemae.segmentation.prepare import prepare_case
from sparsemae.segmentation.reading import read_channels
from sparsemae.training.memory import memory_explained
from sparsemae.training.ranks import pick_device

__all__ = ["Predictions", "predict"]


@dataclass
class Predictions:
    """What became of every case."""

    written: list[Path] = field(default_factory=list)
    kept: list[Path] = field(default_factory=list)  # there before, by the same weights
    failures: dict[str, str] = field(default_factory=dict)  # by case
    stopped: bool = False
    warnings: list[str] = field(default_factory=list)


def predict(
    runs: list[Path],
    source: Path | None,
    output: Path,
    *,
    validation: bool = False,
    best: bool = False,
    step: float = STEP,
    mirror: bool = True,
    probabilities: bool = False,
    overlay: bool = False,
    device: str = "auto",
    precision: str | None = None,
    sums_on: str | None = None,
    overwrite: bool = False,
    console: Console | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Predictions:
    """Segment every case of `source` with the mean of `runs`, and write OUTPUT/CASE.nii.gz.

    A case that cannot be read does not keep the others from being predicted. Run again, cases that
    are there already are left alone, if the same weights and options made them.

    Args:
        runs: Fine-tuning runs of one plan, or folders of such runs; their logits are averaged.
        source: A folder of images, or one file; None with `validation`.
        validation: Predict the cases that the run held out of its own data set.
        best: The checkpoints of the highest validation Dice, not the newest.
        step: From one window to the next at the most, in windows.
        mirror: Also predict mirrored windows, 8 in all, and average.
        probabilities: Write OUTPUT/CASE_probabilities.nii.gz too, a frame per class.
        overlay: Draw OUTPUT/CASE.png too.
        device: auto, cpu, cuda or cuda:1.
        precision: fp32, bf16 or fp16; what the run was trained in on a GPU, fp32 on a CPU, if None.
        sums_on: Where logits are summed up, if not on `device`: cpu where a GPU is too small.
        stopped: Asked between cases.

    Raises:
        UserError: No runs, no images, or `output` holds other predictions.
        OSError: The output cannot be written.
    """
    console = console or Console(quiet=True)
    ensemble = load_ensemble(runs, best=best)
    cases = _cases(ensemble, source, validation=validation)
    chosen = pick_device(device, key="--device")
    summing = chosen if sums_on is None else pick_device(sums_on, key="--sums-on")
    for line in ensemble.told():
        say(console, line)
    if precision is None:
        precision = ensemble.runs[0].config.train.precision if chosen.type == "cuda" else "fp32"
    options = {"step": step, "mirror": mirror, "precision": precision}
    record = Record.claim(output, _facts(ensemble, options), overwrite=overwrite)
    work = _Work(
        ensemble=ensemble,
        networks=[run.network.to(chosen) for run in ensemble.runs],
        record=record,
        windows={
            "step": step,
            "mirror_axes": MIRROR_AXES if mirror else (),
            "device": chosen,
            "sums_on": summing,
            "precision": precision,
        },
        probabilities=probabilities,
        overlay=overlay,
    )
    done = Predictions(warnings=ensemble.warnings)
    with LiveLine(console, "cases", total=len(cases)) as line:
        for number, case in enumerate(cases):
            path = work.labels_of(case)
            if work.is_done(case):
                done.kept.append(path)
                continue
            if stopped():
                done.stopped = True
                break
            begun = f"case {number + 1}/{len(cases)}  {case.id}"

            def on_window(now: int, total: int, number: int = number, begun: str = begun) -> None:
                text = f"window {now} of {total}"
                line.update(number, len(cases), text, f"{begun}: {text}")
                if stopped():
                    raise _StoppedError

            try:
                with memory_explained(partial(_memory_advice, case.id)):
                    work.predict(case, on_window)
            except _StoppedError:
                done.stopped = True
                break
            except VolumeError as error:
                done.failures[case.id] = str(error)
                line.say(f"{case.id}: left out: {error}")
                continue
            except UserError as error:
                raise UserError(f"{case.id}: {error}") from None
            done.written.append(path)
            line.update(number + 1, len(cases), case.id, f"{begun}: done", last=True)
    return done


@dataclass(frozen=True)
class _Work:
    """One case after the other by the same networks."""

    ensemble: Ensemble
    networks: list[ResEncUNet]
    record: Record
    windows: dict[str, Any]  # of `predict_logits`
    probabilities: bool
    overlay: bool

    def labels_of(self, case: SegCase) -> Path:
        return self._beside(case, LABELS)

    def is_done(self, case: SegCase) -> bool:
        """Whether all that is wanted of it is there."""
        files = [self.labels_of(case)]
        files += [self._beside(case, PROBABILITY_MAPS)] * self.probabilities
        files += [self._beside(case, OVERLAY)] * self.overlay
        return self.record.holds(case) and all(path.is_file() for path in files)

    def predict(self, case: SegCase, on_window: Callable[[int, int], None]) -> None:
        """Write what is wanted of a case, its label map last; `VolumeError` if it is unfit."""
        plan, classes = self.ensemble.plan, self.ensemble.task.classes
        volumes = read_channels(case.images)
        ready = prepare_case(volumes, None, plan)
        first = volumes[0]
        volumes.clear()  # one channel is enough for what follows
        crop = (ready.crop_start, ready.crop_stop)
        placement = place(first.array.shape, first.affine, crop, plan.spacing)
        stream = predict_logits(
            *(ready.array, self.networks, plan.patch_size), on_window=on_window, **self.windows
        )
        wanted = self._beside(case, PROBABILITY_MAPS) if self.probabilities else None
        with _sink(wanted, len(classes), first, stream.axis) as sink:
            labels = to_labels(stream, placement, probabilities=sink)
        if self.overlay:
            path = self._beside(case, OVERLAY)
            draw_overlay(first.array, labels, first.spacing, classes.names, path)
        write_like(self.labels_of(case), labels, first.native, label_dtype(len(classes)))
        self.record.add(case)

    def _beside(self, case: SegCase, ending: str) -> Path:
        return self.record.folder / f"{case.id}{ending}"


def _cases(ensemble: Ensemble, source: Path | None, *, validation: bool) -> list[SegCase]:
    task = ensemble.task
    if not validation:
        if source is None:
            raise UserError("IN: name a folder of images, or a file; or give --validation")
        return find_cases(source, task.channels)
    if len(ensemble.runs) > 1:
        raise UserError("--validation: the cases held out of one run; name one run, not several")
    dataset = read_dataset(Path(task.path) if source is None else source)
    known = {case.id: case for case in dataset.training}
    if missing := [name for name in task.val if name not in known]:
        raise UserError(f"{dataset.path}: case {missing[0]} of the run is not in it; name it as IN")
    if not task.val:
        raise UserError(f"{ensemble.paths[0]}: its fold held out no cases; name IN")
    return [known[name] for name in task.val]


def _facts(ensemble: Ensemble, options: dict[str, Any]) -> dict[str, Any]:
    return {
        "weights": ensemble.facts(),
        "options": options,
        "channels": list(ensemble.task.channels),
        "labels": {name: i for i, name in enumerate(ensemble.task.classes.names)},
    }


class _StoppedError(Exception):
    """A stop was asked for in the middle of a case."""


def _memory_advice(case: str, where: str) -> str:
    return (
        f"{case}: out of memory ({where}): predict with fewer runs at a time, or, if it is the "
        f"GPU's, sum up on the host with --sums-on cpu"
    )


@contextlib.contextmanager
def _sink(path: Path | None, classes: int, volume: Volume, axis: int) -> Iterator[Sink | None]:
    """What takes probabilities, on disk until they are written."""
    if path is None:
        yield None
        return
    shape = (classes, *volume.array.shape)
    with tempfile.TemporaryFile(dir=path.parent, suffix=TEMPORARY) as file:
        array = np.memmap(file, np.float32, "w+", shape=shape)
        planes = np.moveaxis(array, axis + 1, 1)

        def sink(index: int, plane: np.ndarray) -> None:
            planes[:, index] = plane

        yield sink
        write_like(path, array, volume.native, np.float32)
