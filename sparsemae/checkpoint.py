"""Checkpoints: safetensors and JSON, no pickle, committed by one rename, verified when read.

A checkpoint is a folder `step-00001234` with `model.safetensors`, `optimizer.safetensors`, where
weights are averaged `ema.safetensors`, and `meta.json`, which lists size and SHA-256 of the others,
ends with its own, and is written last. Whatever happens while one is written, the ones before it
stay whole. The same state makes the same bytes.
"""

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from sparsemae.errors import DivergedError, UserError
from sparsemae.files import sealed, sync_folder, write_synced

FORMAT = 2
MODEL, OPTIMIZER, EMA = "model.safetensors", "optimizer.safetensors", "ema.safetensors"
META = "meta.json"
_LARGEST_META = 2**24  # bytes
_PARTIAL, _DELETED = ".tmp-", ".del-"  # prefixes of what a killed process may leave behind


@dataclass(frozen=True)
class Snapshot:
    """A state copied to the host at the end of a step: training goes on while it is written."""

    step: int
    tensors: dict[str, dict[str, Tensor]]  # by file
    meta: dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint on disk whose files have been verified."""

    path: Path
    meta: dict[str, Any]

    @property
    def step(self) -> int:
        return self.meta["step"]

    def model(self) -> dict[str, Tensor]:
        return safetensors.torch.load_file(self.path / MODEL)

    def optimizer(self) -> dict[str, Tensor]:
        return safetensors.torch.load_file(self.path / OPTIMIZER)

    def ema(self) -> dict[str, Tensor] | None:
        """The averaged weights, or None if the run keeps none."""
        return safetensors.torch.load_file(self.path / EMA) if EMA in self.meta["files"] else None


def take_snapshot(
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    meta: dict[str, Any],
    *,
    ema: nn.Module | None = None,
) -> Snapshot:
    """Copy everything a checkpoint holds.

    Raises:
        DivergedError: A weight is not finite: the checkpoints before stay the last ones.
    """
    tensors = {MODEL: model_tensors(model), OPTIMIZER: _optimizer_tensors(model, optimizer)}
    if ema is not None:
        tensors[EMA] = model_tensors(ema)
    for file in tensors.keys() - {OPTIMIZER}:
        if (name := _not_finite(tensors[file])) is not None:
            raise DivergedError(
                f"step {step}: weight {name} is not finite, so no checkpoint is written; the last "
                f"one is whole. Start a new run with a lower train.lr"
            )
    return Snapshot(step, tensors, meta)


def write_checkpoint(folder: Path, snapshot: Snapshot, *, keep: int, best: int | None) -> Path:
    """Write `folder/step-<step>`, then remove all but the newest `keep` and that of step `best`.

    Checkpoints of later steps go too: a run is continued from its newest whole one, so they are
    damaged, or of a future that is being written anew.

    Raises:
        OSError: The disk is full or not writable; earlier checkpoints are untouched.
    """
    final = _named(folder, snapshot.step)
    partial = folder / f"{_PARTIAL}{final.name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        listing = {}
        for name, content in snapshot.tensors.items():
            data = safetensors.torch.save(content)
            write_synced(partial / name, data)
            listing[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        full = {"format": FORMAT, "step": snapshot.step, **snapshot.meta, "files": listing}
        write_synced(partial / META, json.dumps(sealed(full), indent=1).encode())
        sync_folder(partial)
        if final.exists():
            _remove(final)
        partial.rename(final)
        sync_folder(folder)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)  # gives a full disk its space back
        raise
    past = [path for path in _folders(folder) if path.name <= final.name]
    kept = {*past[-keep:], *([_named(folder, best)] if best is not None else [])}
    for path in _folders(folder):
        if path not in kept:
            _remove(path)
    return final


def load_checkpoint(folder: Path, step: int | None = None) -> tuple[Checkpoint, list[str]]:
    """The newest whole checkpoint, or that of `step`; a warning for each newer one not whole.

    Raises:
        UserError: There is none, or none is whole.
    """
    warnings = []
    found = _folders(folder) if step is None else [p for p in [_named(folder, step)] if p.exists()]
    for path in reversed(found):
        try:
            return Checkpoint(path, _verified(path)), warnings
        except _DamagedError as problem:
            warnings.append(f"{path}: {problem}; using the checkpoint before it")
    if warnings:
        found = "; ".join(warning.rpartition(";")[0] for warning in warnings)
        raise UserError(f"no whole checkpoint ({found}): put back a copy, or start a new run")
    what = "no checkpoint" if step is None else f"no checkpoint of step {step}"
    raise UserError(f"{what} in {folder}: put back a copy, or start a new run")


def newest_meta(folder: Path) -> dict[str, Any]:
    """What the newest checkpoint says that can be read; its weights are not looked at.

    Raises:
        UserError: There is none.
    """
    for path in reversed(_folders(folder)):
        with contextlib.suppress(_DamagedError):
            return _meta(path)
    return load_checkpoint(folder)[0].meta  # says why


def load_best_checkpoint(folder: Path) -> tuple[Checkpoint, list[str]]:
    """That of the best validation, as the newest whole one knows it.

    Raises:
        UserError: There was no validation, or that checkpoint is not whole.
    """
    newest, warnings = load_checkpoint(folder)
    found = newest.meta["trainer"]["best"]
    if found is None:
        raise UserError(f"{folder}: no validation, so no best checkpoint; take the newest")
    best, more = load_checkpoint(folder, found[0])
    return best, warnings + more


def has_checkpoints(folder: Path) -> bool:
    """Whether there is any, whole or not."""
    return bool(_folders(folder))


def clean(folder: Path) -> None:
    """Remove what a killed process left half-written or half-removed; only under the run's lock."""
    for path in [*folder.glob(f"{_PARTIAL}step-*"), *folder.glob(f"{_DELETED}step-*")]:
        shutil.rmtree(path, ignore_errors=True)


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of parameters and buffers on the CPU, each under its first name only."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: _copy(tensor) for name, tensor in named}


