"""The kinds of training runs: the command that makes one, and what its validation measures."""

from dataclasses import dataclass
from pathlib import Path

from sparsemae.runfiles import PLAN, TASK


@dataclass(frozen=True)
class Measure:
    """What people are told of a validation. Files keep `val_loss`, which a run makes small."""

    name: str
    short: str  # where there is little room
    of: str = ""  # what it is taken over
    # a score from 0 to 1, 1 minus `val_loss`; else `val_loss`, on the scale of the training loss
    score: bool = False

    def shown(self, val_loss: float) -> float:
        """The number to show."""
        return 1 - val_loss if self.score else val_loss


@dataclass(frozen=True)
class Kind:
    """What words about a run depend on."""

    command: str  # of sparsemae
    data: str  # what the command calls the place of the data
    measure: Measure
    pictures: str  # what its previews show


VALIDATION_LOSS = Measure("validation loss", "validation")
VALIDATION_DICE = Measure(
    "validation Dice", "validation Dice", "mean of the classes over fixed patches", score=True
)

PRETRAINING = Kind("pretrain", "STORE", VALIDATION_LOSS, "Reconstruction")
FINETUNING = Kind("finetune", "DATASET", VALIDATION_DICE, "Segmentation")


def kind_of(run: Path) -> Kind:
    """Of a run folder, whatever state its files are in."""
    marked = any((run / name).is_file() for name in (PLAN, TASK))
    return FINETUNING if marked else PRETRAINING
