"""Starting from a checkpoint of another run: what is taken, what is new, what is said, and that the file may go."""

from __future__ import annotations

import logging
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import contract
import lightning.pytorch as L
import pytest
import torch
import yaml
from lightning.pytorch import LightningModule
from torch import Tensor, nn

import framework.reports
from framework.__main__ import main
from framework.datamodules import ImageFolderDataModule
from framework.errors import ConfigurationError
from framework.initialization import Initialization, of_the_target
from framework.modules import CDAN, DANN, MCD, AlignmentSum, ImageClassifier, ResidualClassifier, TransferClassifier
from framework.networks import Bottleneck, convert_domain_specific, create_backbone
from framework.trainer import Trainer

Writer = Callable[..., Path]
QUIET: dict[str, Any] = {
    "max_epochs": 1,
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "limit_val_batches": 0,
}
MODEL: dict[str, Any] = {"backbone": "resnet8", "bottleneck_features": 16, "learning_rate": 0.05}


class Start(L.Callback):
    """The weights with which the training begins."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.weights = contract.weights(module)


def folder_data(root: Path) -> ImageFolderDataModule:
    return ImageFolderDataModule(
        str(root), batch_size=4, steps_per_epoch=3, image_size=16, crop="none", num_workers=0, check_images=False
    )


def train(module: ImageClassifier, root: Path, path: Path) -> Path:
    """A checkpoint of the module after a few steps on a folder."""
    trainer = Trainer(**QUIET)
    trainer.fit(module, folder_data(root))
    trainer.save_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def finetuned(domains: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """resnet8 with a bottleneck, trained on the three classes of the source."""
    torch.manual_seed(5)
    return train(TransferClassifier(3, **MODEL), domains / "source", tmp_path_factory.mktemp("runs") / "finetuned.ckpt")


@pytest.fixture(scope="module")
def plain(domains: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without a bottleneck."""
    torch.manual_seed(6)
    module = ResidualClassifier(3, backbone="resnet8", learning_rate=0.05)
    return train(module, domains / "source", tmp_path_factory.mktemp("runs") / "plain.ckpt")


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


def begun(method: type[Any], root: Path, init_from: Path | None, **model: Any) -> dict[str, Tensor]:
    """The weights with which a run of a method on the domains begins."""
    start = Start()
    options = {"init_from": None if init_from is None else str(init_from), **model}
    contract.fit(method, root, model=options, max_epochs=1, limit_val_batches=0, callbacks=[start])
    return start.weights


def of(part: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(f"{part}."): value for key, value in weights.items() if key.startswith(f"{part}.")}


def saved(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]  # type: ignore[no-any-return]


def change(path: Path, to: Path, **content: Any) -> Path:
    checkpoint = torch.load(path, weights_only=True)
    checkpoint.update(content)
    torch.save(checkpoint, to)
    return to


