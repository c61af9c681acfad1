"""experiments/fuse.py: sweeps, soups and ensembles on short runs; what is left behind, and what is refused."""

from __future__ import annotations

import csv
import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import yaml
from fusion_runs import QUIET, build_data, load, same, train
from torch import Tensor

from framework import Trainer, fusion
from framework.__main__ import main

REPOSITORY = Path(__file__).resolve().parents[1]
FUSED = Path("lightning_logs/fusion/version_0")


@pytest.fixture(scope="module")
def fuse() -> ModuleType:
    specification = importlib.util.spec_from_file_location("fuse", REPOSITORY / "experiments" / "fuse.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, images: Callable[..., Path]) -> Path:
    """A probe, runs fine-tuned from it, and a run of other classes on the same backbone."""
    folder = tmp_path_factory.mktemp("fuse")
    before = Path.cwd()
    os.chdir(folder)
    try:
        data, other = images(folder / "data", ["ant", "bee"], count=16), images(folder / "three", list("xyz"), count=16)
        start = train(other, seed=1, bottleneck_features=8)
        torch.save({"state_dict": load(start)["state_dict"]}, "w.ckpt")
        options: dict[str, Any] = {"weights": "w.ckpt", "bottleneck_features": 8, "data": {"seed": 5}}
        probe = train(data, policy="frozen", seed=2, **options)
        shutil.copy(start, "source.ckpt")
        shutil.copy(probe, "probe.ckpt")
        for seed in (3, 4, 5):
            shutil.copy(train(data, seed=seed, **options, trainer={"max_epochs": 2}), f"tuned_{seed}.ckpt")
        shutil.copy(train(data, "ResidualClassifier", seed=6), "residual.ckpt")
        shutil.rmtree("lightning_logs")
        return folder
    finally:
        os.chdir(before)


@pytest.fixture
def here(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory beside the checkpoints."""
    for path in runs.glob("*.ckpt"):
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return runs


def held_out(path: str | Path, root: Path, seed: int = 5) -> float:
    """Accuracy on the validation split as the run itself measures it."""
    module = L.LightningModule.load_from_checkpoint(path, weights_only=True)
    (scores,) = Trainer(**QUIET | {"logger": False}).validate(module, build_data(root, seed=seed), verbose=False)
    return float(scores["val/accuracy"])


def table(folder: Path = FUSED) -> list[dict[str, str]]:
    with (folder / "table.csv").open() as file:
        return list(csv.DictReader(file))


def saved(path: str | Path) -> dict[str, Tensor]:
    return load(path)["state_dict"]  # type: ignore[no-any-return]


# ---------------------------------------------------------------------- wise_ft
def test_wise_ft(fuse: ModuleType, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alphas = ["0", "0.25", "0.5", "1"]
    assert fuse.main(["wise_ft", "--start", "probe.ckpt", "--end", "tuned_3.ckpt", "--alphas", *alphas]) == 0
    rows = table()
    assert [row["alpha"] for row in rows] == ["0.0", "0.25", "0.5", "1.0"]
    assert float(rows[0]["accuracy"]) == pytest.approx(held_out("probe.ckpt", here / "data"))
    assert float(rows[-1]["accuracy"]) == pytest.approx(held_out("tuned_3.ckpt", here / "data"))
    printed = capsys.readouterr().out
    assert "[2/4] alpha 0.25: new task" in printed
    assert f"framework test --run {FUSED}" in printed
    provenance = yaml.safe_load((FUSED / "fusion.yaml").read_text())
    alpha = provenance["alpha"]
    best = max(float(row["accuracy"]) for row in rows)
    assert [float(row["accuracy"]) for row in rows if float(row["alpha"]) == alpha] == [best]
    assert same(
        saved(FUSED / "checkpoints/last.ckpt"), fusion.interpolate(saved("probe.ckpt"), saved("tuned_3.ckpt"), alpha)
    )
    written = load(FUSED / "checkpoints/last.ckpt")
    assert written["fusion"] == provenance
    assert held_out(FUSED / "checkpoints/last.ckpt", here / "data") == pytest.approx(best)
    assert (FUSED / "table.md").read_text().startswith("| alpha | accuracy, % |")


@pytest.mark.parametrize(("alpha", "end"), [("0", "probe.ckpt"), ("1", "tuned_3.ckpt")])
def test_the_end_points_are_the_files(fuse: ModuleType, here: Path, alpha: str, end: str) -> None:
    arguments = ["--alphas", alpha, "--recompute_batch_norm"]
    assert fuse.main(["wise_ft", "--start", "probe.ckpt", "--end", "tuned_3.ckpt", *arguments]) == 0
    assert same(saved(FUSED / "checkpoints/last.ckpt"), saved(end))
    assert float(table()[0]["accuracy"]) == pytest.approx(held_out(end, here / "data"))


def test_the_end_points_of_a_sweep_keep_their_statistics(
    fuse: ModuleType, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    estimated: list[Any] = []
    monkeypatch.setattr(
        fuse.Judge, "estimate", lambda self, network: estimated.append(network.state_dict()["head.bias"][0].item())
    )
    arguments = ["--alphas", "0", "0.4", "1", "--recompute_batch_norm"]
    assert fuse.main(["wise_ft", "--start", "probe.ckpt", "--end", "tuned_3.ckpt", *arguments]) == 0
    middle = fusion.interpolate(saved("probe.ckpt"), saved("tuned_3.ckpt"), 0.4)["head.bias"][0].item()
    assert set(estimated) == {middle}


def test_two_tasks_with_heads_of_their_own(fuse: ModuleType, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--start", "source.ckpt", "--end", "tuned_3.ckpt", "--source_data", str(here / "three")]
    assert fuse.main(["wise_ft", *arguments, "--alphas", "0", "0.3", "1"]) == 0
    assert "number of classes is 3 in --start and 2 in --end" in capsys.readouterr().out
    rows = table()
    assert float(rows[0]["source_accuracy"]) == pytest.approx(held_out("source.ckpt", here / "three", seed=0))
    assert float(rows[-1]["accuracy"]) == pytest.approx(held_out("tuned_3.ckpt", here / "data"))
    alpha = yaml.safe_load((FUSED / "fusion.yaml").read_text())["alpha"]
    found, start, end = saved(FUSED / "checkpoints/last.ckpt"), saved("source.ckpt"), saved("tuned_3.ckpt")
    for name, value in found.items():
        if name.startswith("head."):
            assert torch.equal(value, end[name])
        else:
            assert torch.equal(value, fusion.interpolate({"w": start[name]}, {"w": end[name]}, alpha)["w"])


def test_ties(fuse: ModuleType) -> None:
    """The new task, then the source task, then the middle."""

    def chosen(*rows: tuple[float, float, float]) -> float:
        named = [{"alpha": a, "accuracy": b, "source_accuracy": c} for a, b, c in rows]
        return float(max(named, key=fuse._preference)["alpha"])

    assert chosen((0.0, 0.8, 0.9), (0.5, 0.9, 0.1), (1.0, 0.8, 0.8)) == 0.5
    assert chosen((0.0, 0.9, 0.9), (0.5, 0.9, 0.1), (1.0, 0.9, 0.8)) == 0.0
    assert chosen((0.0, 0.9, 0.5), (0.4, 0.9, 0.5), (0.7, 0.9, 0.5)) == 0.4


# ---------------------------------------------------------------------- batch norm
def test_recomputed_statistics(fuse: ModuleType, here: Path) -> None:
    """Those of the mean over the training batches, and nothing else changes."""
    files = ["tuned_3.ckpt", "tuned_4.ckpt"]
    assert fuse.main(["soup", *files, "--kind", "uniform"]) == 0
    assert fuse.main(["soup", *files, "--kind", "uniform", "--recompute_batch_norm"]) == 0
    plain, again = (saved(f"lightning_logs/fusion/version_{i}/checkpoints/last.ckpt") for i in (0, 1))
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    changed = {name for name in plain if not torch.equal(plain[name], again[name])}
    assert changed == {name for name in plain if name.endswith(statistics)}

    module = L.LightningModule.load_from_checkpoint(FUSED / "checkpoints/last.ckpt", weights_only=True).eval()
    data = build_data(here / "data", seed=5)
    data.setup("fit")
    first: list[Tensor] = []
    stem = next(m for m in module.backbone.modules() if isinstance(m, torch.nn.Conv2d))  # type: ignore[union-attr]
    stem.register_forward_hook(lambda _, __, output: first.append(output.detach().double()))
    for batch in data.train_dataloader():
        module(data.normalize(batch.images))
    assert len(first) == 3
    name = next(name for name in plain if name.endswith("running_mean"))
    expected = torch.stack([output.mean(dim=(0, 2, 3)) for output in first]).mean(dim=0)
    torch.testing.assert_close(again[name].double(), expected, rtol=1e-4, atol=1e-5)
    name = name.replace("running_mean", "running_var")
    expected = torch.stack([output.transpose(0, 1).flatten(1).var(dim=1) for output in first]).mean(dim=0)
    torch.testing.assert_close(again[name].double(), expected, rtol=1e-4, atol=1e-5)
    assert int(again[name.replace("running_var", "num_batches_tracked")]) == 3


# ---------------------------------------------------------------------- held-out images
def test_folders_of_parts(
    fuse: ModuleType, images: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``root/val`` is what is held out, where it is there."""
    monkeypatch.chdir(tmp_path)
    for seed, (part, count) in enumerate({"train": 8, "val": 3, "test": 5}.items()):
        images(tmp_path / "parts" / part, ["ant", "bee"], count=count, seed=seed)
    path = train(tmp_path / "parts", seed=1)
    assert fuse.main(["soup", str(path)]) == 0
    data = fuse.HeldOut(fuse.data_options(load(path), str(path), None, {}), None)
    data.setup("test")
    assert sum(len(batch.images) for batch in data.test_dataloader()) == 6
    assert float(table()[0]["accuracy"]) == pytest.approx(held_out(path, tmp_path / "parts"))


def test_images_that_do_not_fit_in_memory(fuse: ModuleType, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fuse.main(["soup", "tuned_3.ckpt"]) == 0
    monkeypatch.setattr(fuse, "CACHE", 0)
    data = fuse.HeldOut(fuse.data_options(load("tuned_3.ckpt"), "tuned_3.ckpt", None, {}), None)
    data.setup("test")
    loader = data.test_dataloader()
    assert data.batches is None
    assert sum(len(batch.images) for batch in loader) == len(data.val_files)
    assert fuse.main(["soup", "tuned_3.ckpt"]) == 0
    assert table() == table(FUSED.with_name("version_1"))


# ---------------------------------------------------------------------- soups
def test_uniform_soup_of_one_model(fuse: ModuleType, here: Path) -> None:
    assert fuse.main(["soup", *3 * ["tuned_3.ckpt"], "--kind", "uniform"]) == 0
    assert same(saved(FUSED / "checkpoints/last.ckpt"), saved("tuned_3.ckpt"))


def test_greedy_soup(fuse: ModuleType, here: Path) -> None:
    files = [f"tuned_{seed}.ckpt" for seed in (3, 4, 5)] + ["probe.ckpt"]
    assert fuse.main(["soup", *files, "--output", "soup.ckpt"]) == 0
    accuracies = [held_out(file, here / "data") for file in files]
    module = L.LightningModule.load_from_checkpoint(files[0], weights_only=True)

    def evaluate(state: dict[str, Tensor]) -> float:
        module.load_state_dict(state)
        trainer = Trainer(**QUIET | {"logger": False})
        (scores,) = trainer.validate(module, build_data(here / "data", seed=5), verbose=False)
        return float(scores["val/accuracy"])

    expected = fusion.greedy_soup([saved(file) for file in files], accuracies, evaluate)
    assert same(saved(FUSED / "checkpoints/last.ckpt"), expected.state)
    assert same(saved("soup.ckpt"), expected.state)
    rows = table()
    assert [row["file"] for row in rows] == [files[index] for index, _ in expected.trials]
    assert [row["file"] for row in rows if row["in_soup"] == "True"] == [files[i] for i in expected.ingredients]
    assert [float(row["soup_accuracy"]) for row in rows] == pytest.approx([value for _, value in expected.trials])


# ---------------------------------------------------------------------- the result is a run
@pytest.mark.parametrize(
    "words",
    [
        "wise_ft --start probe.ckpt --end tuned_3.ckpt --alphas 0.5",
        "soup tuned_3.ckpt tuned_4.ckpt",
        "ensemble tuned_3.ckpt residual.ckpt",
    ],
)
def test_the_result_is_a_run(fuse: ModuleType, here: Path, words: str) -> None:
    flags = ["--val_fraction", "0.25", "--experiment", "mixed/all"]
    assert fuse.main([*words.split(), *flags]) == 0
    folder = Path("lightning_logs/mixed/all/version_0")
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == {"config.yaml", "fusion.yaml", "table.csv", "table.md", "checkpoints/last.ckpt"}
    for command in ("test", "predict"):
        assert main([command, "--run", str(folder), "--trainer.enable_progress_bar", "false"]) == 0
    assert "test/accuracy" in (folder / "metrics.csv").read_text()
    assert len((folder / "predictions.csv").read_text().splitlines()) == 1 + 2 * 3
    # again beside it, nothing overwritten
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert fuse.main([*words.split(), *flags]) == 0
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert (folder.parent / "version_1" / "checkpoints" / "last.ckpt").is_file()


def test_the_result_starts_another_run_but_is_not_resumed(
    fuse: ModuleType, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fuse.main(["soup", "tuned_3.ckpt", "tuned_4.ckpt", "--kind", "uniform"]) == 0
    capsys.readouterr()
    assert main(["fit", "--run", str(FUSED), "--trainer.max_epochs", "9"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    path = f"{FUSED}/checkpoints/last.ckpt"
    assert f"`--model.init_from {path}`" in message
    flags = f"--model TransferClassifier --model.backbone resnet8 --model.init_from {path}"
    data = f"--data ImageFolderDataModule --data.root {here / 'data'} --data.batch_size 4 --data.image_size 16"
    assert main(["fit", *flags.split(), *data.split(), "--trainer.fast_dev_run", "true"]) == 0
    assert "taken: backbone" in capsys.readouterr().err


def test_ensemble(fuse: ModuleType, here: Path) -> None:
    files = ["tuned_3.ckpt", "residual.ckpt", "tuned_4.ckpt"]
    assert fuse.main(["ensemble", *files, "--average", "logits", "--output", "all.ckpt"]) == 0
    rows = table()
    assert [row["file"] for row in rows] == [*files, "ensemble"]
    assert [float(row["accuracy"]) for row in rows[:3]] == pytest.approx([held_out(f, here / "data") for f in files])
    assert float(rows[-1]["accuracy"]) == pytest.approx(held_out("all.ckpt", here / "data"))
    again = L.LightningModule.load_from_checkpoint("all.ckpt", weights_only=True)
    assert (type(again).__name__, again.average) == ("PredictionEnsemble", "logits")


# ---------------------------------------------------------------------- mistakes
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "soup tuned_3.ckpt residual.ckpt",
            "class of module is 'TransferClassifier' in 'tuned_3.ckpt' and 'ResidualClassifier'",
        ),
        ("soup tuned_3.ckpt source.ckpt", "number of classes is 2 in 'tuned_3.ckpt' and 3 in 'source.ckpt'"),
        ("soup nowhere.ckpt", "`CHECKPOINT` to be a checkpoint file, but 'nowhere.ckpt' does not exist"),
        ("wise_ft --start probe.ckpt --end none.ckpt", "`--end` to be a checkpoint file"),
        ("wise_ft --start probe.ckpt --end tuned_3.ckpt --alphas 0.5 1.5", "`--alphas` to be from 0 to 1, but got 1.5"),
        ("wise_ft --start probe.ckpt --end tuned_3.ckpt --data nowhere", "nowhere"),
        ("soup tuned_3.ckpt --val_fraction 0.5", "Expected the split of the run"),
        ("soup tuned_3.ckpt --seed 6", "Expected the split of the run"),
        ("ensemble tuned_3.ckpt source.ckpt", "2 classes, as the data has, but 'source.ckpt' has 3"),
        ("soup tuned_3.ckpt --output tuned_4.ckpt", "`--output` to be a new file, but 'tuned_4.ckpt' exists"),
    ],
)
def test_mistakes(fuse: ModuleType, here: Path, words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert fuse.main(words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("fuse: error: Expected ")
    assert message in error
    assert not Path("lightning_logs").exists()


@pytest.mark.parametrize("words", ["", "melt", "soup", "soup a.ckpt --kind all", "wise_ft --start a.ckpt"])
def test_usage(fuse: ModuleType, words: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        fuse.main(words.split())
    assert stopped.value.code == 2


def test_a_changed_split_is_refused(
    fuse: ModuleType, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(runs / "data", "data")
    path = train(Path("data"), seed=7, data={"seed": None})  # the seed of the run
    monkeypatch.delenv("PL_GLOBAL_SEED")
    assert fuse.main(["soup", str(path)]) == 0
    Path("data/ant/0.png").unlink()
    assert fuse.main(["soup", str(path)]) == 2
    assert "Expected the split of the run" in capsys.readouterr().err
    assert fuse.main(["soup", str(path), "--data", str(runs / "data")]) == 0  # another folder, another split
