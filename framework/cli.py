"""The command line on LightningCLI: the only place that knows the shell."""

from __future__ import annotations

import contextlib
import logging
import os
import pydoc
import re
import shutil
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import SIGTERMException

from framework.cli_errors import ABSTRACT, class_names, constructor_message, missing_class, readable
from framework.compatibility import check_compatible
from framework.errors import ConfigurationError, did_you_mean
from framework.loggers import TensorBoardRun
from framework.signals import stop_in_order
from framework.trainer import Trainer

SUBCOMMANDS = ("fit", "validate", "test", "predict")
DEBUG = "FRAMEWORK_DEBUG"
HELD_BY_CHECKPOINTS = ("weights", "init_from", "teachers", "members")
"""Files that a model starts from; its own checkpoint holds what was in them."""


class Parser(LightningArgumentParser):
    """Prints what is wrong in a line or two, without the usage and without jsonargparse's account of every attempt."""

    arguments: ClassVar[Sequence[str]] = ()
    """The command line, which a message may refer to."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **({"prog": "framework"} | options))

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Print the message and exit with 2."""
        if not self.exit_on_error:  # a parser within the parser: its caller tries another type, or adds where it was
            super().error(message, ex)
        if os.environ.get(DEBUG) and ex is not None:
            traceback.print_exception(ex)
        print(f"framework: error: {readable(str(message), self.arguments)}", file=sys.stderr)
        raise SystemExit(2)


class RunConfiguration(SaveConfigCallback):
    """Writes the resolved configuration beside the logs: ``config.yaml`` for the first fit, a file of its own for each
    later command on the same run.

    Attributes:
        started: whether the first batch is due; a run that ends before that has nothing to keep.
    """

    started = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Choose a free name, say where the run is, write."""
        folder = trainer.log_dir
        if self.already_saved or folder is None or not trainer.loggers:
            return
        if trainer.is_global_zero:
            self.config_filename = _free_name(Path(folder), str(getattr(stage, "value", stage)))
            print(f"Run: {os.path.relpath(folder)}", flush=True)
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The run has begun."""
        self.started = True

    on_validation_start = on_test_start = on_predict_start = on_train_start


def _free_name(folder: Path, stage: str) -> str:
    if stage == "fit" and not (folder / "config.yaml").exists():
        return "config.yaml"
    number = 1
    while (folder / f"config.{stage}_{number}.yaml").exists():
        number += 1
    return f"config.{stage}_{number}.yaml"


