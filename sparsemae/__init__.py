"""Masked-autoencoder pre-training of 3D CNNs for medical images that skips the masked voxels.

Names below are imported when first used, so that the command line starts without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsemae.models.mae import SparseMAE, masked_mse
    from sparsemae.models.masking import Masks
    from sparsemae.models.resenc import ResEncUNet

__version__ = "0.1.0"

__all__ = ["Masks", "ResEncUNet", "SparseMAE", "masked_mse"]

_HOMES = {
    "Masks": "sparsemae.models.masking",
    "ResEncUNet": "sparsemae.models.resenc",
    "SparseMAE": "sparsemae.models.mae",
    "masked_mse": "sparsemae.models.mae",
}


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'sparsemae' has no attribute {name!r}")
