"""What a network expects of the images it is given."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from framework.errors import ConfigurationError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Preprocessing(NamedTuple):
    """Size and normalisation of the images that a network was trained on, or was made for.

    Attributes:
        image_size: height and width in pixels.
        mean, std: of the three channels, for images in [0, 1].
    """

    image_size: int = 224
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    @classmethod
    def of(cls, values: Mapping[str, Any], where: str) -> Preprocessing:
        """From plain values, as a file of weights or a checkpoint holds them.

        Args:
            values: "image_size", "mean" and "std".
            where: they were found, for the message.

        Raises:
            ConfigurationError: one of them is missing or not what it should be.
        """
        try:
            size = int(values["image_size"])
            mean, std = (tuple(float(value) for value in values[name]) for name in ("mean", "std"))
            fits = size >= 1 and len(mean) == len(std) == 3 and min(std) > 0
        except (KeyError, TypeError, ValueError):
            fits = False
        if not fits:
            raise ConfigurationError(
                f"Expected 'preprocessing' in {where} to hold 'image_size' in pixels and three numbers each for 'mean' "
                f"and 'std', but got {values!r}."
            )
        return cls(size, mean, std)  # type: ignore[arg-type]

    def plain(self) -> dict[str, Any]:
        """As plain values, for a checkpoint."""
        return {"image_size": self.image_size, "mean": list(self.mean), "std": list(self.std)}


def check_image_size(backbone: nn.Module, name: str, image_size: int) -> None:
    """Send one black image through the backbone, so that a size that it does not take is known before training.

    Modes, statistics, gradients and random numbers stay as they are.

    Args:
        backbone: images ``[N, 3, H, W]`` to features ``[N, num_features]``.
        name: of the backbone.
        image_size: height and width in pixels.

    Raises:
        ConfigurationError: the backbone refuses the image, or returns something else than ``[1, num_features]``.
    """
    parameter = next(backbone.parameters(), torch.empty(0))
    if parameter.device.type == "meta" or (parameter.device.type == "cpu" and parameter.dtype == torch.float16):
        return  # nothing can be computed here
    own = getattr(backbone, "preprocessing", Preprocessing()).image_size
    try:
        features = features_of_black(backbone, image_size, parameter)
    except Exception as error:  # networks refuse sizes in many ways: assertions, errors of their layers
        reason = (str(error).splitlines() or [""])[0].rstrip(".!") or type(error).__name__
        if image_size != own and not _takes(backbone, own, parameter):
            raise ConfigurationError(
                f"Expected `--model.backbone` and its options to be a network of images [N, 3, {own}, {own}], but "
                f"{name!r} refuses them: {reason}."
            ) from error
        option = next((key for key in ("img_size", "image_size") if key in _options(backbone)), None)
        build = (
            ""
            if option is None
            else (f", or build the network for it: `--model.backbone_options '{{{option}: {image_size}}}'`")
        )
        raise ConfigurationError(
            f"Expected `--data.image_size` to be a size that {name!r} takes, such as the {own} pixels that it was made "
            f"for, but got {image_size}: {reason}. Leave it out{build}."
        ) from error
    expected = [1, int(backbone.num_features)]  # type: ignore[arg-type]
    if list(features.shape) != expected:
        raise ConfigurationError(
            f"Expected `--model.backbone` {name!r} to return features {expected} of an image of {image_size} pixels, "
            f"but got {list(features.shape)}."
        )


def features_of_black(backbone: nn.Module, image_size: int, like: Tensor) -> Tensor:
    """The backbone's features of a black image, in evaluation mode; modes and random numbers stay as they were."""
    training = [(module, module.training) for module in backbone.modules()]
    try:
        for module, _ in training:
            module.training = False  # not by eval(), which a module may take as an occasion for more
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            images = torch.zeros(1, 3, image_size, image_size, dtype=like.dtype, device=like.device)
            features: Tensor = backbone.forward(images)  # not by a call, which may compile it for this one image
    finally:
        for module, mode in training:
            module.training = mode
    return features


def _takes(backbone: nn.Module, image_size: int, like: Tensor) -> bool:
    try:
        features_of_black(backbone, image_size, like)
    except Exception:  # whatever it raises: it does not take this size
        return False
    return True


def _options(backbone: nn.Module) -> set[str]:
    return set(inspect.signature(type(backbone).__init__).parameters)
