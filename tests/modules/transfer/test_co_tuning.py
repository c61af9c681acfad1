"""Co-Tuning: the relationship from the training images, the term, and that the pass before training leaves no trace."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from source_task import CLASSES, SOURCE_CLASSES, build_data, differing, fit, write_weights
from torch import Tensor
from torch.utils.data import DataLoader

from framework import CoTuning, ImageFolderDataModule, Trainer
from framework.batch import LabelledBatch
from framework.datamodules.decoding import read_image
from framework.errors import ConfigurationError
from framework.functional import direct_relationship, reverse_relationship
from framework.modules.transfer import co_tuning

Build = Callable[[], CoTuning]


@pytest.fixture(scope="module")
def root(images: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images(tmp_path_factory.mktemp("data"), ["a", "b", "c"], count=12)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights") / "source.pth")


def builder(file: Path | None, **options: Any) -> Build:
    defaults: dict[str, Any] = {"backbone": "resnet8", "learning_rate": 0.05, "backbone_learning_rate_factor": 0.5}
    return lambda: CoTuning(CLASSES, weights=None if file is None else str(file), **{**defaults, **options})


def source_logits(model: CoTuning, root: Path) -> tuple[Tensor, Tensor]:
    """Of all training images, one by one and without augmentation, by the model in evaluation mode."""
    data = build_data(root, crop="random_resized")
    data.setup("fit")
    rows, model = [], model.eval()
    for path in data.train_files.paths:
        image = data.eval_transform(read_image(path))
        rows.append(model.source_head(model.backbone(data.normalize(image[None])))[0].detach())
    return torch.stack(rows), torch.tensor(data.train_files.labels)


# ------------------------------------------------------------------ the relationship
@pytest.mark.parametrize("approach", ["direct", "reverse"])
def test_the_relationship_of_a_run(root: Path, file: Path, approach: Any) -> None:
    """From the pretrained network in evaluation mode, on the training images alone, each once, as evaluation sees them;
    training augments them."""
    build = builder(file, relationship=approach, source_temperature=1.5)
    logits, labels = source_logits(build(), root)
    probabilities = (logits.double() / 1.5).softmax(1)
    expected = (direct_relationship if approach == "direct" else reverse_relationship)(probabilities, labels, CLASSES)
    model = fit(build, root, data={"crop": "random_resized"}, max_epochs=1)
    assert model.relationship.shape == (CLASSES, SOURCE_CLASSES)
    torch.testing.assert_close(model.relationship.double(), expected, rtol=0, atol=1e-4)
    assert (expected[0] - expected[1]).abs().max() > 0.01


def test_calibrate_is_handed_on(root: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def spy(*arguments: Any, calibrate: bool) -> Tensor:
        given.append(calibrate)
        return reverse_relationship(*arguments, calibrate=calibrate)

    monkeypatch.setattr(co_tuning, "reverse_relationship", spy)
    for value in (True, False):
        fit(builder(file, calibrate=value), root, max_epochs=1)
    assert given == [True, False]


class Draws(L.Callback):
    """What the run's generators would draw after the pass, the modes, and the images of the first batch."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        module.backbone.bn1.eval()  # type: ignore[union-attr,operator]  # a mode that is not its parent's
        torch.manual_seed(11)
        random.seed(11)
        np.random.seed(11)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        draws = (torch.rand(1).item(), random.random(), float(np.random.rand()))
        self.seen += [draws, [part.training for part in module.backbone.modules()]]  # type: ignore[union-attr]
        self.seen.append({name: value.clone() for name, value in module.state_dict().items() if "running" in name})

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        self.seen.append(batch.images.clone())


