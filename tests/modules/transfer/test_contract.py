"""The contract that every transfer method keeps; a new method is tested by existing."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import transfer_contract as contract
from contract import PRECISIONS, each_precision
from torch import Tensor

from framework.modules import TransferClassifier
from framework.trainer import Trainer

CASES = contract.cases()
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
Case = contract.Case
STOPS = (5, 6, 7)  # an epoch's end, and before and after the first batch with a newly unfrozen stage, in mid-epoch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, images: Callable[..., Path]) -> Path:
    """The images and files that methods are built with."""
    return contract.prepare(tmp_path_factory.mktemp("transfer"), images)


Run = tuple[TransferClassifier, dict[str, Tensor], Path]


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Run]:
    """An uninterrupted run of a case, made once: the module, its weights at the end, and the folder of checkpoints."""
    runs: dict[str, Run] = {}

    def of(case: Case) -> Run:
        if case.name not in runs:
            checkpoints = tmp_path_factory.mktemp(case.name)
            module = contract.fit(case, folder, save={batch: checkpoints / f"{batch}.ckpt" for batch in (*STOPS, 15)})
            runs[case.name] = (module, contract.weights(module), checkpoints)
        return runs[case.name]

    return of


def test_the_methods_are_found() -> None:
    names = {method.__name__ for method in contract.methods()}
    assert {"TransferClassifier", "L2SP", "LWF", "Distillation"} <= names
    assert "RegularizedTransfer" not in names
    policies = set(inspect.get_annotations(TransferClassifier.__init__, eval_str=True)["policy"].__args__)
    assert policies == {options.get("policy", "full") for options in contract.POLICIES.values()}


@each_case
def test_every_parameter_learns(case: Case, run: Callable[[Case], Run], folder: Path) -> None:
    L.seed_everything(0, verbose=False)
    start = contract.weights(contract.build_model(case, folder))
    module, end, _ = run(case)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad or name.startswith("backbone."):  # copies may follow without gradients
            assert parameter.requires_grad != torch.equal(end[name], start[name]), name
    groups = module.parameter_groups()
    names = [group["name"] for group in groups]
    assert len(set(names)) == len(names)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(set(grouped)) == len(grouped)
    assert set(grouped) == {id(parameter) for parameter in module.parameters() if parameter.requires_grad}


@each_case
def test_checkpoint_reloads_to_the_same_outputs(case: Case, run: Callable[[Case], Run]) -> None:
    module, _, checkpoints = run(case)
    images = torch.randn(5, 3, 16, 16)
    expected = module.eval()(images)
    for loader in (case.method, L.LightningModule):
        loaded = loader.load_from_checkpoint(checkpoints / "15.ckpt", weights_only=True, map_location="cpu").eval()
        assert type(loaded) is case.method
        assert torch.equal(loaded(images), expected)
        assert loaded.hparams["weights"] is None


@each_case
@pytest.mark.parametrize("batches", STOPS)
def test_resumed_equals_uninterrupted(case: Case, batches: int, run: Callable[[Case], Run], folder: Path) -> None:
    _, end, checkpoints = run(case)
    resumed = contract.fit(case, folder, resume=checkpoints / f"{batches}.ckpt")
    assert not contract.differing(end, contract.weights(resumed))


@pytest.mark.slow
@each_case
def test_resumed_with_workers_equals_uninterrupted(case: Case, run: Callable[[Case], Run], folder: Path) -> None:
    _, end, checkpoints = run(case)
    resumed = contract.fit(case, folder, resume=checkpoints / "7.ckpt", data={"num_workers": 2})
    assert not contract.differing(end, contract.weights(resumed))


@pytest.mark.slow
@each_case
def test_resumed_while_accumulating_equals_uninterrupted(case: Case, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "stop.ckpt"
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "data": {"steps_per_epoch": 6}, "max_epochs": 2}
    whole = contract.fit(case, folder, save={8: path}, **options)  # 8 = 6 + 2: between two optimizer steps
    resumed = contract.fit(case, folder, resume=path, **options)
    assert not contract.differing(contract.weights(whole), contract.weights(resumed))


@each_case
def test_again_and_with_loggers_the_same(case: Case, run: Callable[[Case], Run], folder: Path, tmp_path: Path) -> None:
    """The same seed gives the same weights, whatever is logged."""
    logger = L.loggers.CSVLogger(tmp_path)
    logged = contract.fit(case, folder, logger=logger, log_every_n_steps=1, default_root_dir=tmp_path)
    assert not contract.differing(run(case)[1], contract.weights(logged))


@each_case
@each_precision
def test_resumed_in_other_precisions_equals_uninterrupted(
    case: Case, precision: str, folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "stop.ckpt"
    whole = contract.fit(case, folder, save={7: path}, max_epochs=2, precision=precision)
    assert all(torch.isfinite(p).all() and p.dtype == PRECISIONS[precision] for p in whole.parameters())
    resumed = contract.fit(case, folder, resume=path, max_epochs=2, precision=precision)
    assert not contract.differing(contract.weights(whole), contract.weights(resumed))


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    # the other policies have the backbone of the first
    [case for case in CASES if case.method is not TransferClassifier or case.name in ("full", "lora")],
    ids=lambda case: case.name,
)
def test_backbone_compiles_to_one_graph(case: Case, folder: Path) -> None:
    module = contract.build_model(case, folder)
    explanation = torch._dynamo.explain(module.backbone)(torch.randn(4, 3, 16, 16))
    assert (explanation.graph_count, explanation.graph_break_count) == (1, 0)
    torch._dynamo.reset()


@each_case
def test_validate_test_predict(case: Case, folder: Path) -> None:
    trainer = Trainer(**contract.QUIET)
    module, data = contract.build_model(case, folder), contract.build_data(folder)
    trainer.validate(module, data, verbose=False)
    assert {"val/accuracy", "val/loss"} <= trainer.callback_metrics.keys()
    (scores,) = trainer.test(module, data, verbose=False)
    assert scores.keys() == {"test/accuracy", "test/mean_class_accuracy", "test/macro_f1", "test/calibration_error"}
    predictions = trainer.predict(module, data)
    assert predictions is not None
    assert sum(len(batch["paths"]) for batch in predictions) > 0  # type: ignore[index, call-overload]
