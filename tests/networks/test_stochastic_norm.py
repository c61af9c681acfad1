"""The stochastic norm against batch norms in its two states, channel by channel."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from framework.errors import ConfigurationError
from framework.networks import StochasticNorm, convert_stochastic, resnet8

KINDS = [(nn.BatchNorm1d, (8, 5)), (nn.BatchNorm1d, (8, 5, 3)), (nn.BatchNorm2d, (4, 5, 3, 3))]


def trained_norm(kind: type[nn.Module], features: int = 5, **options: float) -> nn.Module:
    norm = kind(features, **options).double()
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.normal_(norm.bias)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return norm


def by_hand(norm: nn.Module, inputs: Tensor, chosen: Tensor) -> Tensor:
    """Each channel by itself: ``chosen`` ones by the statistics that the norm holds."""
    outputs = []
    for c in range(inputs.shape[1]):
        channel = inputs[:, c]
        mean, variance = channel.mean(), channel.var(correction=0)
        if chosen[c]:
            mean, variance = norm.running_mean[c].clone(), norm.running_var[c].clone()
        outputs.append((channel - mean) / (variance + norm.eps).sqrt() * norm.weight[c] + norm.bias[c])
    return torch.stack(outputs, dim=1)


@pytest.mark.parametrize(("kind", "shape"), KINDS)
def test_output_gradients_and_statistics(kind: type[nn.Module], shape: tuple[int, ...]) -> None:
    original = trained_norm(kind)
    reference, plain = copy.deepcopy(original), copy.deepcopy(original)
    norm = StochasticNorm(original, 0.5)
    seen = set()
    for seed in range(4):
        inputs = (3 * torch.randn(shape, dtype=torch.float64) + 1).requires_grad_()
        weights = torch.randn(shape, dtype=torch.float64)
        chosen = torch.rand(5, generator=torch.Generator().manual_seed(seed)) < 0.5
        seen |= {bool(choice) for choice in chosen}
        torch.manual_seed(seed)
        outputs, expected = norm(inputs), by_hand(reference, inputs, chosen)
        torch.testing.assert_close(outputs, expected)
        # of the running branch the gradient too is of the statistics before the update
        mine = torch.autograd.grad((outputs * weights).sum(), [inputs, norm.weight, norm.bias])
        theirs = torch.autograd.grad((expected * weights).sum(), [inputs, reference.weight, reference.bias])
        for gradient, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(gradient, other)
        plain(inputs)  # updates its statistics as any batch norm does
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            assert torch.equal(getattr(norm, name), getattr(plain, name))
            getattr(reference, name).copy_(getattr(plain, name))
    assert seen == {True, False}
    norm.eval()
    plain.eval()
    assert torch.equal(norm(inputs), plain(inputs))


def test_probability_is_that_of_the_running_statistics() -> None:
    inputs = torch.randn(8, 400, dtype=torch.float64) + 5
    norm = StochasticNorm(nn.BatchNorm1d(400).double(), 0.25)
    by_running = (norm(inputs) - inputs).abs().amax(dim=0) < 1e-3  # its statistics are 0 and 1
    assert by_running.double().mean() == pytest.approx(0.25, abs=0.08)
    assert not torch.equal(by_running, (norm(inputs) - inputs).abs().amax(dim=0) < 1e-3)  # drawn anew


@pytest.mark.parametrize("momentum", [0.1, None])
def test_zero_is_batch_norm_and_one_are_the_running_statistics(momentum: float | None) -> None:
    inputs = torch.randn(4, 5, 3, 3, dtype=torch.float64)
    original = trained_norm(nn.BatchNorm2d, momentum=momentum)
    plain, frozen = copy.deepcopy(original), copy.deepcopy(original).eval()
    never, always = StochasticNorm(copy.deepcopy(original), 0.0), StochasticNorm(original, 1.0)
    assert torch.equal(never(inputs), plain(inputs))
    torch.testing.assert_close(always(inputs), frozen(inputs))
    assert torch.equal(never.running_var, plain.running_var)
    assert torch.equal(always.running_var, plain.running_var)


def test_conversion_keeps_tensors_names_and_evaluation() -> None:
    network = resnet8()
    network(torch.randn(4, 3, 16, 16))
    images = torch.randn(4, 3, 16, 16)
    expected = network.eval()(images)
    parameters, state = list(network.parameters()), network.state_dict()
    assert convert_stochastic(network, 0.3) is network
    norms = [part for part in network.modules() if isinstance(part, StochasticNorm)]
    assert len(norms) == 7
    assert {norm.probability for norm in norms} == {0.3}
    assert not any(isinstance(part, nn.BatchNorm2d) for part in network.modules())
    assert not any(part.training for part in network.modules())
    assert all(mine is theirs for mine, theirs in zip(network.parameters(), parameters, strict=True))
    assert list(network.state_dict()) == list(state)
    assert all(value.data_ptr() == state[name].data_ptr() for name, value in network.state_dict().items())
    assert torch.equal(network(images), expected)
    resnet8().load_state_dict(network.state_dict())  # a plain network takes them
    convert_stochastic(network, 0.9)  # a second conversion changes nothing
    assert {part.probability for part in network.modules() if isinstance(part, StochasticNorm)} == {0.3}
    assert torch.equal(pickle.loads(pickle.dumps(network))(images), expected)
    assert torch.equal(copy.deepcopy(network)(images), expected)


def test_shared_frozen_and_untracked_norms() -> None:
    norm = nn.BatchNorm1d(3).requires_grad_(False).eval()
    untracked = nn.BatchNorm1d(3, track_running_stats=False)
    network = convert_stochastic(nn.Sequential(norm, nn.Linear(3, 3), norm, untracked))
    assert network[0] is network[2]
    assert not network[0].training
    assert not any(parameter.requires_grad for parameter in network[0].parameters())
    assert network[3] is untracked
    assert isinstance(convert_stochastic(nn.BatchNorm1d(3)), StochasticNorm)


def test_norms_of_timm_keep_their_activation() -> None:
    timm = pytest.importorskip("timm")
    from timm.layers import BatchNormAct2d

    inputs = torch.randn(4, 5, 3, 3) - 0.5
    plain = BatchNormAct2d(5)
    norm = StochasticNorm(copy.deepcopy(plain), 0.0)
    assert torch.equal(norm(inputs.clone()), plain(inputs.clone()))
    assert float(norm(inputs.clone()).detach().min()) == 0
    network = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    images = torch.randn(2, 3, 32, 32)
    expected = network.eval()(images)
    state = list(network.state_dict())
    assert torch.equal(convert_stochastic(network)(images), expected)
    assert not any(type(part).__name__ == "BatchNormAct2d" for part in network.modules())
    assert list(network.state_dict()) == state
    assert network.train()(images).isfinite().all()


def test_a_batch_norm_of_unknown_kind_is_refused() -> None:
    class Doubled(nn.BatchNorm1d):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    with pytest.raises(ConfigurationError, match=r"`--model\.backbone` with batch norms of torch or timm"):
        convert_stochastic(nn.Sequential(Doubled(3)))
    with pytest.raises(ConfigurationError, match=r"`--model\.probability` to be in \[0, 1\], but got 1\.5"):
        convert_stochastic(nn.BatchNorm1d(3), 1.5)


def test_compiles_into_one_graph() -> None:
    network = convert_stochastic(nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), nn.ReLU()), 0.5)
    twin = copy.deepcopy(network)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    images = torch.randn(4, 3, 4, 4)
    for seed in range(2):
        torch.manual_seed(seed)
        outputs = compiled(images)
        torch.manual_seed(seed)
        expected = twin(images)
        torch.testing.assert_close(outputs, expected)
        mine = torch.autograd.grad(outputs.square().sum(), list(network.parameters()))
        theirs = torch.autograd.grad(expected.square().sum(), list(twin.parameters()))
        torch.testing.assert_close(mine, theirs)
        torch.testing.assert_close(dict(network.named_buffers()), dict(twin.named_buffers()))
    torch._dynamo.reset()


def test_half_precision_inputs() -> None:
    norm = StochasticNorm(nn.BatchNorm2d(5))
    assert norm(torch.randn(4, 5, 3, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert norm.running_mean is not None
    assert norm.running_mean.dtype == torch.float32
