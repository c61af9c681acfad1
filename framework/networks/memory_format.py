"""Images and weights with the channels innermost in memory, which suits convolutions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

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
    """Lay the weights of a network of images ``[N, C, H, W]`` out as channels-last, and each batch that comes in.

    Shapes, names and values are unchanged; PyTorch's operations keep the layout from one layer to the next.
    """
    network.to(memory_format=torch.channels_last)
    network.register_forward_pre_hook(_to_channels_last)


def _to_channels_last(network: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(images.contiguous(memory_format=torch.channels_last) for images in inputs)
