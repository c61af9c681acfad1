"""When the stages of a backbone begin to learn: a function of how far the run is, and of nothing else.

Gradual unfreezing from the top: Howard and Ruder, ACL 2018, arXiv:1801.06146. A probe of the head, then everything:
Kumar et al., ICLR 2022, arXiv:2202.10054.
"""

from __future__ import annotations

import itertools

import lightning.pytorch as L
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from framework.errors import ConfigurationError
from framework.progress import batches_planned, batches_processed

MILESTONES = {"gradual": (0.1, 0.2, 0.3, 0.4, 0.5), "lp_ft": (0.5,)}
"""The policies that unfreeze, and when they do so by default, as shares of the run."""


def check_milestones(policy: str, unfreeze_at: list[float] | None) -> None:
    """Refuse what ``policy`` cannot do.

    Raises:
        ConfigurationError: ``unfreeze_at`` is given to a policy that does not unfreeze, is not increasing, has values
            outside (0, 1) or another number of them than ``lp_ft`` has.
    """
    if unfreeze_at is None:
        return
    if policy not in MILESTONES:
        raise ConfigurationError(
            f"Expected `--model.unfreeze_at` with `--model.policy` gradual or lp_ft, but got {unfreeze_at} with "
            f"{policy!r}, which unfreezes nothing."
        )
    increasing = all(first < second for first, second in itertools.pairwise(unfreeze_at))
    if not unfreeze_at or not increasing or not 0 < unfreeze_at[0] <= unfreeze_at[-1] < 1:
        raise ConfigurationError(
            f"Expected `--model.unfreeze_at` to be increasing shares of the run, above 0 and below 1, but got "
            f"{unfreeze_at}."
        )
    if policy == "lp_ft" and len(unfreeze_at) > 1:
        raise ConfigurationError(
            f"Expected `--model.unfreeze_at` to be one share of the run for `--model.policy lp_ft`, but got "
            f"{unfreeze_at}. For several there is `--model.policy gradual`."
        )


def milestones(policy: str, unfreeze_at: list[float] | None, stages: list[str]) -> tuple[float, ...]:
    """The shares of the run at which the stages begin to learn; the default leaves out what has no stage.

    Raises:
        ConfigurationError: ``unfreeze_at`` has more milestones than there are stages.
    """
    if unfreeze_at is None:
        return MILESTONES[policy][: len(stages)]
    if len(unfreeze_at) > len(stages):
        raise ConfigurationError(
            f"Expected `--model.unfreeze_at` to have at most {len(stages)} values, one for each stage of the backbone "
            f"({', '.join(stages)}), but got {len(unfreeze_at)}."
        )
    return tuple(unfreeze_at)


def unfrozen_stages(progress: float, milestones: tuple[float, ...], stages: int) -> int:
    """How many stages learn, counted from the output: one more from each milestone on, from the last one on all.

    >>> [unfrozen_stages(batch / 10, (0.2, 0.5, 0.8), 5) for batch in range(10)]
    [0, 0, 1, 1, 1, 2, 2, 2, 5, 5]
    """
    passed = sum(progress >= milestone for milestone in milestones)
    return stages if passed == len(milestones) else passed


def check_bounded(trainer: L.Trainer, policy: str) -> None:
    """Refuse a run without a planned length: shares of it need one.

    Raises:
        ConfigurationError: neither epochs nor steps bound the run.
    """
    if trainer.max_epochs == -1 and trainer.max_steps == -1:
        raise ConfigurationError(
            "Expected `--trainer.max_epochs` or `--trainer.max_steps` to bound the run, but both are -1: "
            f"`--model.policy {policy}` unfreezes at shares of its length."
        )


def run_progress(trainer: L.Trainer) -> float:
    """The share of the run's batches that are processed."""
    planned = batches_planned(trainer)
    assert planned is not None  # check_bounded
    return batches_processed(trainer) / planned


def may_skip_backward(trainer: L.Trainer) -> bool:
    """Whether parameters may stop and begin to ask for gradients while the run goes on.

    A DDP that was not told to look for parameters without gradients waits for them for ever.
    """
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy):
        options = strategy._ddp_kwargs
        return bool(options.get("find_unused_parameters")) and not options.get("static_graph")
    return isinstance(strategy, SingleDeviceStrategy)
