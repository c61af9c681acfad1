"""The bottleneck between backbone and head."""

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
