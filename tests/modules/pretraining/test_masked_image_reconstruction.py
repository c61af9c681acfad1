"""Masked image reconstruction: what the network sees, where its pixels land, what it learns, alone and as a term."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import contract
import pretraining_contract
import pytest
import torch
from torch import Tensor, nn
from transfer_contract import differing, weights

from framework.errors import ConfigurationError
from framework.functional import mask_of_pixels, masked_reconstruction_loss, random_block_mask
from framework.modules import AlignmentSum, MaskedImageReconstruction
from framework.modules.adaptation.self_supervision import MaskingLoss
from framework.modules.pretraining.masked_image_reconstruction import MaskedImageTask
from framework.networks import NetworkOutputs, create_backbone, resnet8

VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
BACKBONES: list[tuple[str, dict[str, Any]]] = [("resnet8", {}), ("timm/vit_tiny_patch16_224", VIT)]
PROGRESS = torch.tensor(0.5)


def built(
    name: str = "resnet8", options: dict[str, Any] | None = None, **task: Any
) -> tuple[nn.Module, MaskedImageTask]:
    backbone = create_backbone(name, **(options or {}))
    return backbone, MaskedImageTask(backbone, **{"block_size": 4, **task})


def test_the_loss_is_that_of_the_seed_s_mask() -> None:
    backbone, task = built(norm="l2", mask_ratio=0.5)
    backbone.eval()
    nn.init.normal_(task.masked_block)
    images = torch.randn(3, 3, 16, 16)
    torch.manual_seed(5)
    loss = task(backbone, images)
    torch.manual_seed(5)
    mask = mask_of_pixels(random_block_mask(3, (16, 16), 4, 0.5), (16, 16), 4)
    seen = images.clone()
    for image in range(3):
        for row in range(16):
            for column in range(16):
                if mask[image, 0, row, column]:
                    seen[image, :, row, column] = task.masked_block[:, row % 4, column % 4]
    with task.maps.recording():
        backbone(seen)
        pixels = torch.nn.functional.pixel_shuffle(task.decoder(task.maps.last()), 4)
    torch.testing.assert_close(loss, masked_reconstruction_loss(pixels, images, mask, "l2"))
    assert torch.equal(task.diagnostics["masked_error"], loss.detach())
    baseline, count = 0.0, 0
    for image in range(3):
        for channel in range(3):
            visible = images[image, channel][~mask[image, 0]]
            hidden = images[image, channel][mask[image, 0]]
            baseline += float(((hidden - visible.mean()) ** 2).sum())
            count += len(hidden)
    assert float(task.diagnostics["relative_error"]) == pytest.approx(
        float(loss.detach()) / (baseline / count), rel=1e-5
    )


@pytest.mark.parametrize(("name", "options"), BACKBONES)
def test_what_is_masked_cannot_leak(name: str, options: dict[str, Any]) -> None:
    backbone, task = built(name, options)
    images = torch.randn(2, 3, 16, 16)
    mask = task.mask(images)
    expected = task.reconstruction(backbone, images, mask)
    other = torch.where(mask, torch.randn_like(images), images)
    assert torch.equal(task.reconstruction(backbone, other, mask), expected)
    visible = torch.where(mask, images, images + 1)
    assert not torch.equal(task.reconstruction(backbone, visible, mask), expected)


class Identity(nn.Module):
    """A backbone whose map holds the pixels of each 4 by 4 cell: channel ``16 c + 4 i + j``."""

    num_features = 48

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.Conv2d(3, 48, 4, stride=4, padding=0, bias=False)
        self.cells.weight.data = torch.eye(48).view(48, 3, 4, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.cells(nn.functional.pad(images, (0, -images.shape[3] % 4, 0, -images.shape[2] % 4))).mean((2, 3))


@pytest.mark.parametrize("size", [(8, 8), (8, 12), (10, 7)])
def test_every_pixel_lands_where_it_belongs(size: tuple[int, int]) -> None:
    """Also at the edge, where the map looks over the image."""
    backbone = Identity()
    task = MaskedImageTask(backbone, block_size=2)
    assert (task.maps.channels, task.maps.stride) == (48, 4)
    task.decoder.weight.data = torch.eye(48).view(48, 48, 1, 1)
    task.decoder.bias.data.zero_()
    images = torch.randn(2, 3, *size)
    nothing = torch.zeros(2, 1, *size, dtype=torch.bool)
    assert torch.equal(task.reconstruction(backbone, images, nothing), images)


def test_a_map_of_another_grid_is_resized() -> None:
    """SqueezeNet's convolutions do not pad: at 64 pixels 3 positions stand for 18 each, by those of 224."""
    backbone, task = built("squeezenet1_0", block_size=16)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert task.reconstruction(backbone, images, task.mask(images)).shape == images.shape


