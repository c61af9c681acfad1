"""What SimCLR and VICReg share: views, batches, previews, copies and checkpoints."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor, nn
from transfer_contract import QUIET
from two_views_ddp_job import Views

from framework import SimCLR, VICReg
from framework.__main__ import main
from framework.batch import UnlabelledBatch
from framework.datamodules import UnlabelledFolderDataModule
from framework.errors import ConfigurationError
from framework.modules.pretraining.simclr import SimCLRTask
from framework.modules.pretraining.two_views import TwoViewTask
from framework.modules.pretraining.vicreg import VICRegTask
from framework.trainer import Trainer

SMALL: dict[str, Any] = {"backbone": "resnet8", "projection_features": 8, "learning_rate": 0.01}
each_method = pytest.mark.parametrize("method", [SimCLR, VICReg])
each_task = pytest.mark.parametrize("task", [SimCLRTask, VICRegTask])


def encoder(width: int = 12) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, width), nn.Tanh())


def pairs(images: int = 6, size: int = 4) -> Tensor:
    return torch.randn(images, 2, 3, size, size)


# ---------------------------------------------------------------------- the task
@each_task
def test_both_views_in_one_pass(task: Callable[..., TwoViewTask]) -> None:
    """Image by image, each view with its image's other one."""
    made, encode, images, passes = task(12, projection_features=5), encoder(), pairs(), []

    def counted(batch: Tensor) -> Tensor:
        passes.append(batch)
        return encode(batch)  # type: ignore[no-any-return]

    first, second = made.eval().projections(counted, images)
    assert [tuple(batch.shape) for batch in passes] == [(12, 3, 4, 4)]
    torch.testing.assert_close(first, made.projector(encode(images[:, 0])))
    torch.testing.assert_close(second, made.projector(encode(images[:, 1])))


@each_task
def test_every_parameter_learns(task: Callable[..., TwoViewTask]) -> None:
    made, encode = task(12, projection_features=5), encoder()
    made(encode, pairs()).backward()
    for name, parameter in [*made.named_parameters(), *encode.named_parameters()]:
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    assert all(value.dim() == 0 and not value.requires_grad for value in made.diagnostics.values())


@each_task
def test_only_training_gathers(task: Callable[..., TwoViewTask]) -> None:
    """The rows of the other process, here the same ones once more, come after this process's."""
    calls = []

    def gather(rows: Tensor) -> Tensor:
        calls.append(tuple(rows.shape))
        return torch.cat([rows, rows])

    made, images = task(12, projection_features=5, gather=gather), pairs()
    assert len(made.projections(encoder(), images)[0]) == 12
    made.eval()
    assert len(made.projections(encoder(), images)[1]) == 6
    assert calls == [(6, 2, 5)]


@each_task
def test_preview(task: Callable[..., TwoViewTask]) -> None:
    made, encode, images = task(12, projection_features=5).eval(), encoder(), pairs(3)
    images[1, 1] = images[1, 0]
    pictures, captions = made.preview(encode, images)
    assert torch.equal(pictures, images)
    expected = nn.functional.cosine_similarity(*made.projections(encode, images)).detach()
    assert captions == [["", f"cosine {float(cosine):.2f}"] for cosine in expected]
    assert captions[1] == ["", "cosine 1.00"]


@each_task
def test_other_numbers_of_views(task: Callable[..., TwoViewTask]) -> None:
    for images in (torch.randn(4, 3, 4, 4), torch.randn(4, 3, 3, 4, 4)):
        with pytest.raises(ConfigurationError, match=r"two views of each image, \[N, 2, 3, H, W\] \(`--data.views 2`"):
            task(12)(encoder(), images)


