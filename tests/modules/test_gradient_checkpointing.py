"""``--model.gradient_checkpointing``: training in every kind of loop is what it is without."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import contract
import pretraining_contract
import pytest
import torch
from lightning.pytorch import LightningModule

from framework import ADDA, DANN, MCD, SDAT, AlignmentSum, ResidualClassifier, SimCLR, SourceOnly
from framework.errors import ConfigurationError
from framework.networks import Bottleneck

JOB = """
import sys
from pathlib import Path

import torch

sys.path.insert(0, sys.argv[3])
from contract import fit, weights
from framework import DANN

if __name__ == "__main__":
    for value in (False, True):
        module = fit(
            DANN, Path(sys.argv[1]), model={"gradient_checkpointing": value}, strategy="ddp", devices=2,
            max_epochs=1,
        )
        if module.global_rank == 0:
            torch.save(weights(module), f"{sys.argv[2]}/{value}.pt")
"""


@pytest.mark.parametrize(
    ("method", "model", "trainer"),
    [
        (DANN, {}, {}),
        (DANN, {"batch_norm": "domain_specific"}, {}),
        (DANN, {"batch_norm": "separate"}, {"accumulate_grad_batches": 2}),
        (DANN, {"backbone_options": {"stochastic_depth": 0.5}}, {"precision": "bf16-mixed"}),
        (MCD, {"batch_norm": "domain_specific"}, {}),
        (ADDA, {}, {}),
        (SDAT, {"radius": 0.5}, {"accumulate_grad_batches": 2}),
        (AlignmentSum, {"batch_norm": "domain_specific", "terms": {"rotation": 1.0, "mcc": 1.0}}, {}),
        (SourceOnly, {"backbone_learning_rate_factor": 0.0}, {}),
    ],
    ids=["dann", "specific", "separate", "bf16", "mcd", "adda", "sdat", "self-supervision", "frozen"],
)
def test_training_is_the_same(method: Any, model: dict[str, Any], trainer: dict[str, Any], domains: Path) -> None:
    options: dict[str, Any] = {"max_epochs": 1, **trainer}
    found = [
        contract.weights(contract.fit(method, domains, model={**model, "gradient_checkpointing": value}, **options))
        for value in (False, True)
    ]
    assert contract.equal(*found)


def test_pretraining_is_the_same(tmp_path: Path, images: Any) -> None:
    root = pretraining_contract.prepare(tmp_path, images)
    found = [
        contract.weights(pretraining_contract.fit(SimCLR, root, model={"gradient_checkpointing": value}, max_epochs=1))
        for value in (False, True)
    ]
    assert contract.equal(*found)


@pytest.mark.slow
def test_two_processes_train_the_same(domains: Path, tmp_path: Path) -> None:
    job = tmp_path / "job.py"
    job.write_text(JOB)
    tests = str(Path(__file__).parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(Path.cwd()), tests])}
    command = [sys.executable, str(job), str(domains), str(tmp_path), tests]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert contract.equal(*(torch.load(tmp_path / f"{value}.pt", weights_only=True) for value in (False, True)))


def test_checkpoints_go_on_with_and_without(domains: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    model = {"gradient_checkpointing": True}
    whole = contract.fit(SourceOnly, domains, save=(7, path), model=model)
    for value in (True, False):
        resumed = contract.fit(SourceOnly, domains, resume=path, model={"gradient_checkpointing": value})
        assert contract.equal(contract.weights(resumed), contract.weights(whole))
    loaded = LightningModule.load_from_checkpoint(path, weights_only=True)
    assert isinstance(loaded, SourceOnly)
    assert isinstance(loaded.bottleneck, Bottleneck)
    assert loaded.hparams["gradient_checkpointing"] is True


def test_of_a_backbone_without_blocks() -> None:
    with pytest.raises(ConfigurationError, match=r"`--model.gradient_checkpointing` to be false for a .* as VGG"):
        ResidualClassifier(2, backbone="vgg11", gradient_checkpointing=True)