def test_the_masked_block_starts_as_the_mean_colour_and_learns() -> None:
    backbone, task = built()
    images = torch.randn(2, 3, 18, 15)  # no multiple of the block
    mask = task.mask(images)
    assert (task.masked(images, mask)[mask.expand_as(images)] == 0).all()
    assert torch.equal(task.masked(images, mask)[~mask.expand_as(images)], images[~mask.expand_as(images)])
    task(backbone, images).backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in task.parameters())
    assert backbone.conv1.weight.grad.abs().max() > 0
    assert {key.partition(".")[0] for key in task.state_dict()} == {"masked_block", "decoder"}


def landscapes(count: int = 8, size: int = 16) -> Tensor:
    """Smooth images, whose masked parts follow from the visible ones."""
    steps = torch.linspace(-1, 1, size)
    angles = torch.linspace(0, 2 * torch.pi, count + 1)[:-1, None, None]
    slope = angles.cos() * steps[:, None] + angles.sin() * steps
    images = torch.stack([slope, -slope, slope.square()], dim=1)
    return (images - images.mean()) / images.std()


@pytest.mark.parametrize(("name", "options"), BACKBONES)
def test_it_learns_to_fill_in(name: str, options: dict[str, Any]) -> None:
    """The loss of painting the mean of the visible pixels is 1; every step has other masks."""
    backbone, task = built(name, options, mask_ratio=0.5)
    images = landscapes()
    optimizer = torch.optim.AdamW([*backbone.parameters(), *task.parameters()], lr=3e-3)
    errors = []
    for _ in range(150):
        optimizer.zero_grad()
        task(backbone, images).backward()
        optimizer.step()
        errors.append(float(task.diagnostics["relative_error"]))
    assert errors[0] > 0.7
    assert sum(errors[-20:]) / 20 < 0.35


def test_preview() -> None:
    backbone, task = built()
    backbone.eval()
    nn.init.normal_(task.masked_block)
    images = torch.randn(2, 3, 16, 16)
    torch.manual_seed(3)
    pictures, captions = task.preview(backbone, images)
    torch.manual_seed(3)
    mask = task.mask(images)
    assert pictures.shape == (2, 3, 3, 16, 16)
    assert captions == [["image", "masked", "reconstruction"]] * 2
    assert not pictures.requires_grad
    hidden = mask.expand_as(images)
    assert torch.equal(pictures[:, 0], images)
    assert torch.equal(pictures[:, 1], task.masked(images, mask))
    assert torch.equal(pictures[:, 2][~hidden], images[~hidden])
    assert torch.equal(pictures[:, 2][hidden], task.reconstruction(backbone, images, mask)[hidden])


