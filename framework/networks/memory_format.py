"""Maps and weights with the channels innermost in memory, which suits convolutions."""

from __future__ import annotations

import torch
from torch import nn

LEAST_SHARE = 0.25  # ConvNeXt, one convolution to two linear layers, has 0.37; PVTv2 0.2, vision transformers below 0.1


def is_convolutional(network: nn.Module) -> bool:
    """Whether more than a quarter of the convolutions and linear layers are two-dimensional convolutions.

    So are residual networks, VGG, DenseNet, MobileNet, EfficientNet, ConvNeXt and hybrids such as MaxViT; ViT and Swin,
    in which only the patch embedding is a convolution, are not.

    >>> is_convolutional(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 2)))
    True
    >>> is_convolutional(nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 8)))  # a patch embedding
    False
    """
    convolutions = sum(isinstance(layer, nn.Conv2d) for layer in network.modules())
    linear = sum(isinstance(layer, nn.Linear) for layer in network.modules())
    return convolutions > max(1.0, LEAST_SHARE * (convolutions + linear))


def keep_channels_last(network: nn.Module) -> None:
    """Lay the weights of a network's convolutions out as channels-last.

    A convolution with such weights returns such a map, of an image in any layout, and PyTorch's operations keep it from
    one layer to the next. Shapes, names and values are unchanged.
    """
    network.to(memory_format=torch.channels_last)
