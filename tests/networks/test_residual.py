from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from framework.errors import ConfigurationError
from framework.networks import residual_blocks
from framework.networks.residual import RESIDUAL_NETWORKS, ResidualNetwork
from framework.networks.residual_blocks import BasicBlock, BottleneckBlock, PreActivationBlock, ZeroPaddedShortcut

SMALL = {"resnet8": 1, "resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9, "resnet110": 18}
# METHODS section 3: torchvision's own counts
LARGE = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
}
# He 2015, table 6
PUBLISHED_MILLIONS = {"resnet20": 0.27, "resnet32": 0.46, "resnet44": 0.66, "resnet56": 0.85, "resnet110": 1.7}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def build(name: str, num_classes: int | None = None, **options) -> ResidualNetwork:
    return RESIDUAL_NETWORKS[name](num_classes, **options)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def tiny(block: str = "basic", **options) -> ResidualNetwork:
    settings = {"depths": [2, 2], "widths": [4, 8], "num_classes": 3, "image_size": 32, **options}
    return ResidualNetwork(block, **settings)


def blocks_of(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if isinstance(module, residual_blocks.ResidualBlock)]


# parameter counts and layers


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("block", ["basic", "preactivation"])
def test_small_family_counts(name, block):
    n = SMALL[name]
    with torch.device("meta"):
        network = build(name, 10, block=block)
        projected = build(name, 10, block=block, shortcut="B")
        plain = build(name, 10, block=block, residual=False)
    # by hand: 2n-1 3x3 convolutions of width c per stage with batch norm, one that doubles the width, stem and fc
    expected = 27 * 16 + 2 * 16 + 2 * n * (9 * 16 * 16 + 2 * 16) + 64 * 10 + 10
    for width in (32, 64):
        expected += 9 * width * width // 2 + 2 * width + (2 * n - 1) * (9 * width * width + 2 * width)
    assert count(network) == expected == 97_216 * n - 21_926
    assert count(plain) == count(network)
    # two projections; their batch norms only where activations come last
    batch_norms = 2 * (32 + 64) if block == "basic" else 0
    assert count(projected) == expected + 16 * 32 + 32 * 64 + batch_norms
    if name in PUBLISHED_MILLIONS:
        assert count(network) / 1e6 == pytest.approx(PUBLISHED_MILLIONS[name], abs=0.05 if n == 18 else 0.006)


@pytest.mark.parametrize("name", SMALL)
def test_small_family_has_6n_plus_2_layers(name):
    with torch.device("meta"):
        network = build(name, 10)
    layers = [module for module in network.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    assert len(layers) == 6 * SMALL[name] + 2 == int(name.removeprefix("resnet"))


@pytest.mark.parametrize("name", LARGE)
def test_large_family_counts(name):
    with torch.device("meta"):
        network = build(name, 1000)
        assert count(network) == LARGE[name]
        assert count(build(name)) == LARGE[name] - network.num_features * 1000 - 1000
        plain, zero_padded = build(name, 1000, residual=False), build(name, 1000, shortcut="A")
        assert count(plain) == count(zero_padded) < LARGE[name]


@pytest.mark.parametrize("name", LARGE)
def test_state_dict_is_torchvisions(name):
    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)().state_dict()
        ours = build(name, 1000).state_dict()
    assert [(key, value.shape) for key, value in ours.items()] == [(key, value.shape) for key, value in theirs.items()]


# against torchvision


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_logits_equal_torchvisions(name):
    theirs = getattr(torchvision.models, name)(num_classes=7).eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):  # otherwise a swapped pair of batch norms would not show
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    ours = build(name, 7).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images))
        backbone = build(name).eval()
        backbone.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")})
        torch.testing.assert_close(theirs.fc(backbone(images)), theirs(images))


def test_train_mode_equals_torchvisions():
    theirs = torchvision.models.resnet18(num_classes=7)
    ours = build("resnet18", 7)
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(4, 3, 64, 64)
    torch.testing.assert_close(ours(images), theirs(images))
    mine = ours.state_dict()
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(mine[key], value)
    assert mine["layer4.1.bn2.num_batches_tracked"] == 1


