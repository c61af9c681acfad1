"""A network as it was."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from framework.networks import FrozenCopy, resnet8


class Pair(nn.Module):
    """A network that learns beside its frozen copy."""

    def __init__(self) -> None:
        super().__init__()
        self.network = resnet8(3)
        self.copy = FrozenCopy(self.network)


def test_the_copy_does_not_follow() -> None:
    pair, images = Pair(), torch.randn(4, 3, 16, 16)
    pair.eval()
    first = pair.copy(images)
    assert torch.equal(first, pair.network(images))
    pair.train()
    optimizer = torch.optim.SGD([p for p in pair.parameters() if p.requires_grad], lr=0.1)
    (pair.network(images).square().sum() + pair.copy(images).square().sum()).backward()
    optimizer.step()
    assert torch.equal(pair.copy(images), first)
    assert not torch.equal(pair.network(images), first)
    assert {id(p) for p in pair.network.parameters()}.isdisjoint(id(p) for p in pair.copy.parameters())


def test_it_stays_in_evaluation_mode_and_has_no_graph() -> None:
    pair, images = Pair(), torch.randn(4, 3, 16, 16, requires_grad=True)
    before = {name: value.clone() for name, value in pair.copy.state_dict().items()}
    for mode in (True, False, True):
        pair.train(mode)
        assert not any(module.training for module in pair.copy.modules())
        assert pair.network.training == mode
        assert pair.copy(images).grad_fn is None
    assert all(torch.equal(value, before[name]) for name, value in pair.copy.state_dict().items())
    assert not any(parameter.requires_grad for parameter in pair.copy.parameters())


def test_it_is_in_the_state_dict() -> None:
    pair, images = Pair().eval(), torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        pair.network.conv1.weight.mul_(2)
    other = Pair()
    other.load_state_dict(pair.state_dict())
    other.eval()
    assert torch.equal(other.copy(images), pair.copy(images))
    assert not torch.equal(other.copy(images), other.network(images))


def test_any_arguments_and_outputs() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
            return self.scale * first, self.scale * second

    outputs = FrozenCopy(Several())(torch.tensor(1.0), torch.tensor(3.0))
    assert [(float(output), output.requires_grad) for output in outputs] == [(2.0, False), (6.0, False)]
