"""Which plan a new fine-tuning run gets."""

import json
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError
from rich.console import Console

from sparsemae.errors import UserError
from sparsemae.files import write_atomically
from sparsemae.finetuning.config import FinetuneConfig
from sparsemae.live import say
from sparsemae.models.masking import check_patch
from sparsemae.planning.fingerprint import Fingerprint, take_fingerprint
from sparsemae.planning.like_pretrained import Reference, plan_like_pretrained
from sparsemae.planning.nnunet_plans import read_plans
from sparsemae.planning.plan import Plan
from sparsemae.planning.planner import plan_nnunet
from sparsemae.segmentation.dataset import Dataset
from sparsemae.segmentation.making import stamp_of_case
from sparsemae.transfer.pretrained import Pretrained, read_pretrained

FINGERPRINT = "fingerprint.json"


def make_plan(
    config: FinetuneConfig,
    dataset: Dataset,
    pretrained: Pretrained | None,
    folder: Path,
    *,
    workers: int = 1,
    console: Console,
    stopped: Callable[[], bool] = lambda: False,
) -> Plan | None:
    """The plan that `config` asks for; what is learned of the data set is kept in `folder`.

    None if it was `stopped`, which is asked between cases, while it looked at them.

    Raises:
        UserError: Files of the data set cannot be used, the plan is not one for it, or what it
            should follow has no network that is known.
    """
    chosen, data = config.plan, config.data
    if chosen.file is not None:
        return _from_file(config, dataset)
    mode = chosen.mode
    reference = pretrained if chosen.like is None else read_pretrained(Path(chosen.like))
    if mode == "auto":
        known = reference is not None and reference.topology is not None
        mode = "like_pretrained" if known else "nnunet"
    given = {
        "spacing": chosen.spacing,
        "patch_size": data.patch_size,
        "batch_size": data.batch_size,
    }
    _refuse_unused(config, mode)
    if mode == "nnunet":
        fingerprint = _fingerprint(dataset, folder, workers, console, stopped)
        if fingerprint is None:
            return None
        given |= {"preset": chosen.preset, "memory_gb": chosen.memory_gb}
        return plan_nnunet(fingerprint, dataset, **given)
    if reference is None:
        raise UserError(
            "plan.mode like_pretrained: there is nothing to be like; give --init, or plan.like"
        )
    if reference.topology is None or (reference.patch_size is None and data.patch_size is None):
        missing = "strides" if reference.topology is None else "patch size"
        raise UserError(
            f"{reference.origin}: nothing in it tells the network's {missing}; set plan.mode=nnunet"
            f"{', or data.patch_size' if reference.topology is not None else ''}"
        )
    fingerprint = _fingerprint(dataset, folder, workers, console, stopped)
    if fingerprint is None:
        return None
    patch_size = reference.patch_size or data.patch_size
    followed = Reference(reference.topology, patch_size, reference.spacing)
    return plan_like_pretrained(fingerprint, dataset, followed, **given)


_UNUSED = {"nnunet": {"like"}, "like_pretrained": {"preset", "memory_gb"}}


def _refuse_unused(config: FinetuneConfig, mode: str) -> None:
    """A key that does nothing was a misunderstanding."""
    asked = config.plan.model_dump(exclude_defaults=True).keys() & _UNUSED[mode]
    if asked:
        raise UserError(
            f"plan.{sorted(asked)[0]}: a plan of mode {mode} has no use for it; leave it out, or "
            f"set plan.mode"
        )


def _from_file(config: FinetuneConfig, dataset: Dataset) -> Plan:
    path = Path(config.plan.file)
    plans = read_plans(path, dataset.path / "dataset.json", config.plan.configuration)
    asked = config.plan.model_dump(exclude_defaults=True).keys() - {"file", "configuration"}
    if asked:
        raise UserError(f"plan.{sorted(asked)[0]}: plan.file decides that; leave one of them out")
    update = {
        key: value
        for key in ("patch_size", "batch_size")
        if (value := getattr(config.data, key)) is not None
    }
    plan = plans.plan.model_copy(update=update)
    check_patch(plan.patch_size, plan.topology.total_stride)
    return plan


def _fingerprint(
    dataset: Dataset, folder: Path, workers: int, console: Console, stopped: Callable[[], bool]
) -> Fingerprint | None:
    """As kept in `folder`, unless a file of the data set has changed since; None if stopped."""
    path = folder / f"{dataset.name}-{FINGERPRINT}"
    stamps = {case.id: stamp_of_case(case) for case in dataset.training}
    classes = [list(dataset.classes.names), dataset.classes.ignore]
    try:
        kept = json.loads(path.read_text())
        if kept["stamps"] == stamps and kept["classes"] == classes:
            return Fingerprint.model_validate_json(json.dumps(kept["fingerprint"]))
    except (OSError, ValueError, KeyError, TypeError, ValidationError):
        pass  # made anew
    say(console, f"looking at {len(dataset.training)} cases of {dataset.path}")
    fingerprint = take_fingerprint(
        dataset, dataset.training, workers=workers, console=console, stopped=stopped
    )
    if fingerprint is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    found = {
        "stamps": stamps,
        "classes": classes,
        "fingerprint": fingerprint.model_dump(mode="json"),
    }
    write_atomically(path, json.dumps(found, indent=1).encode())
    return fingerprint
