"""The blocks of residual networks (He et al. 2015, arXiv:1512.03385; He et al. 2016, arXiv:1603.05027)."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from framework.errors import ConfigurationError

Shortcut = Literal["A", "B"]


class ZeroPaddedShortcut(nn.Module):
    """Option A (He 2015, section 3.3): every ``stride``-th pixel, new channels filled with zeros, no parameters.

    ``[N, in_channels, H, W] -> [N, out_channels, ceil(H / stride), ceil(W / stride)]``; the zeros come last.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        if out_channels < in_channels:
            raise ConfigurationError(
                f"Expected shortcut 'A' to keep or add channels, but got {in_channels} -> {out_channels}: use 'B'."
            )
        self.added_channels = out_channels - in_channels
        self.stride = stride

    def forward(self, inputs: Tensor) -> Tensor:
        return F.pad(inputs[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added_channels))

    def extra_repr(self) -> str:
        return f"added_channels={self.added_channels}, stride={self.stride}"


def convolution(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    """A convolution without bias (a batch norm follows) that keeps ``ceil(size / stride)`` pixels; odd kernels only."""
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)


class ResidualBlock(nn.Module):
    """What all blocks share: the shortcut, stochastic depth and the addition. Abstract.

    Args of every block:
        in_channels: channels that come in.
        channels: width of the 3x3 convolution; ``channels * expansion`` go out.
        stride: 1, or 2 to halve the resolution.
        shortcut: "A" (zero-padded), "B" (1x1 projection) where the shape changes, the identity elsewhere;
            None for the plain block, which adds nothing.
        drop_probability: of dropping the branch for one sample in training (Huang et al. 2016).
    """

    downsample: nn.Module | None

    def _make_shortcut(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        shortcut: Shortcut | None,
        drop_probability: float,
        normalize: bool = True,
    ) -> None:
        # called last by the constructors, so that parameters are registered in torchvision's order
        self.residual = shortcut is not None
        self.downsample = None
        if shortcut is not None and (stride != 1 or in_channels != out_channels):
            if shortcut == "A":
                self.downsample = ZeroPaddedShortcut(in_channels, out_channels, stride)
            else:
                self.downsample = nn.Sequential(convolution(in_channels, out_channels, 1, stride))
                if normalize:
                    self.downsample.append(nn.BatchNorm2d(out_channels))
        self.stochastic_depth = StochasticDepth(drop_probability, "row") if drop_probability > 0 else nn.Identity()

    def _add_shortcut(self, branch: Tensor, inputs: Tensor) -> Tensor:
        if not self.residual:
            return branch
        shortcut = inputs if self.downsample is None else self.downsample(inputs)
        added: Tensor = self.stochastic_depth(branch) + shortcut
        return added


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions, batch norm after each, ReLU after the addition (He 2015, figure 5 left).

    ``[N, in_channels, H, W] -> [N, channels, H / stride, W / stride]``.
    """

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        shortcut: Shortcut | None = "B",
        drop_probability: float = 0.0,
    ) -> None:
        super().__init__()
        self.conv1 = convolution(in_channels, channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = convolution(channels, channels, 3)
        self.bn2 = nn.BatchNorm2d(channels)
        self._make_shortcut(in_channels, channels, stride, shortcut, drop_probability)

    def forward(self, inputs: Tensor) -> Tensor:
        branch = self.relu(self.bn1(self.conv1(inputs)))
        branch = self.bn2(self.conv2(branch))
        outputs: Tensor = self.relu(self._add_shortcut(branch, inputs))
        return outputs


class BottleneckBlock(ResidualBlock):
    """1x1, 3x3 and 1x1 convolutions, the last to four times the width (He 2015, figure 5 right).

    The stride sits on the 3x3 convolution ("v1.5", as in torchvision); the paper has it on the first 1x1.
    ``[N, in_channels, H, W] -> [N, 4 * channels, H / stride, W / stride]``.
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        shortcut: Shortcut | None = "B",
        drop_probability: float = 0.0,
    ) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = convolution(in_channels, channels, 1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = convolution(channels, channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = convolution(channels, out_channels, 1)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self._make_shortcut(in_channels, out_channels, stride, shortcut, drop_probability)

    def forward(self, inputs: Tensor) -> Tensor:
        branch = self.relu(self.bn1(self.conv1(inputs)))
        branch = self.relu(self.bn2(self.conv2(branch)))
        branch = self.bn3(self.conv3(branch))
        outputs: Tensor = self.relu(self._add_shortcut(branch, inputs))
        return outputs


class PreActivationBlock(ResidualBlock):
    """Batch norm and ReLU before each convolution, nothing after the addition (He 2016, figure 1b and section 4.1).

    Where the shape changes, the shortcut starts behind the first activation and its projection has no batch norm, as
    in the authors' code (KaimingHe/resnet-1k-layers).

    Args:
        bottleneck: 1x1, 3x3, 1x1 convolutions to four times the width instead of two 3x3.
        activated: the inputs come out of a ReLU (first block after the stem), so the block has no first activation:
            "the first activation right after conv1 and before splitting into two paths" (He 2016, appendix).
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        shortcut: Shortcut | None = "B",
        drop_probability: float = 0.0,
        bottleneck: bool = False,
        activated: bool = False,
    ) -> None:
        super().__init__()
        self.expansion = 4 if bottleneck else 1
        out_channels = channels * self.expansion
        self.bn1 = None if activated else nn.BatchNorm2d(in_channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv1 = convolution(in_channels, channels, 1 if bottleneck else 3, 1 if bottleneck else stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = convolution(channels, channels, 3, stride if bottleneck else 1)
        self.bn3 = nn.BatchNorm2d(channels) if bottleneck else None
        self.conv3 = convolution(channels, out_channels, 1) if bottleneck else None
        self._make_shortcut(in_channels, out_channels, stride, shortcut, drop_probability, normalize=False)

    def forward(self, inputs: Tensor) -> Tensor:
        activated = inputs if self.bn1 is None else self.relu(self.bn1(inputs))
        branch = self.conv2(self.relu(self.bn2(self.conv1(activated))))
        if self.bn3 is not None and self.conv3 is not None:
            branch = self.conv3(self.relu(self.bn3(branch)))
        return self._add_shortcut(branch, inputs if self.downsample is None else activated)
