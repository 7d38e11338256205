"""Fine-tuning in nnU-Net 2.8: the decoder warms up alone, then the whole network, then poly decay.

For `nnUNetv2_train DATASET 3d_fullres FOLD -tr nnUNetTrainerSawtooth -p PLANS -pretrained_weights
FILE`, with `nnUNet_extTrainer` set to the folder of this file, for `nnUNetv2_predict` too. Schedule
and numbers are those of "Revisiting MAE pre-training for 3D medical image segmentation", arXiv
2410.23132: 150 epochs, 15 + 15 of them warm-up, peak 1e-3.
"""

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


def sawtooth(epoch: int, epochs: int, warmup: int, peak: float) -> tuple[float, float]:
    """Learning rates of decoder and encoder in an epoch, from 0."""
    if epoch < warmup:
        return peak * (epoch + 1) / warmup, 0.0
    if epoch < 2 * warmup:
        rate = peak * (epoch - warmup + 1) / warmup
    else:
        rate = peak * (1 - (epoch - 2 * warmup) / (epochs - 2 * warmup)) ** 0.9
    return rate, rate


class Sawtooth:
    """Sets the learning rates of an optimiser's two groups, decoder and encoder."""

    def __init__(self, optimizer, epochs: int, warmup: int, peak: float):
        self.optimizer, self.epochs, self.warmup, self.peak = optimizer, epochs, warmup, peak

    def step(self, epoch: int) -> None:
        """At the start of an epoch."""
        rates = sawtooth(epoch, self.epochs, self.warmup, self.peak)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        if epoch == self.warmup:  # what the encoder's momentum gathered while it stood still
            for parameter in self.optimizer.param_groups[1]["params"]:
                self.optimizer.state.pop(parameter, None)


class nnUNetTrainerSawtooth(nnUNetTrainer):
    """150 epochs; a tenth of them for each warm-up."""

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 as nnU-Net has it
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.initial_lr = 1e-3
        self.num_epochs = 150

    def configure_optimizers(self):
        network = getattr(self.network, "_orig_mod", self.network)  # of torch.compile
        encoder = list(network.encoder.parameters())
        known = {id(parameter) for parameter in encoder}
        decoder = [p for p in network.parameters() if id(p) not in known]
        optimizer = torch.optim.SGD(
            [{"params": decoder}, {"params": encoder}],
            self.initial_lr,
            momentum=0.99,
            nesterov=True,
            weight_decay=self.weight_decay,
        )
        schedule = Sawtooth(optimizer, self.num_epochs, self.num_epochs // 10, self.initial_lr)
        return optimizer, schedule
