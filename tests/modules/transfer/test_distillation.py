"""Distillation: the loss against numpy, teachers that never change, checkpoints and resumed runs without files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from fusion_runs import QUIET, build_data, load, same, train
from scipy.special import log_softmax, softmax

import framework
from framework import Distillation, ImageFolderDataModule, Trainer, fusion
from framework.__main__ import main
from framework.batch import LabelledBatch
from framework.errors import ConfigurationError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, images: Callable[..., Path]) -> dict[str, Path]:
    """Checkpoints of teachers, and the images."""
    folder = tmp_path_factory.mktemp("teachers")
    before = Path.cwd()
    os.chdir(folder)
    try:
        data = images(folder / "data", ["ant", "bee"], count=10)
        others = images(folder / "others", ["ant", "cat"], count=10)
        three = images(folder / "three", ["ant", "bee", "cat"], count=10)
        return {
            "data": data,
            "plain": train(data, seed=1, bottleneck_features=8).resolve(),
            "residual": train(data, "ResidualClassifier", seed=2).resolve(),
            "normalised": train(data, seed=3, data={"mean": (0.2, 0.4, 0.6), "std": (0.5, 0.25, 0.3)}).resolve(),
            "larger": train(data, seed=4, data={"image_size": 24}).resolve(),
            "others": train(others, seed=5).resolve(),
            "three": train(three, seed=6).resolve(),
        }
    finally:
        os.chdir(before)


def build(made: dict[str, Path], *names: str, **options: Any) -> Distillation:
    defaults = {"backbone": "resnet8", "learning_rate": 0.05, "backbone_learning_rate_factor": 1.0}
    torch.manual_seed(9)
    return Distillation(2, teachers=[str(made[name]) for name in names], **{**defaults, **options})


def quiet(**options: Any) -> Trainer:
    return Trainer(**{**QUIET, "logger": False, "enable_checkpointing": False, **options})


def teacher(made: dict[str, Path], name: str) -> L.LightningModule:
    return L.LightningModule.load_from_checkpoint(made[name], weights_only=True).eval()


# ---------------------------------------------------------------------- the loss
@pytest.mark.parametrize("weights", [None, [1.0, 3.0]])
@pytest.mark.parametrize(("trade_off", "temperature"), [(0.9, 4.0), (0.25, 1.5)])
def test_loss_against_numpy(
    made: dict[str, Path], trade_off: float, temperature: float, weights: list[float] | None
) -> None:
    model = build(made, "plain", "residual", trade_off=trade_off, temperature=temperature, teacher_weights=weights)
    logged: dict[str, float] = {}
    model.log = lambda *_, **__: None  # type: ignore[method-assign]
    model._means.add = logged.update  # type: ignore[method-assign, assignment]
    batch = LabelledBatch(torch.randn(6, 3, 16, 16), torch.tensor([0, 1, 1, 0, 1, 0]))
    loss = model.training_step(batch, 0)
    with torch.no_grad():
        student = model(batch.images).double().numpy()
        teachers = [teacher(made, name)(batch.images).double().numpy() for name in ("plain", "residual")]
    p = np.average([softmax(z / temperature, axis=1) for z in teachers], axis=0, weights=weights)
    q = log_softmax(student / temperature, axis=1)
    divergence = temperature**2 * (p * (np.log(p) - q)).sum(axis=1).mean()
    labels = batch.labels.numpy()
    entropy = -log_softmax(student, axis=1)[np.arange(6), labels].mean()
    assert loss is not None
    assert float(loss) == pytest.approx((1 - trade_off) * entropy + trade_off * divergence, rel=1e-4)
    assert float(logged["train/distillation_loss"]) == pytest.approx(divergence, rel=1e-4)
    assert float(logged["train/classification_loss"]) == pytest.approx(entropy, rel=1e-4)
    answers = p.argmax(axis=1)
    assert float(logged["train/teacher_accuracy"]) == pytest.approx((answers == labels).mean())
    assert float(logged["train/teacher_agreement"]) == pytest.approx((answers == student.argmax(axis=1)).mean())


def test_one_teacher_is_the_mean_of_itself(made: dict[str, Path]) -> None:
    images = torch.randn(5, 3, 16, 16)
    one, twice = build(made, "plain"), build(made, "plain", "plain")
    assert torch.equal(one.teacher_logits(images), teacher(made, "plain")(images).detach())
    soft = [(model.teacher_logits(images) / 4.0).softmax(dim=1) for model in (one, twice)]
    torch.testing.assert_close(*soft)


def test_the_gradient_is_the_students(made: dict[str, Path]) -> None:
    model = build(made, "plain", trade_off=1.0)
    model.log = lambda *_, **__: None  # type: ignore[method-assign]
    loss = model.training_step(LabelledBatch(torch.randn(6, 3, 16, 16), torch.zeros(6, dtype=torch.long)), 0)
    assert loss is not None
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.backbone.parameters())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.teachers.parameters())
    assert [group["name"] for group in model.parameter_groups()] == ["backbone", "head"]


# ---------------------------------------------------------------------- training
@pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training")
def test_training_leaves_the_teachers_alone(made: dict[str, Path]) -> None:
    model = build(made, "plain", "normalised")
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    quiet(max_epochs=2).fit(model, build_data(made["data"]))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert not any(name.startswith("teachers.") for name in changed)
    assert sum(name.startswith("teachers.") for name in before) > 50


@pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training")
def test_the_student_learns_from_the_teacher_alone(made: dict[str, Path]) -> None:
    """With labels that say nothing, the student ends up near a teacher that is sure."""
    model = build(made, "plain", trade_off=1.0, temperature=2.0)
    quiet(max_epochs=15).fit(model, build_data(made["data"], horizontal_flip=False, crop="none"))
    data = build_data(made["data"], crop="none")
    data.setup("fit")
    images = data.normalize(torch.stack([data.val_dataloader().dataset[i][0] for i in range(4)]))
    with torch.no_grad():
        model.eval()
        ours, theirs = model(images).softmax(1), teacher(made, "plain")(images).softmax(1)
    assert float((ours - theirs).abs().mean()) < 0.15


@pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training")
def test_a_teacher_gets_images_as_it_knows_them(made: dict[str, Path]) -> None:
    pixels = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    model, data = build(made, "normalised"), build_data(made["data"])
    quiet().fit(model, data)
    own = build_data(made["data"], mean=(0.2, 0.4, 0.6), std=(0.5, 0.25, 0.3)).normalize(pixels)
    found = model.teacher_logits(data.normalize(pixels))
    torch.testing.assert_close(found, teacher(made, "normalised")(own).detach(), rtol=1e-3, atol=1e-3)


class SaveAt(L.Callback):
    def __init__(self, batches: int, path: Path) -> None:
        self.batches, self.path = batches, path

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.batches:
            trainer.save_checkpoint(self.path)


@pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training")
@pytest.mark.parametrize("gone", [False, True])
def test_a_run_resumes_exactly(made: dict[str, Path], tmp_path: Path, gone: bool) -> None:
    """With the teachers' files, other ones by now, and without them."""
    copies = {name: Path(shutil.copy(made[name], tmp_path / f"{name}.ckpt")) for name in ("plain", "normalised")}
    data: dict[str, Any] = {"root": made["data"], "seed": 0}
    whole = build(copies, *copies, teacher_weights=[1.0, 2.0])
    quiet(max_epochs=2, callbacks=[SaveAt(4, tmp_path / "run.ckpt")]).fit(whole, build_data(**data))
    for path in copies.values():
        path.unlink()
        if not gone:
            shutil.copy(made["residual"], path)
    rest = build(copies, *copies, teacher_weights=[1.0, 2.0])
    quiet(max_epochs=2).fit(rest, build_data(**data), ckpt_path=tmp_path / "run.ckpt")
    assert same(dict(whole.state_dict()), dict(rest.state_dict()))


@pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training")
def test_the_checkpoint_is_plain_and_needs_no_files(made: dict[str, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copy(made["plain"], tmp_path / "teacher.ckpt"))
    model = build({"it": copy}, "it", temperature=3.0)
    trainer = quiet()
    trainer.fit(model, build_data(made["data"]))
    trainer.save_checkpoint(tmp_path / "student.ckpt")
    copy.unlink()
    written = load(tmp_path / "student.ckpt")
    assert written["hyper_parameters"]["teachers"] is None
    assert [record["file"] for record in written["teachers"]] == [str(copy)]
    assert not any(isinstance(value, torch.Tensor) for record in written["teachers"] for value in record.values())
    images = torch.randn(4, 3, 16, 16)
    for cls in (Distillation, L.LightningModule):
        again = cls.load_from_checkpoint(tmp_path / "student.ckpt", weights_only=True)
        assert type(again) is Distillation
        assert again.temperature == 3.0
        assert torch.equal(again.eval()(images), model.eval()(images))
        assert torch.equal(again.teacher_logits(images), teacher(made, "plain")(images))
        assert again.class_names == ["ant", "bee"]


@pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training")
def test_the_command_line(made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fit with a YAML and a list of teachers, resume and test without their files."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(made["plain"], "a.ckpt")
    shutil.copy(made["residual"], "b.ckpt")
    yaml = Path(__file__).resolve().parents[3] / "experiments" / "transfer" / "distillation.yaml"
    small = "--data.image_size 16 --data.crop none --data.batch_size 4 --data.num_workers 0 --trainer.accelerator cpu "
    small += "--trainer.enable_progress_bar false --trainer.limit_train_batches 2 --model.backbone resnet8 "
    small += f"--model.weights null --data ImageFolderDataModule --data.root {made['data']} --trainer.max_epochs 1"
    words = small.replace("--data ImageFolderDataModule --data.root", "--data.root").split()
    data = ["--data", "ImageFolderDataModule"]
    assert main(["fit", "--config", str(yaml), *data, *words, "--model.teachers", "[a.ckpt, b.ckpt]"]) == 0
    Path("a.ckpt").unlink()
    Path("b.ckpt").unlink()
    run = "lightning_logs/default/version_0"
    assert main(["fit", "--run", run, "--trainer.max_epochs", "2"]) == 0
    for command in ("test", "predict"):
        assert main([command, "--run", run]) == 0
    last = load(f"{run}/checkpoints/last.ckpt")
    assert last["epoch"] == 1
    assert len(last["teachers"]) == 2
    assert same(
        {k[len("teachers.0.module.") :]: v for k, v in last["state_dict"].items() if k.startswith("teachers.0.")},
        load(made["plain"])["state_dict"],
    )


@pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training")
def test_an_ensemble_is_a_teacher(made: dict[str, Path], tmp_path: Path) -> None:
    ensemble = framework.PredictionEnsemble(2, members=[str(made["plain"]), str(made["residual"])])
    checkpoint = fusion.checkpoint_of(ensemble, [load(made["plain"])], {})
    fusion.write_checkpoint(checkpoint, tmp_path / "ensemble.ckpt")
    model = build({"it": tmp_path / "ensemble.ckpt"}, "it")
    images = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(model.teacher_logits(images), ensemble(images))
    trainer = quiet()
    trainer.fit(model, build_data(made["data"]))
    trainer.save_checkpoint(tmp_path / "student.ckpt")
    again = Distillation.load_from_checkpoint(tmp_path / "student.ckpt", weights_only=True)
    torch.testing.assert_close(again.teacher_logits(images), ensemble(images))


def test_bfloat16(made: dict[str, Path]) -> None:
    """The loss is computed in float32 on what the networks say in bfloat16."""
    model = build(made, "plain", "residual")
    model.log = lambda *_, **__: None  # type: ignore[method-assign]
    batch = LabelledBatch(torch.randn(6, 3, 16, 16), torch.zeros(6, dtype=torch.long))
    full = model.training_step(batch, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model.training_step(batch, 0)
    assert half is not None
    assert full is not None
    assert half.dtype == torch.float32
    assert float(half) == pytest.approx(float(full), rel=0.1)


# ---------------------------------------------------------------------- mistakes
@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (("three",), {}, "`--model.teachers` to have 2 classes, as the data has, but .* has 3"),
        (("plain", "others"), {}, "class 1 is 'bee' there and 'cat'"),
        (("plain",), {"trade_off": 1.5}, "`--model.trade_off` to be from 0 to 1, but got 1.5"),
        (("plain",), {"temperature": 0.0}, "`--model.temperature` to be above 0, but got 0.0"),
        (("plain",), {"teacher_weights": [1.0, 2.0]}, "`--model.teacher_weights` to be 1 numbers"),
        (("plain", "residual"), {"teacher_weights": [0.0, 0.0]}, "not all 0"),
    ],
)
def test_mistakes(made: dict[str, Path], names: tuple[str, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        build(made, *names, **options)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "`--model.teachers` to name checkpoint files, but got none"),
        (("nowhere",), "`--model.teachers` to be a checkpoint file, but 'nowhere.ckpt' does not exist"),
        (("others",), "classes of the data, but class 1 is 'bee' there and 'cat'"),
        (("larger",), r"`--data.image_size` to be 24, .* but got 16. `--model.resize_for_teachers true`"),
    ],
)
def test_mistakes_before_the_first_batch(
    made: dict[str, Path], names: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match=message):
        Trainer(**QUIET).fit(build({**made, "nowhere": Path("nowhere.ckpt")}, *names), build_data(made["data"]))
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training")
def test_a_teacher_of_larger_images(made: dict[str, Path]) -> None:
    quiet().fit(build(made, "larger", resize_for_teachers=True), build_data(made["data"]))


def test_data_of_no_known_normalisation(made: dict[str, Path]) -> None:
    """Loaders of the user's own are taken as they are."""
    model = build(made, "plain")
    data = build_data(made["data"])
    assert isinstance(data, ImageFolderDataModule)
    for member in model._each():
        member.prepare(None, "--x")
        assert member._scale_and_shift is None
