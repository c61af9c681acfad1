"""Residual networks (He et al. 2015, arXiv:1512.03385; He et al. 2016, arXiv:1603.05027), written out by hand.

Two families: ``resnet8``, ``resnet20`` to ``resnet110`` for 32 px images and ``resnet18`` to ``resnet152`` for 224 px
images. Attribute names are torchvision's, so that its state dicts of the 224 px family load key for key.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypedDict, get_args

from torch import Tensor, nn
from typing_extensions import Unpack

from framework.errors import ConfigurationError, did_you_mean
from framework.networks.residual_blocks import (
    BasicBlock,
    BottleneckBlock,
    PreActivationBlock,
    Shortcut,
    convolution,
)

Block = Literal["basic", "bottleneck", "preactivation", "preactivation_bottleneck"]


class ResidualNetwork(nn.Module):
    """A stem, stages of residual blocks and global average pooling; with ``num_classes`` also the linear layer ``fc``.

    ``forward``: ``[N, in_channels, H, W]`` to features ``[N, num_features]``, or to logits ``[N, num_classes]``.
    Convolutions are initialised as in He et al. 2015 (arXiv:1502.01852, normal, fan-out), the scales of batch norm
    with 1 and their shifts with 0.

    Args:
        block: "basic", "bottleneck", "preactivation" or "preactivation_bottleneck".
        depths: blocks per stage; each stage after the first halves the resolution.
        widths: channels of the 3x3 convolutions per stage; the first is the stem's width too.
        num_classes: None for a backbone.
        image_size: 32 for the CIFAR stem (3x3, stride 1), 224 for the ImageNet stem (7x7, stride 2, max-pool).
            The network takes other sizes too.
        shortcut: "A" (zero-padded, no parameters) or "B" (1x1 projection) where the shape changes.
        residual: False builds the plain twin: the same layers without any shortcut (``shortcut`` then has no say).
        stochastic_depth: drop probability of the last of L blocks; block l has ``l / L`` of it (Huang et al. 2016,
            arXiv:1603.09382, equation 4 with ``p_L = 1 - stochastic_depth``). Kept branches are divided by their
            survival probability in training, where the paper multiplies in test: the same expectation.
        zero_init_last: zero the scale of each block's last batch norm, so that blocks start as the identity
            (Goyal et al. 2017, arXiv:1706.02677, section 5.1).
        in_channels: 3 for RGB.

    Attributes:
        num_features: width of the pooled features.

    Raises:
        ConfigurationError: a value outside the above; ``stochastic_depth`` or ``zero_init_last`` for the plain twin,
            whose only path they would cut; ``zero_init_last`` for pre-activation blocks, where a ReLU that gets
            nothing but zeros follows the last batch norm, so that the branch would never receive a gradient.
    """

    def __init__(
        self,
        block: Block,
        depths: Sequence[int],
        widths: Sequence[int],
        num_classes: int | None = None,
        *,
        image_size: Literal[32, 224],
        shortcut: Shortcut = "B",
        residual: bool = True,
        stochastic_depth: float = 0.0,
        zero_init_last: bool = False,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        _check_choice("block", block, get_args(Block))
        _check_choice("shortcut", shortcut, get_args(Shortcut))
        _check_choice("image_size", image_size, (32, 224))
        _check_positive("in_channels", in_channels)
        if num_classes is not None:
            _check_positive("num_classes", num_classes)
        if not depths or len(depths) != len(widths):
            raise ConfigurationError(f"Expected as many `depths` as `widths`, but got {depths!r} and {widths!r}.")
        for value in (*depths, *widths):
            _check_positive("depths` and `widths", value)
        if isinstance(stochastic_depth, bool) or not isinstance(stochastic_depth, (int, float)):
            raise ConfigurationError(f"Expected `stochastic_depth` to be a number, but got {stochastic_depth!r}.")
        if not 0 <= stochastic_depth < 1:
            raise ConfigurationError(f"Expected `stochastic_depth` in [0, 1), but got {stochastic_depth!r}.")
        if not residual and stochastic_depth:
            raise ConfigurationError(
                f"Expected `stochastic_depth` 0 for `residual=False`, but got {stochastic_depth!r}: "
                "a plain network has no shortcut around a dropped block."
            )
        if zero_init_last and (not residual or block.startswith("preactivation")):
            kind = "pre-activation blocks" if residual else "`residual=False`"
            raise ConfigurationError(
                f"Expected `zero_init_last` False for {kind}, but got {zero_init_last!r}: no signal would pass."
            )

        channels = widths[0]
        if image_size == 32:
            self.conv1 = convolution(in_channels, channels, 3)
        else:
            self.conv1 = convolution(in_channels, channels, 7, stride=2)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if image_size == 32 else nn.MaxPool2d(3, stride=2, padding=1)

        self.stages = [f"layer{stage}" for stage in range(1, len(depths) + 1)]
        total = sum(depths)
        index = 0
        for stage, depth, width in zip(self.stages, depths, widths, strict=True):
            blocks = nn.Sequential()
            for position in range(depth):
                index += 1
                built = _make_block(
                    block,
                    channels,
                    width,
                    stride=2 if position == 0 and index > 1 else 1,
                    shortcut=shortcut if residual else None,
                    drop_probability=stochastic_depth * index / total,
                    first=index == 1,
                )
                blocks.append(built)
                channels = width * built.expansion
            self.add_module(stage, blocks)

        # pre-activation blocks end without a ReLU: "an extra activation right after its element-wise addition"
        self.last_bn = nn.BatchNorm2d(channels) if block.startswith("preactivation") else None
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.num_features = channels
        self.fc = None if num_classes is None else nn.Linear(channels, num_classes)
        self._initialize(zero_init_last)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        for stage in self.stages:
            features = self.get_submodule(stage)(features)
        if self.last_bn is not None:
            features = self.relu(self.last_bn(features))
        features = self.avgpool(features).flatten(1)
        return features if self.fc is None else self.fc(features)

    def _initialize(self, zero_init_last: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_last and isinstance(module, (BasicBlock, BottleneckBlock)):
                last = module.bn2 if isinstance(module, BasicBlock) else module.bn3
                nn.init.zeros_(last.weight)


def _make_block(
    block: Block,
    in_channels: int,
    channels: int,
    *,
    stride: int,
    shortcut: Shortcut | None,
    drop_probability: float,
    first: bool,
) -> BasicBlock | BottleneckBlock | PreActivationBlock:
    if block == "basic":
        return BasicBlock(in_channels, channels, stride, shortcut, drop_probability)
    if block == "bottleneck":
        return BottleneckBlock(in_channels, channels, stride, shortcut, drop_probability)
    bottleneck = block == "preactivation_bottleneck"
    return PreActivationBlock(in_channels, channels, stride, shortcut, drop_probability, bottleneck, activated=first)


def _check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    if value not in choices:
        expected = " or ".join(repr(choice) for choice in choices)
        raise ConfigurationError(f"Expected `{name}` to be {expected}, but got {value!r}.")


def _check_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"Expected `{name}` to be a positive integer, but got {value!r}.")


class ResidualOptions(TypedDict, total=False):
    """Options of every constructor below, explained at :class:`ResidualNetwork`.

    ``block`` is "basic" or "preactivation" (32 px family, ``resnet18``, ``resnet34``), "bottleneck" or "preactivation"
    (``resnet50``, ``resnet101``, ``resnet152``); "preactivation" keeps the convolutions and moves the activations.
    ``shortcut`` is "A" for the 32 px family and "B" for the 224 px family unless given.
    """

    shortcut: Shortcut
    block: Literal["basic", "bottleneck", "preactivation"]
    residual: bool
    stochastic_depth: float
    zero_init_last: bool
    in_channels: int


def _build(
    layers: Literal["basic", "bottleneck"],
    depths: Sequence[int],
    image_size: Literal[32, 224],
    num_classes: int | None,
    options: ResidualOptions,
) -> ResidualNetwork:
    """Fill in the defaults of a family."""
    unknown = sorted(set(options) - set(ResidualOptions.__annotations__))
    if unknown:
        known = did_you_mean(unknown[0], ResidualOptions.__annotations__)
        raise ConfigurationError(f"Expected an option of a residual network, but got {unknown[0]!r}. {known}")
    asked = options.get("block", layers)
    _check_choice("block", asked, (layers, "preactivation"))
    block: Block = layers
    if asked == "preactivation":
        block = "preactivation_bottleneck" if layers == "bottleneck" else "preactivation"
    return ResidualNetwork(
        block,
        depths,
        [16, 32, 64] if image_size == 32 else [64, 128, 256, 512],
        num_classes,
        image_size=image_size,
        shortcut=options.get("shortcut", "A" if image_size == 32 else "B"),
        residual=options.get("residual", True),
        stochastic_depth=options.get("stochastic_depth", 0.0),
        zero_init_last=options.get("zero_init_last", False),
        in_channels=options.get("in_channels", 3),
    )


# The 32 px family (He 2015, section 4.2): 6n + 2 layers in three stages of n blocks, 16, 32 and 64 channels.


def resnet8(num_classes: int | None = None, **options: Unpack[ResidualOptions]) -> ResidualNetwork:
    """ResNet-8 for 32 px images (n = 1)."""
    return _build("basic", [1] * 3, 32, num_classes, options)


def resnet20(num_classes: int | None = None, **options: Unpack[ResidualOptions]) -> ResidualNetwork:
    """ResNet-20 for 32 px images (n = 3): 269,722 parameters with 10 classes."""
    return _build("basic", [3] * 3, 32, num_classes, options)


def resnet32(num_classes: int | None = None, **options: Unpack[ResidualOptions]) -> ResidualNetwork:
    """ResNet-32 for 32 px images (n = 5): 464,154 parameters with 10 classes."""
    return _build("basic", [5] * 3, 32, num_classes, options)


def resnet44(num_classes: int | None = None, **options: Unpack[ResidualOptions]) -> ResidualNetwork:
    """ResNet-44 for 32 px images (n = 7): 658,586 parameters with 10 classes."""
    return _build("basic", [7] * 3, 32, num_classes, options)


def resnet56(num_classes: int | None = None, **options: Unpack[ResidualOptions]) -> ResidualNetwork:
    """ResNet-56 for 32 px images (n = 9): 853,018 parameters with 10 classes."""
    return _build("basic", [9] * 3, 32, num_classes, options)


def resnet110(num_classes: int | None = None, **options: Unpack[ResidualOptions]) -> ResidualNetwork:
    """ResNet-110 for 32 px images (n = 18): 1,727,962 parameters with 10 classes."""
    return _build("basic", [18] * 3, 32, num_classes, options)


# The 224 px family (He 2015, table 1): four stages, 64 to 512 channels, bottlenecks from 50 layers on (v1.5).


def resnet18(num_classes: int | None = None, **options: Unpack[ResidualOptions]) -> ResidualNetwork:
    """ResNet-18 for 224 px images: 11,689,512 parameters with 1000 classes."""
    return _build("basic", [2, 2, 2, 2], 224, num_classes, options)


def resnet34(num_classes: int | None = None, **options: Unpack[ResidualOptions]) -> ResidualNetwork:
    """ResNet-34 for 224 px images: 21,797,672 parameters with 1000 classes."""
    return _build("basic", [3, 4, 6, 3], 224, num_classes, options)


def resnet50(num_classes: int | None = None, **options: Unpack[ResidualOptions]) -> ResidualNetwork:
    """ResNet-50 (v1.5: stride on the 3x3) for 224 px images: 25,557,032 parameters with 1000 classes."""
    return _build("bottleneck", [3, 4, 6, 3], 224, num_classes, options)


def resnet101(num_classes: int | None = None, **options: Unpack[ResidualOptions]) -> ResidualNetwork:
    """ResNet-101 (v1.5: stride on the 3x3) for 224 px images: 44,549,160 parameters with 1000 classes."""
    return _build("bottleneck", [3, 4, 23, 3], 224, num_classes, options)


def resnet152(num_classes: int | None = None, **options: Unpack[ResidualOptions]) -> ResidualNetwork:
    """ResNet-152 (v1.5: stride on the 3x3) for 224 px images: 60,192,808 parameters with 1000 classes."""
    return _build("bottleneck", [3, 8, 36, 3], 224, num_classes, options)


RESIDUAL_NETWORKS: dict[str, Callable[..., ResidualNetwork]] = {
    constructor.__name__: constructor
    for constructor in (
        *(resnet8, resnet20, resnet32, resnet44, resnet56, resnet110),
        *(resnet18, resnet34, resnet50, resnet101, resnet152),
    )
}
