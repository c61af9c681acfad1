"""Image size and normalisation come from the model's backbone, unless they are given."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import yaml
from torch import nn

from framework.__main__ import main
from framework.datamodules import DomainPairDataModule, ImageFolderDataModule
from framework.errors import ConfigurationError
from framework.modules import DANN, ResidualClassifier
from framework.networks import resnet8
from framework.networks.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing

DESCRIBED = {"image_size": 20, "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}
EXPECTED = Preprocessing(20, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Weights that say what they expect."""
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": resnet8().state_dict(), "preprocessing": DESCRIBED}, path)
    return path


def build_data(domains: Path, **options: Any) -> ImageFolderDataModule:
    defaults: dict[str, Any] = {"batch_size": 4, "steps_per_epoch": 3, "crop": "none", "num_workers": 0}
    return ImageFolderDataModule(str(domains / "source"), **{**defaults, "horizontal_flip": False, **options})


class Watch(L.Callback):
    """Keeps what the network was given."""

    def __init__(self) -> None:
        self.batches: list[Any] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, *_: Any) -> None:
        self.batches.append(batch)

    def on_test_batch_start(self, trainer: Any, module: Any, batch: Any, *_: Any) -> None:
        self.batches.append(batch)

    on_predict_batch_start = on_validation_batch_start = on_test_batch_start


def are_normalised(images: torch.Tensor, expected: Preprocessing) -> bool:
    """Whether undoing the expected normalisation gives whole grey levels: it does with no other."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in expected[1:])
    levels = (images * std + mean) * 255
    return images.shape[-2:] == (expected.image_size,) * 2 and bool(((levels - levels.round()).abs() < 1e-3).all())


# ---------------------------------------------------------------------- without a Trainer


def test_in_a_notebook(domains: Path) -> None:
    data = build_data(domains)
    assert data.preprocessing == Preprocessing(224, IMAGENET_MEAN, IMAGENET_STD)
    assert (data.image_size, data.resize_size, data.mean, data.std) == (224, 256, IMAGENET_MEAN, IMAGENET_STD)
    data = build_data(domains, image_size=12, mean=[0.5, 0.5, 0.5], crop="center")
    assert data.preprocessing == Preprocessing(12, (0.5, 0.5, 0.5), IMAGENET_STD)
    assert data.resize_size == 14
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch.images.shape == (4, 3, 12, 12)
    assert data.eval_transform(torch.zeros(3, 9, 9, dtype=torch.uint8)).shape == (3, 12, 12)
    assert are_normalised(data.normalize(batch.images), Preprocessing(12, (0.5, 0.5, 0.5)))
    assert build_data(domains, image_size=12, resize_size=20).resize_size == 20


def test_a_crop_larger_than_the_square(domains: Path, trainer: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"`--data.resize_size` .* `--data.image_size` = 32, but got 16"):
        build_data(domains, image_size=32, resize_size=16)
    with pytest.raises(ConfigurationError, match=r"`--data.resize_size` .* `--data.image_size` = 32, but got 16"):
        trainer().fit(ResidualClassifier(3, backbone="resnet8"), build_data(domains, resize_size=16))


# ---------------------------------------------------------------------- from the module


@pytest.mark.parametrize("workers", [0, 2])
def test_the_backbones_by_default(domains: Path, trainer: Any, weights: Path, workers: int) -> None:
    watch, data = Watch(), build_data(domains, num_workers=workers)
    module = ResidualClassifier(3, backbone="resnet8", weights=str(weights))
    assert module.preprocessing == EXPECTED
    run = trainer(callbacks=[watch])
    run.fit(module, data)
    run.test(module, data, verbose=False)
    run.predict(module, data)
    assert len(watch.batches) > 10
    assert all(are_normalised(batch.images, EXPECTED) for batch in watch.batches)
    assert data.preprocessing == EXPECTED


def test_both_domains(domains: Path, trainer: Any, weights: Path) -> None:
    watch = Watch()
    folders = {name: str(domains / name) for name in ("source", "target", "target_test")}
    data = DomainPairDataModule(**folders, batch_size=4, steps_per_epoch=2, num_workers=0, crop="none")
    trainer(callbacks=[watch], limit_val_batches=0).fit(DANN(3, backbone="resnet8", weights=str(weights)), data)
    assert all(are_normalised(batch.source.images, EXPECTED) for batch in watch.batches)
    assert all(are_normalised(batch.target, EXPECTED) for batch in watch.batches)


def test_what_is_given_counts(domains: Path, trainer: Any, weights: Path) -> None:
    watch = Watch()
    data = build_data(domains, image_size=16, std=(1.0, 1.0, 1.0))
    trainer(callbacks=[watch]).fit(ResidualClassifier(3, backbone="resnet8", weights=str(weights)), data)
    assert all(are_normalised(b.images, Preprocessing(16, EXPECTED.mean, (1.0, 1.0, 1.0))) for b in watch.batches)


def test_one_datamodule_for_several_models(domains: Path, trainer: Any, weights: Path) -> None:
    """Nothing is kept of the first one's."""
    data = build_data(domains)
    for module, expected in (
        (ResidualClassifier(3, backbone="resnet8", weights=str(weights)), EXPECTED),
        (ResidualClassifier(3, backbone="resnet8"), Preprocessing(32)),
    ):
        watch = Watch()
        trainer(callbacks=[watch], max_epochs=1).fit(module, data)
        assert all(are_normalised(batch.images, expected) for batch in watch.batches)


