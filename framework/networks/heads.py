"""The classifier of several layers that methods with two classifiers use."""

from __future__ import annotations

from typing import Literal

from torch import nn

from framework.errors import ConfigurationError


class MLPHead(nn.Sequential):
    """Hidden layers of linear, batch norm, ReLU and dropout, then a linear one: ``[N, in_features] -> [N, K]``, logits.

    With one hidden layer and dropout it is the classifier of MDD (Zhang et al. 2019, arXiv:1904.05801), with two and
    batch norm that of MCD (Saito et al. 2018, arXiv:1712.02560).

    Args:
        in_features: width of the features.
        num_classes: number of classes ``K``.
        hidden_features: width of the hidden layers; 0 for none, whatever ``layers`` says.
        dropout: probability after each hidden layer, in [0, 1); 0 adds no layer.
        normalization: "batch", or "none" for no batch norm. "batch" needs more than one sample in training.
        layers: how many hidden layers.

    Raises:
        ConfigurationError: a value outside the above.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        hidden_features: int = 1024,
        dropout: float = 0.5,
        normalization: Literal["batch", "none"] = "none",
        layers: int = 1,
    ) -> None:
        for name, value, least in (
            ("in_features", in_features, 1),
            ("num_classes", num_classes, 1),
            ("hidden_features", hidden_features, 0),
            ("layers", layers, 0),
        ):
            if value < least:
                raise ConfigurationError(
                    f"Expected `{name}` of the classifier to be at least {least}, but got {value}."
                )
        if normalization not in ("batch", "none"):
            raise ConfigurationError(
                f"Expected `normalization` of the classifier to be 'batch' or 'none', but got {normalization!r}."
            )
        if not 0 <= dropout < 1:
            raise ConfigurationError(f"Expected `dropout` of the classifier in [0, 1), but got {dropout!r}.")
        modules: list[nn.Module] = []
        width = in_features
        for _ in range(layers if hidden_features else 0):
            modules.append(nn.Linear(width, hidden_features))
            if normalization == "batch":
                modules.append(nn.BatchNorm1d(hidden_features))
            modules.append(nn.ReLU())
            if dropout:
                modules.append(nn.Dropout(dropout))
            width = hidden_features
        super().__init__(*modules, nn.Linear(width, num_classes))
        self.in_features = in_features
