"""Unsupervised domain adaptation: one method, one file."""

from framework.modules.adaptation.ada_bn import AdaBN
from framework.modules.adaptation.adda import ADDA
from framework.modules.adaptation.afn import AFN
from framework.modules.adaptation.alignment_sum import AlignmentSum
from framework.modules.adaptation.base import AlignmentLoss, DomainAdaptation
from framework.modules.adaptation.bnm import BNM
from framework.modules.adaptation.bsp import BSP
from framework.modules.adaptation.cdan import CDAN
from framework.modules.adaptation.cmd import CMD
from framework.modules.adaptation.daan import DAAN
from framework.modules.adaptation.dan import DAN
from framework.modules.adaptation.dann import DANN
from framework.modules.adaptation.deep_coral import DeepCORAL
from framework.modules.adaptation.deep_jdot import DeepJDOT
from framework.modules.adaptation.dsan import DSAN
from framework.modules.adaptation.information_maximization import InformationMaximization
from framework.modules.adaptation.jan import JAN
from framework.modules.adaptation.mcc import MCC
from framework.modules.adaptation.mcd import MCD
from framework.modules.adaptation.mdd import MDD
from framework.modules.adaptation.sdat import SDAT
from framework.modules.adaptation.self_supervision import JigsawLoss as JigsawLoss  # a term of sums
from framework.modules.adaptation.self_supervision import MaskingLoss as MaskingLoss  # a term of sums
from framework.modules.adaptation.self_supervision import RotationLoss as RotationLoss  # a term of sums
from framework.modules.adaptation.sliced_wasserstein import SlicedWasserstein
from framework.modules.adaptation.source_only import SourceOnly
from framework.modules.adaptation.swd import SWD

__all__ = [
    "ADDA",
    "AFN",
    "BNM",
    "BSP",
    "CDAN",
    "CMD",
    "DAAN",
    "DAN",
    "DANN",
    "DSAN",
    "JAN",
    "MCC",
    "MCD",
    "MDD",
    "SDAT",
    "SWD",
    "AdaBN",
    "AlignmentLoss",
    "AlignmentSum",
    "DeepCORAL",
    "DeepJDOT",
    "DomainAdaptation",
    "InformationMaximization",
    "SlicedWasserstein",
    "SourceOnly",
]
