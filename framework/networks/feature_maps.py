"""The outputs of a network's inner layers, caught while it runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from framework.errors import ConfigurationError, did_you_mean
from framework.networks.stages import split_stages


class FeatureMaps:
    """Catches what some layers of a network return, each time it runs inside :meth:`recording`.

    The hooks are registered once, so that they are part of the graph where the network is compiled afterwards, and do
    nothing outside ``recording``. They refer to nothing but this object: a network that is copied or pickled takes an
    object of its own along.

    Args:
        network: what runs.
        layers: names of its modules.
    """

    def __init__(self, network: nn.Module, layers: Sequence[str]) -> None:
        self.layers = list(layers)
        self.active = False
        self.caught: dict[str, Tensor] = {}
        for layer in self.layers:
            network.get_submodule(layer).register_forward_hook(_Catch(self, layer))

    def __getitem__(self, layer: str) -> Tensor:
        """The last output of a layer.

        Raises:
            ConfigurationError: it has not run.
        """
        if layer not in self.caught:
            raise ConfigurationError(
                f"Expected `--model.layers` to name modules that the backbone runs, but {layer!r} has returned nothing."
            )
        return self.caught[layer]

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Within this context outputs are caught; its end lets go of them."""
        self.active = True
        try:
            yield
        finally:
            self.active = False
            self.caught.clear()


class _Catch:
    """The hook of one layer; an object, as a function defined inside another could not be pickled."""

    def __init__(self, maps: FeatureMaps, layer: str) -> None:
        self.maps, self.layer = maps, layer

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if self.maps.active:
            self.maps.caught[self.layer] = output


def layer_names(network: nn.Module, layers: int | Sequence[str], flag: str = "--model.layers") -> list[str]:
    """The largest modules of the last ``layers`` stages, or the named ones.

    Raises:
        ConfigurationError: no layers, more than there are stages, or a name that is not a module's.
    """
    known = {name for name, _ in network.named_modules() if name}
    if isinstance(layers, int):
        # not their last modules, which may be the norm and the pooling before the classifier
        stages = [stage.name for stage in split_stages(network) if stage.name in known]
        if not 1 <= layers <= len(stages):
            raise ConfigurationError(
                f"Expected `{flag}` to be from 1 to {len(stages)}, the stages of the backbone, or names of its "
                f"modules, but got {layers}."
            )
        return stages[-layers:]
    for layer in layers:
        if layer not in known:
            raise ConfigurationError(
                f"Expected `{flag}` to name modules of the backbone, but got {layer!r}. {did_you_mean(layer, known)}"
            )
    if not layers or len(set(layers)) < len(layers):
        raise ConfigurationError(f"Expected `{flag}` to name different modules, but got {list(layers)}.")
    return list(layers)


def channel_dimension(module: nn.Module, maps: Tensor) -> int:
    """Where the channels are in the output of a module of any backbone.

    ``[N, C]`` and a transformer's ``[N, T, C]``: the last dimension. Of four dimensions, ``[N, C, H, W]`` and ``[N, H,
    W, C]`` are told apart by the two equal ones, since images are square; where that does not tell (all three equal, or
    none), the channels are last in a module without convolutions.

    Raises:
        ConfigurationError: an output that is no such tensor.
    """
    if not isinstance(maps, Tensor) or not 2 <= maps.dim() <= 4:
        what = f"a tensor of shape {list(maps.shape)}" if isinstance(maps, Tensor) else f"a {type(maps).__name__}"
        raise ConfigurationError(
            "Expected `--model.layers` to name modules that return [N, C], [N, T, C], [N, C, H, W] or [N, H, W, C], "
            f"but {type(module).__name__} returns {what}."
        )
    if maps.dim() < 4:
        return maps.dim() - 1
    _, first, second, third = maps.shape
    if (first == second) != (second == third):
        return 1 if second == third else 3
    return 1 if any(isinstance(part, nn.Conv2d) for part in module.modules()) else 3
