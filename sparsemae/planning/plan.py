"""A plan: voxel size, patch and network for one labelled data set, the same for all its runs.

All triples have the axes of our arrays, RAS: left-right, posterior-anterior, inferior-superior.
nnU-Net's arrays have them in reverse; `nnunet_plans` translates.
"""

from typing import Annotated, Literal

from pydantic import BeforeValidator, PositiveFloat, PositiveInt

from sparsemae.config import Size, Strict, as_tuple, floats
from sparsemae.models.resenc import ResEncUNet
from sparsemae.models.topology import ARGUMENTS, Topology

Counts = Annotated[tuple[PositiveInt, ...], BeforeValidator(as_tuple)]
PerStage = Annotated[tuple[Size, ...], BeforeValidator(as_tuple)]
Spacing = Annotated[tuple[PositiveFloat, PositiveFloat, PositiveFloat], BeforeValidator(floats)]


class Intensities(Strict):
    """Of the voxels of any class, over all training cases; raw values."""

    mean: float
    std: float
    low: float  # percentile 0.5
    high: float  # percentile 99.5


class ChannelPlan(Strict):
    """How one input channel is normalised, in nnU-Net's terms."""

    name: str
    normalization: Literal["zscore", "ct", "rescale", "none"] = "zscore"
    masked: bool = False  # zscore: of voxels that are not zero in all channels; others become 0
    intensities: Intensities | None = None  # ct needs them


class Plan(Strict):
    """What preprocessing, network and patches of a data set have in common."""

    planner: Literal["nnunet", "like_pretrained", "plans.json"]
    spacing: Spacing  # mm
    patch_size: Size
    batch_size: PositiveInt
    channels: Annotated[tuple[ChannelPlan, ...], BeforeValidator(as_tuple)]
    features_per_stage: Counts
    strides: PerStage
    n_blocks_per_stage: Counts
    kernel_sizes: PerStage
    n_conv_per_stage_decoder: Counts
    batch_dice: bool = False  # Dice over the whole batch, not sample by sample

    @property
    def topology(self) -> Topology:
        """The network's numbers, checked; `UserError` if they are impossible."""
        return Topology.parse(**{name: getattr(self, name) for name in ARGUMENTS})


def build_network(plan: Plan, num_classes: int, *, deep_supervision: bool) -> ResEncUNet:
    """The network of a plan, freshly initialised from torch's global random numbers."""
    arguments = plan.topology.arguments()
    return ResEncUNet(
        len(plan.channels), num_classes, **arguments, deep_supervision=deep_supervision
    )
