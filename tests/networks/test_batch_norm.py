from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from framework.errors import ConfigurationError
from framework.networks import DomainSpecificBatchNorm, convert_domain_specific, resnet8, select_domain
from framework.networks.batch_norm import batch_norms, running_statistics_kept


def trained_norm(kind: type[nn.Module]) -> nn.Module:
    norm = kind(3)
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.normal_(norm.bias)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return norm


@pytest.mark.parametrize(("kind", "shape"), [(nn.BatchNorm1d, (8, 3)), (nn.BatchNorm2d, (4, 3, 5, 5))])
def test_against_two_independent_batch_norms(kind, shape):
    torch.manual_seed(0)
    original = trained_norm(kind)
    references = {"source": copy.deepcopy(original), "target": copy.deepcopy(original)}
    converted = convert_domain_specific(original)
    assert isinstance(converted, DomainSpecificBatchNorm)

    inputs = {"source": torch.randn(shape), "target": torch.randn(shape) * 3 + 1}
    for domain in ("source", "target", "source"):
        select_domain(converted, domain)
        outputs, expected = converted(inputs[domain]), references[domain](inputs[domain])
        assert torch.equal(outputs, expected)
        outputs.square().sum().backward()
        expected.square().sum().backward()
    for domain, reference in references.items():
        mine = converted.get_submodule(domain)
        for key, value in reference.state_dict().items():
            assert torch.equal(mine.state_dict()[key], value), (domain, key)
        for parameter, theirs in zip(mine.parameters(), reference.parameters(), strict=True):
            assert torch.equal(parameter.grad, theirs.grad)
    assert not torch.equal(converted.source.running_mean, converted.target.running_mean)

    converted.eval()
    for domain, reference in references.items():
        select_domain(converted, domain)
        assert torch.equal(converted(inputs[domain]), reference.eval()(inputs[domain]))


def test_target_is_the_default_and_survives_deepcopy():
    norm = DomainSpecificBatchNorm(nn.BatchNorm1d(3))
    assert norm.domain == "target"
    norm(torch.randn(8, 3))
    assert norm.source.num_batches_tracked == 0
    assert norm.target.num_batches_tracked == 1
    select_domain(norm, "source")
    twin = copy.deepcopy(norm)
    assert twin.domain == "source"
    select_domain(twin, "target")
    assert norm.domain == "source"


def test_conversion_of_a_network_keeps_its_outputs_and_converts_all():
    torch.manual_seed(0)
    network = resnet8(5)
    images = torch.randn(4, 3, 16, 16)
    network(images)
    network.eval()
    expected = network(images)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    assert convert_domain_specific(network) is network
    converted = [module for module in network.modules() if isinstance(module, DomainSpecificBatchNorm)]
    assert len(converted) == norms == 7
    assert all(not module.training for module in network.modules())
    for domain in ("source", "target"):
        select_domain(network, domain)
        assert torch.equal(network(images), expected)
    # a second conversion must not nest
    keys = list(network.state_dict())
    convert_domain_specific(network)
    assert list(network.state_dict()) == keys
    assert "layer1.0.bn1.source.running_mean" in keys


def test_only_the_selected_domain_moves():
    network = convert_domain_specific(resnet8(5))
    before = copy.deepcopy(network.state_dict())
    select_domain(network, "source")
    network(torch.randn(4, 3, 16, 16)).sum().backward()
    for key, value in network.state_dict().items():
        if key.endswith("running_mean"):
            assert torch.equal(before[key], value) == (".target." in key), key
    for name, parameter in network.named_parameters():
        assert (parameter.grad is None) == (".target." in name), name


def test_state_dict_round_trip():
    network = convert_domain_specific(resnet8(5))
    for domain in ("source", "target"):
        select_domain(network, domain)
        network(torch.randn(4, 3, 16, 16) + (domain == "source"))
    restored = convert_domain_specific(resnet8(5))
    restored.load_state_dict(network.state_dict(), strict=True)
    images = torch.randn(2, 3, 16, 16)
    outputs = {}
    for domain in ("source", "target"):
        for module in (network, restored):
            select_domain(module, domain)
            module.eval()
        outputs[domain] = network(images)
        assert torch.equal(outputs[domain], restored(images))
    assert not torch.equal(outputs["source"], outputs["target"])


def test_shared_and_frozen_norms_stay_shared_and_frozen():
    norm = nn.BatchNorm1d(3).requires_grad_(False).eval()
    network = convert_domain_specific(nn.Sequential(norm, nn.Linear(3, 3), norm))
    assert network[0] is network[2]
    assert not network[0].training
    assert all(not parameter.requires_grad for parameter in network[0].parameters())


