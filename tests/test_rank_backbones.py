"""The ranking of backbones: its table against the scores of features made by hand, failures and mistakes."""

from __future__ import annotations

import csv
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from framework import ImageFolderDataModule
from framework.datamodules.decoding import read_image
from framework.functional import h_score, leep, log_maximum_evidence, negative_conditional_entropy
from framework.networks import create_backbone

REPOSITORY = Path(__file__).resolve().parents[1]
OPTIONS = ["--crop", "none", "--num_workers", "0"]


@pytest.fixture(scope="module")
def ranking() -> ModuleType:
    path = REPOSITORY / "experiments" / "rank_backbones.py"
    specification = importlib.util.spec_from_file_location("rank_backbones", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: Callable[..., Path]) -> Path:
    """A working directory with a folder of three classes."""
    monkeypatch.chdir(tmp_path)
    return images(tmp_path / "photos", ["ant", "bee", "cat"], count=20, size=32)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A file of resnet8 with a classifier of 10 source classes, and what images it expects."""
    torch.manual_seed(3)
    network = create_backbone("resnet8")
    state = network.state_dict() | {f"fc.{key}": value for key, value in nn.Linear(64, 10).state_dict().items()}
    preprocessing = {"image_size": 24, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    torch.save({"state_dict": state, "preprocessing": preprocessing}, tmp_path / "own.pth")
    return tmp_path / "own.pth"


def rows(experiment: str = "backbones") -> list[dict[str, str]]:
    with (Path("lightning_logs") / experiment / "table.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_table_against_features_made_by_hand(
    ranking: ModuleType, photos: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data", str(photos), "--backbones", "resnet8", "resnet20", *OPTIONS]
    assert ranking.main([*arguments, "--weights", "none", f"resnet8={weights}"]) == 0
    found = {row["backbone"]: row for row in rows()}
    assert [float(row["logme"]) for row in rows()] == sorted((float(row["logme"]) for row in rows()), reverse=True)

    # the training images of the framework's split, by hand: resized, normalised, one by one through the network
    data = ImageFolderDataModule(str(photos), batch_size=1, crop="none", num_workers=0)
    data.setup("fit")
    network: Any = create_backbone("resnet8", str(weights)).eval()
    outputs = []
    for path in data.train_files.paths:
        pixels = nn.functional.interpolate(
            read_image(path)[None].float(), size=(24, 24), mode="bilinear", antialias=True, align_corners=False
        )
        mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])
        with torch.no_grad():
            outputs.append(network((pixels.round() / 255 - mean[:, None, None]) / std[:, None, None])[0])
    features, labels = torch.stack(outputs).double(), torch.tensor(data.train_files.labels)
    state = torch.load(weights)["state_dict"]
    logits = features @ state["fc.weight"].double().T + state["fc.bias"].double()
    expected = {
        "logme": log_maximum_evidence(features, labels),
        "h_score": h_score(features, labels, shrinkage=True),
        "leep": leep(logits.softmax(1), labels),
        "nce": negative_conditional_entropy(logits.argmax(1), labels),
    }
    for name, value in expected.items():
        assert float(found["resnet8"][name]) == pytest.approx(float(value), abs=2e-3), name
    assert {name: found["resnet8"][name] for name in ("images", "classes", "features", "source_classes")} == {
        "images": "42",
        "classes": "3",
        "features": "64",
        "source_classes": "10",
    }
    assert (found["resnet8"]["image_size"], found["resnet20"]["image_size"]) == ("24", "32")
    # without a source classifier there is nothing that LEEP and NCE could be of
    assert (found["resnet20"]["leep"], found["resnet20"]["nce"], found["resnet20"]["source_classes"]) == ("", "", "")
    written = (Path("lightning_logs") / "backbones" / "table.md").read_text()
    assert written in capsys.readouterr().out
    assert written.splitlines()[0].startswith("| backbone | weights | LogME | H-score | LEEP | NCE |")
    assert {line.count("|") for line in written.splitlines()} == {10}


def test_images_are_those_of_training(ranking: ModuleType, photos: Path) -> None:
    arguments = ["--data.root", str(photos), "--backbones", "resnet8", "--weights", "none", *OPTIONS]
    for number, more, count in (
        (0, [], 42),
        (1, ["--labels_per_class", "2"], 6),
        (2, ["--labels_per_class", "0.5"], 21),
        (3, ["--labels_per_class", "1.0"], 42),
        (4, ["--val_fraction", "0", "--test_fraction", "0"], 60),
    ):
        assert ranking.main([*arguments, "--experiment", f"e{number}", "--image_size", "16", *more]) == 0
        (row,) = rows(f"e{number}")
        assert (row["images"], row["image_size"]) == (str(count), "16")


def test_the_batch_size_and_the_seed_of_the_images_play_their_parts(ranking: ModuleType, photos: Path) -> None:
    arguments = ["--data", str(photos), "--backbones", "resnet8", "--weights", "none", *OPTIONS]
    values = []
    for more in ([], ["--batch_size", "5"], ["--seed", "0"], ["--seed", "1"]):
        assert ranking.main([*arguments, *more]) == 0
        values.append(float(rows()[0]["logme"]))
    assert values[1] == pytest.approx(values[0], abs=1e-5)
    assert values[2] == values[0]
    assert values[3] != values[0]


def test_a_failed_backbone_stops_nothing(
    ranking: ModuleType, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    right = ranking.create_backbone

    def create(name: str, *rest: Any) -> nn.Module:
        if name == "resnet32":
            raise FloatingPointError("not a number")
        network: nn.Module = right(name, *rest)
        if name == "resnet44":
            for parameter in network.parameters():
                parameter.data.fill_(math.nan)
        return network

    monkeypatch.setattr(ranking, "create_backbone", create)
    arguments = ["--data", str(photos), "--backbones", "resnet32", "resnet20", "resnet8", "resnet18x", "resnet44"]
    broken = tmp_path / "broken.pth"
    broken.write_bytes(b"nothing")
    assert ranking.main([*arguments, *OPTIONS, "--weights", "none", f"resnet20={broken}"]) == 1
    printed = capsys.readouterr()
    assert "FloatingPointError: not a number" in printed.err
    assert "Expected `--weights` '" in printed.err
    assert "Expected `--backbones` to be a known network, but got 'resnet18x'" in printed.err
    assert "4 of 5 backbones failed" in printed.err
    assert "\r" not in printed.out + printed.err
    assert [row["backbone"] for row in rows()] == ["resnet8", "resnet32", "resnet20", "resnet18x", "resnet44"]
    assert [row["status"].split(":")[0] for row in rows()] == ["finished", *["failed"] * 4]
    assert "finite features" in rows()[-1]["status"]
    assert "| resnet32 | none | failed |" in Path("lightning_logs/backbones/table.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "nowhere"], "Expected `--data` to be a folder of images, but 'nowhere' does not exist"),
        (["--backbones", "resnet8", "resnet8"], "`--backbones` to name each once, but got 'resnet8' again"),
        (["--weights", "resnet9=x.pth"], "with a name of `--backbones`, but got 'resnet9'. Did you mean 'resnet8'"),
        (["--weights", "none", "DEFAULT"], "`--weights` once for all backbones, but got none and DEFAULT"),
        (["--labels_per_class", "15"], "`--labels_per_class` to be no more than a class has training images"),
        (["--val_fraction", "1.5"], "`--val_fraction`"),
    ],
)
def test_mistakes(
    ranking: ModuleType, photos: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data", str(photos), "--backbones", "resnet8", "--weights", "none", *OPTIONS]
    assert ranking.main([*arguments, *words]) == 2
    assert message in capsys.readouterr().err
    assert not Path("lightning_logs").exists()


def test_corrupt_images_are_found_first(ranking: ModuleType, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "bee" / "0.png").write_bytes(b"")
    assert ranking.main(["--data", str(photos), "--backbones", "resnet8", "--weights", "none", *OPTIONS]) == 2
    assert "Expected every file of `--data` to be an image that can be read" in capsys.readouterr().err


def test_a_better_backbone_comes_first(ranking: ModuleType, photos: Path, tmp_path: Path) -> None:
    """The classes differ by brightness: a network that sees it, against one whose features are noise."""
    torch.manual_seed(0)
    state = create_backbone("resnet8").state_dict()
    blind = {key: torch.zeros_like(value) if "conv" in key else value for key, value in state.items()}
    torch.save(state, tmp_path / "sees.pth")
    torch.save(blind, tmp_path / "blind.pth")
    values = {}
    for name in ("sees", "blind"):
        arguments = ["--data", str(photos), "--backbones", "resnet8", "--weights", f"{tmp_path}/{name}.pth", *OPTIONS]
        assert ranking.main([*arguments, "--experiment", name]) == 0
        values[name] = {key: float(rows(name)[0][key]) for key in ("logme", "h_score")}
    assert values["sees"]["logme"] > values["blind"]["logme"] + 0.5
    assert values["sees"]["h_score"] > values["blind"]["h_score"] + 0.5
