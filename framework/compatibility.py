"""Do a module and a datamodule go together? Asked before anything is built or written."""

from __future__ import annotations

from framework.batch import DomainBatch, LabelledBatch, UnlabelledBatch
from framework.errors import ConfigurationError

DATAMODULES = {
    LabelledBatch: "ImageFolderDataModule",
    DomainBatch: "DomainPairDataModule",
    UnlabelledBatch: "UnlabelledFolderDataModule",
}
"""The datamodule of the framework that serves each kind of training batch."""


def check_compatible(module: type, data: type, command: str) -> None:
    """Refuse a module and a datamodule of which one needs what the other does not have.

    Each says what its training batches are in ``batch_type``; what says nothing, a class of the user's own, is taken.

    Args:
        module: class of the module.
        data: class of the datamodule.
        command: ``fit``, ``validate``, ``test`` or ``predict``.

    Raises:
        ConfigurationError: another batch in ``fit`` or ``validate``; or ``test`` or ``predict`` without classes.
    """
    needed, served = getattr(module, "batch_type", None), getattr(data, "batch_type", None)
    if command in ("fit", "validate"):
        if needed is not None and served is not None and needed is not served:
            take = f" Take `--data {DATAMODULES[needed]}`." if needed in DATAMODULES else ""
            raise ConfigurationError(
                f"Expected `--data` to serve {_named(needed)}, on which {module.__name__} trains, but {data.__name__} "
                f"serves {_named(served)}.{take}"
            )
    elif needed is UnlabelledBatch:
        raise ConfigurationError(
            f"Expected a classifier to `{command}`, but {module.__name__} knows no classes. Start one from its "
            "checkpoint: `framework fit --model.init_from <checkpoint>`."
        )
    elif served is UnlabelledBatch:
        take = DATAMODULES[needed if needed is not None else LabelledBatch]
        raise ConfigurationError(
            f"Expected `--data` to hold what `{command}` needs, but {data.__name__} serves images without classes, to "
            f"`fit` and `validate` only. Take `--data {take}`."
        )


def _named(batch: type) -> str:
    return f"{'an' if batch.__name__[0] in 'AEIOU' else 'a'} {batch.__name__}"
