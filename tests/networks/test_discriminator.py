from __future__ import annotations

import pytest
import torch
from torch import nn

from framework.errors import ConfigurationError
from framework.networks import DomainDiscriminator


@pytest.mark.parametrize(
    ("normalization", "hidden"),
    [
        ("batch", [nn.Linear, nn.BatchNorm1d, nn.ReLU]),
        ("dropout", [nn.Linear, nn.ReLU, nn.Dropout]),
        ("none", [nn.Linear, nn.ReLU]),
    ],
)
def test_layers_shapes_and_gradients(normalization, hidden):
    torch.manual_seed(0)
    discriminator = DomainDiscriminator(6, 16, normalization)
    assert [type(layer) for layer in discriminator] == [*hidden, *hidden, nn.Linear]
    logits = discriminator(torch.randn(32, 6) * 10)
    assert logits.shape == (32,)
    assert logits.min() < 0  # no probabilities
    nn.functional.binary_cross_entropy_with_logits(logits, torch.randint(2, (32,)).float()).backward()
    assert all(parameter.grad is not None for parameter in discriminator.parameters())
    # one sample keeps its axis
    assert discriminator.eval()(torch.randn(1, 6)).shape == (1,)


def test_width_is_the_papers():
    discriminator = DomainDiscriminator(256)
    widths = [(layer.in_features, layer.out_features) for layer in discriminator if isinstance(layer, nn.Linear)]
    assert widths == [(256, 1024), (1024, 1024), (1024, 1)]


def test_logits_are_the_last_linear_layers():
    discriminator = DomainDiscriminator(3, 4, "none")
    features = torch.randn(5, 3)
    hidden = features
    for index in (0, 2):
        hidden = (hidden @ discriminator[index].weight.T + discriminator[index].bias).clamp(min=0)
    torch.testing.assert_close(
        discriminator(features), (hidden @ discriminator[4].weight.T + discriminator[4].bias)[:, 0]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_features": 0}, "`in_features` of the discriminator to be at least 1, but got 0"),
        ({"hidden_features": -1}, "`hidden_features` of the discriminator"),
        ({"normalization": "layer"}, "'batch', 'dropout' or 'none', but got 'layer'"),
    ],
)
def test_bad_values(options, message):
    with pytest.raises(ConfigurationError, match=message):
        DomainDiscriminator(**{"in_features": 3, **options})
