from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from framework.errors import ConfigurationError
from framework.networks import MLPHead

MDD = [nn.Linear, nn.ReLU, nn.Dropout, nn.Linear]
MCD = [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Dropout, nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Dropout, nn.Linear]


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({}, MDD),
        ({"normalization": "batch", "layers": 2}, MCD),
        ({"dropout": 0.0}, [nn.Linear, nn.ReLU, nn.Linear]),
        ({"hidden_features": 0, "layers": 2}, [nn.Linear]),
        ({"layers": 0}, [nn.Linear]),
    ],
)
def test_layers_and_gradients(options: dict[str, Any], kinds: list[type]) -> None:
    head = MLPHead(6, 4, **{"hidden_features": 8, **options})
    assert [type(layer) for layer in head] == kinds
    logits = head(torch.randn(32, 6))
    assert logits.shape == (32, 4)
    assert logits.min() < 0  # logits, not probabilities
    (logits * torch.randn(32, 4)).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in head[-1].parameters())
    assert all(parameter.grad is not None for parameter in head.parameters())


def test_values() -> None:
    head = MLPHead(3, 2, hidden_features=5, dropout=0.0)
    inputs = torch.randn(7, 3)
    hidden = (inputs @ head[0].weight.T + head[0].bias).clamp(min=0)
    torch.testing.assert_close(head(inputs), hidden @ head[2].weight.T + head[2].bias)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_features": 0}, "`in_features` of the classifier to be at least 1, but got 0"),
        ({"num_classes": 0}, "`num_classes` of the classifier"),
        ({"hidden_features": -1}, "`hidden_features` of the classifier to be at least 0"),
        ({"layers": -1}, "`layers` of the classifier"),
        ({"normalization": "layer"}, "'batch' or 'none', but got 'layer'"),
        ({"dropout": 1.0}, "`dropout` of the classifier in"),
    ],
)
def test_bad_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        MLPHead(**{"in_features": 3, "num_classes": 2, **options})