def test_the_pass_leaves_no_trace(root: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Generators, modes, statistics, batches and weights are those of a run that needs none."""
    learned = fit(builder(file), root, max_epochs=1).relationship

    loader = ImageFolderDataModule.unaugmented_train_dataloader

    def drawing(self: ImageFolderDataModule) -> DataLoader[Any]:
        """As a loader of the user's own may: it draws from the run's generators."""
        assert torch.rand(1) + random.random() + np.random.rand() > 0
        return loader(self)

    monkeypatch.setattr(ImageFolderDataModule, "unaugmented_train_dataloader", drawing)

    def prepared() -> CoTuning:
        model = builder(file)()
        model.relationship.copy_(learned)
        return model

    first, second = Draws(), Draws()
    with_pass = fit(builder(file), root, callbacks=first)
    monkeypatch.setattr(CoTuning, "learned_relationship", lambda self: pytest.fail("it has one"))
    without = fit(prepared, root, callbacks=second)
    assert first.seen[:2] == second.seen[:2]
    assert False in first.seen[1]
    assert True in first.seen[1]
    assert first.seen[2].keys() == second.seen[2].keys()
    assert all(torch.equal(value, second.seen[2][name]) for name, value in first.seen[2].items())
    assert len(first.seen) == len(second.seen) == 18
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(first.seen[3:], second.seen[3:], strict=True))
    assert differing(with_pass, without) == []


# ------------------------------------------------------------------ the term
def test_the_term_against_a_loop(file: Path) -> None:
    model = builder(file, bottleneck_features=6)().double().train()
    relationship = torch.rand(CLASSES, SOURCE_CLASSES, dtype=torch.float64)
    model.relationship.copy_(relationship / relationship.sum(1, keepdim=True))
    images, labels = torch.randn(6, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 1, 2, 2, 1, 2])
    outputs = model.outputs(images)
    logits = model.source_head(model._backbone_features).tolist()
    total = 0.0
    for row, label in zip(logits, labels.tolist(), strict=True):
        normalizer = sum(np.exp(value) for value in row)
        for source in range(SOURCE_CLASSES):
            total -= float(model.relationship[label, source]) * np.log(np.exp(row[source]) / normalizer)
    found = model.regularization(outputs, LabelledBatch(images, labels))
    assert found.item() == pytest.approx(total / 6)
    found.backward()
    assert all(p.grad is not None for p in [*model.backbone.parameters(), *model.source_head.parameters()])
    assert all(p.grad is None for p in [*model.head.parameters(), *model.bottleneck.parameters()])


def test_the_defaults_are_the_papers_codes(file: Path) -> None:
    model = builder(file)()
    assert (model.trade_off, model.approach, model.calibrate, model.source_temperature) == (2.3, "reverse", True, 1.0)


# ------------------------------------------------------------------ runs
def test_a_resumed_run_is_the_uninterrupted_one(
    root: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fit(builder(file), root, save=(7, tmp_path / "run.ckpt"))
    monkeypatch.setattr(CoTuning, "learned_relationship", lambda self: pytest.fail("the checkpoint has it"))
    assert differing(whole, fit(builder(file), root, resume=tmp_path / "run.ckpt")) == []


def test_a_checkpoint_needs_the_weights_no_more(root: Path, tmp_path: Path) -> None:
    file = write_weights(tmp_path / "weights.pth")
    model = fit(builder(file, relationship="direct"), root, save=(5, tmp_path / "run.ckpt"), max_epochs=1)
    file.unlink()
    for cls in (CoTuning, L.LightningModule):
        again = cls.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
        assert type(again) is CoTuning
        assert again.approach == "direct"
        assert differing(model, again) == []
        assert again.relationship.any()


@pytest.mark.parametrize("trainer", [{"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}])
def test_other_trainers(root: Path, file: Path, trainer: dict[str, Any]) -> None:
    model = fit(builder(file), root, max_epochs=1, **trainer)
    assert all(value.isfinite().all() for value in model.state_dict().values() if value.is_floating_point())
    plain = fit(builder(file), root, max_epochs=1)
    torch.testing.assert_close(model.relationship, plain.relationship)  # learned in full precision


def test_loader_workers_make_no_difference(root: Path, file: Path) -> None:
    first = fit(builder(file), root, max_epochs=1)
    assert differing(first, fit(builder(file), root, max_epochs=1, data={"num_workers": 1})) == []


# ------------------------------------------------------------------ errors
def test_data_without_unaugmented_images(root: Path, file: Path) -> None:
    class Own(L.LightningDataModule):
        def train_dataloader(self) -> DataLoader[Any]:
            return build_data(root).train_dataloader()

    def trainer() -> Trainer:
        return Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")

    expected = r"`--data` to have the method `unaugmented_train_dataloader\(\)`.*CoTuning.*but got Own"
    with pytest.raises(ConfigurationError, match=expected):
        trainer().fit(builder(file)(), Own())
    data = build_data(root)
    data.setup("fit")
    with pytest.raises(ConfigurationError, match="but got loaders without a datamodule"):
        trainer().fit(builder(file)(), data.train_dataloader())


def test_bad_values_name_the_flag(file: Path) -> None:
    with pytest.raises(
        ConfigurationError, match=r"`--model\.relationship` to be 'reverse' or 'direct', but got 'both'"
    ):
        builder(file, relationship="both")()
    with pytest.raises(ConfigurationError, match=r"`--model\.source_temperature` to be above 0, but got 0"):
        builder(file, source_temperature=0)()


def test_weights_without_a_classifier() -> None:
    with pytest.raises(ConfigurationError, match=r"classifier of the source task, which CoTuning keeps"):
        builder(None)()
