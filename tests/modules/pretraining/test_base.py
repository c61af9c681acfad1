"""What the pre-training modules share: which images set the running statistics of batch norms."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from pretraining_contract import build_data, build_model, methods, prepare
from torch import Tensor, nn

from framework.batch import UnlabelledBatch
from framework.errors import ConfigurationError
from framework.modules import JigsawPrediction, MaskedImageReconstruction, PretrainingModule, RotationPrediction
from framework.networks.batch_norm import batch_norms
from framework.trainer import Trainer

QUIET = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
CHANGING = [method for method in methods() if method.views == (1,)]  # those of two views see images as they are


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, images: Callable[..., Path]) -> Path:
    return prepare(tmp_path_factory.mktemp("pretraining"), images)


class FirstBatch(L.Callback):
    """Keeps the batch of the first step."""

    def __init__(self) -> None:
        self.batch: Tensor | None = None

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: UnlabelledBatch, batch_idx: int) -> None:
        self.batch = batch.images.clone()


def first_norm(module: PretrainingModule) -> nn.Module:
    return batch_norms(module.backbone)[0]


def inputs_of_first_norm(module: PretrainingModule, images: Tensor) -> Tensor:
    caught = []
    hook = first_norm(module).register_forward_hook(lambda _, inputs, output: caught.append(inputs[0]))
    with torch.no_grad():
        module.eval()(images)
    hook.remove()
    return caught[0]


@pytest.mark.parametrize("method", methods(), ids=lambda method: method.__name__)
def test_running_statistics_are_of_the_images_themselves(method: type[PretrainingModule], root: Path) -> None:
    L.seed_everything(0, verbose=False)
    module = build_model(method, learning_rate=0.0, weight_decay=0.0)
    seen = FirstBatch()
    trainer = Trainer(**QUIET, max_steps=1, limit_val_batches=0, callbacks=[seen])
    trainer.fit(module, build_data(root, method))
    assert seen.batch is not None
    values = inputs_of_first_norm(module, seen.batch if seen.batch.dim() == 4 else seen.batch.flatten(0, 1))
    norm = first_norm(module)
    assert int(norm.num_batches_tracked) == 1
    torch.testing.assert_close(norm.running_mean, 0.1 * values.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * values.transpose(0, 1).flatten(1).var(dim=1))


@pytest.mark.parametrize("method", CHANGING, ids=lambda method: method.__name__)
def test_validation_normalises_by_the_batch_and_leaves_no_trace(method: type[PretrainingModule], root: Path) -> None:
    L.seed_everything(0, verbose=False)
    module, data = build_model(method), build_data(root, method)
    trainer = Trainer(**QUIET)
    before = trainer.validate(module, data, verbose=False)
    for norm in batch_norms(module.backbone):
        norm.running_mean += 3.0  # would change every output that it normalises
    state = {name: value.clone() for name, value in module.state_dict().items()}
    assert trainer.validate(module, data, verbose=False) == before
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert not any(part.training for part in module.eval().modules())
    assert all(norm.track_running_stats for norm in batch_norms(module.backbone))


def test_a_single_image_that_remains_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    module = RotationPrediction(backbone="resnet8")
    logged: list[int] = []
    monkeypatch.setattr(module, "log_dict", lambda values, batch_size, **_: logged.append(batch_size))
    monkeypatch.setattr(module, "reseed", lambda *_, **__: None)
    for index, count in enumerate((4, 4, 1)):
        module.eval().validation_step(UnlabelledBatch(torch.randn(count, 3, 16, 16)), index)
    assert logged == [4, 4]


def test_validation_images_are_mixed(tmp_path: Path, images: Callable[..., Path]) -> None:
    """A batch of one class would be normalised by, and contrasted with, that class alone."""
    images(tmp_path / "folder", ["ant", "bee"], count=40)
    data = build_data(tmp_path, RotationPrediction, folders=str(tmp_path / "folder"), val_fraction=0.5)
    data.setup("fit")
    classes = [Path(path).parent.name for path in data.val_files.paths]
    assert sorted(classes) != classes
    assert set(classes[:10]) == {"ant", "bee"}
    again = build_data(tmp_path, RotationPrediction, folders=str(tmp_path / "folder"), val_fraction=0.5)
    again.setup("fit")
    assert again.val_files.paths == data.val_files.paths


@pytest.mark.parametrize(
    ("method", "options", "flag"),
    [(MaskedImageReconstruction, {"block_size": 32}, "block_size"), (JigsawPrediction, {"gap": 9}, "gap")],
)
def test_options_that_do_not_suit_the_images_are_refused_before_training(
    method: type[PretrainingModule], options: dict[str, Any], flag: str, root: Path
) -> None:
    begun: list[bool] = []
    begin = LambdaCallback(setup=lambda *_, **__: begun.append(True))
    module = build_model(method, **options)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ConfigurationError, match=f"`--model.{flag}`"):
        Trainer(**QUIET, max_steps=1, callbacks=begin).fit(module, build_data(root, method))
    assert not begun  # the first batch would be refused too
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("method", methods(), ids=lambda method: method.__name__)
def test_trying_the_images_leaves_no_trace(method: type[PretrainingModule]) -> None:
    module = build_model(method)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    drawn = torch.get_rng_state()
    module.train()
    module.task.try_images(module.encode, 16)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(part.training for part in module.task.modules())
    changed = {
        name.rsplit(".", 1)[-1] for name, value in module.state_dict().items() if not torch.equal(value, state[name])
    }
    # those of two views see images as they are, for which prepare_data sets the backbone to eval mode too
    assert changed <= ({"running_mean", "running_var", "num_batches_tracked"} if module.task.views == 2 else set())
