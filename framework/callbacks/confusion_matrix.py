"""The confusion matrix of a test."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchmetrics import Metric
from torchvision.transforms.v2.functional import pil_to_tensor


class ConfusionMatrix(L.Callback):
    """Writes ``confusion_matrix.csv`` beside the logs after a test, and a picture of it to TensorBoard.

    Rows are the true classes, columns the predicted ones, values counts; in the picture they are percent of a row.
    """

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Gather the counts of all processes and write them."""
        metric = getattr(pl_module, "test_confusion", None)
        if not isinstance(metric, Metric) or not trainer.loggers:
            return
        counts = metric.compute()
        folder = trainer.log_dir
        if not trainer.is_global_zero or folder is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        names = getattr(trainer.datamodule, "class_names", None) or [str(i) for i in range(len(counts))]  # type: ignore[attr-defined]
        Path(folder).mkdir(parents=True, exist_ok=True)
        with (Path(folder) / "confusion_matrix.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["true \\ predicted", *names])
            writer.writerows([name, *row] for name, row in zip(names, counts.tolist(), strict=True))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                picture = confusion_picture(counts.cpu(), names)
                logger.experiment.add_image("test/confusion_matrix", picture, trainer.global_step)


def confusion_picture(counts: Tensor, names: Sequence[str]) -> Tensor:
    """A picture of a confusion matrix: the darker, the larger the share of its row.

    Args:
        counts: shape ``[K, K]``, rows true, columns predicted.
        names: the classes; written beside the rows and above the columns where there is room (up to 65 classes).

    Returns:
        uint8, shape ``[3, H, W]``.
    """
    classes = len(names)
    shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    cell = 40 if classes <= 12 else 28 if classes <= 31 else 16 if classes <= 65 else max(2, 800 // classes)
    low, high = torch.tensor([255.0, 255.0, 255.0]), torch.tensor([8.0, 48.0, 107.0])
    colours = (low + shares[..., None] * (high - low)).round().to(torch.uint8)
    matrix = Image.fromarray(colours.numpy()).resize((classes * cell, classes * cell), Image.Resampling.NEAREST)
    if classes > 65:
        return pil_to_tensor(matrix)  # type: ignore[no-any-return]

    font, small = ImageFont.load_default(min(14, cell - 3)), ImageFont.load_default(max(10, cell // 3 + 1))
    short = [name if len(name) <= 20 else f"{name[:19]}…" for name in names]
    margin = 12 + int(max(font.getlength(name) for name in [*short, "predicted"]))
    size = margin + classes * cell
    picture = Image.new("RGB", (size + 8, size + 8), "white")
    above = Image.new("RGB", (size, margin), "white")  # the names of the columns, turned by a quarter below
    draw = ImageDraw.Draw(picture)
    for i, name in enumerate(short):
        middle = margin + i * cell + cell // 2
        draw.text((margin - 6, middle), name, "black", font, anchor="rm")
        label = Image.new("RGB", (margin - 6, cell), "white")
        ImageDraw.Draw(label).text((6, cell // 2), name, "black", font, anchor="lm")
        above.paste(label.rotate(90, expand=True), (middle - cell // 2, 0))
    picture.paste(above, (0, 0))
    picture.paste(matrix, (margin, margin))
    draw.text((margin - 6, margin - 6), "predicted", "gray", small, anchor="rb")
    draw.text((6, margin - 6 - small.getbbox("x")[3]), "true", "gray", small, anchor="lb")
    draw.rectangle((margin - 1, margin - 1, size, size), outline="black")
    if cell >= 28:
        for (row, column), share in zip(
            torch.cartesian_prod(*2 * [torch.arange(classes)]), shares.flatten(), strict=True
        ):
            if counts[row, column]:
                position = (margin + int(column) * cell + cell // 2, margin + int(row) * cell + cell // 2)
                draw.text(position, f"{100 * share:.0f}", "white" if share > 0.5 else "black", small, anchor="mm")
    return pil_to_tensor(picture)  # type: ignore[no-any-return]