# shapes and gradients

VARIANTS = [
    *itertools.product(["basic", "bottleneck", "preactivation", "preactivation_bottleneck"], ["A", "B"], [True]),
    *itertools.product(["basic", "bottleneck", "preactivation", "preactivation_bottleneck"], ["A"], [False]),
]


@pytest.mark.parametrize(("block", "shortcut", "is_residual"), VARIANTS)
def test_every_parameter_gets_a_gradient(block, shortcut, is_residual):
    network = tiny(block, shortcut=shortcut, residual=is_residual)
    logits = network(torch.randn(4, 3, 9, 9))
    assert logits.shape == (4, 3)
    nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0])).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("name", ["resnet8", "resnet18", "resnet50"])
@pytest.mark.parametrize("block", ["default", "preactivation"])
@pytest.mark.parametrize("size", [33, 64])
def test_backbone_returns_features(name, block, size):
    network = build(name, in_channels=1, **({} if block == "default" else {"block": block})).eval()
    with torch.no_grad():
        features = network(torch.randn(2, 1, size, size))
    assert features.shape == (2, network.num_features)
    assert network.num_features == {"resnet8": 64, "resnet18": 512, "resnet50": 2048}[name]
    # the last activation is a ReLU in every variant
    assert (features >= 0).all()


def test_resolution_halves_between_stages():
    sizes = {}
    for name, image_size in (("resnet8", 32), ("resnet18", 224)):
        network = build(name).eval()
        hooks = {"stem": network.maxpool, **{stage: network.get_submodule(stage) for stage in network.stages}}
        for key, module in hooks.items():
            module.register_forward_hook(lambda _m, _i, out, key=(name, key): sizes.update({key: tuple(out.shape[1:])}))
        with torch.no_grad():
            network(torch.randn(1, 3, image_size, image_size))
    assert [sizes["resnet8", k] for k in ("stem", "layer1", "layer2", "layer3")] == [
        (16, 32, 32),
        (16, 32, 32),
        (32, 16, 16),
        (64, 8, 8),
    ]
    assert [sizes["resnet18", k] for k in ("stem", "layer1", "layer2", "layer3", "layer4")] == [
        (64, 56, 56),
        (64, 56, 56),
        (128, 28, 28),
        (256, 14, 14),
        (512, 7, 7),
    ]


def test_compiles_to_one_graph():
    for block in ("basic", "preactivation"):
        network = tiny(block, stochastic_depth=0.2)
        compiled = torch.compile(network.eval(), backend="eager", fullgraph=True)
        images = torch.randn(2, 3, 8, 8)
        torch.testing.assert_close(compiled(images), network(images))


# shortcuts and the plain twin


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [7, 8])
def test_zero_padded_shortcut_against_a_loop(stride, size):
    inputs = torch.randn(2, 3, size, size)
    outputs = ZeroPaddedShortcut(3, 5, stride)(inputs)
    side = (size + stride - 1) // stride
    expected = torch.zeros(2, 5, side, side)
    for sample, channel, row, column in itertools.product(range(2), range(3), range(side), range(side)):
        expected[sample, channel, row, column] = inputs[sample, channel, row * stride, column * stride]
    assert torch.equal(outputs, expected)
    assert count(ZeroPaddedShortcut(3, 5, stride)) == 0


def zero_convolutions(block: nn.Module) -> None:
    for name, module in block.named_modules():
        if isinstance(module, nn.Conv2d) and "downsample" not in name:
            nn.init.zeros_(module.weight)