def test_shared_weights_are_one_parameter_with_two_statistics():
    torch.manual_seed(0)
    plain = resnet8(5)
    network = convert_domain_specific(copy.deepcopy(plain), share_weights=True)
    norms = [module for module in network.modules() if isinstance(module, DomainSpecificBatchNorm)]
    assert all(norm.source.weight is norm.target.weight and norm.source.bias is norm.target.bias for norm in norms)
    # an optimizer gets each once
    assert len(list(network.parameters())) == len(list(plain.parameters()))
    images = {"source": torch.randn(4, 3, 16, 16), "target": 2 * torch.randn(4, 3, 16, 16) + 1}
    for domain in ("source", "target"):
        select_domain(network, domain)
        expected = copy.deepcopy(plain)(images[domain])
        torch.testing.assert_close(network(images[domain]), expected)
    assert all((norm.source.running_mean != norm.target.running_mean).any() for norm in norms)


@pytest.mark.parametrize("how", ["deepcopy", "double", "load_state_dict", "pickle"])
def test_shared_weights_stay_shared(how, tmp_path):
    norm = convert_domain_specific(trained_norm(nn.BatchNorm1d), share_weights=True)
    norm.target.running_mean.fill_(7)
    if how == "deepcopy":
        other = copy.deepcopy(norm)
    elif how == "double":
        other = copy.deepcopy(norm).double()
    elif how == "pickle":
        torch.save(norm, tmp_path / "norm.pt")
        other = torch.load(tmp_path / "norm.pt", weights_only=False)
    else:
        other = convert_domain_specific(nn.BatchNorm1d(3), share_weights=True)
        other.load_state_dict(norm.state_dict(), strict=True)
    assert other.source.weight is other.target.weight
    assert other.source.weight is not norm.source.weight
    for key, value in norm.state_dict().items():
        torch.testing.assert_close(other.state_dict()[key], value, check_dtype=False)
    # one step of an optimizer moves both
    inputs = torch.randn(8, 3).to(other.source.weight.dtype)
    before = other.target.weight.detach().clone()
    select_domain(other, "source")
    other(inputs).square().sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    assert not torch.equal(other.target.weight, before)


def test_norms_without_weights_can_be_shared():
    norm = convert_domain_specific(nn.BatchNorm1d(3, affine=False), share_weights=True)
    assert list(norm.parameters()) == []
    norm(torch.randn(4, 3))


def test_compile_follows_the_domain():
    network = convert_domain_specific(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))).eval()
    network[1].source.running_mean.fill_(5)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    inputs = torch.randn(4, 3)
    outputs = {}
    for domain in ("target", "source", "target"):
        select_domain(network, domain)
        outputs[domain] = compiled(inputs)
        assert torch.equal(outputs[domain], network(inputs))
    assert not torch.equal(outputs["source"], outputs["target"])


def test_kept_statistics_are_those_from_before_and_the_outputs_those_of_the_batch():
    torch.manual_seed(0)
    network, images = resnet8(5), 2 * torch.randn(4, 3, 16, 16) + 1
    network(torch.randn(4, 3, 16, 16))
    before, plain = copy.deepcopy(network.state_dict()), copy.deepcopy(network)
    with running_statistics_kept(network):
        outputs = network(images)
    expected = plain(images)
    assert torch.equal(outputs, expected)
    for key, value in network.state_dict().items():
        assert torch.equal(before[key], value), key
    outputs.square().sum().backward()
    expected.square().sum().backward()
    for mine, theirs in zip(network.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)
    network(images)  # afterwards they move again, as without
    for key, value in network.state_dict().items():
        assert torch.equal(plain.state_dict()[key], value), key


def test_kept_statistics_in_evaluation_are_used():
    network, images = resnet8(5), torch.randn(4, 3, 16, 16)
    network(images)
    network.eval()
    with running_statistics_kept(network):
        assert torch.equal(network(images), network.eval()(images))


def test_statistics_are_kept_where_some_norms_have_none_and_after_an_error():
    network = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False))
    convert_domain_specific(network)
    tracked = [norm.track_running_stats for norm in batch_norms(network)]
    assert tracked == [True, True, False, False]
    with running_statistics_kept(network):
        assert not any(norm.track_running_stats for norm in batch_norms(network))
        network(torch.randn(4, 3))
    assert [norm.track_running_stats for norm in batch_norms(network)] == tracked
    with pytest.raises(ValueError, match="expected 2D or 3D input"), running_statistics_kept(network):
        network(torch.randn(3))
    assert [norm.track_running_stats for norm in batch_norms(network)] == tracked
    assert network[0].target.num_batches_tracked == 0


def test_unknown_domain():
    with pytest.raises(ConfigurationError, match="`domain` to be 'source' or 'target', but got 'both'"):
        select_domain(nn.BatchNorm1d(3), "both")
