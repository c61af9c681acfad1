"""An accelerator of which only the shapes are there, for tests of what a run does on a GPU, on machines without one.

Tensors on it have a shape, a layout, a dtype and a device, and no values (torch's ``FakeTensorMode``). So an operation
on tensors of two devices fails, and so does whatever would have to wait for a real accelerator: reading a value,
branching on one, choosing rows by a mask, and copying from the host in a step.

Importing this file gives torch a backend for the whole process: only jobs of their own may do so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning_utilities.core.apply_func import apply_to_collection
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend


class Backend(_DummyBackendModule):
    """What torch asks of a backend's module."""

    def is_available(self) -> bool:
        """No values can be brought there."""
        return False

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """Any."""
        return [torch.bfloat16, torch.float16]


_setup_privateuseone_for_python_backend("shapes_only", Backend())
DEVICE = torch.device("shapes_only", 0)
MODE = FakeTensorMode(allow_non_fake_inputs=True)
COPIES = {"aten::_to_copy", "aten::copy_", "aten::cat"}


class WaitError(Exception):
    """A step waits for the accelerator."""


class NoCopies(TorchDispatchMode):
    """Refuses copies between the host and the accelerator."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        if operation._schema.name in COPIES:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
            if len({tensor.device.type for tensor in tensors}) > 1:
                raise WaitError(f"{operation} between {' and '.join(str(tensor.device) for tensor in tensors)}")
        return result


class ShapesOnly(CPUAccelerator):
    """As the CPU, for a device of another name."""

    def setup_device(self, device: torch.device) -> None:
        """Nothing to set up."""


class OnShapesOnly(SingleDeviceStrategy):
    """One process on the accelerator: parameters, batches, forward, backward and optimizer steps are there.

    Attributes:
        reads: how many values each reading since the start brought to the host; only outside of a step it may.
    """

    def __init__(self) -> None:
        super().__init__(device=DEVICE, accelerator=ShapesOnly())
        self.gone = self.inside = False
        self.reads: list[int] = []

        def read(tensor: torch.Tensor) -> list[float]:
            if self.inside:
                raise WaitError("values are read within a step")
            self.reads.append(tensor.numel())
            return [0.0] * tensor.numel()

        FakeTensor.tolist = read  # type: ignore[method-assign, assignment]

    @property
    def root_device(self) -> torch.device:
        """The host outside of steps: what Lightning itself does between them needs values."""
        return DEVICE if self.inside else torch.device("cpu")

    @contextmanager
    def there(self) -> Iterator[None]:
        """What is made is on the accelerator, or on the host without values."""
        before, self.inside = self.inside, True
        try:
            with MODE:
                yield
        finally:
            self.inside = before

    def model_to_device(self) -> None:
        """Not yet: passes before training may read values."""

    def go(self) -> None:
        """Bring the model there, of which only shapes, layouts and dtypes arrive."""
        assert self.model is not None
        self.gone = True
        arrived: dict[torch.Tensor, torch.Tensor] = {}
        with self.there():
            for module in self.model.modules():
                for name, parameter in module._parameters.items():
                    if parameter is not None:
                        module._parameters[name] = nn.Parameter(shape_of(parameter), parameter.requires_grad)
                        arrived[parameter] = module._parameters[name]
                for name, buffer in module._buffers.items():
                    if buffer is not None:
                        module._buffers[name] = shape_of(buffer)
                if hasattr(module, "_device"):  # Lightning's modules and torchmetrics' say where they are
                    module._device = DEVICE
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["params"] = [arrived[parameter] for parameter in group["params"]]
                group["fused"] = False  # that kernel wants values

    def batch_to_device(self, batch: Any, *args: Any, **options: Any) -> Any:
        """The one copy that a step needs, and what the datamodule does with it there."""
        if not self.gone:
            return super().batch_to_device(batch, *args, **options)
        batch = apply_to_collection(batch, torch.Tensor, MODE.from_tensor)
        with self.there():
            return super().batch_to_device(batch, *args, **options)

    def training_step(self, *args: Any, **options: Any) -> Any:
        """Without copies."""
        with self.there(), NoCopies():
            return super().training_step(*args, **options)

    def backward(self, *args: Any, **options: Any) -> Any:
        """Without copies."""
        with self.there(), NoCopies():
            return super().backward(*args, **options)

    def optimizer_step(self, *args: Any, **options: Any) -> Any:
        """Without copies; the closure with the step is inside."""
        with self.there(), NoCopies():
            return super().optimizer_step(*args, **options)

    def teardown(self) -> None:
        """Values that are not there cannot come back."""


def shape_of(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE)


class SomeSteps(L.Callback):
    """Brings the model to the accelerator as training begins, and ends the run before it is validated or saved."""

    class Done(Exception):  # noqa: N818 (nothing is wrong)
        """As far as the run should go."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        assert isinstance(trainer.strategy, OnShapesOnly)
        trainer.strategy.go()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx + 1 >= self.batches:
            raise self.Done
