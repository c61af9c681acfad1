"""Learning without forgetting: the source head, the term, what is kept and what a checkpoint needs."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from source_task import CLASSES, SOURCE_CLASSES, build_data, differing, fit, write_weights

from framework import LWF, Trainer
from framework.batch import LabelledBatch
from framework.errors import ConfigurationError


@pytest.fixture(scope="module")
def root(images: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images(tmp_path_factory.mktemp("data"), ["a", "b", "c"], count=10)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights") / "source.pth")


def builder(file: Path | None, **options: Any) -> Callable[[], LWF]:
    defaults: dict[str, Any] = {"backbone": "resnet8", "learning_rate": 0.05, "backbone_learning_rate_factor": 0.5}
    return lambda: LWF(CLASSES, weights=None if file is None else str(file), **{**defaults, **options})


# ------------------------------------------------------------------ the source head
def test_the_source_head_is_the_weights_classifier(file: Path) -> None:
    loaded = torch.load(file, weights_only=True)
    model = builder(file)()
    assert torch.equal(model.source_head.weight, loaded["fc.weight"])
    assert torch.equal(model.source_head.bias, loaded["fc.bias"])
    assert model.source_classes == SOURCE_CLASSES


def test_it_sits_on_the_backbones_output(file: Path) -> None:
    model = builder(file, bottleneck_features=7)().train()
    assert model.source_head.in_features == model.backbone.num_features != 7
    images = torch.randn(4, 3, 16, 16)
    outputs = model.outputs(images)
    assert outputs.features.shape == (4, 7)
    logits = model.source_logits()
    assert logits.shape == (4, SOURCE_CLASSES)
    assert model._backbone_features is None  # no graph outlives the step
    model.eval()
    model.outputs(images)
    assert model._backbone_features is None


def test_predictions_are_the_new_heads(file: Path) -> None:
    model = builder(file)().eval()
    images = torch.randn(4, 3, 16, 16)
    expected = model.head(model.backbone(images))
    with torch.no_grad():
        model.source_head.weight.fill_(math.nan)
    assert torch.equal(model(images), expected)
    assert expected.shape == (4, CLASSES)


def test_it_learns_at_the_backbones_rate(file: Path) -> None:
    groups = {group["name"]: group for group in builder(file)().parameter_groups()}
    assert groups.keys() == {"backbone", "head", "source_head"}
    assert groups["source_head"]["lr"] == groups["backbone"]["lr"] == pytest.approx(0.025)
    assert groups["head"]["lr"] == 0.05


def test_init_from_provides_it_too(root: Path, file: Path, tmp_path: Path) -> None:
    """A classifier of this framework, say of another data set, is the source task."""
    fit(builder(file), root, save=(1, tmp_path / "run.ckpt"), max_epochs=1)
    model = LWF(4, backbone="resnet8", init_from=str(tmp_path / "run.ckpt"))
    state = torch.load(tmp_path / "run.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(model.source_head.weight, state["head.weight"])


# ------------------------------------------------------------------ the term
def softened(row: list[float], temperature: float) -> list[float]:
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


@pytest.mark.parametrize(("temperature", "squared"), [(2.0, False), (3.0, True)])
def test_the_term_against_a_loop(file: Path, temperature: float, squared: bool) -> None:
    """The original is the network that was loaded, in evaluation mode, whatever has become of it."""
    model = builder(file, temperature=temperature, squared_temperature=squared)().double()
    images, labels = torch.randn(6, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    model.eval()
    teacher = model.source_head(model.backbone(images)).tolist()
    with torch.no_grad():
        for parameter in [*model.backbone.parameters(), *model.source_head.parameters()]:
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.train()
    outputs = model.outputs(images)
    student = model.source_head(model._backbone_features).tolist()
    total = 0.0
    for ours, theirs in zip(student, teacher, strict=True):
        p, q = softened(theirs, temperature), softened(ours, temperature)
        total += sum(p[k] * math.log(p[k] / q[k]) for k in range(SOURCE_CLASSES))
    expected = total / 6 * (temperature**2 if squared else 1)
    found = model.regularization(outputs, LabelledBatch(images, labels))
    assert expected > 0.01
    assert found.item() == pytest.approx(expected)
    found.backward()
    assert all(p.grad is None for p in model.original.parameters())
    assert all(p.grad is not None for p in [*model.backbone.parameters(), *model.source_head.parameters()])
    assert all(p.grad is None for p in model.head.parameters())


def test_the_defaults_are_the_papers(file: Path) -> None:
    model = builder(file)()
    assert (model.trade_off, model.temperature, model.squared_temperature) == (1.0, 2.0, False)


# ------------------------------------------------------------------ runs
def test_a_run_trains_all_but_the_original(root: Path, file: Path) -> None:
    L.seed_everything(0, verbose=False)
    start = builder(file)()
    model = fit(builder(file), root, max_epochs=1)
    changed = differing(start, model)
    assert not [name for name in changed if name.startswith("original.")]
    for part in ("backbone.", "head.", "source_head."):
        names = [name for name in model.state_dict() if name.startswith(part)]
        assert set(names) <= set(changed)


def forgetting(file: Path, trade_off: float) -> float:
    """How far the source predictions move while random labels are learned."""
    model = builder(file, trade_off=trade_off)().train()
    model.backbone.eval()  # so that its statistics, which fit no data, stay those of the original
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(12, 3, 16, 16, generator=generator)
    batch = LabelledBatch(images, torch.randint(CLASSES, (12,), generator=generator))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for _ in range(30):
        outputs = model.outputs(images)
        term = model.regularization(outputs, batch)
        loss = model.classification_loss(outputs.logits, batch.labels) + model.trade_off * term
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    predictions = model.source_head(model.backbone(images)).softmax(1)
    return (predictions - model.original(images).softmax(1)).abs().mean().item()


def test_it_forgets_less(file: Path) -> None:
    assert forgetting(file, 5.0) < 0.4 * forgetting(file, 0.0)


def test_a_resumed_run_is_the_uninterrupted_one(root: Path, file: Path, tmp_path: Path) -> None:
    whole = fit(builder(file), root, save=(7, tmp_path / "run.ckpt"))
    assert differing(whole, fit(builder(file), root, resume=tmp_path / "run.ckpt")) == []


def test_a_checkpoint_needs_the_weights_no_more(root: Path, tmp_path: Path) -> None:
    file = write_weights(tmp_path / "weights.pth")
    model = fit(builder(file, temperature=4.0), root, save=(5, tmp_path / "run.ckpt"), max_epochs=1)
    file.unlink()
    for cls in (LWF, L.LightningModule):
        again = cls.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
        assert type(again) is LWF
        assert (again.temperature, again.source_classes) == (4.0, SOURCE_CLASSES)
        assert differing(model, again) == []
    fit(lambda: again, root, max_epochs=1)  # its source head counts as loaded


@pytest.mark.parametrize("trainer", [{"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}])
def test_other_trainers(root: Path, file: Path, trainer: dict[str, Any]) -> None:
    model = fit(builder(file, bottleneck_features=8), root, max_epochs=1, **trainer)
    assert all(value.isfinite().all() for value in model.state_dict().values() if value.is_floating_point())


def test_compiled(root: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both networks, in place: the names in the state dict stay."""
    compiled: list[str] = []

    def compile_(self: torch.nn.Module) -> None:
        compiled.append(type(self).__name__)
        self._compiled_call_impl = self._call_impl  # type: ignore[assignment]

    monkeypatch.setattr(torch.nn.Module, "compile", compile_)
    model = builder(file, compile=True)()
    names = list(model.state_dict())
    model.configure_model()
    model.configure_model()
    assert len(compiled) == 2
    assert list(model.state_dict()) == names


