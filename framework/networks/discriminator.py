"""The network that tells source from target features."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from framework.errors import ConfigurationError


class DomainDiscriminator(nn.Sequential):
    """Three linear layers with a single logit: ``[N, in_features] -> [N]``; never a sigmoid.

    The x-1024-1024-1 discriminator of DANN (Ganin et al. 2016, arXiv:1505.07818, section 5.2), which CDAN (Long et
    al. 2018, arXiv:1705.10667) and its successors kept; their published codes put either batch norm or dropout behind
    the hidden layers. Which domain a positive logit means is the loss's business.

    Args:
        in_features: width of what is judged: the features', or that of their product with the predictions (CDAN).
        hidden_features: width of both hidden layers.
        normalization: "batch" for Linear-BatchNorm-ReLU, "dropout" for Linear-ReLU-Dropout(0.5), "none" for
            Linear-ReLU. "batch" needs more than one sample in training.

    Raises:
        ConfigurationError: a value outside the above.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int = 1024,
        normalization: Literal["batch", "dropout", "none"] = "batch",
    ) -> None:
        for name, value in (("in_features", in_features), ("hidden_features", hidden_features)):
            if value < 1:
                raise ConfigurationError(f"Expected `{name}` of the discriminator to be at least 1, but got {value!r}.")
        if normalization not in ("batch", "dropout", "none"):
            raise ConfigurationError(
                "Expected `normalization` of the discriminator to be 'batch', 'dropout' or 'none', "
                f"but got {normalization!r}."
            )
        layers: list[nn.Module] = []
        for width in (in_features, hidden_features):
            layers.append(nn.Linear(width, hidden_features))
            if normalization == "batch":
                layers.append(nn.BatchNorm1d(hidden_features))
            layers.append(nn.ReLU())
            if normalization == "dropout":
                layers.append(nn.Dropout(0.5))
        super().__init__(*layers, nn.Linear(hidden_features, 1))
        self.in_features = in_features

    def forward(self, features: Tensor) -> Tensor:
        for layer in self:
            features = layer(features)
        return features.squeeze(1)