class CommandLine(LightningCLI):
    """LightningCLI over every LightningModule and LightningDataModule of the framework, by bare class name."""

    def __init__(self, arguments: list[str]) -> None:
        strict = {"allow_abbrev": False}  # otherwise --trainer.max_epoch=3 would be taken for --trainer.max_epochs
        super().__init__(
            L.LightningModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=RunConfiguration,
            trainer_class=Trainer,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_class=Parser,
            parser_kwargs={**strict, "prog": "framework", **{name: dict(strict) for name in SUBCOMMANDS}},
            args=arguments,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The number of classes comes from the data, where the data has classes and the model asks for them."""
        parser.link_arguments("data.num_classes", "model.init_args.num_classes", apply_on="instantiate")

    def _parse_ckpt_path(self) -> None:
        """Lightning lets the checkpoint's hyperparameters overwrite the command line. Here the flags win."""

    def before_instantiate_classes(self) -> None:
        """Refuse what would fail later, or in silence."""
        config = self.config[self.subcommand]
        for key in ("model", "data"):
            if config.get(key) is None:
                raise ConfigurationError(missing_class(key))
            home, _, name = config[key].class_path.rpartition(".")
            if name in ABSTRACT and home.split(".")[0] == "framework":
                raise ConfigurationError(
                    f"Expected `--{key}` to be a class that can be used as it is, but got {name}, a base of others. "
                    f"Known: {', '.join(class_names(key))}."
                )
        model, data = (pydoc.locate(config[key].class_path) for key in ("model", "data"))
        if isinstance(model, type) and isinstance(data, type):
            check_compatible(model, data, str(self.subcommand))
        arguments = config.model.get("init_args", {})
        if arguments.get("num_classes") is not None:
            raise ConfigurationError("Expected no `--model.num_classes`: it comes from the data. Remove it.")
        if config.get("ckpt_path"):
            epoch = check_checkpoint(config.ckpt_path, config.model.class_path, self.subcommand)
            epochs = config.trainer.max_epochs
            if self.subcommand == "fit" and epochs is not None and 0 <= epochs <= epoch:
                raise ConfigurationError(
                    f"Expected `--trainer.max_epochs` to be more than the {epoch} epochs that '{config.ckpt_path}' has "
                    f"behind it, but got {epochs}."
                )
            for name in HELD_BY_CHECKPOINTS:
                if name in arguments:
                    arguments[name] = None
        elif self.subcommand != "fit" and not config.trainer.fast_dev_run:
            raise ConfigurationError(
                f"Expected `--run` or `--ckpt_path`, the trained network to {self.subcommand}, but got neither."
            )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and refuse a seed that Lightning would refuse with a traceback."""
        super().parse_arguments(parser, args)
        seed = self.config[self.config.subcommand].seed_everything
        if not 0 <= int(seed) < 2**32:
            raise ConfigurationError(f"Expected `--seed_everything` to be from 0 to {2**32 - 1}, but got {seed}.")

    def instantiate_classes(self) -> None:
        """Build data, model and Trainer; what a constructor refuses is the user's mistake."""
        try:
            super().instantiate_classes()
        except ConfigurationError:
            raise
        except (MisconfigurationException, ValueError, TypeError) as error:
            message = constructor_message(str(error))
            if "`--" not in message:
                config = self.config[self.subcommand]
                helps = (f"`--{key}.help {config[key].class_path.rsplit('.', 1)[-1]}`" for key in ("model", "data"))
                message = f"{message} See {' and '.join(helps)}."
            raise ConfigurationError(message) from error

    def instantiate_trainer(self, **options: Any) -> L.Trainer:
        """The Trainer; what it refuses is the user's mistake."""
        try:
            trainer: L.Trainer = super().instantiate_trainer(**options)
        except ConfigurationError:
            raise
        except (MisconfigurationException, ValueError, TypeError) as error:
            message = " ".join(str(error).split())
            given = list(self.config[self.subcommand].trainer.items())
            named = [name for name, _ in given if re.search(rf"\b{name}\b", message)]
            named = named or [name for name, value in given if isinstance(value, str) and value in message]
            flags = " and ".join(f"`--trainer.{name}`" for name in named) or "`--trainer` options"
            raise ConfigurationError(f"Expected {flags} that Lightning takes, but: {message}") from error
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        configuration = next((c for c in self.trainer.callbacks if isinstance(c, RunConfiguration)), None)  # type: ignore[attr-defined]
        try:
            super()._run_subcommand(subcommand)
        except BaseException:
            if configuration is None or not configuration.started:
                self._discard_run()
            raise
        if subcommand == "fit" and configuration is not None and not configuration.started:
            print(
                "Nothing was left to train: the checkpoint is at the end of the run. Raise `--trainer.max_epochs` (now "
                f"{self.trainer.max_epochs}) or `--trainer.max_steps` (now {self.trainer.max_steps}) to go on."
            )

    def _discard_run(self) -> None:
        """Remove the folder that this run has made, where it ends before its first batch."""
        for logger in self.trainer.loggers:
            if isinstance(logger, TensorBoardRun) and logger.claimed is not None:
                shutil.rmtree(logger.claimed, ignore_errors=True)
                with contextlib.suppress(OSError):  # there are other runs of the experiment
                    logger.claimed.parent.rmdir()


def check_checkpoint(path: str, class_path: str, subcommand: str | None = None) -> int:
    """Refuse a checkpoint that is not there, cannot be read, belongs to another class of model, or holds no run to
    resume.

    Returns:
        The epoch that it was written in, counted from 0.
    """
    if not Path(path).is_file():
        raise ConfigurationError(
            f"Expected `--ckpt_path` to be a checkpoint file, but '{path}' "
            + ("is a folder." if Path(path).is_dir() else "does not exist.")
        )
    try:
        checkpoint = torch.load(path, map_location="meta", weights_only=True, mmap=True)
        hyperparameters, epoch = checkpoint["hyper_parameters"], int(checkpoint["epoch"])
    except Exception as error:  # a broken file can break the loader in any way
        raise ConfigurationError(
            f"Expected `--ckpt_path` to be a checkpoint of this framework, but '{path}' cannot be read as one: "
            f"{type(error).__name__}: {str(error).split('. ')[0].splitlines()[0] if str(error) else ''}"
        ) from error
    written = hyperparameters.get("_class_path")
    if written is not None and written.rsplit(".", 1)[-1] != class_path.rsplit(".", 1)[-1]:
        raise ConfigurationError(
            f"Expected `--ckpt_path` to be a checkpoint of `--model` {class_path.rsplit('.', 1)[-1]}, but '{path}' is "
            f"one of {written.rsplit('.', 1)[-1]}."
        )
    if subcommand == "fit" and "optimizer_states" not in checkpoint:
        raise ConfigurationError(
            f"Expected `--ckpt_path` to be the checkpoint of a run that can go on, but '{path}' holds weights alone "
            f"(experiments/fuse.py writes such). Start another run from it: `--model.init_from {path}`."
        )
    return epoch


def expand_run(arguments: list[str]) -> list[str]:
    """Replace ``--run DIR`` by the run's configuration, its folder and its checkpoint; the other flags come after.

    ``--ckpt_path`` may be ``last`` (the default) or ``best`` of the run, or a path.
    """
    arguments = list(arguments)
    run, checkpoint = _take(arguments, "--run"), None
    if run is None:
        return arguments
    folder = Path(run)
    if not (folder / "config.yaml").is_file():
        raise ConfigurationError(
            f"Expected `--run` to be the folder of a run, lightning_logs/<experiment>/version_N, but '{run}' holds no "
            "config.yaml."
        )
    checkpoint = _take(arguments, "--ckpt_path") or "last"
    if checkpoint in ("last", "best"):
        path = folder / "checkpoints" / f"{checkpoint}.ckpt"
        if not path.is_file():
            raise ConfigurationError(
                f"Expected the run '{run}' to have a checkpoint '{checkpoint}', but '{path}' does not exist (it is "
                "written at the end of an epoch)."
            )
        checkpoint = str(path)
    taken = ["--config", str(folder / "config.yaml"), "--trainer.run", run, "--ckpt_path", checkpoint]
    return [arguments[0], *taken, *arguments[1:]]


def _take(arguments: list[str], flag: str) -> str | None:
    """Remove a flag from the arguments and return its value."""
    for index, argument in enumerate(arguments):
        if argument.startswith(f"{flag}="):
            return arguments.pop(index).split("=", 1)[1]
        if argument == flag:
            if index + 1 >= len(arguments) or arguments[index + 1].startswith("--"):
                raise ConfigurationError(f"Expected a value after `{flag}`, but got none.")
            del arguments[index]
            return arguments.pop(index)
    return None


def run(arguments: list[str]) -> int:
    """Run a subcommand and return the exit code."""
    if arguments[0] not in SUBCOMMANDS:
        return _mistake(
            ConfigurationError(
                f"Expected a command, {', '.join(SUBCOMMANDS)}, but got {arguments[0]!r}. "
                f"{did_you_mean(arguments[0], SUBCOMMANDS)}"
            )
        )
    for key in ("model", "data"):
        if arguments[-1] == f"--{key}.help" and not any(a.split("=")[0] == f"--{key}" for a in arguments):
            return _mistake(
                ConfigurationError(f"Expected a name after `--{key}.help`. Known: {', '.join(class_names(key))}.")
            )
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    Parser.arguments = arguments
    with warnings.catch_warnings(), stop_in_order(arguments[0]) as received:
        for message in (
            ".*does not have many workers.*",
            ".*LeafSpec.*",
            "(?s).*(JsonargparseDeprecationWarning|removed in v5).*",  # calls that Lightning makes
            ".*args parameter is intended.*",
            ".*dirpath has changed.*",  # a checkpoint of another run
            ".*exists and is not empty.*",  # a resumed run's folder: that is what was asked for
        ):
            warnings.filterwarnings("ignore", message=message)
        try:
            CommandLine(expand_run(arguments))
        except SIGTERMException:  # Lightning's own exit code would be 0
            return 130 if received else 143
        except KeyboardInterrupt:
            return 130
        except SystemExit as stop:  # the parser's, or Lightning's after a KeyboardInterrupt
            return 130 if received else stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except (ConfigurationError, MisconfigurationException) as error:
            return _mistake(error)
        except RuntimeError as error:
            message = " ".join(str(error).split())
            if "Error(s) in loading state_dict" in message:
                shown = message if len(message) < 400 else message[:400] + " …"
                message = f"Expected `--model` options of the network that the checkpoint holds, but: {shown}"
            elif not message.startswith("Early stopping conditioned on metric"):
                raise
            return _mistake(ConfigurationError(message))
    return 0


def _mistake(error: Exception) -> int:
    if os.environ.get(DEBUG):
        traceback.print_exception(error)
    message = str(error)
    if "Original Traceback" in message:  # raised in a loader's worker: only its last line is for the user
        message = message.strip().rsplit(f"{type(error).__name__}: ", 1)[-1]
    print(f"framework: error: {message}", file=sys.stderr)
    return 2
