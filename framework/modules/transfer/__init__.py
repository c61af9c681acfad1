"""Transfer learning: a pretrained backbone on a new task, one file for each method.

A new method is a file, an import line and a name in ``__all__`` here.
"""

from framework.modules.transfer.base import TransferClassifier
from framework.modules.transfer.bi_tuning import BiTuning
from framework.modules.transfer.bss import BSS
from framework.modules.transfer.co_tuning import CoTuning
from framework.modules.transfer.delta import DELTA
from framework.modules.transfer.distillation import Distillation
from framework.modules.transfer.l2_sp import L2SP
from framework.modules.transfer.lwf import LWF
from framework.modules.transfer.regularized import RegularizedTransfer
from framework.modules.transfer.stoch_norm import StochNorm

__all__ = [
    "BSS",
    "DELTA",
    "L2SP",
    "LWF",
    "BiTuning",
    "CoTuning",
    "Distillation",
    "RegularizedTransfer",
    "StochNorm",
    "TransferClassifier",
]
