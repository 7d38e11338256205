"""Masked autoencoding as a task for the training loop: batches, loss, validation and preview.

Every random number of a sample, its mask included, follows from the seed and the sample's number in
the run. So a step sees the same on one rank or many, in one part or several.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from sparsemae.data.loader import check_parts, make_loader
from sparsemae.data.loading.augment import assemble
from sparsemae.data.loading.prefetch import to_device_ahead
from sparsemae.data.loading.samples import RawBatch, SampleReader
from sparsemae.data.store import Store
from sparsemae.models.mae import SparseMAE, masked_error
from sparsemae.models.masking import Masks
from sparsemae.pretraining.config import PretrainConfig
from sparsemae.training.loop import Batch, Loss
from sparsemae.training.options import evaluating
from sparsemae.training.ranks import Ranks

if TYPE_CHECKING:
    from sparsemae.reporting.preview import Preview

PREVIEWED = 2  # patches in the report
_MASKS, _RATIO, _VALIDATION = range(3)  # what random numbers are for


class Objective:
    """Of a configuration, a store and a model that is on the ranks' device.

    Raises:
        UserError: The batch cannot be split as `train.accumulate` asks.
    """

    def __init__(self, config: PretrainConfig, store: Store, mae: SparseMAE, ranks: Ranks):
        self.config, self.mae, self.ranks = config, mae, ranks
        self._train, held_out = store.split("train"), store.split("val")
        self.validated = config.data.validation > 0 and len(held_out) > 0
        # what is never trained on, the same for runs of any seed, so that they compare
        shown = held_out if len(held_out) else self._train
        size = config.data.patch_size
        self._order = SampleReader(self._train, size, seed=config.seed)
        self._fixed = SampleReader(shown, size, seed=0, foreground=1.0)
        check_parts(config.data.batch_size, ranks.world_size, config.train.accumulate)

    def batches(self, start_step: int) -> Iterable[Batch]:
        """This rank's share of the batches from a step on."""
        data = self.config.data
        loader = make_loader(
            self._train,
            data.patch_size,
            data.batch_size,
            seed=self.config.seed,
            steps=self.config.train.steps,
            start_step=start_step,
            workers=data.workers,
            augment=data,
            foreground=data.foreground,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            timeout=data.timeout,
        )
        return to_device_ahead(loader, self.ranks.device)

    def cases_of(self, step: int) -> list[str]:
        """The cases of a step's samples, over all ranks."""
        size = self.config.data.batch_size
        return [self._order.case_of(step * size + slot).id for slot in range(size)]

    def loss_of(self, model: nn.Module, batch: Batch, step: int) -> Loss:
        """The squared error on masked voxels that are not excluded."""
        first = step * self.config.data.batch_size
        masks = self._masks([first + slot for slot in batch["slots"]], self._ratio(step), _MASKS)
        image = batch["image"]
        total, weight = masked_error(model(image, masks), image, masks.scored, batch["excluded"])
        return Loss(total, weight)

    def validate(self, model: SparseMAE) -> float:
        """The mean error on fixed patches of held-out cases with fixed masks; on all ranks."""
        ranks, count = self.ranks, self.config.data.validation
        precision = self.config.train.precision
        sums = torch.zeros(2, count, dtype=torch.float64, device=ranks.device)
        with evaluating(model, precision, ranks.device):
            for i in range(ranks.rank, count, ranks.world_size):
                batch, masks = self._held_out(i)
                image = batch["image"]
                out = masked_error(model(image, masks), image, masks.scored, batch["excluded"])
                sums[:, i] = torch.stack(out)
        total, weight = ranks.total(sums).sum(1).tolist()
        return total / max(weight, 1e-12)

    def preview(self, model: SparseMAE, step: int) -> "Preview":
        """The first validation patches, and what the model makes of them."""
        from sparsemae.reporting.preview import Preview  # only where there is a report

        shown = [self._held_out(i) for i in range(PREVIEWED)]
        precision, ranks = self.config.train.precision, self.ranks
        restored = []
        with evaluating(model, precision, ranks.device), model.decoding_all_masked():
            for batch, masks in shown:
                restored.append(model.reconstruct(batch["image"], masks).float().cpu())
        return Preview(
            step=step,
            cases=tuple(batch["case"][0] for batch, _ in shown),
            original=torch.cat([b["image"].cpu() for b, _ in shown])[:, 0].numpy(),
            reconstruction=torch.cat(restored)[:, 0].numpy(),
            visible=torch.cat([m.visible.visible.cpu() for _, m in shown]).numpy(),
            block_size=model.block_size,
            spacing=np.array([self._fixed.case_of(i).spacing for i in range(PREVIEWED)]),
        )

    def _held_out(self, i: int) -> tuple[Batch, Masks]:
        """Fixed patch i and its fixed masks."""
        raw = RawBatch(self._fixed.patch_size, (self._fixed(i),))
        batch = assemble(raw.map(lambda a: torch.from_numpy(a).to(self.ranks.device)))
        return batch, self._masks([i], self.config.mask.typical, _VALIDATION)

    def _masks(self, samples: Sequence[int], ratio: float, purpose: int) -> Masks:
        seed = 0 if purpose == _VALIDATION else self.config.seed
        generators = [
            torch.Generator().manual_seed(_key(seed, purpose, sample)) for sample in samples
        ]
        masks = self.mae.draw_masks(
            len(samples), self.config.data.patch_size, ratio, generator=generators
        )
        return masks.to(self.ranks.device)

    def _ratio(self, step: int) -> float:
        """Of all samples of a step: one shape for all of them, and for all ranks."""
        low, high = self.config.mask.range
        if low == high:
            return low
        key = _key(self.config.seed, _RATIO, step)
        return float(np.random.default_rng(key).uniform(low, high))


def _key(seed: int, purpose: int, number: int) -> int:
    sequence = np.random.SeedSequence(seed, spawn_key=(purpose, number))
    return int(sequence.generate_state(1, np.uint64)[0])
