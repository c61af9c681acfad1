"""What the contract tests and their two-process job share: every method, on tiny folders."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch

import framework.modules  # noqa: F401  (every method is a subclass once it is imported)
from framework.datamodules import DomainPairDataModule
from framework.modules import AlignmentLoss, DomainAdaptation
from framework.networks import NetworkOutputs
from framework.trainer import Trainer

# beside 32-true: what the weights then are
PRECISIONS = {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}
each_precision = pytest.mark.parametrize(
    "precision", ["bf16-mixed", *(pytest.param(name, marks=pytest.mark.slow) for name in ("bf16-true", "64-true"))]
)


def methods(base: type[DomainAdaptation] = DomainAdaptation) -> list[type[DomainAdaptation]]:
    """Every method: the subclasses of the base, and theirs."""
    found = []
    for cls in base.__subclasses__():
        if cls.__module__.startswith("framework."):
            found.append(cls)
        found += methods(cls)
    return sorted(found, key=lambda cls: cls.__name__)


def build_data(root: Path, **options: Any) -> DomainPairDataModule:
    defaults: dict[str, Any] = {
        "batch_size": 4,
        "steps_per_epoch": 5,
        "image_size": 16,
        "crop": "pad",
        "num_workers": 0,
    }
    folders = {"source": str(root / "source"), "target": str(root / "target"), "target_test": str(root / "target_test")}
    return DomainPairDataModule(**{**folders, **defaults, **options})


def build_model(method: type[DomainAdaptation], **options: Any) -> DomainAdaptation:
    defaults: dict[str, Any] = {
        "backbone": "resnet8",
        "bottleneck_features": 16,
        "bottleneck_dropout": 0.5,
        "learning_rate": 0.05,
        "backbone_learning_rate_factor": 1.0,
        "schedule": "inverse_decay",
    }
    known = inspect.signature(method.__init__).parameters
    defaults |= {name: 32 for name in ("discriminator_features", "classifier_features") if name in known}
    return method(3, **{**defaults, **options})


class SaveAt(L.Callback):
    """Writes a checkpoint after a number of batches, wherever in the epoch that is."""

    def __init__(self, batches: int, path: Path) -> None:
        self.batches, self.path, self.seen = batches, path, 0

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.seen += 1
        if self.seen == self.batches:
            trainer.save_checkpoint(self.path)


def fit(
    method: type[DomainAdaptation],
    root: Path,
    *,
    seed: int = 0,
    save: tuple[int, Path] | None = None,
    resume: Path | None = None,
    data: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    **trainer: Any,
) -> DomainAdaptation:
    """Train a method on the tiny folders and return it; with ``save`` a checkpoint is written on the way."""
    L.seed_everything(seed, verbose=False)
    module = build_model(method, **(model or {}))
    defaults: dict[str, Any] = {
        "max_epochs": 3,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "callbacks": [SaveAt(*save)] if save else [],
    }
    Trainer(**{**defaults, **trainer}).fit(module, build_data(root, **(data or {})), ckpt_path=resume)
    return module


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


SHIFTS = ("noise", "rotation")


def toy_accuracy(
    loss: AlignmentLoss | None, shift: str, trade_off: float = 1.0, seed: int = 0, steps: int = 300
) -> float:
    """Target accuracy of a linear map to 16 features and a linear head, trained on a toy with or without a loss.

    ``noise``: dimension 0 tells the two classes best in the source and is noise in the target; dimension 1 is the same
    in both. A classifier of the source alone leans on dimension 0 (at most 0.8 of the target is right, by dimension 1
    alone 0.977). ``rotation``: two round clusters, in the target turned by 70 degrees; the source's classifier is right
    for 0.92 on average.
    """
    generator = torch.Generator().manual_seed(seed)

    def sample(count: int, domain: str) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.randint(2, (count,), generator=generator)
        sign = (2.0 * labels - 1)[:, None]
        if shift == "noise":
            values = sign + torch.tensor([0.3, 0.5]) * torch.randn(count, 2, generator=generator)
            if domain == "target":
                values[:, 0] = 1.1 * torch.randn(count, generator=generator)
            return values, labels
        angle = torch.tensor(math.radians(70.0 if domain == "target" else 0.0))
        centre = 1.5 * torch.stack([angle.cos(), angle.sin()])
        return sign * centre + 0.4 * torch.randn(count, 2, generator=generator), labels

    torch.manual_seed(seed)
    features, head = torch.nn.Linear(2, 16), torch.nn.Linear(16, 2)
    parameters = [*features.parameters(), *head.parameters(), *(loss.parameters() if loss else [])]
    optimizer = torch.optim.SGD(parameters, lr=0.02, momentum=0.9)
    for step in range(steps):
        (values, labels), (target_values, _) = sample(64, "source"), sample(64, "target")
        hidden = features(torch.cat([values, target_values]))
        source, target = NetworkOutputs(hidden, head(hidden)).split(64)
        total = torch.nn.functional.cross_entropy(source.logits, labels)
        if loss:
            total = total + trade_off * loss(source._replace(labels=labels), target, torch.tensor(step / steps))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    values, labels = sample(1000, "target")
    return float((head(features(values)).argmax(1) == labels).float().mean())


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
