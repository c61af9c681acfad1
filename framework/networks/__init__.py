"""Networks and layers without Lightning."""

from framework.networks.backbones import create_backbone, list_backbones
from framework.networks.batch_norm import DomainSpecificBatchNorm, convert_domain_specific, select_domain
from framework.networks.discriminator import DomainDiscriminator
from framework.networks.frozen import FrozenCopy
from framework.networks.heads import MLPHead
from framework.networks.outputs import NetworkOutputs
from framework.networks.projection import Bottleneck
from framework.networks.residual import (
    ResidualNetwork,
    resnet8,
    resnet18,
    resnet20,
    resnet32,
    resnet34,
    resnet44,
    resnet50,
    resnet56,
    resnet101,
    resnet110,
    resnet152,
)
from framework.networks.residual_blocks import BasicBlock, BottleneckBlock, PreActivationBlock
from framework.networks.stages import Stage, split_stages

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "BottleneckBlock",
    "DomainDiscriminator",
    "DomainSpecificBatchNorm",
    "FrozenCopy",
    "MLPHead",
    "NetworkOutputs",
    "PreActivationBlock",
    "ResidualNetwork",
    "Stage",
    "convert_domain_specific",
    "create_backbone",
    "list_backbones",
    "resnet8",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet34",
    "resnet44",
    "resnet50",
    "resnet56",
    "resnet101",
    "resnet110",
    "resnet152",
    "select_domain",
    "split_stages",
]
