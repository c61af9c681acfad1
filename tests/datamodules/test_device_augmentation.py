"""Views made of a batch on its device: those of the loader but for rounding, in training only, exact on resume."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor

from framework.datamodules import DomainPairDataModule, ImageFolderDataModule, UnlabelledFolderDataModule
from framework.datamodules.augmentation import Augmentation, TrainingTransform, View, uniform_numbers
from framework.datamodules.datasets import PlannedViews
from framework.datamodules.device_augmentation import DeviceAugmentation
from framework.errors import ConfigurationError

COLORS: dict[str, Any] = {"color_jitter": 1.0, "grayscale": 0.3, "blur": 0.5}


def smooth(count: int, side: int) -> Tensor:
    """Pictures with edges and gradients, uint8 ``[count, 3, side, side]``."""
    coarse = torch.rand(count, 3, 5, 5)
    fine = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1)
    fine[:, :, side // 3 : side // 2] = torch.rand(count, 3, 1, 1)
    return (255 * fine).round().to(torch.uint8)


def bits(plans: Tensor) -> Tensor:
    return plans.float().view(torch.int32)


@pytest.mark.parametrize(
    ("options", "largest", "mean"),
    [
        ({}, 1.01, 0.35),
        ({"image_size": 20, "crop_scale": (0.6, 1.0)}, 1.01, 0.35),
        ({"crop": "pad", "side": 48}, 1e-3, 1e-4),
        ({"crop": "center"}, 1e-3, 1e-4),
        ({"crop": "none", "side": 48, "grayscale": 0.5}, 1.6, 0.4),
        ({"blur": 0.7}, 2.0, 0.35),
        (COLORS, 12.0, 1.6),
    ],
)
@pytest.mark.parametrize("views", [1, 2])
def test_views_are_those_of_the_loader(options: dict[str, Any], largest: float, mean: float, views: int) -> None:
    defaults: dict[str, Any] = {"image_size": 48, "side": 56, "crop": "random_resized", "horizontal_flip": True}
    augmentation = Augmentation(**(defaults | options))
    images = torch.cat([smooth(20, augmentation.side), torch.randint(0, 256, (5, 3, *[augmentation.side] * 2)).byte()])
    plans = augmentation.views(uniform_numbers(range(25), views).flatten(0, 1))
    transform = TrainingTransform(augmentation, resized=True)
    expected = torch.stack(
        [transform.view(images[i // views], View(*plan)) for i, plan in enumerate(plans.tolist())]
    ).float()
    found = DeviceAugmentation(augmentation)(PlannedViews(images, bits(plans).view(25, views, -1)))
    assert found.shape == ((25, 3) if views == 1 else (25, views, 3)) + expected.shape[-2:]
    difference = (found.reshape(expected.shape) - expected).abs()
    assert difference.max() < largest
    assert difference.mean() < mean


# ---------------------------------------------------------------------- in a run
def build(kind: str, root: Path, **options: Any) -> Any:
    defaults: dict[str, Any] = {"batch_size": 6, "image_size": 16, "num_workers": 0, "steps_per_epoch": 5, "seed": 3}
    defaults |= options
    if kind == "folder":
        return ImageFolderDataModule(str(root / "source"), **defaults)
    if kind == "pair":
        return DomainPairDataModule(str(root / "source"), str(root / "target"), **defaults)
    return UnlabelledFolderDataModule([str(root / "source"), str(root / "target")], **defaults)


def parts(batch: Any) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch]
    return [tensor for part in batch for tensor in parts(part)] if isinstance(batch, tuple) else []


@pytest.mark.parametrize("kind", ["folder", "pair", "unlabelled"])
@pytest.mark.parametrize(
    "options", [{}, {"crop": "pad", "num_workers": 1}, {"views": 2, "cache": "memory"}, {"views": 2, **COLORS}]
)
def test_a_run_sees_what_it_sees_with_the_loader(
    domains: Path, make_recorder: Any, trainer: Any, kind: str, options: dict[str, Any]
) -> None:
    if options.get("views") and kind == "folder":
        pytest.skip("the views are of all three alike")
    runs = []
    for place in ("loader", "device"):
        recorder = make_recorder()
        torch.manual_seed(1)
        data = build(kind, domains, augment_on=place, mean=(0, 0, 0), std=(1 / 255,) * 3, **options)
        trainer(max_epochs=2).fit(recorder, data)
        runs.append(recorder)
    for a, b in zip(*(run.seen["train"] for run in runs), strict=True):
        for ours, theirs in zip(parts(a), parts(b), strict=True):
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
            assert (ours.double() - theirs.double()).abs().max() < (20 if "blur" in options else 1.01)
    for (_, a), (_, b) in zip(*(run.seen["val"] for run in runs), strict=True):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(parts(a), parts(b), strict=True))
    assert runs[0].random == runs[1].random  # the run's generator is left alone
    assert set(runs[1].arrived) == {torch.uint8}


@pytest.mark.parametrize("views", [1, 2])
def test_only_training_batches_are_planned(domains: Path, views: int) -> None:
    for place in ("loader", "device"):
        data = build("unlabelled", domains, augment_on=place, views=views)
        data.setup("fit")
        (trained, *_), (validated, *_) = data.train_dataloader(), data.val_dataloader()
        assert isinstance(validated.images, Tensor)
        assert isinstance(trained.images, PlannedViews if place == "device" else Tensor)
    assert trained.images.images.shape == (6, 3, 18, 18)  # as they are before the crop
    assert trained.images.plans.shape == (6, views, 12)


@pytest.mark.parametrize("stop", [2, 5, 8])
def test_resumes_exactly(domains: Path, make_recorder: Any, trainer: Any, tmp_path: Path, stop: int) -> None:
    whole, rest = make_recorder(), make_recorder()

    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if len(whole.seen["train"]) == stop:
                trainer.save_checkpoint(tmp_path / "run.ckpt")

    options = {"augment_on": "device", **COLORS}
    trainer(max_epochs=2, callbacks=[Save()]).fit(whole, build("pair", domains, **options))
    trainer(max_epochs=2).fit(rest, build("pair", domains, num_workers=1, **options), ckpt_path=tmp_path / "run.ckpt")
    assert len(rest.seen["train"]) == 10 - stop
    for a, b in zip(whole.seen["train"][stop:], rest.seen["train"], strict=True):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(parts(a), parts(b), strict=True))
    images = [batch.target for batch in whole.seen["train"]]
    assert all(not torch.equal(a, b) for a, b in pairwise(images))


def test_two_ranks_take_the_batch_of_one(domains: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def batches(batch_size: int, rank: int, world: int) -> list[Tensor]:
        monkeypatch.setattr(UnlabelledFolderDataModule, "_rank", rank)
        monkeypatch.setattr(UnlabelledFolderDataModule, "_world_size", world)
        data = build("unlabelled", domains, batch_size=batch_size, views=2, augment_on="device", **COLORS)
        data.setup("fit")
        return [data.on_after_batch_transfer(batch, 0).images for batch in data.train_dataloader()]

    one, first, second = batches(8, 0, 1), batches(4, 0, 2), batches(4, 1, 2)
    for together, *shares in zip(one, first, second, strict=True):
        torch.testing.assert_close(together, torch.cat(shares), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("precision", "dtype"), [("64-true", torch.float64), ("bf16-true", torch.bfloat16)])
def test_precision_of_the_model(
    domains: Path, make_recorder: Any, trainer: Any, precision: Any, dtype: torch.dtype
) -> None:
    """It rounds the normalised images, and not the windows of the crops, which bfloat16 cannot tell beyond 256."""
    runs = []
    for given in (precision, "32-true"):
        run, recorder = trainer(precision=given, max_epochs=1, limit_val_batches=0), make_recorder()
        run.fit(recorder, build("pair", domains, augment_on="device", image_size=300, batch_size=2))
        runs.append(recorder.seen["train"])
    for ours, theirs in zip(*runs, strict=True):
        assert ours.target.dtype == dtype
        torch.testing.assert_close(ours.target.float(), theirs.target, rtol=0.01, atol=0.02)


def test_no_wait_for_the_device_and_no_loop_over_images() -> None:
    """On the meta device nothing has a value: whatever asked for one would raise."""
    augmentation = Augmentation(24, 28, "random_resized", True, **COLORS)
    augment = DeviceAugmentation(augmentation)
    planned = PlannedViews(
        torch.empty(7, 3, 28, 28, dtype=torch.uint8, device="meta"),
        torch.empty(7, 2, 12, dtype=torch.int32, device="meta"),
    )
    assert augment(planned).shape == (7, 2, 3, 24, 24)


def test_an_unknown_place() -> None:
    with pytest.raises(ConfigurationError, match=r"`--data.augment_on` to be 'loader' or 'device', but got 'gpu'"):
        UnlabelledFolderDataModule("x", augment_on="gpu")  # type: ignore[arg-type]
