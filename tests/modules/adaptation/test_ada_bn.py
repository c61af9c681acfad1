"""AdaBN: the source's weights, the target's statistics."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import contract
import pytest
import torch
from torch import Tensor, nn

from framework.batch import DomainBatch, LabelledBatch
from framework.errors import ConfigurationError
from framework.modules import AdaBN, SourceOnly
from framework.networks import DomainSpecificBatchNorm


def test_weights_are_those_of_source_only_bit_for_bit(domains: Path) -> None:
    """No gradient and no statistic of the target reaches them, with batch norm and dropout in the network."""
    plain = contract.weights(contract.fit(SourceOnly, domains))
    adapted = contract.weights(contract.fit(AdaBN, domains))
    for name, value in plain.items():
        head, _, last = name.rpartition(".")
        names = [name] if name in adapted else [f"{head}.source.{last}"]
        if last in ("weight", "bias") and name not in adapted:
            names.append(f"{head}.target.{last}")  # shared
        for mine in names:
            assert torch.equal(adapted[mine], value), mine
    shifted = [name for name in adapted if name.endswith("target.running_mean")]
    assert len(shifted) == 8  # 7 of the backbone, 1 of the bottleneck
    for name in shifted:
        assert not torch.equal(adapted[name], adapted[name.replace("target.", "source.")])


def step(module: AdaBN, source: Tensor, target: Tensor, labels: Tensor | None = None) -> Tensor:
    module.logged_loss = lambda loss, **terms: loss  # type: ignore[method-assign]
    labels = torch.arange(len(source)) % 3 if labels is None else labels
    loss = module.train().training_step(DomainBatch(LabelledBatch(source, labels), target), 0)
    assert loss is not None
    return loss


def images(shift: float = 0.0) -> Tensor:
    return torch.randn(6, 3, 16, 16) + shift


def test_statistics_against_a_network_for_each_domain() -> None:
    module = AdaBN(3, backbone="resnet8", bottleneck_features=8)
    # the same network with plain batch norms, once fed with each domain
    alone = {}
    for domain in ("source", "target"):
        alone[domain] = SourceOnly(3, backbone="resnet8", bottleneck_features=8)
        state = {k.replace(".source.", "."): v for k, v in module.state_dict().items() if ".target." not in k}
        alone[domain].load_state_dict(state)
    source, target = images(), images(2.0)
    for _ in range(3):
        step(module, source, target)
    for domain, batch in (("source", source), ("target", target)):
        for _ in range(3):
            expected = alone[domain].train()(batch)
        assert expected is not None
        for name, norm in alone[domain].named_modules():
            if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
                mine = module.get_submodule(f"{name}.{domain}")
                torch.testing.assert_close(mine.running_mean, norm.running_mean)
                torch.testing.assert_close(mine.running_var, norm.running_var)
    # in use, target images meet the target's statistics
    probe = images(2.0)
    torch.testing.assert_close(module.eval()(probe), alone["target"].eval()(probe))
    torch.testing.assert_close(module.outputs_in("source", probe).logits, alone["source"].eval()(probe))
    torch.testing.assert_close(module(probe), alone["target"](probe))  # and the selection is put back


def test_no_gradient_from_the_target() -> None:
    torch.manual_seed(0)
    module = AdaBN(3, backbone="resnet8")
    gradients = []
    for target in (images(), images(5.0)):
        module.zero_grad()
        torch.manual_seed(1)
        source = images()
        step(copy.deepcopy(module), source, target)
        twin = copy.deepcopy(module)
        step(twin, source, target).backward()
        gradients.append({name: p.grad for name, p in twin.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        assert torch.equal(gradient, gradients[1][name]), name


def test_weights_learn_under_autocast() -> None:
    """The target's forward, without gradients, shares autocast's cache of cast weights with the source's."""
    module = AdaBN(3, backbone="resnet8")
    with torch.autocast("cpu", torch.bfloat16):
        loss = step(module, images(), images(1.0))
    loss.backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_each_parameter_is_in_one_group_once() -> None:
    module = AdaBN(3, backbone="resnet8")
    grouped = [id(p) for group in module.parameter_groups() for p in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(list(SourceOnly(3, backbone="resnet8").parameters()))


def test_it_undoes_a_change_of_contrast_and_brightness() -> None:
    """Target images are as dark and flat as no source image is; the target's statistics take that out again."""
    pattern = torch.randn(3, 3, 16, 16)
    module = AdaBN(3, backbone="resnet8", backbone_learning_rate_factor=1.0)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)

    def sample(domain: str) -> tuple[Tensor, Tensor]:
        labels = torch.arange(24) % 3
        batch = pattern[labels] + 0.5 * torch.randn(24, 3, 16, 16)
        return (batch if domain == "source" else 0.2 * batch - 3), labels

    for _ in range(25):
        (source, labels), (target, _) = sample("source"), sample("target")
        optimizer.zero_grad()
        step(module, source, target, labels).backward()
        optimizer.step()
    images, labels = sample("target")
    module.eval()
    adapted = (module(images).argmax(1) == labels).float().mean()
    as_source = (module.outputs_in("source", images).logits.argmax(1) == labels).float().mean()
    assert adapted > 0.95
    assert as_source < 0.7


def test_the_policy_is_its_own() -> None:
    for policy in ("separate", "domain_specific"):
        with pytest.raises(ConfigurationError, match=r"`--model\.batch_norm` of AdaBN"):
            AdaBN(3, backbone="resnet8", batch_norm=policy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"backbone": "squeezenet1_1", "bottleneck_normalization": "none"},
            "squeezenet1_1 has none: this is SourceOnly",
        ),
        ({"backbone": "squeezenet1_1"}, "squeezenet1_1 has none: only the bottleneck adapts"),
        ({}, None),
    ],
)
def test_a_backbone_without_batch_norm_is_named(options: Any, message: str | None, domains: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        contract.fit(AdaBN, domains, model=options, data={"image_size": 32}, fast_dev_run=True)
    found = [str(warning.message) for warning in caught if "--model.backbone" in str(warning.message)]
    assert len(found) == (message is not None)
    assert message is None or message in found[0]


def test_the_shift_of_the_statistics_is_logged(domains: Path) -> None:
    module = contract.fit(AdaBN, domains, max_epochs=1)
    layers = [layer for layer in module.modules() if isinstance(layer, DomainSpecificBatchNorm)]
    total = count = 0.0
    for layer in layers:
        for channel in range(len(layer.source.running_mean)):
            difference = layer.target.running_mean[channel] - layer.source.running_mean[channel]
            total += abs(float(difference)) / float(layer.source.running_var[channel] + 1e-5) ** 0.5
            count += 1
    assert float(module.trainer.callback_metrics["val/batch_norm_shift"]) == pytest.approx(total / count, rel=1e-4)
