"""Loggers of a run: TensorBoard and an append-only CSV in a folder that no other run shares."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning_utilities.core.rank_zero import rank_zero_only

from framework.errors import ConfigurationError


class TensorBoardRun(TensorBoardLogger):
    """TensorBoard in ``root/experiment/version_N``; ``N`` is claimed by making the folder, so two runs never share one.

    Args:
        root: folder of all runs.
        experiment: name of the experiment.
        version: name of an existing run's folder, to continue it; default: a new ``version_N``.

    Attributes:
        claimed: the folder that this logger has made, None until then.
    """

    claimed: Path | None = None

    def __init__(self, root: str | Path, experiment: str, version: str | None = None) -> None:
        super().__init__(str(root), name=experiment, version=version, default_hp_metric=False)

    @property
    def version(self) -> int | str:
        """Number of the run, claimed when it is first asked for."""
        if self._version is None:
            self._version = (
                self._claimed() if getattr(rank_zero_only, "rank", 0) in (0, None) else self._get_next_version()
            )
        return self._version

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write the values, without the epoch that Lightning adds to every row."""
        super().log_metrics({name: value for name, value in metrics.items() if name != "epoch"}, step)

    def _claimed(self) -> int:
        number = self._get_next_version()
        while True:
            folder = Path(self.root_dir) / f"version_{number}"
            try:
                folder.parent.mkdir(parents=True, exist_ok=True)
                folder.mkdir()
            except FileExistsError as error:
                if not folder.exists():  # what is in the way is a file where a parent should be
                    raise _cannot_write(self.root_dir, error) from error
                number += 1  # another run took it in between
            except OSError as error:
                raise _cannot_write(self.root_dir, error) from error
            else:
                self.claimed = folder
                return number


def _cannot_write(folder: str, error: OSError) -> ConfigurationError:
    return ConfigurationError(
        f"Expected to write the run below '{folder}', but cannot: {error.strerror}. Change the working directory or "
        "`--trainer.experiment`."
    )


class AppendingCSVLogger(Logger):
    """``metrics.csv`` beside the TensorBoard files, one row a value: ``step,name,value``.

    Rows are only ever appended: a resumed run keeps the earlier ones. (Lightning's CSVLogger deletes them.)

    Args:
        run: the logger whose folder this one writes to.
    """

    def __init__(self, run: TensorBoardRun) -> None:
        super().__init__()
        self._run = run

    @property
    def name(self) -> str:
        """The experiment."""
        return str(self._run.name)

    @property
    def version(self) -> int | str:
        """The run."""
        return self._run.version

    @property
    def path(self) -> Path:
        """The file."""
        return Path(self._run.log_dir) / "metrics.csv"

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append the values."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = not self.path.exists()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(["step", "name", "value"])
            writer.writerows([step, name, float(value)] for name, value in metrics.items() if name != "epoch")

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Hyperparameters are in ``hparams.yaml`` and ``config.yaml`` already."""
