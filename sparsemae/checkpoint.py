"""Checkpoints: safetensors and JSON, no pickle, committed by one rename, verified when read.

A checkpoint is a folder `step-00001234` with `model.safetensors`, `optimizer.safetensors` and
`meta.json`, which lists size and SHA-256 of the others and is written last. Whatever happens while
one is written, the ones before it stay whole.
"""

import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from sparsemae.errors import UserError
from sparsemae.files import sync_folder, write_synced

FORMAT = 1
MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"


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


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    meta: dict[str, Any],
    *,
    keep: int,
) -> Path:
    """Write `folder/step-<step>`, then remove all but the newest `keep` up to this step.

    Checkpoints of later steps go too: a run is continued from its newest whole one, so they are
    damaged, or of a future that is being written anew.

    Raises:
        OSError: The disk is full or not writable; earlier checkpoints are untouched.
    """
    final = folder / f"step-{step:08d}"
    partial = folder / f".tmp-{final.name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = {MODEL: model_tensors(model), OPTIMIZER: _optimizer_tensors(model, optimizer)}
    listing = {}
    for name, content in tensors.items():
        data = safetensors.torch.save(content)
        write_synced(partial / name, data)
        listing[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    full = {"format": FORMAT, "step": step, **meta, "files": listing}
    write_synced(partial / "meta.json", json.dumps(full, indent=1).encode())
    sync_folder(partial)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    sync_folder(folder)
    past = [path for path in _folders(folder) if path.name <= final.name]
    for path in _folders(folder):
        if path not in past[-keep:]:
            shutil.rmtree(path)
    return final


def load_checkpoint(folder: Path) -> tuple[Checkpoint, list[str]]:
    """The newest whole checkpoint, and a warning for each newer one that is damaged.

    Raises:
        UserError: There is none, or none is whole.
    """
    warnings = []
    for path in reversed(_folders(folder)):
        problem = _problem(path)
        if problem is None:
            return Checkpoint(path, json.loads((path / "meta.json").read_text())), warnings
        warnings.append(f"{path}: {problem}; using the checkpoint before it")
    if warnings:
        found = "; ".join(warning.rpartition(";")[0] for warning in warnings)
        raise UserError(f"no whole checkpoint ({found}): put back a copy, or start a new run")
    raise UserError(
        f"no checkpoint in {folder}: the run stopped before its first; "
        f"remove its folder and start it anew"
    )


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, each under its first name only, on the CPU."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().cpu().contiguous() for name, tensor in named}


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
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    """Restore what `save_checkpoint` stored of the optimiser's state."""
    parameters = dict(model.named_parameters())
    for key, tensor in tensors.items():
        name, _, entry = key.rpartition("/")
        parameter = parameters[name]
        device = "cpu" if entry == "step" else parameter.device
        optimizer.state[parameter][entry] = tensor.to(device)


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    out = {}
    for name, parameter in model.named_parameters():
        for entry, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                out[f"{name}/{entry}"] = value.detach().cpu().contiguous()
    return out


def _folders(folder: Path) -> list[Path]:
    """Of checkpoints, oldest first; a copy under a name of somebody's own is not one."""
    return sorted(p for p in folder.glob("step-*") if re.fullmatch(r"step-\d{8}", p.name))


def _problem(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    try:
        meta = json.loads((path / "meta.json").read_text())
        if meta["format"] > FORMAT:
            return f"format {meta['format']} is newer than this version of sparsemae reads"
        if path.name != f"step-{meta['step']:08d}" or meta["files"].keys() != {MODEL, OPTIMIZER}:
            return "meta.json is damaged"
        for name, expected in meta["files"].items():
            digest = hashlib.sha256()
            with (path / name).open("rb") as file:
                while chunk := file.read(2**22):
                    digest.update(chunk)
            if digest.hexdigest() != expected["sha256"]:
                return f"{name} is damaged"
    except OSError as error:
        return f"incomplete ({error.strerror}: {Path(error.filename).name})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "meta.json is damaged"
    return None
