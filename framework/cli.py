"""The command line on LightningCLI: the only place that knows the shell."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import SIGTERMException

import framework.datamodules
import framework.modules
from framework.errors import ConfigurationError, did_you_mean
from framework.trainer import Trainer

SUBCOMMANDS = ("fit", "validate", "test", "predict")
DEBUG = "FRAMEWORK_DEBUG"


class Parser(LightningArgumentParser):
    """Prints what is wrong in a line or two, without the usage and without jsonargparse's account of every attempt."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Print the message and exit with 2."""
        if os.environ.get(DEBUG) and ex is not None:
            traceback.print_exception(ex)
        print(f"framework: error: {readable(str(message))}", file=sys.stderr)
        raise SystemExit(2)


def readable(message: str) -> str:
    """The useful lines of a jsonargparse message."""
    noise = ("Expected a <class 'NoneType'>", "Given value", "Subtypes:", "Does not validate", "Errors:", "Got value:")
    lines = [line.strip().lstrip("- ").strip() for line in message.splitlines()]
    kept = list(dict.fromkeys(line for line in lines if line and not line.startswith(noise)))
    text = "\n    ".join(kept)
    if match := re.search(r"[Uu]nexpected import path format: (\w+)", text):
        text += f"\n    {did_you_mean(match.group(1), _class_names())}"
    class_path = re.search(r"class_path '([\w.]+)'", text)
    if class_path and "is not accepted" in text:
        text += f"\n    See `--{_home(class_path.group(1))}.help {class_path.group(1).rsplit('.', 1)[-1]}`."
    return text


def _class_names() -> list[str]:
    return [
        name
        for module in (framework.modules, framework.datamodules)
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, L.LightningModule | L.LightningDataModule)
    ]


def _home(class_path: str) -> str:
    return "data" if "datamodules" in class_path else "model"


class RunConfiguration(SaveConfigCallback):
    """Writes the resolved configuration beside the logs: ``config.yaml`` for the first fit, a file of its own for each
    later command on the same run."""

    def __init__(self, parser: LightningArgumentParser, config: Any, **options: Any) -> None:
        super().__init__(parser, config, **options)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Choose a free name, say where the run is, write."""
        folder = trainer.log_dir
        if self.already_saved or folder is None or not trainer.loggers:
            return
        if trainer.is_global_zero:
            self.config_filename = _free_name(Path(folder), stage)
            print(f"Run: {os.path.relpath(folder)}", flush=True)
        super().setup(trainer, pl_module, stage)


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
        """The number of classes comes from the data."""
        parser.link_arguments("data.num_classes", "model.init_args.num_classes", apply_on="instantiate")

    def _parse_ckpt_path(self) -> None:
        """Lightning lets the checkpoint's hyperparameters overwrite the command line. Here the flags win."""

    def before_instantiate_classes(self) -> None:
        """Refuse what would fail later, or in silence."""
        config = self.config[self.subcommand]
        for key, example in (("model", "DANN"), ("data", "DomainPairDataModule")):
            if config.get(key) is None:
                raise ConfigurationError(
                    f"Expected `--{key}` to name a class, such as `--{key} {example}`, or a `--config` that does, but "
                    f"got none. Known: {', '.join(name for name in _class_names() if _is(name, key))}."
                )
        arguments = config.model.get("init_args", {})
        if arguments.get("num_classes") is not None:
            raise ConfigurationError("Expected no `--model.num_classes`: it comes from the data. Remove it.")
        if config.get("ckpt_path"):
            check_checkpoint(config.ckpt_path, config.model.class_path)
            if "weights" in arguments:
                arguments.weights = None  # the checkpoint holds them


def _is(name: str, key: str) -> bool:
    home = framework.modules if key == "model" else framework.datamodules
    value = getattr(home, name, None)
    return value is not None and name not in ("ImageClassifier", "DomainAdaptation", "ImageDataModule")


def check_checkpoint(path: str, class_path: str) -> None:
    """Refuse a checkpoint that is not there, cannot be read, or belongs to another class of model."""
    if not Path(path).is_file():
        raise ConfigurationError(f"Expected `--ckpt_path` to be a checkpoint file, but '{path}' does not exist.")
    try:
        checkpoint = torch.load(path, map_location="meta", weights_only=True, mmap=True)
        hyperparameters = checkpoint["hyper_parameters"]
    except Exception as error:  # a broken file can break the loader in any way
        raise ConfigurationError(
            f"Expected `--ckpt_path` to be a checkpoint of this framework, but '{path}' cannot be read as one: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error
    written = hyperparameters.get("_class_path")
    if written is not None and written.rsplit(".", 1)[-1] != class_path.rsplit(".", 1)[-1]:
        raise ConfigurationError(
            f"Expected `--ckpt_path` to be a checkpoint of `--model` {class_path.rsplit('.', 1)[-1]}, but '{path}' is "
            f"one of {written.rsplit('.', 1)[-1]}."
        )


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


@contextmanager
def stop_in_order() -> Iterator[list[int]]:
    """Let Ctrl-C finish the batch and save, as SIGTERM does; a second one stops at once. Yields what was received."""
    received: list[int] = []

    def stop(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print("\nStopping after this batch, then saving last.ckpt (Ctrl-C again stops at once) …", file=sys.stderr)
        os.kill(os.getpid(), signal.SIGTERM)

    earlier = signal.signal(signal.SIGINT, stop)
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, earlier)


def run(arguments: list[str]) -> int:
    """Run a subcommand and return the exit code."""
    if arguments[0].startswith("-") or arguments[0] not in SUBCOMMANDS:
        print(
            f"framework: error: Expected a command, {', '.join(SUBCOMMANDS)}, but got {arguments[0]!r}. "
            f"{did_you_mean(arguments[0], SUBCOMMANDS)}",
            file=sys.stderr,
        )
        return 2
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", module="jsonargparse.*")
    sys.argv = [sys.argv[0], *arguments] if len(sys.argv) > 1 else sys.argv
    with stop_in_order() as received:
        try:
            command = expand_run(arguments)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*args parameter is intended.*")
                CommandLine(command)
        except SIGTERMException:  # Lightning's own exit code would be 0
            return 130 if received else 143
        except (ConfigurationError, MisconfigurationException) as error:
            return _mistake(error)
        except RuntimeError as error:
            if "Error(s) in loading state_dict" in str(error):
                return _mistake(
                    ConfigurationError(
                        "Expected a checkpoint of the same network, but its weights do not fit the `--model` options: "
                        + " ".join(str(error).split())[:600]
                    )
                )
            raise
    return 0


def _mistake(error: Exception) -> int:
    if os.environ.get(DEBUG):
        traceback.print_exception(error)
    print(f"framework: error: {error}", file=sys.stderr)
    return 2
