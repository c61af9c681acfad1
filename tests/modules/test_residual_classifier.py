"""Classifiers trained from scratch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from framework import ImageFolderDataModule, ResidualClassifier, Trainer
from framework.batch import LabelledBatch
from framework.errors import ConfigurationError

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "accelerator": "cpu",
}


@pytest.fixture
def data(images: Callable[..., Path], tmp_path: Path) -> ImageFolderDataModule:
    images(tmp_path, ["a", "b", "c"], count=8)
    return ImageFolderDataModule(
        str(tmp_path),
        batch_size=8,
        steps_per_epoch=10,
        val_fraction=0.0,
        test_fraction=0.0,
        image_size=16,
        crop="none",
        horizontal_flip=False,
        num_workers=0,
    )


def test_learns_a_small_set_by_heart(data: ImageFolderDataModule) -> None:
    model = ResidualClassifier(3, backbone="resnet8", learning_rate=0.05, schedule="cosine")
    trainer = Trainer(max_epochs=6, **QUIET)
    trainer.fit(model, data)
    assert trainer.callback_metrics["val/accuracy"] == 1.0
    assert trainer.callback_metrics["val/loss"] < 0.2


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_label_smoothing(smoothing: float) -> None:
    """``(1 - e) * -log p_y + e * mean_k(-log p_k)`` (Szegedy et al. 2016, sec. 7)."""
    model = ResidualClassifier(5, backbone="resnet8", label_smoothing=smoothing)
    logits, labels = torch.randn(7, 5), torch.randint(5, (7,))
    losses = []
    for row, label in zip(logits.double(), labels, strict=True):
        log = row - row.exp().sum().log()
        losses.append(-(1 - smoothing) * log[label] - smoothing * log.mean())
    assert model.classification_loss(logits, labels).item() == pytest.approx(float(sum(losses)) / 7, rel=1e-6)


def mixed(model: ResidualClassifier, steps: int = 30) -> tuple[Tensor, Tensor, LabelledBatch]:
    """Images and labels that reach the network and the loss, batch after batch of the same four images."""
    seen: list[tuple[Tensor, Tensor]] = []
    batch = LabelledBatch(torch.arange(4.0)[:, None, None, None].expand(4, 3, 8, 8).clone(), torch.tensor([0, 1, 2, 0]))
    model.logged_loss = lambda loss, **terms: loss  # type: ignore[method-assign]
    model.classification_loss = lambda logits, labels: seen.append((images[-1], labels))  # type: ignore[assignment,method-assign,func-returns-value]
    images: list[Tensor] = []
    model.forward = lambda x: images.append(x) or x  # type: ignore[assignment,method-assign,func-returns-value]
    for step in range(steps):
        model.training_step(batch, step)
    return torch.stack([i for i, _ in seen]), torch.stack([labels for _, labels in seen]), batch


def test_mixup_mixes_images_and_labels_alike() -> None:
    images, labels, batch = mixed(ResidualClassifier(3, backbone="resnet8", mixup=0.4))
    assert labels.shape == (30, 4, 3)
    torch.testing.assert_close(labels.sum(dim=2), torch.ones(30, 4))
    assert ((labels > 0.01) & (labels < 0.99)).any()  # soft
    assert len({row.tobytes() for row in labels.numpy()}) > 20  # another share in each batch
    one_hot = F.one_hot(batch.labels, 3).float()
    for picture, soft in zip(images, labels, strict=True):
        share = (picture[1, 0, 0, 0] - batch.images[0, 0, 0, 0]) / 1  # image 1 is mixed with image 0
        torch.testing.assert_close(soft, share * one_hot + (1 - share) * one_hot.roll(1, 0), atol=1e-5, rtol=0)
        torch.testing.assert_close(picture, share * batch.images + (1 - share) * batch.images.roll(1, 0))


def test_cutmix_cuts_as_much_as_it_says() -> None:
    images, labels, batch = mixed(ResidualClassifier(3, backbone="resnet8", cutmix=1.0))
    one_hot = F.one_hot(batch.labels, 3).float()
    assert ((labels > 0.01) & (labels < 0.99)).any()
    for picture, soft in zip(images, labels, strict=True):
        kept = (picture[1, 0] == 1.0).float().mean()  # the rest comes from image 0
        assert set(picture[1, 0].unique().tolist()) <= {0.0, 1.0}
        torch.testing.assert_close(soft, kept * one_hot + (1 - kept) * one_hot.roll(1, 0), atol=1e-5, rtol=0)


def test_both_take_turns_at_random() -> None:
    images, _, _ = mixed(ResidualClassifier(3, backbone="resnet8", mixup=1.0, cutmix=1.0), steps=60)
    cut = sum(set(picture.unique().tolist()) <= {0.0, 1.0, 2.0, 3.0} for picture in images)
    assert 15 < cut < 45


def test_without_mixing_the_labels_are_hard() -> None:
    _, labels, batch = mixed(ResidualClassifier(3, backbone="resnet8"), steps=3)
    assert torch.equal(labels, batch.labels.expand(3, 4))


@pytest.mark.parametrize(
    "options", [{"mixup": 0.2, "label_smoothing": 0.1}, {"cutmix": 1.0}, {"mixup": 1.0, "cutmix": 1.0}]
)
@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
def test_mixing_trains_in_every_precision(data: ImageFolderDataModule, options: dict[str, Any], precision: Any) -> None:
    model = ResidualClassifier(3, backbone="resnet8", **options)
    trainer = Trainer(max_epochs=1, limit_train_batches=2, precision=precision, **QUIET)
    trainer.fit(model, data)
    assert trainer.callback_metrics["train/loss"].isfinite()


def test_mixing_depends_on_the_seed_of_the_step_alone(data: ImageFolderDataModule) -> None:
    weights = []
    for seed in (1, 2):
        torch.manual_seed(0)
        model = ResidualClassifier(3, backbone="resnet8", mixup=1.0, cutmix=1.0)
        torch.manual_seed(seed)
        Trainer(max_epochs=1, limit_train_batches=4, limit_val_batches=0, **QUIET).fit(model, data)
        weights.append(model.head.weight.detach().clone())
    assert torch.equal(*weights)


def test_evaluation_reports_every_metric(data: ImageFolderDataModule) -> None:
    model = ResidualClassifier(3, backbone="resnet8", bottleneck_features=6)
    trainer = Trainer(max_epochs=1, **QUIET)
    (validated,) = trainer.validate(model, data, verbose=False)
    assert set(validated) == {"val/accuracy", "val/loss"}
    model.eval()
    with torch.no_grad():
        batches = [(model(data.normalize(batch.images)), batch.labels) for batch in data.val_dataloader()]
    logits, labels = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
    assert validated["val/accuracy"] == pytest.approx((logits.argmax(dim=1) == labels).float().mean().item())
    assert validated["val/loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert model.outputs(torch.zeros(2, 3, 16, 16)).features.shape == (2, 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixup": -0.1}, "`--model.mixup` to be 0 or more"),
        ({"cutmix": -1}, "`--model.cutmix` to be 0 or more"),
        ({"label_smoothing": 1.0}, "`--model.label_smoothing` to be at least 0 and below 1"),
        ({"learning_rate": -1.0}, "`--model.learning_rate` to be 0 or more"),
        ({"backbone": "resnet21"}, "Did you mean 'resnet20'|Did you mean '"),
        ({"num_classes": 1}, "`--model.num_classes` to be at least 2"),
    ],
)
def test_mistakes_name_the_flag(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ResidualClassifier(**{"num_classes": 3, "backbone": "resnet8", **options})
