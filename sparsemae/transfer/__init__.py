"""Weights into a network: read what somebody trained, copy what fits, tell what became of it."""

from sparsemae.transfer.copying import Scope, transfer
from sparsemae.transfer.pretrained import Pretrained, read_pretrained
from sparsemae.transfer.table import Row, TransferTable, check_useful

__all__ = [
    "Pretrained",
    "Row",
    "Scope",
    "TransferTable",
    "check_useful",
    "read_pretrained",
    "transfer",
]
