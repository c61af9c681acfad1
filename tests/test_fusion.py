"""Weight arithmetic: exact end points, identical models, a brute-force greedy soup, differences named."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from fusion_runs import load, same, train
from torch import Tensor

from framework import fusion
from framework.errors import ConfigurationError
from framework.networks import create_backbone

State = dict[str, Tensor]


def state(seed: int, name: str = "resnet8") -> State:
    """A network's state after some batches, with batch-norm statistics and counters of its own."""
    torch.manual_seed(seed)
    network = create_backbone(name)
    for _ in range(seed + 1):
        network(torch.randn(4, 3, 16, 16) + seed)
    found = {key: value.clone() for key, value in network.state_dict().items()}
    found["half"] = torch.randn(5).to(torch.bfloat16)
    found["double"] = torch.randn(5, dtype=torch.float64)
    found["zero"] = torch.tensor([-0.0, 0.0, float("inf")])
    found["table"] = torch.arange(4) + seed
    return found


def test_the_end_points_are_exact() -> None:
    first, second = state(0), state(1)
    second["zero"] = torch.tensor([0.0, -0.0, float("-inf")])
    assert not same(first, second)
    assert same(fusion.interpolate(first, second, 0), first)
    assert same(fusion.interpolate(first, second, 1.0), second)
    mixed = fusion.interpolate(first, second, 0)
    mixed["double"].zero_()
    assert first["double"].any()  # a copy


def test_interpolation_against_numpy() -> None:
    first, second = state(0), state(1)
    for alpha in (0.1, 0.5, 0.9):
        mixed = fusion.interpolate(first, second, alpha)
        for name, value in mixed.items():
            one, other = first[name], second[name]
            assert value.dtype == one.dtype
            if not one.is_floating_point():
                assert torch.equal(value, one if alpha <= 0.5 else other)
            elif name != "zero":
                expected = (1 - alpha) * one.double().numpy() + alpha * other.double().numpy()
                rounded = torch.from_numpy(np.asarray(expected)).to(one.dtype)
                assert torch.equal(value, rounded), name


@pytest.mark.parametrize("alpha", [0.1, 0.3, 1 / 3, 0.7])
def test_equal_networks_stay_what_they_are(alpha: float) -> None:
    assert same(fusion.interpolate(state(2), state(2), alpha), state(2))


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_a_soup_of_identical_models_is_that_model(count: int) -> None:
    assert same(fusion.average([state(2)] * count), state(2))


def test_average_against_numpy() -> None:
    states = [state(seed) for seed in range(3)]
    mean = fusion.average(states)
    for name, value in mean.items():
        if value.is_floating_point() and name != "zero":
            expected = np.mean([s[name].double().numpy() for s in states], axis=0)
            np.testing.assert_allclose(value.double().numpy(), expected, rtol=5e-3 if name == "half" else 1e-7)
        elif not value.is_floating_point():
            assert torch.equal(value, states[0][name])


def test_the_mean_is_accumulated_in_float64() -> None:
    """In float32 the small one is lost beside the large ones."""
    states = [{"w": torch.tensor([value])} for value in (1e8, 1.0, -1e8)]
    assert fusion.average(states)["w"].item() == pytest.approx(1 / 3)


# ---------------------------------------------------------------------- greedy soup
def brute_force(points: np.ndarray, accuracy: Callable[[np.ndarray], float]) -> tuple[list[int], float]:
    """Recipe 1 as printed, on points."""
    order = [i for _, i in sorted((-accuracy(point), i) for i, point in enumerate(points))]
    ingredients: list[int] = []
    for i in order:
        with_it = accuracy(points[[*ingredients, i]].mean(axis=0))
        if not ingredients or with_it >= accuracy(points[ingredients].mean(axis=0)):
            ingredients.append(i)
    return ingredients, accuracy(points[ingredients].mean(axis=0))


@pytest.mark.parametrize("seed", range(8))
def test_greedy_soup_against_brute_force(seed: int) -> None:
    generator = np.random.default_rng(seed)
    points = generator.normal(size=(6, 2))
    data, truth = generator.normal(size=(40, 2)), generator.normal(size=2)

    def accuracy(point: np.ndarray) -> float:
        return float(((data @ point > 0) == (data @ truth > 0)).mean())

    states = [{"w": torch.from_numpy(point), "n": torch.tensor(i)} for i, point in enumerate(points)]
    soup = fusion.greedy_soup(states, [accuracy(p) for p in points], lambda s: accuracy(s["w"].numpy()))
    expected, value = brute_force(points, accuracy)
    assert soup.ingredients == expected
    assert soup.accuracy == value >= max(accuracy(p) for p in points)
    np.testing.assert_allclose(soup.state["w"].numpy(), points[expected].mean(axis=0))
    assert [index for index, _ in soup.trials] == sorted(range(6), key=lambda i: -accuracy(points[i]))


def test_an_equal_soup_takes_one_more() -> None:
    states = [{"w": torch.tensor([float(i)])} for i in range(3)]
    tried: list[float] = []

    def evaluate(soup: State) -> float:
        tried.append(soup["w"].item())
        return 0.5

    soup = fusion.greedy_soup(states, [0.5, 0.5, 0.5], evaluate)
    assert (soup.ingredients, tried) == ([0, 1, 2], [0.5, 1.0])


