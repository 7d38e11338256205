"""Give weights away: to nnU-Net, to nnssl's tools, or as safetensors with our own names.

What leaves is what `read_pretrained` reads back, bit for bit. nnU-Net's and nnssl's files have
their axes, ours have our own, and all say so.
"""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch

from sparsemae.data.codes import one_line
from sparsemae.errors import UserError
from sparsemae.exporting.metadata import as_text, describe
from sparsemae.exporting.nnssl import adaptation_plan
from sparsemae.exporting.nnunet import WEIGHTS, state_dict, to_bytes
from sparsemae.files import write_atomically
from sparsemae.models.resenc import ResEncUNet
from sparsemae.planning.nnunet_plans import NnunetPlans, read_plans
from sparsemae.planning.plan import build_network
from sparsemae.runfiles import CHECKPOINTS
from sparsemae.transfer import Pretrained, TransferTable, check_useful, read_pretrained, transfer
from sparsemae.transfer.copying import kept
from sparsemae.transfer.kernels import OURS
from sparsemae.transfer.pretrained import METADATA, ZYX

Format = Literal["nnunet", "nnssl", "safetensors", "encoder"]
FORMATS = ("nnunet", "nnssl", "safetensors", "encoder")
TRAINER_FOLDER, TRAINER = "nnunet_trainer", "nnUNetTrainerSawtooth.py"
REPOSITORY = ("checkpoint_final.pth", "adaptation_plan.json", "config.json")  # nnssl's on the Hub


def export(
    run: Path,
    format: Format,
    output: Path,
    *,
    plans: Path | None = None,
    dataset_json: Path | None = None,
    configuration: str = "3d_fullres",
    trainer: bool = False,
    overwrite: bool = False,
) -> TransferTable:
    """Write the newest weights of a run, averaged if it keeps averages.

    Args:
        run: A run folder, or any file that `read_pretrained` takes.
        format: "nnunet" for `-pretrained_weights`; "nnssl" with its adaptation plan, to a file, or
            without an ending to a folder as its models on the Hugging Face Hub have it;
            "safetensors" of all tensors, "encoder" of the encoder's.
        plans: nnU-Net's plans of the data set to fine-tune on: "nnunet" then has their network.
        dataset_json: That data set's; goes with `plans`.
        configuration: Of the plans.
        trainer: Put a fine-tuning trainer for nnU-Net beside the output, in a folder of its own,
            since nnU-Net imports every file of such a folder.
        overwrite: Replace what is there.

    Raises:
        UserError: The source, plans or output cannot be used, or little of it fits the plans.
        OSError: The output cannot be written.
    """
    parts = _parts(format, output)
    helper = output.parent / TRAINER_FOLDER / TRAINER
    code = (files("sparsemae.exporting") / TRAINER).read_bytes()
    known = not trainer or (helper.is_file() and helper.read_bytes() == code)
    _check(run, format, output, parts if known else [*parts, helper], overwrite=overwrite)
    if trainer and format != "nnunet":
        raise UserError(f"--trainer: it is nnU-Net's and goes with --format nnunet, not {format}")
    planned = _planned(format, plans, dataset_json, configuration)
    pretrained = read_pretrained(run)
    if format in ("safetensors", "encoder"):
        table, contents = _safetensors(pretrained, encoder_only=format == "encoder")
    else:
        table, contents = _torch(pretrained, parts, planned, nnssl=format == "nnssl")
    written = list(zip(parts, contents, strict=True))
    if trainer:
        written.append((helper, code))
    for path, data in reversed(written):  # what is asked for last: it stands for the rest
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
    return table


def _parts(format: Format, output: Path) -> list[Path]:
    """The files to write."""
    if format not in FORMATS:
        raise UserError(f"--format {format}: choose from {', '.join(FORMATS)}")
    if format == "nnssl" and not output.suffix:
        return [output / name for name in REPOSITORY]
    return [output]


def _check(run: Path, format: Format, output: Path, parts: list[Path], *, overwrite: bool) -> None:
    """Refuse to write where something would be lost."""
    checkpoints = (run / CHECKPOINTS).resolve()
    if checkpoints in (output.resolve(), *output.resolve().parents):
        raise UserError(one_line(f"{output}: inside the run's checkpoints; choose another -o"))
    for part in parts:
        if part.is_dir():
            raise UserError(one_line(f"{part}: a folder; name a file for --format {format}"))
        if part.exists() and not overwrite:
            raise UserError(one_line(f"{part} exists already: choose another -o, or --overwrite"))
    if run.exists() and any(part.exists() and part.samefile(run) for part in parts):
        raise UserError(one_line(f"{output}: the weights themselves; choose another -o"))


def _planned(
    format: Format, plans: Path | None, dataset_json: Path | None, configuration: str
) -> NnunetPlans | None:
    if plans is None and dataset_json is None:
        return None
    if format != "nnunet":
        raise UserError(
            f"--plans: they are nnU-Net's, so they go with --format nnunet, not {format}"
        )
    if plans is None or dataset_json is None:
        missing = "--plans" if plans is None else "--dataset-json"
        raise UserError(f"{missing}: missing; plans.json and dataset.json go together")
    return read_plans(plans, dataset_json, configuration)


def _torch(
    pretrained: Pretrained, parts: list[Path], planned: NnunetPlans | None, *, nnssl: bool
) -> tuple[TransferTable, list[bytes]]:
    """nnU-Net's or nnssl's files; the network is that of the plans, or the source's own."""
    if planned is None:
        network, axes = _own_network(pretrained), ZYX
        table = transfer(pretrained, network, "encoder+decoder", heads=True)
    else:
        network, axes = _fresh(planned), planned.axes
        table = transfer(pretrained, network, "encoder+decoder")
        check_useful(table)
    about = describe(pretrained, network.topology, axes)
    content: dict[str, Any] = {WEIGHTS: state_dict(network, axes), METADATA: about}
    if not nnssl:
        return table, [to_bytes(content)]
    plan = adaptation_plan(pretrained, network.topology, axes)
    content["nnssl_adaptation_plan"] = plan
    config = {"library_name": "nnssl", "architecture": plan["architecture_plans"]}
    texts = [json.dumps(value, indent=1).encode() for value in (plan, config)]
    return table, [to_bytes(content), *texts][: len(parts)]


def _safetensors(
    pretrained: Pretrained, *, encoder_only: bool
) -> tuple[TransferTable, list[bytes]]:
    prefix = "encoder." if encoder_only else ""
    tensors = {n: t.contiguous() for n, t in pretrained.tensors.items() if n.startswith(prefix)}
    about = as_text(describe(pretrained, pretrained.topology, OURS))
    return kept(pretrained, tensors.keys()), [safetensors.torch.save(tensors, about)]


def _own_network(pretrained: Pretrained) -> ResEncUNet:
    """The network the weights are of, to be filled with them."""
    topology, head = pretrained.topology, pretrained.tensors.get("decoder.seg_layers.0.weight")
    if topology is None or head is None:
        raise UserError(
            one_line(
                f"{pretrained.origin}: an encoder alone: give --plans and --dataset-json of a data "
                f"set of nnU-Net's, or --format encoder"
            )
        )
    return ResEncUNet(
        pretrained.input_channels,
        head.shape[0],
        **topology.arguments(),
    )


def _fresh(planned: NnunetPlans) -> ResEncUNet:
    """The planned network as nnU-Net would start it; the same one every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_network(planned.plan, planned.num_classes, deep_supervision=True)
