"""What some methods ask of the batches, checked before training."""

from __future__ import annotations

from framework.errors import ConfigurationError
from framework.modules.adaptation.base import DomainAdaptation


def check_batch_sizes(module: DomainAdaptation, at_least: int, why: str, equal_for: str = "") -> None:
    """Raise a ConfigurationError unless the datamodule's batches suit the method.

    Args:
        module: the method, with its trainer.
        at_least: images of each domain in a batch.
        why: what they are for, a relative clause.
        equal_for: the option that compares neighbours in the batches, so that it needs as many target as source images
            and, for neighbours to be independent draws, a single source; empty where none does.
    """
    data = module.trainer.datamodule  # type: ignore[attr-defined]
    source, target = getattr(data, "batch_size", at_least), getattr(data, "target_batch_size", None)
    target = source if target is None else target
    if equal_for and source != target:
        raise ConfigurationError(
            f"Expected `--data.target_batch_size` to equal `--data.batch_size` for `{equal_for}`, but got {target} and "
            f"{source}."
        )
    if equal_for and (folders := len(getattr(data, "sources", ()))) > 1:
        raise ConfigurationError(
            f"Expected `--data.source` to be one folder for `{equal_for}`, which compares neighbours in a batch, but "
            f"got {folders}: there they are never of the same folder. Take `--model.estimator unbiased`."
        )
    if min(source, target) < at_least:
        raise ConfigurationError(
            f"Expected at least {at_least} images of each domain in a batch, {why}, but got `--data.batch_size` "
            f"{source} and `--data.target_batch_size` {target}."
        )