# ---------------------------------------------------------------------- differences
def changed(key: str, value: Tensor | None) -> State:
    other = state(0)
    if value is None:
        del other[key]
    else:
        other[key] = value
    return other


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (changed("double", None), "number 2 has no 'double', which number 1 has"),
        (changed("extra", torch.ones(1)), "number 1 has no 'extra', which number 2 has"),
        (changed("half", torch.ones(3)), r"'half' has the shape \(5,\) in number 1 and \(3,\) in number 2"),
        (changed("half", torch.ones(5)), r"'half' has the dtype torch.bfloat16 in number 1 and torch.float32"),
    ],
)
def test_states_that_differ(other: State, message: str) -> None:
    for fuse in (lambda: fusion.interpolate(state(0), other, 0.5), lambda: fusion.average([state(0), other])):
        with pytest.raises(ConfigurationError, match=message):
            fuse()


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_alpha_outside(alpha: float) -> None:
    with pytest.raises(ConfigurationError, match=r"`--alphas` to be from 0 to 1"):
        fusion.interpolate(state(0), state(0), alpha)


def test_no_states() -> None:
    with pytest.raises(ConfigurationError, match="one checkpoint or more"):
        fusion.average([])


def content(**changes: Any) -> dict[str, Any]:
    hyperparameters = {"_class_path": "framework.A", "num_classes": 2, "backbone": "resnet8"}
    names = changes.pop("class_names", ["ant", "bee"])
    preprocessing = changes.pop("preprocessing", {"image_size": 16, "mean": [0.5] * 3, "std": [0.5] * 3})
    return {
        "hyper_parameters": {**hyperparameters, **changes},
        "class_names": names,
        "preprocessing": preprocessing,
        "state_dict": {"backbone.w": torch.ones(1), "head.w": torch.ones(2)},
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_path": "framework.B"}, "class of module is 'A' in 'a.ckpt' and 'B' in 'b.ckpt'"),
        ({"num_classes": 3}, "number of classes is 2 in 'a.ckpt' and 3"),
        ({"class_names": ["ant", "cat"]}, "class 1 is 'bee' in 'a.ckpt' and 'cat'"),
        ({"backbone": "vgg11"}, "backbone is 'resnet8'"),
        ({"backbone_options": {"x": 1}}, "backbone_options is None"),
        ({"preprocessing": {"image_size": 16, "mean": [0.4] * 3, "std": [0.5] * 3}}, "mean and std of the images"),
    ],
)
def test_checkpoints_that_differ(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        fusion.check_checkpoints([content(), content(**changes)], ["a.ckpt", "b.ckpt"])


def test_checkpoints_without_class_names_pass() -> None:
    older = content(class_names=None, _class_path="framework.modules.A")  # the same class, by its home
    del older["preprocessing"]
    fusion.check_checkpoints([content(), older, content()], ["a.ckpt", "b.ckpt", "c.ckpt"])


def test_other_heads_pass_where_only_the_rest_is_shared() -> None:
    other = content(num_classes=3)
    other["state_dict"]["head.w"] = torch.ones(3)
    fusion.check_checkpoints([content(), other], ["a.ckpt", "b.ckpt"], heads=False)


# ---------------------------------------------------------------------- files
def test_the_result_is_a_normal_checkpoint(
    images: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    images(tmp_path / "data", ["ant", "bee"], count=8)
    paths = [train(tmp_path / "data", seed=seed, bottleneck_features=8) for seed in (1, 2)]
    first, second = map(load, paths)
    fusion.check_checkpoints([first, second], ["a", "b"])
    mixed = fusion.interpolate(first["state_dict"], second["state_dict"], 0.25)
    fusion.write_checkpoint(fusion.fused(first, mixed, {"alpha": 0.25}), tmp_path / "new" / "x.ckpt")
    written = load(tmp_path / "new" / "x.ckpt")
    assert not {"optimizer_states", "lr_schedulers", "loops"} & written.keys()
    assert written["fusion"] == {"alpha": 0.25}
    assert written["hyper_parameters"] == first["hyper_parameters"]
    module = L.LightningModule.load_from_checkpoint(tmp_path / "new" / "x.ckpt", weights_only=True)
    assert type(module).__name__ == "TransferClassifier"
    assert same(dict(module.state_dict()), mixed)
    with pytest.raises(ConfigurationError, match="new file"):
        fusion.write_checkpoint(written, tmp_path / "new" / "x.ckpt")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.ckpt"]


def test_the_order_of_accuracies_is_stable() -> None:
    states = [{"w": torch.tensor([float(i)])} for i in range(3)]
    for accuracies in itertools.permutations([0.1, 0.2, 0.3]):
        soup = fusion.greedy_soup(states, accuracies, lambda s: 0.0)
        assert soup.ingredients == [int(np.argmax(accuracies))]
        assert same(soup.state, states[soup.ingredients[0]])
