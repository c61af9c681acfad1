"""What a self-supervised task makes of images, in TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from framework.errors import ConfigurationError
from framework.inspection import epoch_is_due, undisturbed
from framework.seeding import global_seed

LEAST_SIZE = 96  # pixels of a picture, so that there is room for a caption
GAP = 4


class PretextImages(L.Callback):
    """Shows what a pre-training module's task makes of some validation images and what the network answers.

    In the validation of every n-th epoch, and of the last, as ``val/pretext``: a row for each of the first images, the
    same ones with the same random numbers every time. Training is bit for bit the same without it. It does nothing for
    a module that has no ``preview``.

    Args:
        most: images, of the first validation batch.
        every_n_epochs: epochs between two pictures.
    """

    def __init__(self, most: int = 8, every_n_epochs: int = 1) -> None:
        for option, value in (("most", most), ("every_n_epochs", every_n_epochs)):
            if value < 1:
                raise ConfigurationError(f"Expected `--trainer.callbacks.{option}` to be at least 1, but got {value}.")
        self.most, self.every_n_epochs = most, every_n_epochs

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the picture after the first batch, where an average of the weights is in place."""
        loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        preview = getattr(pl_module, "preview", None)
        if batch_idx or dataloader_idx or preview is None or not loggers or not trainer.is_global_zero:
            return
        if trainer.state.fn != "fit" or trainer.sanity_checking or not epoch_is_due(trainer, self.every_n_epochs):
            return
        with undisturbed(pl_module), trainer.precision_plugin.forward_context():
            torch.manual_seed(global_seed())
            pictures, captions = preview(batch.images[: self.most])
        picture = pretext_picture(self._visible(trainer, pictures), captions)
        for logger in loggers:
            logger.experiment.add_image("val/pretext", picture, trainer.global_step)

    def _visible(self, trainer: L.Trainer, pictures: Tensor) -> Tensor:
        pictures = pictures.detach().cpu().float()
        denormalize = getattr(trainer.datamodule, "denormalize", None)  # type: ignore[attr-defined]
        if denormalize is None:  # loaders of the user's own: stretch all of them alike to [0, 1]
            low, high = pictures.aminmax()
            return (pictures - low) / (high - low).clamp(min=1e-12)
        visible: Tensor = denormalize(pictures)
        return visible


def pretext_picture(pictures: Tensor, captions: Sequence[Sequence[str]]) -> Tensor:
    """One picture of rows of pictures, with the captions below them.

    Args:
        pictures: ``N`` rows of ``P``, shape ``[N, P, 3, H, W]``, in [0, 1]; small ones are enlarged by a whole number.
        captions: ``N`` lists of ``P`` texts; without any there is no room for them.

    Returns:
        uint8, shape ``[3, H', W']``.
    """
    rows, columns, _, height, width = pictures.shape
    scale = max(1, -(-LEAST_SIZE // height))
    height, width = scale * height, scale * width
    font = ImageFont.load_default(13)
    texts = [text for row in captions for text in row]
    cell_width = max([width, *(int(font.getlength(text)) + 1 for text in texts)]) + GAP
    cell_height = height + GAP + (font.getbbox("Ag")[3] + 2 * GAP if any(texts) else 0)
    sheet = Image.new("RGB", (GAP + columns * cell_width, GAP + int(rows * cell_height)), "white")
    draw = ImageDraw.Draw(sheet)
    for row in range(rows):
        for column in range(columns):
            x, y = GAP + column * cell_width, GAP + int(row * cell_height)
            middle = x + (cell_width - GAP) // 2
            tile = to_pil_image(pictures[row, column]).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(tile, (middle - width // 2, y))
            draw.text((middle, y + height + GAP), captions[row][column], "black", font, anchor="mt")
    return pil_to_tensor(sheet)  # type: ignore[no-any-return]
