"""Transfer learning: a pretrained backbone on a new task, one file for each method.

A new method is a file, an import line and a name in ``__all__`` here.
"""

from framework.modules.transfer.base import TransferClassifier
from framework.modules.transfer.regularized import RegularizedTransfer

__all__ = [
    "RegularizedTransfer",
    "TransferClassifier",
]
