"""Loss increases without a channel, and the attention that is made of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from framework.networks import FeatureMaps, resnet8
from framework.networks.channel_attention import (
    ChannelAttention,
    attention_weights,
    loss_increases,
    train_linear_classifier,
)


class Two(nn.Module):
    """Two layers, and a convolution whose ReLU works in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.second = nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 5, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.second(self.act(self.first(images))).mean(dim=(2, 3))


def setting() -> tuple[Two, nn.Linear, list[tuple[Tensor, Tensor]]]:
    network, classifier = Two().double().requires_grad_(False), nn.Linear(5, 3).double()
    batches = [(torch.randn(6, 3, 4, 4, dtype=torch.float64), torch.randint(3, (6,))) for _ in range(2)]
    return network, classifier, batches


def switched_off(network: Two, classifier: nn.Linear, images: Tensor, first: Tensor, second: Tensor) -> Tensor:
    hidden = network.first(images).relu() * first.view(-1, 1, 1)
    return classifier((network.second(hidden) * second.view(-1, 1, 1)).mean(dim=(2, 3)))


def test_increases_by_hand() -> None:
    network, classifier, batches = setting()
    found = loss_increases(network, FeatureMaps(network, ["first", "second"]), classifier, batches)
    on = torch.ones(4, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    for index, name in enumerate(["first", "second"]):
        expected = []
        for c in range(len(on[index])):
            masks = [on[0].clone(), on[1].clone()]
            masks[index][c] = 0
            rises = [
                F.cross_entropy(switched_off(network, classifier, images, *masks), labels).item()
                - F.cross_entropy(switched_off(network, classifier, images, *on), labels).item()
                for images, labels in batches
            ]
            expected.append(sum(rises) / 2)
        assert found[name].tolist() == pytest.approx(expected, rel=1e-9)
    assert not network.first._forward_hooks.keys() - {next(iter(network.first._forward_hooks))}


def test_first_order_is_the_slope_towards_off() -> None:
    network, classifier, batches = setting()
    found = loss_increases(network, FeatureMaps(network, ["first", "second"]), classifier, batches, first_order=True)
    masks = [
        torch.ones(4, dtype=torch.float64, requires_grad=True),
        torch.ones(5, dtype=torch.float64).requires_grad_(),
    ]
    losses = [F.cross_entropy(switched_off(network, classifier, images, *masks), labels) for images, labels in batches]
    for name, slope in zip(["first", "second"], torch.autograd.grad(sum(losses) / 2, masks), strict=True):
        torch.testing.assert_close(found[name], -slope)
    assert not any(image.requires_grad for image, _ in batches)


class Permuted(nn.Module):
    """The same with the channels last, as in a Swin transformer."""

    def __init__(self, network: Two) -> None:
        super().__init__()
        self.first, self.act, self.second = nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 5)
        for mine, theirs in ((self.first, network.first), (self.second, network.second)):
            mine.load_state_dict(
                {name: value.flatten(1) if name == "weight" else value for name, value in theirs.state_dict().items()}
            )

    def forward(self, images: Tensor) -> Tensor:
        return self.second(self.act(self.first(images.movedim(1, 3)))).mean(dim=(1, 2))


@pytest.mark.parametrize("first_order", [False, True])
def test_channels_last(first_order: bool) -> None:
    network, classifier, batches = setting()
    layers = ["first", "second"]
    permuted = Permuted(network).double().requires_grad_(False)
    images = batches[0][0][:, :, :3, :3]  # of a size that is no layer's number of channels
    batch = [(images, batches[0][1])]
    expected = loss_increases(network, FeatureMaps(network, layers), classifier, batch, first_order)
    found = loss_increases(permuted, FeatureMaps(permuted, layers), classifier, batch, first_order)
    for layer in layers:
        torch.testing.assert_close(found[layer], expected[layer])


def test_a_compiled_network_is_measured_too() -> None:
    network = resnet8().eval().requires_grad_(False)
    maps, classifier = FeatureMaps(network, ["layer3"]), nn.Linear(64, 2)
    batches = [(torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 0, 1]))]
    expected = loss_increases(network, maps, classifier, batches)
    network.compile(backend="eager")
    network(batches[0][0])
    torch.testing.assert_close(loss_increases(network, maps, classifier, batches), expected)
    assert expected["layer3"].abs().max() > 0
    torch._dynamo.reset()


def test_weights_of_increases() -> None:
    increases = torch.tensor([0.3, -0.1, 0.7, 0.0], dtype=torch.float64)
    z = (increases.numpy() - increases.numpy().mean()) / increases.numpy().std()
    expected = np.exp(z / 5) / np.exp(z / 5).sum()
    np.testing.assert_allclose(attention_weights(increases).numpy(), expected)
    np.testing.assert_allclose(attention_weights(7 * increases + 2).numpy(), expected)
    plain = np.exp(increases.numpy())
    np.testing.assert_allclose(attention_weights(increases, None).numpy(), plain / plain.sum())
    assert attention_weights(torch.full((4,), 0.3)).tolist() == [0.25] * 4  # no channel matters more


def test_classifier_against_scikit_learn() -> None:
    features, labels = torch.randn(90, 4, dtype=torch.float64), torch.randint(3, (90,))
    features += labels[:, None]
    with torch.no_grad():  # as where the run starts
        mine = train_linear_classifier(features, labels, 3, weight_decay=0.01, steps=500)
    # its penalty is 1/2 |w|^2 / C on the sum of the losses, and none on the bias: here a column of ones
    columns = np.concatenate([features.numpy(), np.ones((90, 1))], axis=1)
    theirs = LogisticRegression(C=1 / 0.9, fit_intercept=False, tol=1e-10, max_iter=5000).fit(columns, labels.numpy())
    np.testing.assert_allclose(
        mine(features).softmax(1).detach().numpy(), theirs.predict_proba(columns), rtol=1e-3, atol=1e-5
    )


def test_weights_travel_in_the_state_dict() -> None:
    attention, other = ChannelAttention(["layer1.0", "layer2"]), ChannelAttention(["layer1.0", "layer2"])
    assert not attention.known
    other.load_state_dict(attention.state_dict())
    assert not other.known
    attention["layer1.0"], attention["layer2"] = torch.rand(3), torch.rand(5)
    assert attention.known
    other.load_state_dict(attention.state_dict())
    assert other.known
    assert torch.equal(other["layer1.0"], attention["layer1.0"])
    assert other.double()["layer2"].dtype == torch.float64


def test_weights_take_the_dtype_that_a_checkpoint_has() -> None:
    attention = ChannelAttention(["layer"]).bfloat16()
    attention["layer"] = torch.rand(3)
    assert attention["layer"].dtype == torch.bfloat16


def test_half_precision_features_are_classified_in_float32() -> None:
    features = torch.randn(30, 4).bfloat16()
    labels = (features[:, 0] > 0).long()
    logits = train_linear_classifier(features, labels, 2)(features)
    assert logits.dtype == torch.float32
    assert torch.equal(logits.argmax(1), labels)
