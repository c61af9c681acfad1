"""Which channels of a network matter to a task: how much its loss rises without them (DELTA, Li et al., ICLR 2019)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from framework.functional.precision import HALF_PRECISION
from framework.networks.feature_maps import FeatureMaps, channel_dimension

Classifier = Callable[[Tensor], Tensor]


class ChannelAttention(nn.Module):
    """A weight for each channel of some layers, as buffers of the ``state_dict``; empty until they are set or loaded.

    Args:
        layers: their names; buffers have ``/`` for the dots.
    """

    def __init__(self, layers: Sequence[str]) -> None:
        super().__init__()
        for layer in layers:
            self.register_buffer(layer.replace(".", "/"), torch.empty(0))

    @property
    def known(self) -> bool:
        """Whether all weights have been set or loaded."""
        return all(len(weights) > 0 for weights in self.buffers())

    def __getitem__(self, layer: str) -> Tensor:
        return self._buffers[layer.replace(".", "/")]  # type: ignore[return-value]

    def __setitem__(self, layer: str, weights: Tensor) -> None:
        self._buffers[layer.replace(".", "/")] = weights.to(self[layer].dtype)  # that in which it would be loaded

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, weights in self._buffers.items():  # the number of channels is known once the network has run
            loaded = state_dict.get(prefix + name)
            if weights is not None and loaded is not None:
                self._buffers[name] = weights.new_empty(loaded.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


def attention_weights(increases: Tensor, temperature: float | None = 5.0) -> Tensor:
    """The softmax of a layer's loss increases ``[C]``, which sums to 1.

    They are standardised and divided by ``temperature`` before, as in the authors' code, or taken as they are where
    that is None, as in the paper's formula.

    >>> attention_weights(torch.tensor([0.01, 0.03]), temperature=1.0)
    tensor([0.1192, 0.8808])
    """
    if temperature is not None:
        deviation = increases.std(correction=0).clamp(min=1e-12)
        increases = (increases - increases.mean()) / deviation / temperature
    return increases.softmax(dim=0)


def train_linear_classifier(
    features: Tensor, labels: Tensor, num_classes: int, weight_decay: float = 1e-4, steps: int = 100
) -> Classifier:
    """Multinomial logistic regression from zero by L-BFGS on all features at once: no chance is involved.

    Args:
        features: shape ``[N, D]``; in half precision they are cast to float32.
        labels: class indices, shape ``[N]``.
        num_classes: number of classes ``K``.
        weight_decay: weight of ``1/2 |w|^2``; that of the authors' code by default.
        steps: at most so many iterations.

    Returns:
        The map from features ``[N, D]`` to logits ``[N, K]``.
    """
    features = features.float() if features.dtype in HALF_PRECISION else features
    weight = features.new_zeros(num_classes, features.shape[1]).requires_grad_()
    bias = features.new_zeros(num_classes).requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        decay = weight_decay / 2 * (weight.square().sum() + bias.square().sum())
        value = F.cross_entropy(F.linear(features, weight, bias), labels) + decay
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    return lambda inputs: F.linear(inputs.to(weight.dtype), weight.detach(), bias.detach())


def loss_increases(
    network: nn.Module,
    maps: FeatureMaps,
    classifier: Classifier,
    batches: Iterable[tuple[Tensor, Tensor]],
    first_order: bool = False,
) -> dict[str, Tensor]:
    """How much the cross-entropy rises where a channel of a layer's output is set to 0, for each channel of each layer.

    Args:
        network: images to features; in evaluation mode, without gradients of its weights. It runs uncompiled.
        maps: its layers.
        classifier: features to logits.
        batches: images ``[N, 3, H, W]`` and class indices ``[N]``; the mean over these.
        first_order: ``-gradient * output`` summed over images and positions, which is the increase in a loss that is
            linear in the outputs, in place of a forward pass for each channel.

    Returns:
        Shape ``[C]`` for each layer.
    """
    measure = _estimated if first_order else _measured
    found = [measure(network, maps, classifier, images, labels) for images, labels in batches]
    return {layer: torch.stack([increases[layer] for increases in found]).mean(dim=0) for layer in maps.layers}


# `network.forward` and not `network`: where that is compiled, every hook and channel would be another graph
def _measured(
    network: nn.Module, maps: FeatureMaps, classifier: Classifier, images: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    with torch.no_grad():
        with maps.recording():
            normal = F.cross_entropy(classifier(network.forward(images)), labels)
            shapes = {layer: (_dimension(network, layer, maps), maps[layer].shape) for layer in maps.layers}
        increases = {}
        for layer, (dimension, shape) in shapes.items():
            off = _SwitchOff(dimension)
            handle = network.get_submodule(layer).register_forward_hook(off)
            losses = []
            for off.channel in range(shape[dimension]):
                losses.append(F.cross_entropy(classifier(network.forward(images)), labels))
            handle.remove()
            increases[layer] = torch.stack(losses) - normal
    return increases


def _estimated(
    network: nn.Module, maps: FeatureMaps, classifier: Classifier, images: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    increases = {}
    with torch.enable_grad(), maps.recording():
        # the weights are frozen: only what comes from an input with a gradient has one
        loss = F.cross_entropy(classifier(network.forward(images.detach().requires_grad_())), labels)
        outputs = [maps[layer] for layer in maps.layers]
        for layer, output, gradient in zip(maps.layers, outputs, torch.autograd.grad(loss, outputs), strict=True):
            dimension = _dimension(network, layer, maps)
            others = [other for other in range(output.dim()) if other != dimension]
            increases[layer] = -(gradient * output.detach()).sum(dim=others)
    return increases


class _SwitchOff:
    """The hook that sets one channel of a layer's output to 0."""

    def __init__(self, dimension: int) -> None:
        self.dimension, self.channel = dimension, 0

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output.select(self.dimension, self.channel).zero_()
        return output


def _dimension(network: nn.Module, layer: str, maps: FeatureMaps) -> int:
    return channel_dimension(network.get_submodule(layer), maps[layer])
