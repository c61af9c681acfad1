"""What the tests of the online probe share, and what one of them runs in two gloo processes.

Lightning starts the second process by running this file again. Usage: ``online_probe_ddp_job.py ROOT FOLDER OUTPUT``.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from framework import ImageFolderDataModule, RotationPrediction, Trainer
from framework.callbacks import OnlineProbe
from framework.datamodules import UnlabelledFolderDataModule

NAMES = ("linear_probe_accuracy", "knn_accuracy")


def pretraining(**options: Any) -> RotationPrediction:
    torch.manual_seed(0)
    return RotationPrediction(**{"backbone": "resnet8", "learning_rate": 0.01, **options})


def unlabelled(folder: Path, **options: Any) -> UnlabelledFolderDataModule:
    defaults: dict[str, Any] = {"batch_size": 4, "steps_per_epoch": 3, "image_size": 16, "crop": "none"}
    return UnlabelledFolderDataModule(str(folder), **{**defaults, "num_workers": 0, "check_images": False, **options})


def expected_values(
    module: L.LightningModule,
    root: Path,
    neighbours: int,
    encode: Callable[[Tensor], Tensor] | None = None,
    **options: Any,
) -> dict[str, float]:
    """Both accuracies by scikit-learn, of the features of the module as it is."""
    defaults: dict[str, Any] = {"batch_size": 1, "image_size": 16, "crop": "none", "check_images": False}
    data = ImageFolderDataModule(str(root), **{**defaults, "num_workers": 0, **options})
    _, mean, std = module.preprocessing  # type: ignore[misc]
    for name, value in (("mean", mean), ("std", std)):
        data._given[name] = options.get(name) or value
    data.setup("fit")
    module.eval()
    parts = []
    with torch.no_grad():
        for loader in (data.unaugmented_train_dataloader(), data.val_dataloader()):
            batches = [((encode or module)(data.normalize(batch.images)), batch.labels) for batch in loader]
            features, labels = (torch.cat(part).numpy() for part in zip(*batches, strict=True))
            parts.append((features.astype("float64"), labels))
    (bank, bank_labels), (images, labels) = parts
    scaler = StandardScaler().fit(bank)
    linear = LogisticRegression(C=1 / (0.01 * len(bank)), tol=1e-8, max_iter=5000)
    linear.fit(scaler.transform(bank), bank_labels)
    neighbours = min(neighbours, len(bank))
    nearest = KNeighborsClassifier(neighbours, metric="cosine", algorithm="brute", weights=votes)
    nearest.fit(bank, bank_labels)
    return dict(
        zip(NAMES, (linear.score(scaler.transform(images), labels), nearest.score(images, labels)), strict=True)
    )


def votes(distances: Any) -> Any:
    """Of the nearest neighbours, over a factor that keeps them finite."""
    return torch.tensor((distances.min() - distances) / 0.07).exp().numpy()


def main(root: Path, folder: Path, output: Path) -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    options: dict[str, Any] = {"max_epochs": 2, "accelerator": "cpu", "strategy": "ddp", "devices": 2}
    options |= {"enable_progress_bar": False, "logger": False, "enable_checkpointing": False}
    weights, values = [], {}
    for probes in ([], [OnlineProbe(str(root), neighbours=3)]):
        run, module = Trainer(callbacks=probes, **options), pretraining()
        run.fit(module, unlabelled(folder, image_size=24))
        weights.append(module.state_dict())
        values = {name: float(run.callback_metrics[f"val/{name}"]) for name in NAMES if probes}
    gathered: list[Any] = [None, None]
    torch.distributed.all_gather_object(gathered, values)
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        result = {
            "equal weights": all(torch.equal(value, weights[1][name]) for name, value in weights[0].items()),
            "values": gathered[0],
            "values of the other": gathered[1],
            "expected": expected_values(module, root, 3, image_size=24),
        }
        output.write_text(json.dumps(result))


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
