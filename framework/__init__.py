"""Residual networks, transfer learning and unsupervised domain adaptation on image folders, on PyTorch Lightning.

Every module, every datamodule and the Trainer can be imported from here.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from framework.datamodules import *  # noqa: F403
    from framework.modules import *  # noqa: F403
    from framework.trainer import Trainer as Trainer

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # torch and Lightning take seconds to import: `framework --help` does not wait for them
    if not name.startswith("_"):
        for home in ("framework.modules", "framework.datamodules", "framework.trainer"):
            module = importlib.import_module(home)
            if name in getattr(module, "__all__", ("Trainer",)):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
