"""Low-rank adapters beside a transformer's linear layers."""

from __future__ import annotations

import builtins
import copy
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from framework.errors import ConfigurationError
from framework.modules import TransferClassifier
from framework.networks.lora import SelfAttention, add_adapters, merge_adapters
from framework.networks.preprocessing import Preprocessing

VIT_LAYERS = ("self_attention.in_proj", "self_attention.out_proj", "mlp.0", "mlp.3")
BLOCK_LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")  # timm's names


def sized(network: nn.Module, size: int) -> nn.Module:
    network.preprocessing = Preprocessing(size)  # type: ignore[assignment]
    return network.eval()


def torchvision_vit() -> nn.Module:
    network = torchvision.models.VisionTransformer(16, 8, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=12)
    network.heads = nn.Identity()
    return sized(network, 16)


def torchvision_swin(**options: Any) -> nn.Module:
    network = torchvision.models.SwinTransformer([4, 4], 8, [1, 1], [2, 2], [2, 2], **options)
    network.head = nn.Identity()
    return sized(network, 16)


def timm_model(name: str, **options: Any) -> nn.Module:
    return sized(timm.create_model(name, num_classes=0, img_size=16, patch_size=4, embed_dim=8, **options), 16)


def timm_vit() -> nn.Module:
    return timm_model("vit_tiny_patch16_224", depth=2, num_heads=2)


def timm_swin() -> nn.Module:
    return timm_model("swin_tiny_patch4_window7_224", window_size=2, depths=(1, 1), num_heads=(2, 2))


NETWORKS = {
    "torchvision ViT": (
        torchvision_vit,
        [f"encoder.layers.encoder_layer_{block}.{layer}" for block in (0, 1) for layer in VIT_LAYERS],
    ),
    "torchvision Swin": (  # its attention uses the weights of qkv and proj without calling them
        torchvision_swin,
        [f"features.{block}.0.mlp.{layer}" for block in (1, 3) for layer in (0, 3)] + ["features.2.reduction"],
    ),
    "timm ViT": (timm_vit, [f"blocks.{block}.{layer}" for block in (0, 1) for layer in BLOCK_LAYERS]),
    "timm Swin": (
        timm_swin,
        [f"layers.{stage}.blocks.0.{layer}" for stage in (0, 1) for layer in BLOCK_LAYERS]
        + ["layers.1.downsample.reduction"],
    ),
}
each_network = pytest.mark.parametrize("name", NETWORKS)


def randomize(network: nn.Module) -> None:
    """Adapters as training leaves them: B is zero at first."""
    with torch.no_grad():
        for key, parameter in network.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.3)


@each_network
def test_adapters_are_beside_every_layer_that_is_called(name: str) -> None:
    build, layers = NETWORKS[name]
    network, images = build(), torch.randn(2, 3, 16, 16)
    expected, before = network(images), {key: value.clone() for key, value in network.state_dict().items()}
    assert sorted(add_adapters(network, name, rank=2)) == sorted(layers)
    torch.testing.assert_close(network(images), expected)  # nothing changes at first

    learning = {key: p for key, p in network.named_parameters() if p.requires_grad}
    assert all("lora_" in key for key in learning)
    assert {key.partition(".lora_")[0] for key in learning} == set(layers)
    randomize(network)
    network.train()(images).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in learning.values())  # each takes part
    assert not torch.allclose(network.eval()(images), expected, atol=1e-3)
    frozen = [value for key, value in network.state_dict().items() if "lora_" not in key]
    assert len(frozen) == len(before)
    assert all(any(torch.equal(value, was) for was in before.values() if was.shape == value.shape) for value in frozen)


