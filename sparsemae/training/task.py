"""What is trained, as functions: all that pre-training and fine-tuning differ in."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from sparsemae.config import Strict
from sparsemae.kinds import VALIDATION_LOSS, Measure
from sparsemae.training.loop import Batch, Loss

if TYPE_CHECKING:
    from sparsemae.reporting.preview import Preview
    from sparsemae.reporting.segmentation import SegmentationPreview

    AnyPreview = Preview | SegmentationPreview


@dataclass(frozen=True)
class Task:
    """A model, what it learns from, and how good it is."""

    model: nn.Module  # on the device
    groups: dict[str, list[nn.Parameter]]  # of the optimiser; a schedule knows their names
    loss_of: Callable[[nn.Module, Batch, int], Loss]  # see fit
    batches: Callable[[int], Iterable[Batch]]  # this rank's, from a step on
    cases_of: Callable[[int], Sequence[str]]  # what the samples of a step show, over all ranks
    validate: Callable[[nn.Module], float] | None  # called on all ranks; lower is better
    preview: Callable[[nn.Module, int], "AnyPreview | None"]  # for the report, of a step; on rank 0
    config: Strict  # the whole configuration, written into the run folder
    defining: dict[str, Any]  # what of it a resumed run must have in common
    data: str  # fingerprint of what it is trained on; a resumed run must have the same
    origin: dict[str, Any]  # more for every checkpoint; "store" is where the data lie
    measure: Measure = VALIDATION_LOSS  # what people are told of `validate`
