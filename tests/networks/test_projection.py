from __future__ import annotations

import pytest
import torch
from torch import nn

from framework.errors import ConfigurationError
from framework.networks import Bottleneck, ProjectionHead


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({}, [nn.Linear, nn.BatchNorm1d, nn.ReLU]),
        ({"normalization": "none"}, [nn.Linear, nn.ReLU]),
        ({"dropout": 0.5}, [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Dropout]),
        ({"normalization": "none", "dropout": 0.1}, [nn.Linear, nn.ReLU, nn.Dropout]),
    ],
)
def test_layers_and_gradients(options, kinds):
    torch.manual_seed(0)
    bottleneck = Bottleneck(6, 4, **options)
    assert [type(layer) for layer in bottleneck] == kinds
    features = bottleneck(torch.randn(32, 6))
    assert features.shape == (32, 4)
    (features * torch.randn(32, 4)).sum().backward()
    assert all(parameter.grad is not None for parameter in bottleneck.parameters())


def test_values():
    bottleneck = Bottleneck(3, 2)
    inputs = torch.randn(5, 3)
    projected = inputs @ bottleneck[0].weight.T + bottleneck[0].bias
    normalized = (projected - projected.mean(0)) / (projected.var(0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(bottleneck(inputs), normalized.clamp(min=0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_features": 0}, "`in_features` of the bottleneck to be at least 1, but got 0"),
        ({"out_features": 0}, "`out_features` of the bottleneck"),
        ({"normalization": "layer"}, "'batch' or 'none', but got 'layer'"),
        ({"dropout": 1.0}, "`dropout` of the bottleneck in"),
    ],
)
def test_bad_values(options, message):
    with pytest.raises(ConfigurationError, match=message):
        Bottleneck(**{"in_features": 3, "out_features": 2, **options})


LINEAR, NORM, RELU = nn.Linear, nn.BatchNorm1d, nn.ReLU


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({}, [LINEAR, NORM, RELU, LINEAR]),
        ({"layers": 1}, [LINEAR]),
        ({"layers": 3}, [LINEAR, NORM, RELU, LINEAR, NORM, RELU, LINEAR]),
        ({"layers": 3, "normalization": "none"}, [LINEAR, RELU, LINEAR, RELU, LINEAR]),
    ],
)
def test_projection_head(options, kinds):
    """Every parameter matters: none is what a batch norm behind it takes away."""
    head = ProjectionHead(6, 5, 4, **options)
    assert [type(layer) for layer in head] == kinds
    assert (head.in_features, head.out_features) == (6, 4)
    projections = head(torch.randn(32, 6))
    assert projections.shape == (32, 4)
    (projections * torch.randn(32, 4)).sum().backward()
    assert all(parameter.grad.abs().max() > 1e-4 for parameter in head.parameters())
    assert head[-1].bias is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_features": 0}, "`hidden_features` of the projection head to be at least 1, but got 0"),
        ({"layers": 0}, "`layers` of the projection head"),
        ({"normalization": "layer"}, "'batch' or 'none', but got 'layer'"),
    ],
)
def test_bad_projection_head(options, message):
    with pytest.raises(ConfigurationError, match=message):
        ProjectionHead(**{"in_features": 3, "hidden_features": 2, "out_features": 2, **options})