# ---------------------------------------------------------------------- fine-tune, then adapt
@pytest.mark.parametrize(
    ("method", "options"),
    [(DANN, {}), (CDAN, {"batch_norm": "separate"}), (AlignmentSum, {"batch_norm": "domain_specific"})],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_adaptation_starts_from_a_fine_tuned_classifier(
    method: type[Any], options: dict[str, Any], finetuned: Path, domains: Path, said: Callable[[], str]
) -> None:
    weights, expected = begun(method, domains, finetuned, **options), saved(finetuned)
    untouched = begun(method, domains, None, **options)
    domain_specific = options.get("batch_norm") == "domain_specific"
    for key, value in weights.items():
        twin = key.replace(".source.", ".").replace(".target.", ".") if domain_specific else key
        if twin.startswith(("backbone.", "bottleneck.", "head.")):
            assert torch.equal(value, expected[twin]), key
            assert expected[twin].dtype == torch.int64 or not value.any() or not torch.equal(value, untouched[key])
        else:
            assert torch.equal(value, untouched[key])  # the seed's
    text = said()
    assert text.count("Started from") == 1
    assert "a checkpoint of TransferClassifier with the backbone 'resnet8'" in text
    entries = len(of("backbone", expected))
    assert f"taken: backbone ({entries} entries), bottleneck (7 entries), head (2 entries)" in text
    assert "new: " not in text
    assert "not used: nothing" in text


def test_all_steps_of_the_chain_are_reproducible(finetuned: Path, domains: Path) -> None:
    """The seed's random numbers are the same with and without a checkpoint, whatever of it is taken."""
    first = contract.weights(contract.fit(DANN, domains, model={"init_from": str(finetuned)}))
    assert contract.equal(first, contract.weights(contract.fit(DANN, domains, model={"init_from": str(finetuned)})))


@pytest.mark.parametrize("batch_norm", ["joint", "domain_specific"])
def test_both_heads_of_mcd_come_through_the_same_door(
    batch_norm: str, finetuned: Path, domains: Path, tmp_path: Path, said: Callable[[], str]
) -> None:
    heads = {"batch_norm": batch_norm, "classifier_layers": 1, "classifier_normalization": "batch"}
    untouched = begun(MCD, domains, None, **heads)
    weights = begun(MCD, domains, finetuned, **heads)
    assert contract.equal(of("second_head", weights), of("second_head", untouched))
    assert contract.equal(of("head", weights), of("head", untouched))
    text = said()
    assert "new: head, since it has other layers: weight, bias in the checkpoint, 0.weight, 0.bias, 1.weight" in text
    assert "new: second_head, since the checkpoint has none" in text
    assert "bottleneck (7 entries)\n" in text  # and not the head, which the base could have taken

    # from its own checkpoint, with another dropout too, whose layer shifts the names of those behind it
    module = contract.fit(MCD, domains, model={"init_from": str(finetuned), **heads})
    module.trainer.save_checkpoint(tmp_path / "mcd.ckpt")
    assert contract.weights(module).keys() == weights.keys()
    said()
    for dropout in (0.5, 0.0):
        started = begun(MCD, domains, tmp_path / "mcd.ckpt", **heads, classifier_dropout=dropout)
        for name in ("head", "second_head"):
            own, expected = of(name, started), of(name, contract.weights(module))
            assert len(own) == len(expected)
            target = [value for key, value in expected.items() if ".source." not in key]
            assert len(target) == 9
            for values in (
                [value for key, value in own.items() if ".source." not in key],
                [value for key, value in own.items() if ".target." not in key],
            ):
                assert all(torch.equal(a, b) for a, b in zip(values, target, strict=True))
        assert "head (9 entries), second_head (9 entries)" in said()


def test_a_linear_head_starts_a_head_of_mcd_without_hidden_layers(finetuned: Path, domains: Path) -> None:
    weights = begun(MCD, domains, finetuned, classifier_features=0)
    assert torch.equal(weights["head.0.weight"], saved(finetuned)["head.weight"])
    assert not torch.equal(weights["second_head.0.weight"], saved(finetuned)["head.weight"])


def test_other_numbers_of_classes(
    finetuned: Path, tmp_path: Path, images: Writer, domains: Path, said: Callable[[], str]
) -> None:
    images(tmp_path / "source", ["ant", "bee", "cat", "dog"], count=5)
    module = DANN(4, **MODEL, init_from=str(finetuned))
    torch.manual_seed(0)
    data = contract.build_data(domains, source=str(tmp_path / "source"), target_test=None)
    start = Start()
    Trainer(**QUIET, callbacks=[start]).fit(module, data)
    assert contract.equal(of("backbone", start.weights), of("backbone", saved(finetuned)))
    assert contract.equal(of("bottleneck", start.weights), of("bottleneck", saved(finetuned)))
    text = said()
    assert "taken: backbone" in text
    assert "new: head, since weight is [3, 16] in the checkpoint and [4, 16] here" in text


def test_as_many_but_other_classes(
    finetuned: Path, tmp_path: Path, images: Writer, domains: Path, said: Callable[[], str]
) -> None:
    """The head's shape agrees, and its classes do not: it begins as it would without the checkpoint."""
    images(tmp_path / "source", ["ant", "bee", "dog"], count=6)
    for batch_norm in ("joint", "domain_specific"):
        for method, heads in ((DANN, ["head"]), (MCD, ["head", "second_head"])):
            shape = {"classifier_normalization": "batch", "classifier_features": 4} if method is MCD else {}
            checkpoint = finetuned
            if method is MCD:  # so that both heads could be taken
                module = contract.fit(MCD, domains, model={"batch_norm": batch_norm, **shape}, max_epochs=1)
                module.trainer.save_checkpoint(tmp_path / "mcd.ckpt")
                checkpoint = tmp_path / "mcd.ckpt"
            said()
            options = {"batch_norm": batch_norm, **shape}
            data = {"source": str(tmp_path / "source"), "target_test": None}
            started = []
            for init_from in (str(checkpoint), None):
                start = Start()
                model = {**options, "init_from": init_from}
                contract.fit(method, domains, model=model, data=data, max_epochs=1, callbacks=[start])
                started.append(start.weights)
            for head in heads:
                assert contract.equal(of(head, started[0]), of(head, started[1]))
            norms = [key for key in started[0] if key.endswith("running_mean") and key.startswith("backbone")]
            assert not any(torch.equal(started[0][key], started[1][key]) for key in norms)
            text = said()
            for head in heads:
                assert f"new: {head}, since its classes are ant, bee, cat, the data's are ant, bee, dog" in text
                assert f"{head} (" not in text


def test_other_classes_and_another_head(
    finetuned: Path, tmp_path: Path, images: Writer, domains: Path, said: Callable[[], str]
) -> None:
    """The head that the classes would make new is no longer there."""
    images(tmp_path / "source", ["ant", "bee", "dog"], count=6)
    data = {"source": str(tmp_path / "source"), "target_test": None}
    contract.fit(MCD, domains, model={"init_from": str(finetuned)}, data=data, max_epochs=1)
    assert "new: head, since it has other layers" in said()


def test_a_run_knows_its_classes(finetuned: Path, domains: Path, tmp_path: Path) -> None:
    assert torch.load(finetuned, weights_only=True)["class_names"] == ["ant", "bee", "cat"]
    module = LightningModule.load_from_checkpoint(finetuned, weights_only=True)
    assert module.class_names == ["ant", "bee", "cat"]
    # a module of a checkpoint that is saved again, without a training in between
    trainer = Trainer(**QUIET)
    trainer.test(module, folder_data(domains / "source"), verbose=False)
    trainer.save_checkpoint(tmp_path / "again.ckpt")
    assert torch.load(tmp_path / "again.ckpt", weights_only=True)["class_names"] == ["ant", "bee", "cat"]


def test_a_test_of_other_class_names_is_left_as_it_is(finetuned: Path, tmp_path: Path, images: Writer) -> None:
    images(tmp_path / "photos", ["x", "y", "z"], count=10)
    module = TransferClassifier(3, **MODEL)
    Trainer(**QUIET).test(module, folder_data(tmp_path / "photos"), ckpt_path=finetuned, verbose=False)
    assert contract.equal(contract.weights(module), saved(finetuned))


def test_a_checkpoint_without_class_names(
    finetuned: Path, domains: Path, tmp_path: Path, said: Callable[[], str]
) -> None:
    older = change(finetuned, tmp_path / "older.ckpt", class_names=None)
    weights = begun(DANN, domains, older)
    assert torch.equal(weights["head.weight"], saved(finetuned)["head.weight"])
    assert "it does not name its classes: head may mean others than the data's" in said()


def test_behind_a_new_bottleneck_the_head_is_new(plain: Path, domains: Path, said: Callable[[], str]) -> None:
    """Its shape would agree, 64 features; what it has learned is about other features."""
    weights = begun(DANN, domains, plain, bottleneck_features=64)
    untouched = begun(DANN, domains, None, bottleneck_features=64)
    assert contract.equal(of("backbone", weights), of("backbone", saved(plain)))
    assert contract.equal(of("head", weights), of("head", untouched))
    text = said()
    assert "new: bottleneck, since the checkpoint has none" in text
    assert "new: head, since it follows another bottleneck" in text


def test_what_is_left_over_is_named(domains: Path, tmp_path: Path, said: Callable[[], str]) -> None:
    """From an adapted network back to a classifier without a bottleneck."""
    module = contract.fit(DANN, domains, model={"batch_norm": "domain_specific"}, max_epochs=1)
    module.trainer.save_checkpoint(tmp_path / "dann.ckpt")
    expected = module.state_dict()
    started = TransferClassifier(3, backbone="resnet8", init_from=str(tmp_path / "dann.ckpt"))
    for key, value in started.backbone.state_dict().items():
        above, leaf = key.rsplit(".", 1)
        target = f"backbone.{above}.target.{leaf}"
        assert torch.equal(value, expected[target if target in expected else f"backbone.{key}"])
    norms = sum(isinstance(layer, nn.BatchNorm2d) for layer in started.backbone.modules())
    alignment = len(of("alignment", expected))
    Trainer(**QUIET).fit(started, folder_data(domains / "source"))
    text = said()
    assert f"of its {norms + 1} batch norms for each domain, the target's" in text
    assert "new: head, since weight is [3, 16] in the checkpoint and [3, 64] here" in text
    assert f"not used: bottleneck (7 entries), alignment ({alignment} entries)" in text


def test_target_entries_of_domain_specific_batch_norms() -> None:
    network = create_backbone("resnet8")
    plain_keys = list(network.state_dict())
    state = convert_domain_specific(network).state_dict()
    entries, count = of_the_target(state)
    assert list(entries) == plain_keys
    assert count == sum("running_mean" in key for key in plain_keys)
    assert of_the_target(entries) == (entries, 0)
    # a part that happens to be called so is no batch norm
    other = {"target.weight": torch.ones(1), "source.weight": torch.ones(1), "x.target.running_mean": torch.ones(1)}
    assert of_the_target(other) == (other, 0)


def test_the_classifier_of_the_checkpoint_is_the_source_classifier(plain: Path, finetuned: Path) -> None:
    module = TransferClassifier(5, backbone="resnet8", init_from=str(plain))
    source: Any = module.backbone.source_classifier
    assert torch.equal(source["weight"], saved(plain)["head.weight"])
    assert torch.equal(source["bias"], saved(plain)["head.bias"])
    assert not any("source_classifier" in key for key in module.state_dict())
    behind: Any = TransferClassifier(5, backbone="resnet8", init_from=str(finetuned)).backbone
    assert getattr(behind, "source_classifier", None) is None  # it saw the bottleneck's features


def test_what_the_checkpoint_was_trained_on_comes_with_it(finetuned: Path, domains: Path, tmp_path: Path) -> None:
    """Image size and normalisation, for data that leave them to the backbone."""
    described = {"image_size": 20, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    path = change(finetuned, tmp_path / "described.ckpt", preprocessing=described)
    module = DANN(3, **MODEL, init_from=str(path))
    assert module.preprocessing.plain() == described
    data = contract.build_data(domains, image_size=None)
    Trainer(**QUIET).fit(module, data)
    assert data.preprocessing.plain() == described
    module.trainer.save_checkpoint(tmp_path / "dann.ckpt")
    again = LightningModule.load_from_checkpoint(tmp_path / "dann.ckpt", weights_only=True)
    assert again.preprocessing.plain() == described
    assert TransferClassifier(3, **MODEL).preprocessing.image_size == 32  # the backbone's own


# ---------------------------------------------------------------------- the file may go
def test_a_checkpoint_rebuilds_without_the_file(finetuned: Path, domains: Path, tmp_path: Path) -> None:
    copy = shutil.copy(finetuned, tmp_path / "copy.ckpt")
    module = contract.fit(DANN, domains, model={"init_from": str(copy)}, max_epochs=1)
    module.trainer.save_checkpoint(tmp_path / "dann.ckpt")
    assert module.hparams["init_from"] == str(copy)  # the run's own account keeps it
    copy.unlink()
    again = LightningModule.load_from_checkpoint(tmp_path / "dann.ckpt", weights_only=True)
    assert type(again) is DANN
    assert again.hparams["init_from"] is None
    assert contract.equal(contract.weights(again), contract.weights(module))


@pytest.mark.parametrize("method", [DANN, MCD])
def test_a_resumed_run_equals_the_uninterrupted_one(
    method: type[Any], finetuned: Path, domains: Path, tmp_path: Path, said: Callable[[], str]
) -> None:
    path = tmp_path / "middle.ckpt"
    whole = contract.fit(method, domains, model={"init_from": str(finetuned)}, save=(7, path))
    assert "Started from" in said()
    for init_from in (None, str(finetuned)):  # with the file too, the checkpoint has the last word
        resumed = contract.fit(method, domains, model={"init_from": init_from}, resume=path)
        assert contract.equal(contract.weights(resumed), contract.weights(whole))
        assert "Started from" not in said()


def test_a_second_fit_goes_on(finetuned: Path, tmp_path: Path, images: Writer, said: Callable[[], str]) -> None:
    """The head is made anew once, not whenever the module is fitted."""
    images(tmp_path / "photos", ["x", "y", "z"], count=10)
    module = TransferClassifier(3, **MODEL, init_from=str(finetuned))
    Trainer(**QUIET).fit(module, folder_data(tmp_path / "photos"))
    assert "new: head" in said()
    learned, start = contract.weights(module), Start()
    Trainer(**QUIET, callbacks=[start]).fit(module, folder_data(tmp_path / "photos"))
    assert contract.equal(of("head", start.weights), of("head", learned))
    assert "Started from" not in said()


# ---------------------------------------------------------------------- from the shell
def test_from_the_shell(
    domains: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    common = (
        "--data.image_size 16 --data.crop none --data.num_workers 0 --data.batch_size 4 --trainer.accelerator cpu "
        "--trainer.max_epochs 1 --trainer.limit_train_batches 2 --trainer.enable_progress_bar false "
        "--model.backbone resnet8 --model.bottleneck_features 8 "
    )
    pair = f"--data DomainPairDataModule --data.source {domains}/source --data.target {domains}/target "
    single = f"--data ImageFolderDataModule --data.root {domains}/source "
    first = "lightning_logs/default/version_0/checkpoints/last.ckpt"

    def command(line: str) -> int:
        return main(shlex.split(line))

    assert command(f"fit --model TransferClassifier {single}{common}") == 0
    assert "Started from" not in capsys.readouterr().err
    dann = f"--model DANN --model.discriminator_features 8 {pair}{common}"
    assert command(f"fit {dann} --model.init_from {first}") == 0
    told = capsys.readouterr().err
    assert f"Started from '{first}', a checkpoint of TransferClassifier with the backbone 'resnet8'." in told
    configuration = yaml.safe_load(Path("lightning_logs/default/version_1/config.yaml").read_text())
    assert configuration["model"]["init_args"]["init_from"] == first
    Path(first).unlink()
    # to go on, and to predict, the file is not asked for
    assert command("fit --run lightning_logs/default/version_1 --trainer.max_epochs 2") == 0
    assert "Started from" not in capsys.readouterr().err
    assert command("predict --run lightning_logs/default/version_1") == 0

    capsys.readouterr()
    assert command(f"fit {dann} --model.init_from {first}") == 2
    assert f"`--model.init_from` to be a checkpoint file, but '{first}' does not exist" in capsys.readouterr().err
    second = "lightning_logs/default/version_1/checkpoints/last.ckpt"
    assert command(f"fit {dann} --model.init_from {second} --model.weights DEFAULT") == 2
    assert "`--model.init_from` or `--model.weights`" in capsys.readouterr().err
    assert len(list(Path("lightning_logs/default").iterdir())) == 2


# ---------------------------------------------------------------------- mistakes
def test_another_backbone(finetuned: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        TransferClassifier(3, backbone="resnet20", init_from=str(finetuned))
    text = str(caught.value)
    assert "Expected `--model.init_from` to hold the backbone that `--model.backbone`" in text
    assert "a checkpoint of TransferClassifier with the backbone 'resnet8', are entries" in text
    assert "missing (" in text
    assert "unexpected" not in text
    with pytest.raises(ConfigurationError, match=r"of another shape \(\S+ \[\d+.*\] instead of \["):
        TransferClassifier(3, backbone="resnet18", init_from=str(finetuned))


def test_options_of_the_backbone_are_named(domains: Path, tmp_path: Path) -> None:
    module = TransferClassifier(3, backbone="resnet8", backbone_options={"stochastic_depth": 0.1})
    path = train(module, domains / "source", tmp_path / "x.ckpt")
    with pytest.raises(ConfigurationError, match=r"'resnet8' and its options \{'stochastic_depth': 0.1\}"):
        TransferClassifier(3, backbone="resnet20", init_from=str(path))


def test_a_wrapped_backbone(finetuned: Path, tmp_path: Path) -> None:
    state = {f"{key.replace('backbone.', 'backbone.base_model.model.')}": v for key, v in saved(finetuned).items()}
    state["backbone.base_model.model.conv.lora_A.default.weight"] = torch.zeros(2, 2)
    path = change(finetuned, tmp_path / "lora.ckpt", state_dict=state)
    with pytest.raises(ConfigurationError, match=r"unexpected \(base_model.model.*adapters must be merged"):
        TransferClassifier(3, backbone="resnet8", init_from=str(path))


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    def refused(content: Any, message: str) -> None:
        path = tmp_path / "file.ckpt"
        torch.save(content, path) if not isinstance(content, bytes) else path.write_bytes(content)
        with pytest.raises(ConfigurationError, match=message):
            Initialization(str(path))

    refused(b"PK\x03\x04 and then nothing", "to be a checkpoint of this framework, but '.*' cannot be read as one")
    refused(b"", "cannot be read as one")
    refused({"a": 1}, "with a backbone in it, but '.*' holds none")
    refused(create_backbone("resnet8").state_dict(), "are given as `--model.weights`")
    refused({"state_dict": {"head.weight": torch.zeros(1)}}, "holds none")
    with pytest.raises(ConfigurationError, match=r"is a folder. A run's are in it as checkpoints/last.ckpt"):
        Initialization(str(tmp_path))


@pytest.mark.parametrize("weights", ["DEFAULT", "IMAGENET1K_V1", "some/file.pth"])
def test_two_sources_of_weights(finetuned: Path, weights: str) -> None:
    with pytest.raises(ConfigurationError, match=r"add `--model.weights none`"):
        TransferClassifier(3, backbone="resnet18", weights=weights, init_from=str(finetuned))


def test_weights_none_is_no_second_source(finetuned: Path) -> None:
    module = TransferClassifier(3, **MODEL, weights="none", init_from=str(finetuned))
    assert contract.equal(contract.weights(module), saved(finetuned))


def test_what_is_kept_of_the_file_outlives_it(finetuned: Path, tmp_path: Path) -> None:
    """The file is mapped into memory: to write over it must not change what is loaded later."""
    copy = shutil.copy(finetuned, tmp_path / "copy.ckpt")
    initialization = Initialization(str(copy))
    initialization.load("backbone", create_backbone("resnet8"))
    size = copy.stat().st_size
    with copy.open("r+b") as file:
        file.write(b"\xff" * size)
    bottleneck, head = Bottleneck(64, 16), nn.Linear(16, 3)
    initialization.load("bottleneck", bottleneck)
    initialization.load("head", head)
    assert torch.equal(head.weight, saved(finetuned)["head.weight"])
    assert torch.equal(bottleneck[0].weight, saved(finetuned)["bottleneck.0.weight"])
