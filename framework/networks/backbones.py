"""One door to every backbone: the networks of this package, torchvision's classifiers and timm's models."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from torch import nn

from framework.errors import ConfigurationError, did_you_mean
from framework.networks.preprocessing import Preprocessing
from framework.networks.residual import RESIDUAL_NETWORKS, ResidualOptions
from framework.networks.timm_backbones import (
    PREFIX,
    build_timm,
    check_timm_name,
    check_timm_weights,
    download_timm,
    is_timm,
    list_timm_backbones,
)
from framework.networks.torchvision_backbones import (
    Built,
    build_torchvision,
    check_options,
    download_torchvision,
    list_torchvision,
    torchvision_entry,
    torchvision_preprocessing,
)
from framework.networks.weights import is_path, load_weights, read_weights


def list_backbones() -> list[str]:
    """The names that :func:`create_backbone` knows without timm, sorted.

    timm's are listed by :func:`~framework.networks.list_timm_backbones`.
    """
    return sorted({*RESIDUAL_NETWORKS, *list_torchvision()})


def create_backbone(
    name: str, weights: str | None = None, *, weights_by_order: bool = False, **options: Any
) -> nn.Module:
    """Build a network without its classifier: images ``[N, 3, H, W]`` to features ``[N, num_features]``.

    ``resnet8`` to ``resnet152`` are this package's (:mod:`framework.networks.residual`), ``timm/<name>`` is a model of
    timm (extra ``timm``), and every other name is a classifier of torchvision, of which the last linear layer and the
    dropout right before it are replaced by the identity. torchvision's ``googlenet`` and ``inception_v3`` come without
    auxiliary classifiers and always with ``transform_input=True``: they take images normalised like every other
    network's, with and without weights.

    What was loaded and what was left aside is reported on standard error.

    Args:
        name: one of :func:`list_backbones` or :func:`list_timm_backbones`; the latter may carry one of timm's tags, as
            ``timm/resnet50.a1_in1k``.
        weights: None or "none" to start from scratch; "DEFAULT" or a torchvision name such as "IMAGENET1K_V1" to
            download; or a path to a ``.pth``, ``.pt``, ``.ckpt``, ``.bin`` or ``.safetensors`` file with a state dict,
            plain or under "state_dict" or "model". A prefix ``module.`` is stripped; if there are keys under
            ``backbone.`` (a checkpoint of this framework), these are taken. The classifier's entries are left aside.
        weights_by_order: the file names its tensors otherwise, but holds the same in the same order. Their shapes must
            agree one by one; ``num_batches_tracked`` is not looked at, and a linear classifier may follow at the end.
        options: go to the network's constructor, e.g. ``stochastic_depth=0.1``.

    Returns:
        A module with the attributes ``num_features``; ``preprocessing``, a
        :class:`~framework.networks.preprocessing.Preprocessing`: what the weights expect (a file may say so under
        "preprocessing"), else what the architecture's default weights do; and ``source_classifier``: "weight"
        ``[Ks, num_features]`` and "bias" ``[Ks]`` of the linear classifier that the weights had, or None. Neither is in
        the state dict.

    Raises:
        ConfigurationError: an unknown name, option or weights name, a file or download that cannot be read, or
            weights with missing, unexpected or wrongly shaped entries.
    """
    _check_name(name)
    if weights is not None and weights.lower() == "none":
        weights = None
    local = weights is not None and is_path(weights)
    if weights is not None and not local:
        # before the network is built: a mistyped name should not cost the seconds that a large network takes
        _check_published(name, weights, weights_by_order)
    built = _build(name, options, initialize=weights is None)
    preprocessing, source_classifier = built.preprocessing, None
    if weights is not None:
        if local:
            found = read_weights(Path(weights))
        else:
            found = download_timm(name, options) if is_timm(name) else download_torchvision(name, weights)
        source_classifier = load_weights(
            built.backbone,
            name,
            found,
            classifier=built.classifier,
            linear=built.linear,
            by_order=weights_by_order,
        )
        preprocessing = found.preprocessing or preprocessing
    # plain attributes, which no state dict holds
    object.__setattr__(built.backbone, "preprocessing", preprocessing)
    object.__setattr__(built.backbone, "source_classifier", source_classifier)
    return built.backbone


def _check_name(name: str) -> None:
    if is_timm(name):
        check_timm_name(name)
    elif name not in list_backbones():
        known = list_backbones()
        with contextlib.suppress(ConfigurationError):  # timm is not installed
            known += list_timm_backbones(name)  # the name alone, where timm has it
        hint = did_you_mean(PREFIX + name if PREFIX + name in known else name, known)
        raise ConfigurationError(f"Expected `--model.backbone` to be a known network, but got {name!r}. {hint}")


def _check_published(name: str, weights: str, weights_by_order: bool) -> None:
    if weights_by_order:
        raise ConfigurationError(
            f"Expected `--model.weights` to be the path of a file for `--model.weights_by_order true`, but got "
            f"{weights!r}."
        )
    if is_timm(name):
        check_timm_weights(name, weights)
    elif name in list_torchvision():
        torchvision_entry(name, weights)
    else:
        raise ConfigurationError(
            f"Expected `--model.weights` to be 'none' or a path to a .pth file, but got {weights!r}: "
            f"there are no published weights for {name!r}."
        )


def _build(name: str, options: dict[str, Any], initialize: bool) -> Built:
    if is_timm(name):
        return build_timm(name, options)
    if name not in RESIDUAL_NETWORKS:
        return build_torchvision(name, options, initialize)
    check_options(name, options, set(ResidualOptions.__annotations__))
    published = name in list_torchvision()  # the family for 224 px; the other one is for CIFAR's 32
    preprocessing = torchvision_preprocessing(name) if published else Preprocessing(image_size=32)
    return Built(RESIDUAL_NETWORKS[name](**options), preprocessing, ("fc.",), "fc")
