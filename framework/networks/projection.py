"""The layers behind a backbone: the bottleneck before a head, and the projection that views are compared in."""

from __future__ import annotations

from typing import Literal

from torch import nn

from framework.errors import ConfigurationError


class Bottleneck(nn.Sequential):
    """Linear, batch norm, ReLU, dropout: ``[N, in_features] -> [N, out_features]``.

    The small layer that deep domain adaptation puts between a pretrained backbone and the classifier, so that what is
    aligned has few dimensions and is learned from scratch (DDC, Tzeng et al. 2014, arXiv:1412.3474; DANN,
    Ganin et al. 2016, arXiv:1505.07818, section 5.2).

    Args:
        in_features: width of the backbone's features.
        out_features: width of the projected features.
        normalization: "batch", or "none" for no batch norm. "batch" needs more than one sample in training.
        dropout: probability, in [0, 1); 0 adds no layer.

    Raises:
        ConfigurationError: a value outside the above.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int = 256,
        normalization: Literal["batch", "none"] = "batch",
        dropout: float = 0.0,
    ) -> None:
        for name, value in (("in_features", in_features), ("out_features", out_features)):
            if value < 1:
                raise ConfigurationError(f"Expected `{name}` of the bottleneck to be at least 1, but got {value!r}.")
        if normalization not in ("batch", "none"):
            raise ConfigurationError(
                f"Expected `normalization` of the bottleneck to be 'batch' or 'none', but got {normalization!r}."
            )
        if not 0 <= dropout < 1:
            raise ConfigurationError(f"Expected `dropout` of the bottleneck in [0, 1), but got {dropout!r}.")
        layers: list[nn.Module] = [nn.Linear(in_features, out_features)]
        if normalization == "batch":
            layers.append(nn.BatchNorm1d(out_features))
        layers.append(nn.ReLU())
        if dropout:
            layers.append(nn.Dropout(dropout))
        super().__init__(*layers)
        self.in_features = in_features
        self.out_features = out_features


class ProjectionHead(nn.Sequential):
    """The layers between a backbone and a loss that compares views: ``[N, in_features] -> [N, out_features]``.

    Hidden layers of linear, batch norm and ReLU, then a linear one without bias or norm. Used in pre-training alone:
    what it makes invariant, the backbone's features still tell. With one hidden layer of the backbone's width it is the
    head of SimCLR (Chen et al. 2020, arXiv:2002.05709, whose code also normalises the output), with two hidden layers
    as wide as the output the expander of VICReg (Bardes et al. 2022, arXiv:2105.04906).

    Args:
        in_features: width of the backbone's features.
        hidden_features: width of the hidden layers.
        out_features: width of the projections.
        layers: how many linear layers; 1 has no hidden one.
        normalization: "batch", or "none" for no batch norm. "batch" needs more than one sample in training.

    Raises:
        ConfigurationError: a value outside the above.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int,
        layers: int = 2,
        normalization: Literal["batch", "none"] = "batch",
    ) -> None:
        for name, value in (
            ("in_features", in_features),
            ("hidden_features", hidden_features),
            ("out_features", out_features),
            ("layers", layers),
        ):
            if value < 1:
                raise ConfigurationError(
                    f"Expected `{name}` of the projection head to be at least 1, but got {value!r}."
                )
        if normalization not in ("batch", "none"):
            raise ConfigurationError(
                f"Expected `normalization` of the projection head to be 'batch' or 'none', but got {normalization!r}."
            )
        modules: list[nn.Module] = []
        width = in_features
        for _ in range(layers - 1):
            modules.append(nn.Linear(width, hidden_features, bias=normalization == "none"))  # batch norm has its own
            if normalization == "batch":
                modules.append(nn.BatchNorm1d(hidden_features))
            modules.append(nn.ReLU())
            width = hidden_features
        super().__init__(*modules, nn.Linear(width, out_features, bias=False))
        self.in_features = in_features
        self.out_features = out_features
