"""The contract that every pre-training method keeps; a new method is tested by existing."""

from __future__ import annotations

import csv
import logging
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pretraining_contract as contract
import pytest
import torch
from contract import PRECISIONS, each_precision
from torch import Tensor, nn
from transfer_contract import QUIET, differing, weights

import framework.reports
from framework.__main__ import main
from framework.batch import UnlabelledBatch
from framework.datamodules import DomainPairDataModule, ImageFolderDataModule
from framework.modules import (
    DANN,
    AlignmentSum,
    PretrainingModule,
    ResidualClassifier,
    RotationPrediction,
    TransferClassifier,
)
from framework.trainer import Trainer

METHODS = contract.methods()
Method = type[PretrainingModule]
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, images: Callable[..., Path]) -> Path:
    """Two folders of images without labels, and a test folder."""
    root = contract.prepare(tmp_path_factory.mktemp("pretraining"), images)
    images(root / "source", contract.CLASSES, count=6, seed=3)
    return root


Run = tuple[PretrainingModule, dict[str, Tensor], Path]


@pytest.fixture(scope="module")
def run(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Method], Run]:
    """An uninterrupted run of a method, made once: the module, its weights at the end, the folder of checkpoints."""
    runs: dict[Method, Run] = {}

    def of(method: Method) -> Run:
        if method not in runs:
            checkpoints = tmp_path_factory.mktemp(method.__name__)
            module = contract.fit(method, folders, save={batch: checkpoints / f"{batch}.ckpt" for batch in (5, 7, 15)})
            runs[method] = (module, weights(module), checkpoints)
        return runs[method]

    return of


