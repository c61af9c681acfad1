"""Sums of alignment losses: the terms, their weights, options from the shell, and what a mistake says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import contract
import pytest
import torch
import yaml
from torch import Tensor

from framework.__main__ import main
from framework.errors import ConfigurationError
from framework.modules import AlignmentLoss, AlignmentSum, DomainAdaptation
from framework.modules.adaptation.alignment_sum import WeightedAlignmentSum, alignment_terms
from framework.networks import NetworkOutputs
from framework.trainer import Trainer

OPTIONS: dict[str, Any] = {"backbone": "resnet8", "bottleneck_features": 16}


class MeanDistance(AlignmentLoss):
    """Not of the framework: it takes no part in the list of terms of a fresh process."""

    def forward(self, source: NetworkOutputs, target: NetworkOutputs, progress: Tensor) -> Tensor:
        value = (source.features.mean(0) - target.features.mean(0)).square().sum()
        self.diagnostics = {"distance": value.detach()}
        return value

    def complaints(self, means: dict[str, float], progress: float) -> Iterator[tuple[str, str]]:
        if means["train/distance"] > 1:
            yield "far", "far apart"


class Entropy(AlignmentLoss):
    def forward(self, source: NetworkOutputs, target: NetworkOutputs, progress: Tensor) -> Tensor:
        p = target.logits.softmax(1)
        return progress * -(p * p.log()).sum(1).mean()


def outputs(shift: float = 0.0) -> NetworkOutputs:
    return NetworkOutputs((torch.randn(6, 4) + shift).requires_grad_(), torch.randn(6, 3).requires_grad_())


def test_value_and_gradient_are_the_weighted_sums() -> None:
    source, target, progress = outputs(), outputs(1.0), torch.tensor(0.5)
    total = WeightedAlignmentSum({"a": MeanDistance(), "b": Entropy()}, {"a": 0.3, "b": 2.0})
    value = total(source, target, progress)
    first, second = MeanDistance()(source, target, progress), Entropy()(source, target, progress)
    torch.testing.assert_close(value, 0.3 * first + 2.0 * second)
    inputs = [source.features, target.features]
    for found, expected in zip(torch.autograd.grad(value, inputs), torch.autograd.grad(first, inputs), strict=True):
        torch.testing.assert_close(found, 0.3 * expected)
    assert set(total.diagnostics) == {"a", "a/distance", "b"}
    torch.testing.assert_close(total.diagnostics["b"], second.detach())


def test_complaints_name_the_term() -> None:
    total = WeightedAlignmentSum({"a": MeanDistance(), "b": Entropy()}, {"a": 1.0, "b": 1.0})
    assert list(total.complaints({"train/a/distance": 2.0, "train/a": 0.0}, 0.5)) == [("a/far", "term 'a': far apart")]
    assert not list(total.complaints({"train/a/distance": 0.5}, 0.5))


def test_every_named_loss_is_a_term_and_every_term_builds() -> None:
    terms = {name: cls for name, cls in alignment_terms().items() if cls.__module__.startswith("framework.")}
    assert {"dann", "dan", "cdan", "mcc"} <= terms.keys()
    module = AlignmentSum(3, terms=dict.fromkeys(terms, 0.5), **OPTIONS)
    assert {name: type(loss) for name, loss in module.alignment.losses.items()} == terms  # type: ignore[union-attr, operator]
    images = torch.randn(2, 8, 3, 64, 64)
    source = NetworkOutputs(torch.randn(8, 16), torch.randn(8, 3), torch.arange(8) % 3, images=images[0])
    target = NetworkOutputs(torch.randn(8, 16), torch.randn(8, 3), images=images[1])
    assert torch.isfinite(module.alignment(source, target, torch.tensor(0.5)))


def test_a_sum_of_one_term_is_that_method(domains: Path) -> None:
    summed = contract.fit(AlignmentSum, domains, model={"terms": {"dan": 1.0}}, max_epochs=1)
    alone = contract.fit(contract_method("DAN"), domains, max_epochs=1)
    for part in ("backbone", "bottleneck", "head"):
        assert contract.equal(contract.weights(getattr(summed, part)), contract.weights(getattr(alone, part)))


def contract_method(name: str) -> type[DomainAdaptation]:
    return next(method for method in contract.methods() if method.__name__ == name)


def test_from_the_shell(domains: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [
        *("fit", "--model", "AlignmentSum", "--model.terms.dan", "1", "--model.terms.mcc", "0.5"),
        *("--model.term_options", "{mcc: {temperature: 2.0}}"),
        *("--model.backbone", "resnet8", "--model.bottleneck_features", "16"),
        *("--data", "DomainPairDataModule", "--data.source", f"{domains}/source", "--data.target", f"{domains}/target"),
        *("--data.image_size", "16", "--data.batch_size", "4", "--data.num_workers", "0", "--trainer.max_epochs", "1"),
        *("--trainer.limit_train_batches", "2", "--trainer.log_every_n_steps", "1", "--trainer.accelerator", "cpu"),
    ]
    assert main(arguments) == 0
    run = tmp_path / "lightning_logs" / "default" / "version_0"
    kept = yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]
    assert kept["terms"] == {"dan": 1.0, "mcc": 0.5}
    header = (run / "metrics.csv").read_text()
    assert "train/dan/mmd" in header
    assert "train/mcc" in header
    loaded = AlignmentSum.load_from_checkpoint(run / "checkpoints" / "last.ckpt")
    assert loaded.alignment.weights == {"dan": 1.0, "mcc": 0.5}
    assert loaded.alignment.losses["mcc"].temperature == 2.0  # type: ignore[index, union-attr]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"terms": {}}, r"`--model\.terms` to name losses"),
        ({"terms": {"cdam": 1.0}}, r"`--model\.terms` .*'cdam'\. Did you mean 'cdan'"),
        ({"terms": {"mcc": -1.0}}, r"`--model\.terms\.mcc` to be 0 or more"),
        ({"terms": {"mcc": 1.0}, "term_options": {"cdan": {}}}, r"`--model\.term_options` .*'cdan'"),
        ({"terms": {"mcc": 1.0}, "term_options": {"mcc": {"heat": 1}}}, r"`--model\.term_options\.mcc` .*'heat'"),
        ({"terms": {"mcc": 1.0}, "term_options": {"mcc": {"num_classes": 1}}}, r"`--model\.term_options\.mcc`"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        AlignmentSum(3, **OPTIONS, **options)


def test_options_of_a_term_are_named_as_such() -> None:
    for name, options in (("mcc", {"temperature": -1.0}), ("rotation", {"rotations": "some"})):
        (option,) = options
        with pytest.raises(ConfigurationError, match=rf"`--model.term_options.{name}.{option}`"):
            AlignmentSum(3, backbone="resnet8", terms={name: 1.0}, term_options={name: options})


def test_images_that_do_not_suit_a_term_are_refused_before_training(domains: Path) -> None:
    terms = {"terms": {"mcc": 1.0, "masking": 1.0}, "term_options": {"masking": {"block_size": 32}}}
    model = contract.build_model(AlignmentSum, **terms)
    state = contract.weights(model)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_steps=1)
    with pytest.raises(ConfigurationError, match=r"`--model\.term_options\.masking\.block_size`"):
        trainer.fit(model, contract.build_data(domains))
    assert trainer.global_step == 0
    assert contract.equal(contract.weights(model), state)
