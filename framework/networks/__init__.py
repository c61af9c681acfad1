"""Networks and layers without Lightning."""

from framework.networks.backbones import create_backbone, list_backbones
from framework.networks.batch_norm import DomainSpecificBatchNorm, convert_domain_specific, select_domain
from framework.networks.checkpointing import checkpoint_blocks
from framework.networks.discriminator import DomainDiscriminator
from framework.networks.feature_maps import FeatureMaps
from framework.networks.frozen import FrozenCopy
from framework.networks.heads import MLPHead
from framework.networks.key_queue import KeyQueue
from framework.networks.memory_format import is_convolutional, keep_channels_last
from framework.networks.momentum import MomentumCopy
from framework.networks.outputs import NetworkOutputs
from framework.networks.preprocessing import Preprocessing
from framework.networks.projection import Bottleneck, ProjectionHead
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
from framework.networks.stochastic_norm import StochasticNorm, convert_stochastic
from framework.networks.timm_backbones import list_timm_backbones

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "BottleneckBlock",
    "DomainDiscriminator",
    "DomainSpecificBatchNorm",
    "FeatureMaps",
    "FrozenCopy",
    "KeyQueue",
    "MLPHead",
    "MomentumCopy",
    "NetworkOutputs",
    "PreActivationBlock",
    "Preprocessing",
    "ProjectionHead",
    "ResidualNetwork",
    "Stage",
    "StochasticNorm",
    "checkpoint_blocks",
    "convert_domain_specific",
    "convert_stochastic",
    "create_backbone",
    "is_convolutional",
    "keep_channels_last",
    "list_backbones",
    "list_timm_backbones",
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
