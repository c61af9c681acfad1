"""Prediction ensembles: the mean against numpy, checkpoints that need no members' files, what is refused."""

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
from fusion_runs import QUIET, build_data, load, train
from scipy.special import softmax
from torch import Tensor

from framework import PredictionEnsemble, Trainer, fusion
from framework.__main__ import main
from framework.errors import ConfigurationError
from framework.functional.mixture import mixture_log_probabilities
from framework.modules.members import Member, read_checkpoint

OTHER_MEAN = {"mean": (0.2, 0.4, 0.6), "std": (0.5, 0.25, 0.3)}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, images: Callable[..., Path]) -> dict[str, Path]:
    """Checkpoints of several classifiers of the same images."""
    folder = tmp_path_factory.mktemp("members")
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
            "regularised": train(data, "L2SP", seed=3).resolve(),
            "normalised": train(data, seed=4, data=OTHER_MEAN).resolve(),
            "larger": train(data, seed=5, data={"image_size": 24}).resolve(),
            "others": train(others, seed=6).resolve(),
            "three": train(three, seed=7).resolve(),
        }
    finally:
        os.chdir(before)


def build(made: dict[str, Path], *names: str, **options: Any) -> PredictionEnsemble:
    return PredictionEnsemble(2, members=[str(made[name]) for name in names], **options)


def alone(made: dict[str, Path], name: str, images: Tensor) -> np.ndarray:
    module = L.LightningModule.load_from_checkpoint(made[name], weights_only=True).eval()
    with torch.no_grad():
        return module(images).double().numpy()  # type: ignore[no-any-return]


NAMES = ("plain", "residual", "regularised")


# ---------------------------------------------------------------------- the formula
@pytest.mark.parametrize("weights", [None, [0.5, 0.0, 3.0]])
def test_mixture_against_numpy(weights: list[float] | None) -> None:
    logits = 10 * torch.randn(3, 5, 4, dtype=torch.float64)
    found = mixture_log_probabilities(logits, None if weights is None else torch.tensor(weights))
    expected = np.average(softmax(logits.numpy(), axis=2), axis=0, weights=weights)
    np.testing.assert_allclose(found.exp().numpy(), expected, rtol=1e-12)


def test_mixture_of_tiny_probabilities() -> None:
    logits = torch.tensor([[[0.0, -500.0]], [[0.0, -500.0]]])
    assert torch.equal(mixture_log_probabilities(logits), logits[0])