@each_task
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projection_features": 0}, "`--model.projection_features` to be at least 1, but got 0"),
        ({"projection_layers": 0}, "`--model.projection_layers` to be at least 1, but got 0"),
        ({"projection_normalization": "layer"}, "`--model.projection_normalization` to be 'batch' or 'none'"),
    ],
)
def test_bad_options(task: Callable[..., TwoViewTask], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        task(12, **options)


# ---------------------------------------------------------------------- the module
def fit(module: Any, data: Any = None, **trainer: Any) -> Any:
    data = Views(pairs(8, 16), pairs(5, 16), 4) if data is None else data
    Trainer(**{**QUIET, "max_epochs": 1, **trainer}).fit(module, data)
    return module


@each_method
def test_one_view_is_refused(method: type[Any], images: Callable[..., Path], tmp_path: Path) -> None:
    data = UnlabelledFolderDataModule(str(images(tmp_path / "images")), batch_size=2, image_size=16, num_workers=0)
    expected = f"`--data.views` to be 2, on which {method.__name__} trains, but got 1"
    with pytest.raises(ConfigurationError, match=expected):
        fit(method(**SMALL), data)


@each_method
def test_batches_of_one_image_are_refused(method: type[Any]) -> None:
    for data, flag in (
        (Views(pairs(8, 16), pairs(5, 16), 1), "--data.batch_size"),
        (Views(pairs(8, 16), pairs(5, 16), 4, eval_batch_size=1), "--data.eval_batch_size"),
    ):
        with pytest.raises(ConfigurationError, match=f"`{flag}` to be at least 2 for {method.__name__}, .* but got 1"):
            fit(method(**SMALL), data)
    with pytest.raises(ConfigurationError, match="with at least 2 samples"):  # a single image to validate on
        fit(method(**SMALL), Views(pairs(8, 16), pairs(1, 16), 4))


@each_method
def test_an_image_left_over_in_validation(method: type[Any]) -> None:
    """Five images in batches of two: the loss is the mean of two batches."""
    module = method(**SMALL)
    data = Views(pairs(8, 16), pairs(5, 16), 4)
    fit(module, data)
    found = module.trainer.callback_metrics
    module.eval()
    with torch.no_grad():
        parts = [float(module.task(module.backbone, part)) for part in (data.val[:2], data.val[2:4])]
    assert float(found["val/loss"]) == pytest.approx(sum(parts) / 2, rel=1e-5)
    assert {f"val/{name}" for name in module.task.diagnostics} < found.keys()
    assert all(math.isfinite(value) for value in found.values())


@each_method
def test_copies(method: type[Any]) -> None:
    """A copy gathers by itself, and the module is not a part of its own part."""
    module = method(**SMALL)
    assert not [name for name in module.state_dict() if "gather" in name]
    assert module not in list(module.task.modules())
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other.task.gather.__self__ is other
        torch.testing.assert_close(other.state_dict(), module.state_dict())
        assert fit(other).trainer.global_step == 2


@each_method
def test_a_checkpoint_is_enough(method: type[Any], tmp_path: Path) -> None:
    module = fit(method(projection_layers=3, projection_normalization="none", **SMALL))
    module.trainer.save_checkpoint(tmp_path / "x.ckpt")
    loaded = L.LightningModule.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    assert type(loaded) is method
    torch.testing.assert_close(loaded.state_dict(), module.state_dict())
    images = pairs(4, 16)
    assert loaded.eval().preview(images).captions == module.eval().preview(images).captions


@each_method
def test_training_lowers_the_loss(method: type[Any]) -> None:
    torch.manual_seed(1)
    module = method(**{**SMALL, "learning_rate": 0.003, "optimizer": "Adam"})
    images = pairs(16, 16)
    images[:, 1] = images[:, 0] + 0.3 * images[:, 1]
    data = Views(images, images, 16, eval_batch_size=16)
    losses = []
    fit(module, data, max_epochs=15, callbacks=[Watch(losses)])
    assert losses[-1] < 0.8 * losses[0]
    assert module.task.diagnostics.get("contrast_accuracy", torch.tensor(1.0)) > 0.9


class Watch(L.Callback):
    def __init__(self, losses: list[float]) -> None:
        self.losses = losses

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))


@each_method
def test_bf16_and_accumulation(method: type[Any]) -> None:
    module = fit(method(**SMALL), precision="bf16-mixed", accumulate_grad_batches=2)
    assert module.trainer.global_step == 1
    assert all(parameter.dtype == torch.float32 for parameter in module.parameters())
    assert math.isfinite(float(module.trainer.callback_metrics["val/loss"]))
    with torch.autocast("cpu", torch.bfloat16):
        assert module.eval().task(module.backbone, pairs(4, 16)).dtype == torch.float32


@each_method
def test_from_the_command_line(method: type[Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Options of the class and of its bases arrive with their defaults, the pre-training's and not the classifiers'."""
    data = ["--data", "UnlabelledFolderDataModule", "--data.folders", "images"]
    assert main(["fit", "--model", method.__name__, *data, "--print_config"]) == 0
    printed = capsys.readouterr().out
    for line in ("backbone_learning_rate_factor: 1.0", "projection_normalization: batch", "learning_rate: 0.01"):
        assert line in printed


def test_batch_type() -> None:
    assert SimCLR.batch_type is VICReg.batch_type is UnlabelledBatch
    assert SimCLR.views == VICReg.views == (2,)
