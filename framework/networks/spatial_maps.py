"""The last feature map of a backbone that still knows where in the image it is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from framework.errors import ConfigurationError
from framework.networks.feature_maps import FeatureMaps, channel_dimension
from framework.networks.preprocessing import Preprocessing, features_of_black
from framework.networks.stages import split_stages

TRIED_FIRST = 224  # a checkpoint may have changed the backbone's own size, and must build the same decoder again


class Layout(NamedTuple):
    """How a layer's output lies in its tensor.

    Attributes:
        kind: ``channels_first`` ``[N, C, h, w]``, ``channels_last`` ``[N, h, w, C]`` or ``tokens`` ``[N, T, C]``.
        channels: ``C``.
        side: ``h`` and ``w`` of a square image.
        prefix: how many tokens stand in front of those of the patches: class tokens and registers.
    """

    kind: Literal["channels_first", "channels_last", "tokens"]
    channels: int
    side: int
    prefix: int = 0


class SpatialMaps:
    """Catches the last spatial map of a backbone, each time it runs inside :meth:`recording`.

    That is the last output of a module in the last half of the stages (:func:`~framework.networks.split_stages`) that
    has more than one position: of a residual network that of the stage before the pooling, of a vision transformer the
    patches' tokens after the final norm. Layers behind it, such as VGG's linear ones, have no part in the map.

    Layer, channels and stride are found at once, by a run with one black image that leaves the backbone as it is: of
    224 pixels, or of the backbone's own size where it takes no other. As with
    :class:`~framework.networks.FeatureMaps`, by which it is done, the backbone is no part of this object, a copy of
    both together is one of its own, and the backbone may be compiled afterwards; what changes its modules (domain-
    specific batch norm, adapters) must come before.

    Args:
        backbone: images ``[N, 3, H, W]`` to features, with the attribute ``preprocessing`` or for 224 pixels.

    Attributes:
        layer: name of the module.
        channels: ``C``.
        stride: pixels of an image per position of the map, rounded up.

    Raises:
        ConfigurationError: the backbone has no such module.
    """

    def __init__(self, backbone: nn.Module) -> None:
        size, (self.layer, self._layout) = _found(backbone)
        self.channels = self._layout.channels
        self.stride = -(-size // self._layout.side)
        self._maps = FeatureMaps(backbone, [self.layer])

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Within this context the map is caught; its end lets go of it."""
        with self._maps.recording():
            yield

    def last(self) -> Tensor:
        """The map of the last images, ``[N, C, h, w]``.

        Raises:
            ConfigurationError: tokens of an image that is not square.
        """
        output = self._maps[self.layer]
        if self._layout.kind == "channels_first":
            return output
        if self._layout.kind == "channels_last":
            return output.permute(0, 3, 1, 2)
        tokens = output[:, self._layout.prefix :]
        side = math.isqrt(tokens.shape[1])
        if side**2 != tokens.shape[1]:
            raise ConfigurationError(f"Expected square images, but got {tokens.shape[1]} patches of each.")
        return tokens.transpose(1, 2).reshape(len(tokens), self.channels, side, side)


def _found(backbone: nn.Module) -> tuple[int, tuple[str, Layout]]:
    """The size of an image that the backbone takes, and the layer with its layout at that size."""
    for size in dict.fromkeys((TRIED_FIRST, getattr(backbone, "preprocessing", Preprocessing()).image_size)):
        outputs = _stage_outputs(backbone, size)
        for name, module, output in reversed(outputs):
            layout = _layout(backbone, module, output)
            if layout is not None:
                return size, (name, layout)
    raise ConfigurationError(
        "Expected `--model.backbone` to have a late layer whose output is a map of the image, [N, C, h, w], [N, h, w, "
        f"C] or the tokens [N, T, C] of its patches, but {type(backbone).__name__} has none."
    )


def _stage_outputs(backbone: nn.Module, image_size: int) -> list[tuple[str, nn.Module, Any]]:
    """What the modules of the last half of the stages return for one black image, in their order; nothing where the
    backbone does not take the size."""
    names = {module: name for name, module in backbone.named_modules()}
    stages = split_stages(backbone)
    # an earlier map, as CrossViT's, whose stages return lists, would leave most of the network untrained
    modules = [module for stage in stages[len(stages) // 2 :] for module in stage.modules]
    outputs: dict[nn.Module, Any] = {}

    def keep(module: nn.Module, _: Any, output: Any) -> None:
        outputs[module] = output

    hooks = [module.register_forward_hook(keep) for module in modules]
    try:
        features_of_black(backbone, image_size, next(backbone.parameters()))
    except Exception:  # networks refuse sizes in many ways
        return []
    finally:
        for hook in hooks:
            hook.remove()
    return [(names[module], module, outputs[module]) for module in modules if module in outputs]


def _layout(backbone: nn.Module, module: nn.Module, output: Any) -> Layout | None:
    """The layout of the output for one image, or None where it has not more than one position."""
    if not isinstance(output, Tensor) or output.dim() not in (3, 4) or len(output) != 1:
        return None
    if output.dim() == 4:
        channels = channel_dimension(module, output)
        side = output.shape[2]  # of both layouts, since the image is square
        kind: Literal["channels_first", "channels_last"] = "channels_first" if channels == 1 else "channels_last"
        return Layout(kind, output.shape[channels], side) if side > 1 else None
    tokens = output.shape[1]
    prefix = getattr(backbone, "num_prefix_tokens", None)  # timm's word for them
    if not isinstance(prefix, int) or math.isqrt(max(tokens - prefix, 0)) ** 2 != tokens - prefix:
        prefix = tokens - math.isqrt(tokens) ** 2
    side = math.isqrt(tokens - prefix)
    return Layout("tokens", output.shape[2], side, prefix) if side > 1 else None
