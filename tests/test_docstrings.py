"""The examples in docstrings are true."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from types import ModuleType

import pytest
import torch

import framework

NAMES = [
    module.name for module in pkgutil.walk_packages(framework.__path__, "framework.") if "__main__" not in module.name
]


def examples(module: ModuleType) -> list[doctest.DocTest]:
    return [
        test for test in doctest.DocTestFinder().find(module, globs=vars(module) | {"torch": torch}) if test.examples
    ]


@pytest.mark.parametrize("name", NAMES)
def test_examples(name: str) -> None:
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for test in examples(module):
        runner.run(test)
    assert runner.failures == 0


def test_there_are_examples() -> None:
    assert sum(len(examples(importlib.import_module(name))) for name in NAMES) > 20