def load_model(model: nn.Module, tensors: dict[str, Tensor], origin: Path) -> None:
    """Copy `tensors` (as `model_tensors` gives them) into the model.

    Raises:
        UserError: Names or shapes differ; nothing was copied.
    """
    own = dict([*model.named_parameters(), *model.named_buffers()])
    for name in sorted(own.keys() | tensors.keys()):
        if name not in tensors or name not in own:
            side = "model" if name in tensors else "checkpoint"
            raise UserError(f"{origin}: weight {name} is missing in the {side}: another network")
        if own[name].shape != tensors[name].shape:
            raise UserError(
                f"{origin}: weight {name} has shape {tuple(tensors[name].shape)}, "
                f"the model needs {tuple(own[name].shape)}: another network"
            )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def load_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], origin: Path
) -> None:
    """Restore what a checkpoint holds of the optimiser's state.

    Raises:
        UserError: It is of another network or optimiser.
    """
    parameters = dict(model.named_parameters())
    for key, tensor in tensors.items():
        name, _, entry = key.rpartition("/")
        parameter = parameters.get(name)
        if parameter is None or (tensor.ndim and tensor.shape != parameter.shape):
            raise UserError(f"{origin}: optimiser state {key} does not fit: another network")
        optimizer.state[parameter][entry] = tensor.to(parameter.device)


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    out = {}
    for name, parameter in model.named_parameters():
        for entry, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                out[f"{name}/{entry}"] = _copy(value)
    return out


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _not_finite(tensors: dict[str, Tensor]) -> str | None:
    """The name of a tensor with a value that is not finite, or None."""
    return next((name for name, t in tensors.items() if not t.isfinite().all()), None)


def _named(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def _folders(folder: Path) -> list[Path]:
    """Of checkpoints, oldest first; a copy under a name of somebody's own is not one."""
    return sorted(p for p in folder.glob("step-*") if re.fullmatch(r"step-\d{8}", p.name))


def _remove(path: Path) -> None:
    """Renamed first: half removed, it is no checkpoint."""
    gone = path.with_name(f"{_DELETED}{path.name}")
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    shutil.rmtree(gone)


class _DamagedError(Exception):
    """What is wrong with a checkpoint folder."""


@contextlib.contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Whatever reading a checkpoint comes upon as a `_DamagedError`."""
    try:
        yield
    except OSError as error:
        missing = Path(error.filename or path).name
        raise _DamagedError(f"incomplete ({error.strerror}: {missing})") from None
    except safetensors.SafetensorError as error:
        raise _DamagedError(f"not a safetensors file ({error})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _DamagedError("meta.json is damaged") from None


def _meta(path: Path) -> dict[str, Any]:
    """The meta of a checkpoint, as it was written; `_DamagedError` if not."""
    with _damage(path):
        if (path / META).stat().st_size > _LARGEST_META:
            raise _DamagedError("meta.json is damaged")
        meta = json.loads((path / META).read_text())
        if meta["format"] > FORMAT:
            raise _DamagedError(
                f"format {meta['format']} is newer than this version of sparsemae reads"
            )
        if meta["format"] < FORMAT:
            raise _DamagedError(f"format {meta['format']} is of an older version of sparsemae")
        if sealed(meta) != meta:
            raise _DamagedError("meta.json is damaged")
        files = meta["files"].keys()
        if path.name != f"step-{meta['step']:08d}" or files - {EMA} != {MODEL, OPTIMIZER}:
            raise _DamagedError("meta.json is damaged")
        return meta


def _verified(path: Path) -> dict[str, Any]:
    """The meta of a checkpoint whose files all are as they were written; `_DamagedError` if not."""
    meta = _meta(path)
    files = meta["files"].keys()
    with _damage(path):
        for name, expected in meta["files"].items():
            if (path / name).stat().st_size != expected["size"]:
                raise _DamagedError(f"{name} is damaged")
            with (path / name).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != expected["sha256"]:
                raise _DamagedError(f"{name} is damaged")
        with safetensors.safe_open(path / OPTIMIZER, framework="pt"):
            pass  # its header is whole; values are read where they are needed
        for name in files - {OPTIMIZER}:
            if (weight := _not_finite(safetensors.torch.load_file(path / name))) is not None:
                raise _DamagedError(f"weight {weight} in {name} is not finite")
    return meta
