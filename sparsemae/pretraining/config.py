"""The configuration of a pre-training run, and the model it stands for."""

import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field, NonNegativeInt

from sparsemae.config import Size, Strict, floats, is_number
from sparsemae.data.loader import DataConfig
from sparsemae.errors import UserError
from sparsemae.kernels import registry
from sparsemae.kinds import PRETRAINING
from sparsemae.models.mae import SparseMAE
from sparsemae.models.masking import check_decode, check_grid, check_patch
from sparsemae.models.resenc import ResEncUNet
from sparsemae.models.topology import PRESETS
from sparsemae.training.options import RESUMABLE, TrainConfig, check_train, without


def _one_of(what: str, names: Sequence[str]):
    def check(value: Any) -> Any:
        if value not in names:
            raise ValueError(f"unknown {what}, choose from {', '.join(names)}")
        return value

    return BeforeValidator(check)


def _ratio(value: Any) -> Any:
    """A number between 0 and 1, or two of them, the smaller first."""
    value = floats(value)
    if is_number(value):
        if not 0 < value < 1:
            raise ValueError(f"should be {'greater than 0' if value <= 0 else 'less than 1'}")
        return float(value)
    match value:
        case (float(low), float(high)) if 0 < low < high < 1:
            return low, high
    raise ValueError("give a number between 0 and 1, or a list of two, the smaller first")


class ModelConfig(Strict):
    """`[model]`: the network."""

    preset: Annotated[str, _one_of("preset", list(PRESETS))] = "L"


class MaskConfig(Strict):
    """`[mask]`: what is hidden."""

    # fraction of cells hidden in every sample; of two, every step draws one between them
    ratio: Annotated[float | tuple[float, float], BeforeValidator(_ratio)] = 0.75
    block_size: Size | None = None  # voxels of a cell; the network's total stride if absent

    @property
    def range(self) -> tuple[float, float]:
        """The least and the largest ratio."""
        return self.ratio if isinstance(self.ratio, tuple) else (self.ratio, self.ratio)

    @property
    def typical(self) -> float:
        """One ratio, for validation and pictures."""
        return sum(self.range) / 2


class PretrainDataConfig(DataConfig):
    """`[data]` of pre-training."""

    validation: NonNegativeInt = 16  # fixed patches of held-out cases scored at every checkpoint


class PretrainConfig(Strict):
    """Everything that defines a pre-training run but the data."""

    command: ClassVar[str] = PRETRAINING.command

    seed: NonNegativeInt = 0
    backend: Annotated[str, _one_of("backend", ["auto", *registry.BACKENDS])] = "auto"
    decode: Literal["all", "masked"] | Annotated[float, Field(gt=0, lt=1)] = "all"
    densify: bool = True
    sparse: bool = True
    model: ModelConfig = ModelConfig()
    mask: MaskConfig = MaskConfig()
    data: PretrainDataConfig
    train: TrainConfig

    def resolved(self) -> "PretrainConfig":
        """With what follows from other keys written out."""
        if self.mask.block_size is not None:
            return self
        with torch.device("meta"):
            block_size = ResEncUNet.from_preset(self.model.preset).total_stride
        return self.model_copy(
            update={"mask": self.mask.model_copy(update={"block_size": block_size})}
        )

    def going_on(self, before: "PretrainConfig") -> "PretrainConfig":
        """This, given again to resume a run of `before`; what it leaves open is the run's."""
        return self

    def defining(self) -> dict[str, Any]:
        """What a resumed run must have in common with this one, as plain data."""
        return without(self.resolved().model_dump(mode="json"), RESUMABLE)


def build_mae(config: PretrainConfig) -> SparseMAE:
    """The model of a configuration, initialised from its seed, on the CPU.

    Raises:
        UserError: Patch, cell, network, decode policy or schedule do not fit together.
    """
    check_decode(config.decode)
    _check_train(config.train)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = ResEncUNet.from_preset(config.model.preset)
        mae = SparseMAE(
            network,
            config.mask.block_size,
            decode=config.decode,
            densify=config.densify,
            sparse=config.sparse,
            backend=config.backend,
        )
    for head in network.decoder.seg_layers[:-1]:
        head.requires_grad_(False)  # of deep supervision: the finest alone is scored
    check_patch(config.data.patch_size, network.total_stride)
    for ratio in config.mask.range:
        grid = check_grid(config.data.patch_size, mae.block_size, ratio)
        if config.sparse:
            _check_visible(grid, ratio, mae)
    return mae


def _check_train(config: TrainConfig) -> None:
    check_train(config)
    if config.schedule == "sawtooth":
        raise UserError(
            "train.schedule sawtooth: it protects a pre-trained encoder, so it is for fine-tuning; "
            "choose poly, cosine or constant"
        )


def _check_visible(grid: tuple[int, int, int], ratio: float, mae: SparseMAE) -> None:
    """Refuse a bottleneck of one visible voxel, which instance norm would make a constant."""
    deepest = mae.stage_blocks[-1]
    cells = math.prod(grid)
    visible = cells - round(cells * ratio)
    if deepest is not None and visible * math.prod(deepest) < 2:
        raise UserError(
            f"mask.ratio {ratio} leaves one visible voxel at the bottleneck, which instance norm "
            f"cannot normalise: lower it, use a larger data.patch_size or a smaller mask.block_size"
        )