class First(L.Callback):
    """The weights with which a training begins, and the gradients of its first batch."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor | None] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.weights = weights(pl_module)

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.gradients:
            of = {name: p.grad for name, p in pl_module.named_parameters() if p.requires_grad}
            self.gradients = {name: None if g is None else g.clone() for name, g in of.items()}


def test_the_methods_are_found() -> None:
    names = {method.__name__ for method in METHODS}
    assert "RotationPrediction" in names
    assert "PretrainingModule" not in names


# ---------------------------------------------------------------------- training
@each_method
def test_every_parameter_gets_a_gradient(method: Method, folders: Path) -> None:
    first = First()
    module = contract.fit(method, folders, max_epochs=1, limit_train_batches=1, callbacks=[first])
    assert [name for name, gradient in first.gradients.items() if gradient is None] == []
    backbone = {name: g for name, g in first.gradients.items() if name.startswith("backbone.") and g.dim() > 1}  # type: ignore[union-attr]
    assert len(backbone) > 5
    assert [name for name, gradient in backbone.items() if not gradient.any()] == []  # type: ignore[union-attr]
    assert sum(parameter.numel() for parameter in module.task.parameters() if parameter.requires_grad) > 0
    groups = module.parameter_groups()
    assert [group["name"] for group in groups] == ["backbone", "task"]
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(set(grouped)) == len(grouped)
    assert set(grouped) == {id(parameter) for parameter in module.parameters() if parameter.requires_grad}


@each_method
@pytest.mark.parametrize("batches", [5, 7], ids=["epoch border", "mid-epoch"])
def test_resumed_equals_uninterrupted(
    method: Method, batches: int, run: Callable[[Method], Run], folders: Path
) -> None:
    _, end, checkpoints = run(method)
    resumed = contract.fit(method, folders, resume=checkpoints / f"{batches}.ckpt")
    assert not differing(end, weights(resumed))


@pytest.mark.slow
@each_method
def test_resumed_with_workers_equals_uninterrupted(method: Method, run: Callable[[Method], Run], folders: Path) -> None:
    _, end, checkpoints = run(method)
    resumed = contract.fit(method, folders, resume=checkpoints / "7.ckpt", data={"num_workers": 2})
    assert not differing(end, weights(resumed))


@each_method
def test_resumed_while_accumulating_equals_uninterrupted(method: Method, folders: Path, tmp_path: Path) -> None:
    path = tmp_path / "stop.ckpt"
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "data": {"steps_per_epoch": 6}, "max_epochs": 2}
    whole = contract.fit(method, folders, save={8: path}, **options)  # 8 = 6 + 2: between two optimizer steps
    assert not differing(weights(whole), weights(contract.fit(method, folders, resume=path, **options)))


@each_method
@each_precision
def test_resumed_in_other_precisions_equals_uninterrupted(
    method: Method, precision: str, folders: Path, tmp_path: Path
) -> None:
    path = tmp_path / "stop.ckpt"
    whole = contract.fit(method, folders, save={7: path}, max_epochs=2, precision=precision)
    assert all(torch.isfinite(p).all() and p.dtype == PRECISIONS[precision] for p in whole.parameters())
    resumed = contract.fit(method, folders, resume=path, max_epochs=2, precision=precision)
    assert not differing(weights(whole), weights(resumed))


@pytest.mark.slow
@each_method
def test_trains_with_a_compiled_backbone(method: Method, folders: Path) -> None:
    """It is one graph without breaks, and another for the pass that sets running statistics where a task has that; the
    result is that of the network as it is."""
    short: dict[str, Any] = {"max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 0}
    plain = weights(contract.fit(method, folders, **short))
    graphs = []

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    L.seed_everything(0, verbose=False)
    module = contract.build_model(method, compile=True)
    # where the module would take the inductor
    module.configure_model = lambda: module.backbone.compile(backend=backend, fullgraph=True)  # type: ignore[method-assign]
    try:
        Trainer(**QUIET, **short).fit(module, contract.build_data(folders, method))
    finally:
        torch._dynamo.reset()
    assert len(graphs) == 1 + module.task.changes_images
    for name, value in weights(module).items():
        torch.testing.assert_close(value, plain[name], rtol=1e-4, atol=1e-5, msg=name)


# ---------------------------------------------------------------------- labels
@each_method
def test_its_batches_have_no_room_for_a_label(method: Method, folders: Path) -> None:
    assert method.batch_type is UnlabelledBatch
    assert UnlabelledBatch._fields == ("images",)
    data = contract.build_data(folders, method)
    data.setup("fit")
    shape = [3, 16, 16] if data.views == 1 else [data.views, 3, 16, 16]
    for loader in (data.train_dataloader(), data.val_dataloader()):
        batch = next(iter(loader))
        assert type(batch) is UnlabelledBatch
        assert list(batch.images.shape[1:]) == shape


@each_method
@pytest.mark.parametrize(
    ("name", "sizes", "classes"),
    [("dealt", [1, 3, 14], ["bee", "cat", "dog"]), ("flat", [], [])],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_class_folders_change_nothing(
    method: Method, name: str, sizes: list[int], classes: list[str], run: Callable[[Method], Run], folders: Path
) -> None:
    """Other names, other images in them, none at all: the order of the files is the same, and so are the weights."""
    other = contract.deal(folders, name, sizes, classes)
    module = contract.fit(method, folders, data={"folders": [str(other), str(folders / "others")]})
    assert not differing(run(method)[1], weights(module))


def test_other_images_change_the_weights(run: Callable[[Method], Run], folders: Path) -> None:
    """What the test above looks for would be seen: images in another order are other weights."""
    swapped = {"folders": [str(folders / "others"), str(folders / "labelled")]}
    assert differing(run(RotationPrediction)[1], weights(contract.fit(RotationPrediction, folders, data=swapped)))


# ---------------------------------------------------------------------- logging, validation
@each_method
def test_logging_changes_nothing_and_tells_the_learning_rates(
    method: Method, run: Callable[[Method], Run], folders: Path, tmp_path: Path
) -> None:
    logger = L.loggers.CSVLogger(tmp_path)
    module = contract.fit(method, folders, logger=logger, log_every_n_steps=1, default_root_dir=tmp_path)
    assert not differing(run(method)[1], weights(module))
    rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").read_text().splitlines()))
    for part in ("backbone", "task"):
        rates = [float(row[name]) for row in rows if row[name := f"train/learning_rate/{part}"]]
        assert len(rates) == 15
        expected = [0.01 * (1 + 0.001 * step) ** -0.75 for step in range(15)]
        assert rates == pytest.approx(expected)
        assert any(row[f"train/gradient_norm/{part}"] for row in rows)
    diagnostics = set(module.task.diagnostics)
    assert {"train/loss", "val/loss", *(f"{kind}/{name}" for kind in ("train", "val") for name in diagnostics)} <= (
        rows[0].keys()
    )


@each_method
def test_validation_is_reproducible(method: Method, run: Callable[[Method], Run], folders: Path) -> None:
    """The same weights give the same numbers: at the end of a training, later, and in another process's state."""
    during = Trainer(**QUIET, max_epochs=2)
    L.seed_everything(0, verbose=False)
    module = contract.build_model(method)
    during.fit(module, contract.build_data(folders, method))
    expected = {name: float(value) for name, value in during.callback_metrics.items() if name.startswith("val/")}
    assert "val/loss" in expected
    for state in (0, 1):
        torch.manual_seed(state)
        trainer = Trainer(**QUIET)
        before = weights(module)
        trainer.validate(module, contract.build_data(folders, method), verbose=False)
        assert {name: float(value) for name, value in trainer.callback_metrics.items()} == expected
        assert not differing(before, weights(module))


# ---------------------------------------------------------------------- what comes after
@each_method
def test_checkpoint_reloads_to_the_same_outputs(method: Method, run: Callable[[Method], Run]) -> None:
    module, _, checkpoints = run(method)
    images = torch.randn(5, 3, 16, 16)
    expected = module.eval()(images)
    for loader in (method, L.LightningModule):
        loaded = loader.load_from_checkpoint(checkpoints / "15.ckpt", weights_only=True, map_location="cpu").eval()
        assert type(loaded) is method
        assert torch.equal(loaded(images), expected)
        assert {name: value for name, value in loaded.hparams.items() if not name.startswith("_")} == module.hparams
    plain = torch.load(checkpoints / "15.ckpt", weights_only=True)["hyper_parameters"]
    assert_plain(plain)