@pytest.mark.parametrize("kind", [BasicBlock, BottleneckBlock, PreActivationBlock])
@pytest.mark.parametrize("stride", [1, 2])
def test_zeroed_convolutions_leave_the_shortcut_only(kind, stride):
    inputs = torch.randn(2, 8, 6, 6)
    for shortcut in ("A", "B", None):
        block = kind(8, 8 // getattr(kind, "expansion", 1) * stride, stride, shortcut).eval()
        zero_convolutions(block)
        if shortcut is None:
            assert block.downsample is None
            expected = torch.zeros(2, 8 * stride, 6 // stride, 6 // stride)
        else:
            assert (block.downsample is None) == (stride == 1)
            # a changed shape: the pre-activation shortcut starts behind the (here fresh) first activation
            start = (inputs / (1 + 1e-5) ** 0.5).relu() if kind is PreActivationBlock and stride == 2 else inputs
            expected = start if block.downsample is None else block.downsample(start)
            expected = expected if kind is PreActivationBlock else expected.relu()
        torch.testing.assert_close(block(inputs), expected)


def test_plain_twin_has_the_same_layers_and_no_shortcut():
    for name, block in (("resnet20", "basic"), ("resnet20", "preactivation"), ("resnet18", "basic")):
        options = {"num_classes": 10, "block": block}
        twin, network = build(name, **options, residual=False), build(name, **options, shortcut="A")
        shapes = [(key, value.shape) for key, value in network.state_dict().items()]
        assert [(key, value.shape) for key, value in twin.state_dict().items()] == shapes
        assert not any(isinstance(module, ZeroPaddedShortcut) for module in twin.modules())
        # one dead block stops everything in the plain network and nothing in the residual one
        first, second = torch.randn(2, 2, 3, 32, 32)
        for module in (twin, network):
            module.eval()
            zero_convolutions(module.get_submodule("layer2.0"))
        with torch.no_grad():
            assert torch.equal(twin(first), twin(second))
            assert not torch.equal(network(first), network(second))


def test_preactivation_bottleneck_order_of_layers():
    """Against the equations of He 2016 written out, with non-trivial batch norms."""
    block = PreActivationBlock(4, 4, 2, "B", bottleneck=True)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    inputs = torch.randn(3, 4, 6, 6)

    def activation(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
        mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
        scale, shift = norm.weight.view(1, -1, 1, 1), norm.bias.view(1, -1, 1, 1)
        return ((x - mean) / (variance + norm.eps).sqrt() * scale + shift).clamp(min=0)

    start = activation(block.bn1, inputs)
    branch = torch.einsum("oi,nihw->nohw", block.conv1.weight[:, :, 0, 0], start)
    branch = nn.functional.conv2d(activation(block.bn2, branch), block.conv2.weight, stride=2, padding=1)
    branch = torch.einsum("oi,nihw->nohw", block.conv3.weight[:, :, 0, 0], activation(block.bn3, branch))
    shortcut = torch.einsum("oi,nihw->nohw", block.downsample[0].weight[:, :, 0, 0], start[:, :, ::2, ::2])
    torch.testing.assert_close(block(inputs), branch + shortcut, rtol=1e-4, atol=1e-5)


def test_preactivation_network_activates_once_before_and_once_after():
    network = tiny("preactivation")
    first, *others = blocks_of(network)
    assert first.bn1 is None  # the stem's activation is its own
    assert all(block.bn1 is not None for block in others)
    assert network.last_bn.num_features == 8
    assert tiny("basic").last_bn is None


# stochastic depth


def test_drop_probabilities_follow_the_linear_rule():
    network = build("resnet20", stochastic_depth=0.5)
    found = [block.stochastic_depth.p for block in blocks_of(network)]
    assert all(block.stochastic_depth.mode == "row" for block in blocks_of(network))
    survival = [1 - index / 9 * (1 - 0.5) for index in range(1, 10)]  # Huang 2016, equation 4
    assert found == pytest.approx([1 - p for p in survival])
    assert not any(isinstance(module, StochasticDepth) for module in build("resnet20").modules())


@pytest.mark.parametrize("kind", [BasicBlock, BottleneckBlock, PreActivationBlock])
def test_stochastic_depth_drops_whole_branches_per_sample(kind):
    probability, samples = 0.25, 4000
    block = kind(16, 16 // getattr(kind, "expansion", 1), 1, "A", probability)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # train mode for stochastic depth only, so that samples do not mix
    image = torch.rand(1, 16, 3, 3) + 5  # positive enough that the last ReLU does nothing
    reference = copy.deepcopy(block).eval()
    with torch.no_grad():
        branch = reference(image) - image
        outputs = block(image.expand(samples, -1, -1, -1))
    dropped = (outputs - image).flatten(1).abs().amax(1) < 1e-5
    assert dropped.float().mean().item() == pytest.approx(probability, abs=0.03)
    kept = outputs[~dropped] - image
    torch.testing.assert_close(kept, (branch / (1 - probability)).expand_as(kept), rtol=1e-4, atol=1e-4)
    mean = (outputs - image).mean(0, keepdim=True)
    torch.testing.assert_close(mean, branch, rtol=0.05, atol=1e-3)


def test_stochastic_depth_does_nothing_in_eval():
    network = tiny(stochastic_depth=0.9).eval()
    without = tiny().eval()
    without.load_state_dict(network.state_dict())
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(network(images), without(images))


# initialisation


def test_he_initialisation():
    network = build("resnet50")
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
            assert module.bias is None
        if isinstance(module, nn.BatchNorm2d):
            assert torch.equal(module.weight, torch.ones_like(module.weight))
            assert torch.equal(module.bias, torch.zeros_like(module.bias))


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_zero_init_last_makes_blocks_the_identity(block):
    network = tiny(block, zero_init_last=True)
    inputs = torch.rand(2, 4 * blocks_of(network)[0].expansion, 5, 5)
    assert torch.equal(blocks_of(network)[1](inputs), inputs)
    scales = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d) and not module.weight.any()]
    assert len(scales) == len(blocks_of(network))
    # unlike in a pre-activation block, the zeroed scales can learn
    network(torch.randn(4, 3, 8, 8)).square().sum().backward()
    assert all(scale.weight.grad.abs().sum() > 0 for scale in scales)


# errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shortcut": "C"}, "`shortcut` to be 'A' or 'B', but got 'C'"),
        ({"block": "bottleneck"}, "`block` to be 'basic' or 'preactivation', but got 'bottleneck'"),
        ({"stochastic_depth": 1.0}, r"`stochastic_depth` in \[0, 1\), but got 1.0"),
        ({"stochastic_depth": "0.1"}, "`stochastic_depth` to be a number, but got '0.1'"),
        ({"stochastic_depth": float("nan")}, "`stochastic_depth`"),
        ({"in_channels": 0}, "`in_channels` to be a positive integer, but got 0"),
        ({"num_classes": 0}, "`num_classes` to be a positive integer, but got 0"),
        ({"num_classes": 2.0}, "`num_classes` to be a positive integer, but got 2.0"),
        ({"residual": False, "zero_init_last": True}, "`zero_init_last` False for `residual=False`"),
        ({"block": "preactivation", "zero_init_last": True}, "`zero_init_last` False for pre-activation"),
        ({"residual": False, "stochastic_depth": 0.1}, "`stochastic_depth` 0 for `residual=False`"),
        ({"zero_init": True}, "got 'zero_init'. Did you mean 'zero_init_last'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigurationError, match=message):
        build("resnet8", **options)


def test_bad_network():
    for settings, message in (
        ({"block": "basics"}, "`block` to be 'basic' or"),
        ({"depths": [1]}, "as many `depths` as `widths`"),
        ({"depths": [], "widths": []}, "as many `depths` as `widths`"),
        ({"depths": [1, 0]}, "positive integer, but got 0"),
        ({"image_size": 64}, "`image_size` to be 32 or 224, but got 64"),
        ({"widths": [8, 4], "shortcut": "A"}, "shortcut 'A' to keep or add channels, but got 8 -> 4"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            tiny(**settings)
    with pytest.raises(ConfigurationError, match="'bottleneck' or 'preactivation', but got 'basic'"):
        build("resnet50", block="basic")