def test_bfloat16() -> None:
    backbone, task = built()
    images = torch.randn(2, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = task(backbone, images)
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in task.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 0}, r"`--model\.block_size` to be at least 1, but got 0"),
        ({"mask_ratio": 0.0}, r"`--model\.mask_ratio` to be above 0 and below 1, but got 0\.0"),
        ({"mask_ratio": 1.0}, r"`--model\.mask_ratio`"),
        ({"norm": "l3"}, r"`--model\.norm` to be 'l1' or 'l2', but got 'l3'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        MaskedImageReconstruction(backbone="resnet8", **options)


@pytest.mark.parametrize(("block_size", "message"), [(17, "from 1 to the 16 pixels"), (16, "leave some visible")])
def test_blocks_that_do_not_fit_the_image(block_size: int, message: str) -> None:
    backbone, task = built(block_size=block_size)
    with pytest.raises(ConfigurationError, match=rf"`--model\.block_size`.*{message}"):
        task(backbone, torch.randn(1, 3, 16, 16))


def test_the_module_trains_and_its_checkpoint_rebuilds_it(
    tmp_path_factory: pytest.TempPathFactory, images: Any
) -> None:
    root = pretraining_contract.prepare(tmp_path_factory.mktemp("folders"), images)
    model = {"block_size": 8, "mask_ratio": 0.5, "norm": "l2"}
    module = pretraining_contract.fit(
        MaskedImageReconstruction, root, model=model, max_epochs=1, save={5: root / "a.ckpt"}
    )
    assert {"val/loss", "val/masked_error", "val/relative_error"} <= module.trainer.callback_metrics.keys()
    assert [group["name"] for group in module.parameter_groups()] == ["backbone", "task"]
    keys = set(module.state_dict())
    assert all(key.startswith("backbone.") for key in keys - {f"task.{key}" for key in module.task.state_dict()})
    loaded = MaskedImageReconstruction.load_from_checkpoint(root / "a.ckpt")
    assert not differing(weights(module), weights(loaded))
    assert (loaded.task.block_size, loaded.task.mask_ratio, loaded.task.norm) == (8, 0.5, "l2")
    batch = torch.randn(2, 3, 16, 16)
    pictures = []
    for model_or_copy in (module, loaded, copy.deepcopy(loaded)):
        torch.manual_seed(0)
        pictures.append(model_or_copy.eval().preview(batch).pictures)
    assert torch.equal(pictures[0], pictures[1])
    assert torch.equal(pictures[0], pictures[2])


# ---------------------------------------------------------------------- as a term of adaptation
def outputs(images: Tensor) -> NetworkOutputs:
    return NetworkOutputs(torch.randn(len(images), 16), torch.randn(len(images), 3), images=images)


def summed(batch_norm: str, **options: Any) -> AlignmentSum:
    return AlignmentSum(
        3,
        backbone="resnet8",
        bottleneck_features=16,
        batch_norm=batch_norm,  # type: ignore[arg-type]
        terms={"masking": 2.0},
        term_options={"masking": {"block_size": 4, **options}},
    )


@pytest.mark.parametrize("batch_norm", ["joint", "separate", "domain_specific"])
def test_as_a_term(batch_norm: str) -> None:
    module = summed(batch_norm).train()
    source, target = outputs(torch.randn(4, 3, 16, 16)), outputs(3 + torch.randn(6, 3, 16, 16))
    before = copy.deepcopy(module.state_dict())
    torch.manual_seed(1)
    value = module.alignment(source, target, PROGRESS)
    after = module.state_dict()
    assert all(torch.equal(kept, after[key]) for key, kept in before.items())  # running statistics too
    assert set(module.alignment.diagnostics) == {"masking", "masking/masked_error", "masking/relative_error"}
    task = module.alignment.losses["masking"].task  # type: ignore[index, union-attr]
    torch.manual_seed(1)
    assert source.images is not None
    assert target.images is not None
    if batch_norm == "joint":
        expected = task(module.backbone, torch.cat([source.images, target.images]))
    else:
        shares = [(0.4, "source", source.images), (0.6, "target", target.images)]
        expected = sum(
            share * task(lambda images, domain=domain: module.outputs_in(domain, images).features, images)
            for share, domain, images in shares
        )
    torch.testing.assert_close(value, 2 * expected)
    value.backward()
    used = [p.grad is not None for name, p in module.named_parameters() if name.startswith(("backbone", "alignment"))]
    assert all(used)


def test_the_target_alone_and_other_options() -> None:
    module = summed("joint", domains="target", norm="l2", mask_ratio=0.3)
    task = module.alignment.losses["masking"].task  # type: ignore[index, union-attr]
    assert (task.norm, task.mask_ratio) == ("l2", 0.3)
    source, target = outputs(torch.randn(4, 3, 16, 16)), outputs(torch.randn(4, 3, 16, 16))
    values = []
    for other in (source, outputs(torch.randn(4, 3, 16, 16))):
        torch.manual_seed(1)
        values.append(module.alignment(other, target, PROGRESS))
    assert torch.equal(*values)


def test_without_lightning_and_copied() -> None:
    loss = MaskingLoss(resnet8(), block_size=4)
    other = copy.deepcopy(loss)
    source, target = outputs(torch.randn(2, 3, 16, 16)), outputs(torch.randn(2, 3, 16, 16))
    values = []
    for one in (loss, other):
        torch.manual_seed(1)
        values.append(one(source, target, PROGRESS))
    assert torch.equal(*values)


@pytest.mark.parametrize("batch_norm", ["joint", "domain_specific"])
def test_adaptation_trains_with_it(batch_norm: str, domains: Path, tmp_path: Path) -> None:
    options = {"terms": {"masking": 1.0}, "term_options": {"masking": {"block_size": 4}}, "batch_norm": batch_norm}
    checkpoint = tmp_path / "a.ckpt"
    module = contract.fit(AlignmentSum, domains, model=options, max_epochs=1, save=(5, checkpoint))
    loaded = AlignmentSum.load_from_checkpoint(checkpoint)
    assert contract.equal(contract.weights(module), contract.weights(loaded))