def test_a_module_that_does_not_say(domains: Path, trainer: Any, recorder: Any) -> None:
    recorder.preprocessing = nn.Identity()  # its own business
    data = build_data(domains, image_size=8)
    trainer(max_epochs=1).fit(recorder, data)
    assert are_normalised(recorder.seen["train"][0].images, Preprocessing(8))


# ---------------------------------------------------------------------- in checkpoints


def test_a_checkpoint_knows(domains: Path, trainer: Any, weights: Path, tmp_path: Path) -> None:
    run, path = trainer(max_epochs=1), tmp_path / "run.ckpt"
    run.fit(ResidualClassifier(3, backbone="resnet8", weights=str(weights), weights_by_order=True), build_data(domains))
    run.save_checkpoint(path)
    weights.unlink()
    assert torch.load(path, weights_only=True)["preprocessing"] == DESCRIBED
    module: Any = L.LightningModule.load_from_checkpoint(path, weights_only=True)
    assert module.preprocessing == module.backbone.preprocessing == EXPECTED
    assert module.hparams["weights_by_order"] is True
    alone = ImageFolderDataModule.load_from_checkpoint(path)
    assert alone.preprocessing == EXPECTED  # in a notebook
    for fresh in (module, ResidualClassifier(3, backbone="resnet8")):
        watch = Watch()
        ckpt = None if fresh is module else path
        trainer(callbacks=[watch]).test(fresh, build_data(domains), ckpt_path=ckpt, verbose=False)
        assert all(are_normalised(batch.images, EXPECTED) for batch in watch.batches)


def test_a_checkpoint_without_the_entry(domains: Path, trainer: Any, tmp_path: Path) -> None:
    """As older ones are: the architecture's."""
    run = trainer(max_epochs=1)
    run.fit(ResidualClassifier(3, backbone="resnet8"), build_data(domains))
    run.save_checkpoint(tmp_path / "run.ckpt")
    content = torch.load(tmp_path / "run.ckpt", weights_only=True)
    del content["preprocessing"], content["ImageFolderDataModule"]["preprocessing"]
    torch.save(content, tmp_path / "old.ckpt")
    module: Any = L.LightningModule.load_from_checkpoint(tmp_path / "old.ckpt", weights_only=True)
    assert module.preprocessing == Preprocessing(32)
    trainer(max_epochs=2).fit(module, build_data(domains), ckpt_path=tmp_path / "old.ckpt")


def test_it_says_what_the_network_was_trained_on(domains: Path, trainer: Any, weights: Path, tmp_path: Path) -> None:
    """Not what the first weights expected: as weights of the next run, these expect the same."""
    run, path = trainer(max_epochs=1), tmp_path / "run.ckpt"
    data = build_data(domains, image_size=16, mean=(0.5, 0.5, 0.5))
    run.fit(ResidualClassifier(3, backbone="resnet8", weights=str(weights)), data)
    run.save_checkpoint(path)
    trained_on = Preprocessing(16, (0.5, 0.5, 0.5), EXPECTED.std)
    assert L.LightningModule.load_from_checkpoint(path, weights_only=True).preprocessing == trained_on
    assert ResidualClassifier(3, backbone="resnet8", weights=str(path)).preprocessing == trained_on


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_equals_uninterrupted(domains: Path, trainer: Any, weights: Path, tmp_path: Path, workers: int) -> None:
    """The resumed run is built without the weights, as the command line does."""
    options: dict[str, Any] = {"crop": "random_resized", "horizontal_flip": True, "num_workers": workers}
    path = tmp_path / "half.ckpt"

    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
            if trainer.current_epoch == 1 and index == 0:
                trainer.save_checkpoint(path)

    torch.manual_seed(3)
    whole = ResidualClassifier(3, backbone="resnet8", weights=str(weights))
    trainer(callbacks=[Save()], max_epochs=2).fit(whole, build_data(domains, **options))
    weights.unlink()
    rest = ResidualClassifier(3, backbone="resnet8")
    trainer(max_epochs=2).fit(rest, build_data(domains, **options), ckpt_path=path)
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in rest.state_dict().items())