@each_network
def test_merged_weights_are_w_plus_scaled_b_a(name: str) -> None:
    build, layers = NETWORKS[name]
    network, images = build().double(), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    plain = copy.deepcopy(network)
    add_adapters(network, name, rank=2, alpha=6.0)
    randomize(network)
    outputs = network(images)
    expected = {key: value.clone() for key, value in plain.state_dict().items()}
    for layer in layers:
        adapted = network.get_submodule(layer)
        a, b = adapted.lora_A.default.weight, adapted.lora_B.default.weight  # type: ignore[union-attr]
        assert (a.shape[0], b.shape[1]) == (2, 2)
        key = f"{layer}.weight" if f"{layer}.weight" in expected else f"{layer}_weight"  # in_proj_weight
        expected[key] += 3.0 * b.detach() @ a.detach()  # alpha / rank
    plain.load_state_dict(expected)
    torch.testing.assert_close(outputs, plain(images))

    merged = merge_adapters(network).state_dict()
    assert merged.keys() == expected.keys()
    for key, value in merged.items():
        torch.testing.assert_close(value, expected[key])
    torch.testing.assert_close(network(images), outputs)
    assert [type(m) for m in network.modules()] == [type(m) for m in plain.modules()]
    assert all(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("bias", [True, False])
def test_self_attention_is_the_originals(bias: bool) -> None:
    original = nn.MultiheadAttention(12, 3, bias=bias, batch_first=True).double()
    nn.init.normal_(original.in_proj_weight)
    tokens = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    expected = original(tokens, tokens, tokens, need_weights=False)[0]
    rewritten = SelfAttention(original)
    outputs = rewritten(tokens, tokens, tokens, need_weights=False)[0]
    torch.testing.assert_close(outputs, expected)
    (wanted,) = torch.autograd.grad(expected.square().sum(), tokens)
    (gradient,) = torch.autograd.grad(outputs.square().sum(), tokens)
    torch.testing.assert_close(gradient, wanted)
    assert rewritten.in_proj.weight is original.in_proj_weight  # an optimizer or a hook keeps what it knows


def test_self_attention_by_loops() -> None:
    attention = SelfAttention(nn.MultiheadAttention(4, 2, batch_first=True).double())
    tokens = torch.randn(1, 3, 4, dtype=torch.float64)
    q, k, v = attention.in_proj(tokens[0]).chunk(3, dim=1)
    found = torch.zeros(3, 4, dtype=torch.float64)
    for head in range(2):
        columns = slice(2 * head, 2 * head + 2)
        for i in range(3):
            scores = torch.stack([q[i, columns] @ k[j, columns] / 2**0.5 for j in range(3)])
            for j, share in enumerate(scores.softmax(0)):
                found[i, columns] += share * v[j, columns]
    torch.testing.assert_close(attention(tokens, tokens, tokens)[0][0], attention.out_proj(found))


def test_other_attentions_are_left_alone() -> None:
    options: list[dict[str, Any]] = [
        {"batch_first": False},
        {"kdim": 6},
        {"add_bias_kv": True},
        {"add_zero_attn": True},
    ]
    for option in options:
        attention = nn.MultiheadAttention(**{"embed_dim": 4, "num_heads": 2, "batch_first": True, **option})
        assert not SelfAttention.replaces(attention)


def test_dropout_is_the_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    network = timm_vit()
    add_adapters(network, "vit", dropout=0.25)
    probabilities = []
    original = F.dropout

    def dropout(inputs: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        probabilities.append((p, training))
        return original(inputs, p, training, inplace)

    monkeypatch.setattr(F, "dropout", dropout)
    network.train()(torch.randn(2, 3, 16, 16))
    assert probabilities.count((0.25, True)) == 8


def test_targets() -> None:
    network = timm_vit()
    assert add_adapters(network, "vit", targets=["qkv", "blocks.1.mlp.fc1"]) == [
        "blocks.0.attn.qkv",
        "blocks.1.attn.qkv",
        "blocks.1.mlp.fc1",
    ]


@pytest.mark.parametrize(
    ("build", "targets", "message"),
    [
        (timm_vit, ["query"], r"`--model.lora_targets` .* layers of 'net' \(fc1, fc2, proj, qkv\), but got 'query'"),
        (timm_vit, ["kv"], r"but got 'kv'"),  # a part of a name is no end of it
        (timm_vit, [], r"`--model.lora_targets` to name layers, but got none"),
        (torchvision_swin, ["qkv"], r"'net' uses the weights of 'features.1.0.attn.qkv' without calling it"),
        (lambda: sized(nn.Sequential(nn.Conv2d(3, 4, 3)), 16), None, r"which has none\."),
        (lambda: sized(nn.Sequential(nn.Linear(3, 4)), 16), None, r"to take images of 16 x 16 pixels"),
    ],
)
def test_messages(build: Any, targets: list[str] | None, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        add_adapters(build(), "net", targets=targets)


def test_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "peft":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigurationError, match=r"pip install 'transfer-framework\[lora\]'"):
        add_adapters(timm_vit(), "vit")


def test_the_classifier() -> None:
    options = {"img_size": 16, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2}
    model = TransferClassifier(
        3,
        policy="lora",
        lora_rank=2,
        lora_targets=["qkv"],
        backbone="timm/vit_tiny_patch16_224",
        backbone_options=options,
        learning_rate=0.1,
    )
    rates = {group["name"]: (group["lr"], len(group["params"])) for group in model.parameter_groups()}
    assert rates == {"adapters": (0.1, 4), "head": (0.1, 2)}  # A and B of two layers, at the rate of new layers
    assert model.backbone.training  # dropout and stochastic depth are the backbone's as ever
