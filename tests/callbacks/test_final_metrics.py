"""The HPARAMS tab, as TensorBoard's own code reads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins import base_plugin
from tensorboard.plugins.hparams import api_pb2, list_session_groups
from tensorboard.plugins.hparams.backend_context import Context

from framework import DANN, DomainPairDataModule, ImageFolderDataModule, ResidualClassifier, SourceOnly, Trainer

TEST = ["final/test/accuracy", "final/test/calibration_error", "final/test/macro_f1", "final/test/mean_class_accuracy"]


def read(logdir: Path) -> tuple[set[str], list[str], dict[str, tuple[dict[str, Any], dict[str, float], int]]]:
    """Names of hyperparameters, names of metrics, and for each session the values of both and its status."""
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(logdir))
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, str(logdir))
    context = Context(base_plugin.TBContext(data_provider=provider, logdir=str(logdir)))
    request_context = RequestContext()
    content = context.hparams_metadata(request_context, "")
    given = context.hparams_from_data_provider(request_context, "", None)
    experiment = context.experiment_from_metadata(request_context, "", True, content, given)
    metrics = [info.name.tag for info in experiment.metric_infos]
    statuses = [api_pb2.STATUS_UNKNOWN, api_pb2.STATUS_SUCCESS, api_pb2.STATUS_RUNNING, api_pb2.STATUS_FAILURE]
    request = api_pb2.ListSessionGroupsRequest(start_index=0, slice_size=100, allowed_statuses=statuses)
    for info in experiment.metric_infos:
        request.col_params.append(api_pb2.ColParams(metric=info.name))
    answer = list_session_groups.Handler(request_context, context, "", request).run()
    sessions = {}
    for group in answer.session_groups:
        (session,) = group.sessions
        parameters = {name: getattr(value, str(value.WhichOneof("kind"))) for name, value in group.hparams.items()}
        values = {value.name.tag: value.value for value in session.metric_values}
        sessions[session.name] = (parameters, values, session.status)
    return {info.name for info in experiment.hparam_infos}, metrics, sessions


@pytest.fixture
def data(images: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ImageFolderDataModule:
    monkeypatch.chdir(tmp_path)
    images(tmp_path / "data", ["a", "b"], count=12)
    return ImageFolderDataModule(str(tmp_path / "data"), batch_size=4, image_size=16, crop="none", num_workers=0)


def trainer(**options: Any) -> Trainer:
    return Trainer(**{"max_epochs": 1, "enable_progress_bar": False, "accelerator": "cpu", **options})


def test_fit_and_test_are_one_session(data: ImageFolderDataModule, tmp_path: Path) -> None:
    model = ResidualClassifier(
        2, backbone="resnet8", backbone_options={"stochastic_depth": 0.1}, schedule="step",
        schedule_options={"milestones": [3, 5]},
    )  # fmt: skip
    run = trainer(experiment="study")
    run.fit(model, data)
    accuracy = run.callback_metrics["val/accuracy"].item()
    (tested,) = run.test(model, data, verbose=False)
    _, metrics, sessions = read(tmp_path / "lightning_logs")
    assert metrics == [*TEST, "final/val/accuracy", "final/val/loss"]
    (name,) = sessions
    assert name == "study/version_0/final"
    parameters, values, status = sessions[name]
    assert status == api_pb2.STATUS_SUCCESS
    assert values["final/val/accuracy"] == pytest.approx(accuracy)
    assert values == {**values, **{f"final/{key}": pytest.approx(value) for key, value in tested.items()}}
    assert set(values) == set(metrics)
    expected = {
        "Model": "ResidualClassifier",
        "backbone": "resnet8",
        "backbone_options/stochastic_depth": 0.1,
        "schedule_options/milestones": "3, 5",
        "learning_rate": 0.1,
        "data/batch_size": 4,
        "data/root": str(tmp_path / "data"),
        "data/horizontal_flip": "true",
        "compile": "false",
        "max_epochs": 1,
        "seed": 0,
    }
    assert {key: parameters.get(key) for key in expected} == expected
    assert not any("{" in str(value) or value == "None" for value in parameters.values())
    assert not any(key.startswith("_") for key in parameters)


def test_a_later_test_of_the_run(data: ImageFolderDataModule, tmp_path: Path) -> None:
    run = trainer()
    run.fit(ResidualClassifier(2, backbone="resnet8"), data)
    folder = Path(str(run.log_dir))
    _, metrics, sessions = read(tmp_path / "lightning_logs")
    assert metrics == ["final/val/accuracy", "final/val/loss"]
    later = trainer(run=str(folder))
    model = ResidualClassifier.load_from_checkpoint(folder / "checkpoints" / "last.ckpt")
    (tested,) = later.test(model, data, verbose=False)
    _, metrics, sessions = read(tmp_path / "lightning_logs")
    assert metrics == [*TEST, "final/val/accuracy", "final/val/loss"]
    (values,) = (values for _, values, _ in sessions.values())
    assert values["final/test/accuracy"] == pytest.approx(tested["test/accuracy"])
    assert "final/val/accuracy" in values


def test_methods_side_by_side(domains: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tab has the hyperparameters and metrics of all, also those that the first run does not have."""
    monkeypatch.chdir(tmp_path)
    folders = {name: str(domains / name) for name in ("source", "target", "target_test")}
    for method in (SourceOnly, DANN):
        data = DomainPairDataModule(**folders, batch_size=4, steps_per_epoch=2, image_size=16, num_workers=0)
        model = method(3, backbone="resnet8", bottleneck_features=8)
        run = trainer(experiment=method.__name__)
        run.fit(model, data)
        run.test(model, data, verbose=False)
    data = ImageFolderDataModule(str(domains / "source"), batch_size=4, steps_per_epoch=2, image_size=16, num_workers=0)
    trainer(experiment="residual").fit(ResidualClassifier(3, backbone="resnet8", mixup=0.2), data)
    names, metrics, sessions = read(tmp_path / "lightning_logs")
    assert names >= {"Model", "reversal_gamma", "mixup", "trade_off", "data/source", "data/target", "data/root"}
    assert set(metrics) == {
        *TEST,
        "final/val/accuracy",
        "final/val/loss",
        "final/val/source_accuracy",
        "final/val/target_information_maximization",
        "final/val/mmd",
    }
    models = {name: parameters["Model"] for name, (parameters, _, _) in sessions.items()}
    assert models == {
        "SourceOnly/version_0/final": "SourceOnly",
        "DANN/version_0/final": "DANN",
        "residual/version_0/final": "ResidualClassifier",
    }


def test_a_run_that_breaks_is_listed(data: ImageFolderDataModule, tmp_path: Path) -> None:
    class Broken(ResidualClassifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise KeyError("broken")

    with pytest.raises(KeyError):
        trainer().fit(Broken(2, backbone="resnet8"), data)
    _, _, sessions = read(tmp_path / "lightning_logs")
    ((parameters, values, status),) = sessions.values()
    assert parameters["backbone"] == "resnet8"
    assert values == {}
    assert status != api_pb2.STATUS_SUCCESS


def test_nothing_without_tensorboard(data: ImageFolderDataModule, tmp_path: Path) -> None:
    trainer(logger=False).fit(ResidualClassifier(2, backbone="resnet8"), data)
    assert not list(tmp_path.rglob("final"))