def test_mixture_under_autocast() -> None:
    logits = torch.randn(3, 5, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(mixture_log_probabilities(logits), mixture_log_probabilities(logits.clone()))
        assert mixture_log_probabilities(logits.bfloat16()).dtype == torch.float32
    assert torch.autograd.gradcheck(
        mixture_log_probabilities, torch.randn(2, 3, 4, dtype=torch.float64).requires_grad_()
    )


# ---------------------------------------------------------------------- the module
@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_forward_against_numpy(made: dict[str, Path], average: Any) -> None:
    images = torch.randn(6, 3, 16, 16)
    ensemble = build(made, *NAMES, average=average)
    each = np.stack([alone(made, name, images) for name in NAMES])
    found = ensemble(images).double().softmax(dim=1).numpy()
    expected = softmax(each, axis=2).mean(axis=0) if average == "probabilities" else softmax(each.mean(axis=0), axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_members_never_change(made: dict[str, Path]) -> None:
    ensemble = build(made, *NAMES).train()
    assert not any(module.training for member in ensemble.members for module in member.modules())
    assert not any(parameter.requires_grad for parameter in ensemble.parameters())
    before = {name: value.clone() for name, value in ensemble.state_dict().items()}
    ensemble(torch.randn(6, 3, 16, 16))
    assert all(torch.equal(value, before[name]) for name, value in ensemble.state_dict().items())


@pytest.mark.parametrize("name", ["normalised", "plain"])
def test_a_member_gets_images_as_it_knows_them(made: dict[str, Path], name: str) -> None:
    """The probabilities of an ensemble of one, on data normalised otherwise, are those of the classifier's own test."""
    pixels = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    own, other = ({}, OTHER_MEAN) if name == "plain" else (OTHER_MEAN, {})
    expected = alone(
        made,
        name,
        build_data(made["data"], **{"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), **own}).normalize(
            pixels
        ),
    )
    data = build_data(made["data"], **{"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), **other})
    member = Member(read_checkpoint(made[name], "x"), "x")
    member.prepare(data, "--x")
    np.testing.assert_allclose(member(data.normalize(pixels)).numpy(), expected, rtol=1e-3, atol=1e-4)
    member.prepare(None, "--x")
    assert not np.allclose(member(data.normalize(pixels)).numpy(), expected, atol=1e-2)


def test_other_sizes_are_refused_or_resized(made: dict[str, Path]) -> None:
    data = build_data(made["data"])
    ensemble = build(made, "plain", "larger")
    with pytest.raises(ConfigurationError, match=r"`--data.image_size` to be 24, .* but got 16. `--model.resize_for_"):
        Trainer(logger=False, **QUIET).test(ensemble, data, verbose=False)
    resized = build(made, "plain", "larger", resize_for_members=True)
    Trainer(logger=False, **QUIET).test(resized, data, verbose=False)
    images = torch.randn(4, 3, 16, 16)
    larger = torch.nn.functional.interpolate(images, (24, 24), mode="bilinear", antialias=True)
    np.testing.assert_allclose(resized.members[1](images).numpy(), alone(made, "larger", larger), atol=1e-5)


def write(made: dict[str, Path], path: Path, *names: str, **options: Any) -> PredictionEnsemble:
    ensemble = build(made, *names, **options)
    templates = [load(made[name]) for name in names]
    fusion.write_checkpoint(fusion.checkpoint_of(ensemble, templates, {"method": "ensemble"}), path)
    return ensemble


def test_the_checkpoint_needs_no_members(made: dict[str, Path], tmp_path: Path) -> None:
    copies = {name: Path(shutil.copy(made[name], tmp_path / f"{name}.ckpt")) for name in NAMES}
    ensemble = write(copies, tmp_path / "ensemble.ckpt", *NAMES, average="logits")
    for path in copies.values():
        path.unlink()
    images = torch.randn(5, 3, 16, 16)
    for cls in (PredictionEnsemble, L.LightningModule):
        again = cls.load_from_checkpoint(tmp_path / "ensemble.ckpt", weights_only=True)
        assert type(again) is PredictionEnsemble
        assert again.average == "logits"
        assert [type(member.module).__name__ for member in again.members] == [
            "TransferClassifier",
            "ResidualClassifier",
            "L2SP",
        ]
        assert torch.equal(again(images), ensemble(images))
        assert again.class_names == ["ant", "bee"]
        assert again.preprocessing == ensemble.preprocessing
    written = load(tmp_path / "ensemble.ckpt")
    assert [record["file"] for record in written["members"]] == [str(copies[name]) for name in NAMES]
    assert not any("optimizer_states" in record or "state_dict" in record for record in written["members"])


def test_an_ensemble_of_ensembles(made: dict[str, Path], tmp_path: Path) -> None:
    write(made, tmp_path / "two.ckpt", "plain", "residual")
    nested = PredictionEnsemble(2, members=[str(tmp_path / "two.ckpt"), str(made["regularised"])])
    images = torch.randn(5, 3, 16, 16)
    each = softmax(np.stack([alone(made, name, images) for name in NAMES]), axis=2)
    expected = 0.25 * each[0] + 0.25 * each[1] + 0.5 * each[2]
    np.testing.assert_allclose(nested(images).softmax(dim=1).numpy(), expected, rtol=1e-5)
    checkpoint = fusion.checkpoint_of(nested, [load(made["plain"])], {})
    fusion.write_checkpoint(checkpoint, tmp_path / "three.ckpt")
    again = PredictionEnsemble.load_from_checkpoint(tmp_path / "three.ckpt", weights_only=True)
    assert torch.equal(again(images), nested(images))


def test_the_command_line_tests_and_predicts(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ensemble = write(made, tmp_path / "ensemble.ckpt", *NAMES)
    arguments = (
        f"--model PredictionEnsemble --ckpt_path ensemble.ckpt --data ImageFolderDataModule --data.root {made['data']} "
    )
    arguments += "--data.crop pad --data.num_workers 0 --trainer.accelerator cpu --trainer.enable_progress_bar false "
    arguments += "--data.val_fraction 0.25"
    for command in ("test", "predict", "validate"):
        assert main([command, *arguments.split()]) == 0
    data = build_data(made["data"])
    (scores,) = Trainer(logger=False, **QUIET).test(ensemble, data, verbose=False)
    run = tmp_path / "lightning_logs" / "default"
    rows = (run / "version_0" / "metrics.csv").read_text().splitlines()
    (accuracy,) = [row.rsplit(",", 1)[1] for row in rows if "test/accuracy" in row]
    assert float(accuracy) == pytest.approx(scores["test/accuracy"])
    assert len((run / "version_1" / "predictions.csv").read_text().splitlines()) == 1 + 4


def test_fit_is_refused(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match="is made of trained ones"):
        Trainer(**QUIET).fit(build(made, "plain"), build_data(made["data"]))
    arguments = f"fit --model PredictionEnsemble --model.members [{made['plain']}] --data ImageFolderDataModule"
    assert main([*arguments.split(), "--data.root", str(made["data"]), "--data.batch_size", "4"]) == 2
    assert "is made of trained ones" in capsys.readouterr().err
    assert not list(tmp_path.rglob("config.yaml"))


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (("plain", "three"), {}, "2 classes, as the data has, but .* has 3"),
        (("plain", "others"), {}, "class 1 is 'bee' there and 'cat' in"),
        ((), {}, "`--model.members` to name checkpoint files"),
        (("data",), {}, "is a folder"),
        (("plain",), {"average": "votes"}, "`--model.average` to be 'probabilities' or 'logits', but got 'votes'"),
    ],
)
def test_mistakes(made: dict[str, Path], names: tuple[str, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        build(made, *names, **options)


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "broken.ckpt").write_bytes(b"PK and then nothing")
    torch.save({"state_dict": {"w": torch.ones(1)}}, tmp_path / "foreign.ckpt")
    for name, message in (
        ("none.ckpt", "does not exist"),
        ("broken.ckpt", "cannot be read"),
        ("foreign.ckpt", "as one"),
    ):
        with pytest.raises(ConfigurationError, match=rf"`--model.members` .*{message}"):
            PredictionEnsemble(2, members=[str(tmp_path / name)])


def test_data_of_other_classes(made: dict[str, Path]) -> None:
    data = build_data(made["data"].parent / "others")
    with pytest.raises(ConfigurationError, match="classes of the data, but class 1 is 'cat' there and 'bee'"):
        Trainer(logger=False, **QUIET).test(build(made, "plain"), data, verbose=False)


def test_without_members(made: dict[str, Path]) -> None:
    with pytest.raises(ConfigurationError, match=r"`--model.members` or a checkpoint"):
        Trainer(logger=False, **QUIET).test(PredictionEnsemble(2), build_data(made["data"]), verbose=False)