# ------------------------------------------------------------------ errors
def test_weights_without_a_classifier(file: Path, tmp_path: Path) -> None:
    state = {name: value for name, value in torch.load(file, weights_only=True).items() if not name.startswith("fc.")}
    torch.save(state, tmp_path / "headless.pth")
    with pytest.raises(
        ConfigurationError, match=r"`--model\.weights` with the classifier of the source task.*headless"
    ):
        builder(tmp_path / "headless.pth")()
    with pytest.raises(ConfigurationError, match=r"`--model\.weights` with the classifier of the source task"):
        builder(None)()


def test_a_number_of_classes_alone_is_no_classifier(root: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"`--model\.source_classes` 5 alone, which starts one at random"):
        fit(builder(None, source_classes=5), root)


def test_bad_values_name_the_flag(file: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"`--model\.source_classes` to be 5, as in the weights, but got 6"):
        builder(file, source_classes=6)()
    with pytest.raises(ConfigurationError, match=r"`--model\.temperature` to be above 0, but got 0"):
        builder(file, temperature=0)()
    assert builder(file, source_classes=5)().source_classes == 5


def test_two_views_are_refused(root: Path, file: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"`--data\.views` to be 1, on which LWF trains, but got 2"):
        fit(builder(file), root, data={"views": 2})
    Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu").validate(
        builder(file)(), build_data(root, views=2), verbose=False
    )
