"""What a fine-tuning run keeps beside its configuration, as rows of its page."""

from pathlib import Path
from typing import Any

from sparsemae.reporting.readback import number, read_json
from sparsemae.runfiles import PLAN, TASK


def read_facts(run: Path) -> list[tuple[str, object]]:
    """Keys and words: data set, cases, start and plan; what is not there or damaged is left out."""
    task, plan = read_json(run / TASK), read_json(run / PLAN)
    rows = [
        ("data set", _words(task.get("dataset"))),
        ("its folder", _words(task.get("path"))),
        ("classes", _words(task.get("classes"))),
        ("ignored label", _words(task.get("ignore"))),
        ("channels", _words(task.get("channels"))),
        ("cases trained on", _counted(task.get("train"))),
        ("cases held out", _held_out(task.get("train"), task.get("val"))),
        ("started from", "random weights" if task.get("init") == "none" else task.get("init")),
        ("transferred", _words(task.get("transfer"))),
        ("planned by", _words(plan.get("planner"))),
        ("voxel, mm", _size(plan.get("spacing"))),
        ("patch, voxels", _size(plan.get("patch_size"))),
        ("patches per step", _words(plan.get("batch_size"))),
        ("normalization", _normalization(plan.get("channels"))),
        ("features of the stages", _words(plan.get("features_per_stage"))),
        ("their blocks", _words(plan.get("n_blocks_per_stage"))),
        ("their strides", _sizes(plan.get("strides"))),
        ("their kernels", _sizes(plan.get("kernel_sizes"))),
        ("convolutions of the decoder", _words(plan.get("n_conv_per_stage_decoder"))),
    ]
    return [(key, value) for key, value in rows if isinstance(value, str) and value]


def _words(value: Any) -> str:
    """A word or number, or several; nothing for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        words = [_words(item) for item in value if not isinstance(item, list)]
        return ", ".join(words) if len(words) == len(value) else ""
    return "" if number(value) is None else f"{value:.6g}"


def _counted(cases: Any) -> str:
    """How many, and which."""
    if not isinstance(cases, list):
        return ""
    return f"{len(cases)}: {_words(cases)}" if cases else "none"


def _held_out(train: Any, val: Any) -> str:
    return "none: validated on those trained on" if val and val == train else _counted(val)


def _size(value: Any) -> str:
    """1 x 2 x 3."""
    return " x ".join(map(_words, value)) if isinstance(value, list) else ""


def _sizes(value: Any) -> str:
    return ", ".join(map(_size, value)) if isinstance(value, list) else ""


def _normalization(channels: Any) -> str:
    if not isinstance(channels, list) or not all(isinstance(c, dict) for c in channels):
        return ""
    return ", ".join(
        f"{_words(c.get('name'))} {_words(c.get('normalization'))}".strip() for c in channels
    )