def assert_plain(value: Any) -> None:
    """Numbers, texts, and lists and dictionaries of them."""
    if isinstance(value, dict | list | tuple):
        for item in [*value, *value.values()] if isinstance(value, dict) else value:
            assert_plain(item)
    else:
        assert value is None or type(value) in (bool, int, float, str)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    """What the framework reported since the last call."""
    framework.reports.logger.addHandler(caplog.handler)

    def text() -> str:
        found = "\n".join(record.getMessage() for record in caplog.records if record.name == "framework")
        caplog.clear()
        return found

    caplog.set_level(logging.INFO, logger="framework")
    yield text  # type: ignore[misc]
    framework.reports.logger.removeHandler(caplog.handler)


@each_method
@pytest.mark.parametrize(
    ("then", "options"),
    [
        (ResidualClassifier, {}),
        (TransferClassifier, {"policy": "frozen"}),
        (DANN, {"discriminator_features": 8}),
        (AlignmentSum, {"terms": {"mcc": 1.0}, "batch_norm": "domain_specific"}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_its_checkpoint_starts_another_module(
    method: Method,
    then: type[Any],
    options: dict[str, Any],
    run: Callable[[Method], Run],
    folders: Path,
    said: Callable[[], str],
) -> None:
    _, end, checkpoints = run(method)
    expected = {name.removeprefix("backbone."): value for name, value in end.items() if name.startswith("backbone.")}
    module = then(3, backbone="resnet8", init_from=str(checkpoints / "15.ckpt"), **options)
    small: dict[str, Any] = {"batch_size": 4, "image_size": 16, "crop": "none", "num_workers": 0}
    source, target = str(folders / "source"), str(folders / "others")
    pair = then in (DANN, AlignmentSum)
    data = DomainPairDataModule(source, target, **small) if pair else ImageFolderDataModule(source, **small)
    first = First()
    Trainer(**QUIET, max_epochs=1, limit_train_batches=1, limit_val_batches=0, callbacks=[first]).fit(module, data)
    begun = {name.removeprefix("backbone."): v for name, v in first.weights.items() if name.startswith("backbone.")}
    for domain, other in (("source", "target"), ("target", "source")):  # batch norms of each domain begin as the one
        own = {name.replace(f".{domain}.", "."): v for name, v in begun.items() if f".{other}." not in name}
        assert not differing(own, expected)
    text = said()
    assert text.count("Started from") == 1
    assert f"a checkpoint of {method.__name__} with the backbone 'resnet8'" in text
    assert f"taken: backbone ({len(expected)} entries)" in text
    task = sum(name.startswith("task.") for name in end)
    assert f"not used: task ({task} entr" in text


def test_from_the_shell(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pre-training, then a classifier; a test or a prediction of the first says what to do instead."""
    monkeypatch.chdir(tmp_path)
    common = (
        "--data.image_size 16 --data.crop none --data.num_workers 0 --data.batch_size 4 --trainer.accelerator cpu "
        "--trainer.max_epochs 1 --trainer.limit_train_batches 2 --trainer.enable_progress_bar false "
        "--model.backbone resnet8"
    )
    unlabelled = f"--data UnlabelledFolderDataModule --data.folders '[{folders}/labelled, {folders}/others]'"
    labelled = f"--data ImageFolderDataModule --data.root {folders}/source"
    run = "lightning_logs/default/version_0"

    def command(line: str) -> int:
        capsys.readouterr()
        return main(shlex.split(line))

    assert command(f"fit --model RotationPrediction {unlabelled} {common}") == 0
    assert (Path(run) / "checkpoints" / "best.ckpt").is_file()
    assert "val/rotation_accuracy" in (Path(run) / "metrics.csv").read_text()
    assert command(f"validate --run {run} --trainer.enable_progress_bar false") == 0
    for name in ("test", "predict"):
        for data in ("", f"--data ImageFolderDataModule --data.root {folders}/source"):
            assert command(f"{name} --run {run} {data} --trainer.enable_progress_bar false") == 2
            complaint = capsys.readouterr().err
            assert f"Expected a classifier to `{name}`, but RotationPrediction knows no classes." in complaint
            assert "--model.init_from" in complaint
    checkpoint = f"{run}/checkpoints/last.ckpt"
    assert command(f"fit --model TransferClassifier {labelled} {common} --model.init_from {checkpoint}") == 0
    told = capsys.readouterr().err
    assert f"Started from '{checkpoint}', a checkpoint of RotationPrediction with the backbone 'resnet8'." in told
    assert command("test --run lightning_logs/default/version_1 --trainer.enable_progress_bar false") == 0
    assert command(f"fit --model TransferClassifier {unlabelled} {common}") == 2
    assert "Expected `--data` to serve a LabelledBatch" in capsys.readouterr().err


def test_a_classifier_and_its_data_stay_apart() -> None:
    """No method of pre-training has a classifier of classes: a checkpoint of it could not be taken for one."""
    for method in METHODS:
        assert not issubclass(method, framework.modules.ImageClassifier)
        assert not hasattr(contract.build_model(method), "head")
        assert isinstance(contract.build_model(method).task, nn.Module)