# ---------------------------------------------------------------------- before training


def test_a_size_that_the_network_does_not_take(domains: Path, trainer: Any) -> None:
    pytest.importorskip("timm")
    options = {"backbone": "timm/test_vit", "backbone_options": {"dynamic_img_size": False}}
    watch = Watch()
    with pytest.raises(ConfigurationError, match=r"`--data.image_size` .*'timm/test_vit'.*160 .*got 96.*img_size: 96"):
        trainer(callbacks=[watch]).fit(ResidualClassifier(3, **options), build_data(domains, image_size=96))
    options["backbone_options"] = {"img_size": 32}
    trainer(callbacks=[watch], max_epochs=1).fit(ResidualClassifier(3, **options), build_data(domains))
    assert all(are_normalised(b.images, Preprocessing(32, (0.5,) * 3, (0.5,) * 3)) for b in watch.batches)


def test_the_probe_changes_nothing(domains: Path, trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run with it equals one without."""
    states = []
    for probed in (True, False):
        if not probed:
            monkeypatch.setattr("framework.modules.backbone_module.check_image_size", lambda *_: None)
        torch.manual_seed(0)
        module = ResidualClassifier(3, backbone="resnet8", bottleneck_features=8, bottleneck_dropout=0.5)
        trainer(max_epochs=1).fit(module, build_data(domains, image_size=16))
        states.append(module.state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


# ---------------------------------------------------------------------- from the shell


MODEL = "--model ResidualClassifier --model.backbone resnet8 "
DATA = "--data ImageFolderDataModule --data.root {d}/source --data.num_workers 0 --data.batch_size 4 "
TRAINER = "--trainer.max_epochs 1 --trainer.accelerator cpu --trainer.enable_progress_bar false "
RUN = "lightning_logs/default/version_0"


@pytest.fixture
def command(domains: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], int]:
    """Runs a command line in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    return lambda line: main(shlex.split(line.format(d=domains)))


def test_a_run_and_what_follows(
    command: Callable[[str], int], weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(f"fit {MODEL} {DATA} {TRAINER} --model.weights {weights}") == 0
    told = capsys.readouterr().err
    said = (
        "Images as the backbone expects them: `--data.image_size` 20, `--data.mean` (0.1, 0.2, 0.3), `--data.std` "
        "(0.5, 0.6, 0.7).\n"
    )
    assert told.count(said) == told.count("Images as") == 1
    assert told.count("Weights of 'resnet8': 42 of the 42 tensors in") == 1
    config = yaml.safe_load(Path(f"{RUN}/config.yaml").read_text())
    assert config["data"]["init_args"]["image_size"] is None
    weights.unlink()
    for line in (
        f"test --run {RUN}",
        f"predict --run {RUN}",
        f"validate --run {RUN}",
        f"fit --run {RUN} --trainer.max_epochs 2",
    ):
        assert command(line) == 0, line
        assert capsys.readouterr().err.count(said) == 1, line
    assert command(f"test --run {RUN} --data.image_size 24 --data.mean [0,0,0] --data.std [1,1,1]") == 0
    assert "Images as" not in capsys.readouterr().err


def test_a_wrong_size_from_the_shell(command: Callable[[str], int], capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        command(f"fit --model ResidualClassifier --model.backbone squeezenet1_1 {DATA} {TRAINER} --data.image_size 8")
        == 2
    )
    told = capsys.readouterr().err
    assert "framework: error: Expected `--data.image_size` to be a size that 'squeezenet1_1' takes" in told
    assert not Path(RUN).exists()
    assert command(f"fit {MODEL} {DATA} {TRAINER} --data.image_size 0") == 2
    assert "`--data.image_size` to be at least 1" in capsys.readouterr().err
