"""Segmentation as a task for the training loop: batches, loss, validation and preview.

Every random number of a sample follows from the seed and the sample's number in the run, so a step
sees the same on one rank or many, in one part or several.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparsemae.data.loader import Loader, check_parts
from sparsemae.data.loading.prefetch import to_device_ahead
from sparsemae.data.loading.samples import RawBatch
from sparsemae.errors import UserError
from sparsemae.finetuning.config import FinetuneConfig
from sparsemae.finetuning.loss import segmentation_loss
from sparsemae.models.resenc import ResEncUNet
from sparsemae.planning.plan import Plan
from sparsemae.segmentation.dataset import IGNORE, Classes
from sparsemae.segmentation.patches import assemble
from sparsemae.segmentation.samples import LabelledReader
from sparsemae.segmentation.store import LabelledStore
from sparsemae.training.loop import Batch, Loss
from sparsemae.training.options import evaluating
from sparsemae.training.ranks import Ranks

if TYPE_CHECKING:
    from sparsemae.reporting.segmentation import SegmentationPreview

PREVIEWED = 3  # patches in the report, of as many cases if there are


class Segmentation:
    """Of a configuration, a plan, the cases of a fold and a network on the ranks' device."""

    def __init__(
        self,
        config: FinetuneConfig,
        plan: Plan,
        classes: Classes,
        train: LabelledStore,
        held_out: LabelledStore,
        network: ResEncUNet,
        ranks: Ranks,
    ):
        self.config, self.plan, self.classes = config, plan, classes
        self.network, self.ranks = network, ranks
        masked = [channel.masked for channel in plan.channels]

        def reader(
            store: LabelledStore, seed: int, vary: str, foreground: float = config.data.foreground
        ) -> LabelledReader:
            return LabelledReader(
                *(store, plan.patch_size, plan.batch_size),
                seed=seed,
                augment=config.data,
                masked=masked,
                vary=vary,
                foreground=foreground,
            )

        self._reader = reader(train, config.seed, config.data.augmentation)
        # the same for runs of any seed, so that they compare
        self._fixed = reader(held_out, 0, "none")
        self._shown = reader(held_out if len(held_out) else train, 0, "none", foreground=1.0)

    def batches(self, start_step: int) -> Iterable[Batch]:
        """This rank's share of the batches from a step on."""
        data, size = self.config.data, self.plan.batch_size
        each = size // self.ranks.world_size
        share = range(self.ranks.rank * each, (self.ranks.rank + 1) * each)
        steps = range(start_step, self.config.train.steps)
        pool = {"workers": data.workers, "timeout": data.timeout}
        loader = Loader(self._reader, steps, share, size, **pool)
        return to_device_ahead(loader, self.ranks.device, assemble)

    def cases_of(self, step: int) -> list[str]:
        """The cases of a step's samples, over all ranks."""
        size = self.plan.batch_size
        return [self._reader.case_of(step * size + slot).id for slot in range(size)]

    def loss_of(self, model: nn.Module, batch: Batch, step: int) -> Loss:
        """Dice and cross-entropy over all levels of the decoder."""
        return segmentation_loss(
            model(batch["image"]),
            batch["labels"],
            ignore=self.classes.ignore,
            batch_dice=self.plan.batch_dice,
            total_of=self.ranks.total_of_parts,
        )

    def validate(self, model: ResEncUNet) -> float:
        """1 minus the mean Dice of the classes over fixed patches of held-out cases; on all ranks.

        As nnU-Net's pseudo Dice, the voxels of all patches are counted together.
        """
        ranks, count = self.ranks, self.config.data.validation
        counts = torch.zeros(3, len(self.classes), dtype=torch.float64, device=ranks.device)
        with evaluating(model, self.config.train.precision, ranks.device):
            for i in range(ranks.rank, count, ranks.world_size):
                batch = self._patch(self._fixed, i)
                logits = model(batch["image"])[0]
                counts += overlap(logits.argmax(1), batch["labels"], self.classes)
        return 1 - mean_dice(ranks.total(counts))

    def preview(self, model: ResEncUNet, step: int) -> "SegmentationPreview":
        """Fixed patches of held-out cases around their classes, and what the model makes of them;
        of cases that are trained on if none is held out."""
        from sparsemae.reporting.segmentation import SegmentationPreview  # only for a report

        shown = [self._patch(self._shown, i) for i in range(PREVIEWED)]
        with evaluating(model, self.config.train.precision, self.ranks.device):
            found = [model(batch["image"])[0].argmax(1).cpu() for batch in shown]
        ignored = self.classes.ignore is not None
        return SegmentationPreview(
            step=step,
            cases=tuple(batch["case"][0] for batch in shown),
            image=torch.cat([batch["image"][:, 0].cpu() for batch in shown]).numpy(),
            reference=torch.cat([batch["labels"].cpu() for batch in shown]).numpy(),
            prediction=torch.cat(found).numpy(),
            names=self.classes.names + (IGNORE,) * ignored,
            ignore=ignored,
            spacing=np.array([self._shown.case_of(i).spacing for i in range(PREVIEWED)]),
        )

    def _patch(self, reader: LabelledReader, i: int) -> Batch:
        """Patch i of a reader, as a batch of one on the device."""
        raw = RawBatch(self.plan.patch_size, (reader(i),))
        return assemble(raw.map(lambda a: torch.from_numpy(a).to(self.ranks.device)))


def check_batch(config: FinetuneConfig, plan: Plan, world_size: int) -> None:
    """Refuse a batch that cannot be split as `train.accumulate` and the ranks ask.

    Raises:
        UserError: It does not divide, or not without another loss.
    """
    parts = config.train.accumulate
    check_parts(plan.batch_size, world_size, parts)
    if plan.batch_dice and parts > 1:
        raise UserError(
            f"train.accumulate {parts}: the plan has one Dice over a whole batch (batch_dice), "
            f"which parts would change: set 1, with more ranks or a lower data.batch_size"
        )


def overlap(predicted: Tensor, labels: Tensor, classes: Classes) -> Float[Tensor, "3 C"]:
    """Voxels of each class in both, in the prediction and in the labels; ignored ones left out."""
    known = labels != classes.ignore if classes.ignore is not None else labels >= 0
    predicted, labels = predicted[known], labels[known]
    n = len(classes)
    both = torch.bincount(labels[predicted == labels], minlength=n)
    return torch.stack([both, *(torch.bincount(x, minlength=n) for x in (predicted, labels))])


def mean_dice(counts: Float[Tensor, "3 C"]) -> float:
    """Over the foreground classes that are in the prediction or the labels; 0 if none is."""
    both, predicted, labels = counts[:, 1:]
    there = predicted + labels > 0
    if not there.any():
        return 0.0
    return float((2 * both[there] / (predicted + labels)[there]).mean())
