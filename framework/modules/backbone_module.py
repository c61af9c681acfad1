"""What every module that trains a backbone shares: start, optimisation, logging, reproducible steps, checkpoints."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar, TypeVar

import lightning.pytorch as L
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from framework.compatibility import check_compatible
from framework.errors import ConfigurationError, at_least_zero
from framework.initialization import Initialization
from framework.modules.optimization import (
    SCHEDULES,
    Schedule,
    begin_momentum,
    checked_schedule_options,
    fused_by_default,
    keep_way_of_stepping,
    optimizer_class_and_arguments,
)
from framework.networks import (
    Preprocessing,
    checkpoint_blocks,
    create_backbone,
    is_convolutional,
    keep_channels_last,
)
from framework.networks.preprocessing import check_image_size
from framework.progress import batches_processed
from framework.reports import report
from framework.running_means import RunningMeans
from framework.seeding import global_seed

Module = TypeVar("Module", bound=nn.Module)
SHOW_LOSS_EVERY = 10  # batches, as the progress bar, at most


class BackboneModule(L.LightningModule):
    """A backbone and what a subclass puts on it, trained by gradient descent; it has no loss of its own.

    All arguments are plain values, so that a checkpoint rebuilds its module by itself.

    Args:
        backbone: name of the backbone, see :func:`framework.networks.create_backbone`.
        weights: pretrained weights of the backbone: ``DEFAULT`` or another name of torchvision's, the path of a local
            file, or None to start at random.
        weights_by_order: the file names its tensors otherwise, but holds the same in the same order.
        init_from: a checkpoint of any module of this framework to start from, in place of ``weights``: its
            backbone, which must fit, and its bottleneck and head where they fit. What was taken and what is new is
            reported at the start of ``fit``. The head is new where the data's classes are others.
        backbone_options: more arguments of the backbone, such as ``{stochastic_depth: 0.1}``.
        learning_rate: of new layers (bottleneck, head, discriminators).
        backbone_learning_rate_factor: the backbone learns at this multiple of ``learning_rate``.
        optimizer: name of an optimizer of ``torch.optim``.
        weight_decay: of the optimizer.
        optimizer_options: more arguments of the optimizer; SGD has ``{momentum: 0.9, nesterov: true}`` by default, and
            SGD, Adam and AdamW take each step in one kernel where the device has it (not in 16-mixed, and not where
            gradients are clipped in bf16-mixed), but for ``{fused: false}``.
        schedule: of the learning rate, per optimizer step ``i``: ``constant``; ``inverse_decay``, ``(1 + gamma i) **
            -beta`` with ``{gamma: 0.001, beta: 0.75}``; ``cosine`` with ``{warmup: 0, minimum: 0.0}``; ``step`` with
            ``{milestones: [...], factor: 0.1}``.
        schedule_options: arguments of the schedule.
        compile: run the backbone (and an alignment loss) through ``torch.compile``.
        gradient_checkpointing: compute the backbone's blocks again in the backward pass instead of keeping what is in
            them (:func:`~framework.networks.checkpoint_blocks`): the same results, less memory, more time.
        channels_last: keep the backbone's weights and maps with the channels as the innermost dimension in memory:
            the same numbers but for rounding. By default where the backbone is convolutional
            (:func:`~framework.networks.is_convolutional`): 0.8 to 0.85 of a step's time on a CPU at 224 pixels, less
            than nothing (1.04) for ResNet-18 on images of 32.
    """

    monitor: ClassVar[tuple[str, str]]
    """What chooses the best checkpoint."""

    batch_type: ClassVar[type]
    """What a training batch is; a datamodule of the framework says what it serves by the same name."""

    views: ClassVar[tuple[int, ...]] = (1,)
    """How many views of a training image the module can take, see ``--data.views``."""

    class_names: list[str] | None = None
    """Of the data that it was trained on; None where it does not tell classes apart."""

    def __init__(
        self,
        *,
        backbone: str = "resnet18",
        weights: str | None = None,
        weights_by_order: bool = False,
        init_from: str | None = None,
        backbone_options: dict[str, Any] | None = None,
        learning_rate: float = 0.01,
        backbone_learning_rate_factor: float = 0.1,
        optimizer: str = "SGD",
        weight_decay: float = 1e-3,
        optimizer_options: dict[str, Any] | None = None,
        schedule: Schedule = "constant",
        schedule_options: dict[str, Any] | None = None,
        compile: bool = False,
        gradient_checkpointing: bool = False,
        channels_last: bool | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        at_least_zero("--model.learning_rate", learning_rate)
        at_least_zero("--model.backbone_learning_rate_factor", backbone_learning_rate_factor)
        self.learning_rate, self.backbone_learning_rate_factor = learning_rate, backbone_learning_rate_factor
        self.optimizer_class, self.optimizer_arguments = optimizer_class_and_arguments(
            optimizer, weight_decay, optimizer_options
        )
        self.schedule, self.schedule_options = schedule, checked_schedule_options(schedule, schedule_options)
        self.compile_networks = compile
        self._initialization = _initialization(init_from, weights)
        network = create_backbone(backbone, weights, weights_by_order=weights_by_order, **(backbone_options or {}))
        if is_convolutional(network) if channels_last is None else channels_last:
            keep_channels_last(network)
        if gradient_checkpointing:
            checkpoint_blocks(network)
        self.backbone = self.started("backbone", network)
        self.preprocessing: Preprocessing = self.backbone.preprocessing  # type: ignore[assignment]
        self.num_features = int(self.backbone.num_features)  # type: ignore[arg-type]
        self._means = RunningMeans()

    def __init_subclass__(cls, **options: Any) -> None:
        """Lightning asks for the signature of ``training_step`` in every step: here it is."""
        super().__init_subclass__(**options)
        if "training_step" in vars(cls):
            cls.training_step.__signature__ = inspect.signature(cls.training_step)  # type: ignore[attr-defined]

    def __setattr__(self, name: str, value: Any) -> None:
        """As any module's, but for the name of a hook, which Lightning notes four dozen times a step: torch takes a
        while to find that it is neither parameter nor module."""
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    # ------------------------------------------------------------------ network
    def started(self, name: str, module: Module) -> Module:
        """The same module, begun as the part ``name`` of the checkpoint that ``init_from`` gives, if it fits.

        Backbone, bottleneck and head come through here; so must a head that a method puts in the place of the base's,
        before its batch norms become domain-specific.
        """
        if self._initialization is not None:
            self._initialization.load(name, module)
        return module

    def configure_model(self) -> None:
        """Compile in place, which keeps the names in the state dict."""
        if self.compile_networks and not getattr(self.backbone, "_compiled_call_impl", None):
            self.backbone.compile()

    # ------------------------------------------------------------------ before training
    def prepare_data(self) -> None:
        """Refuse data of another kind before anything is built or written."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        command = self.trainer.state.fn
        if command is not None:
            check_compatible(type(self), type(data), command.value)
        if command == "fit":
            self.check_views()
        image_size = getattr(data, "image_size", None)
        if image_size is not None and command == "fit":
            check_image_size(self.backbone, str(self.hparams.get("backbone")), image_size)

    def check_views(self) -> None:
        """Refuse another number of views of an image than the module takes."""
        views = getattr(self.trainer.datamodule, "views", None)  # type: ignore[attr-defined]
        if views is not None and views not in self.views:  # loaders of the user's own do not say
            raise ConfigurationError(
                f"Expected `--data.views` to be {' or '.join(map(str, self.views))}, on which {type(self).__name__} "
                f"trains, but got {views}."
            )

    def on_fit_start(self) -> None:
        """Say once what the run started from, now that all parts are built; not where it goes on from another. Forget
        what a run before it has measured since its last row."""
        self._means = RunningMeans()
        if self._initialization is not None and not self.trainer.ckpt_path:
            report(self._initialization.account())
        self._initialization = None

    # ------------------------------------------------------------------ training
    def logged_loss(self, loss: Tensor, **terms: Tensor) -> Tensor:
        """``loss``, after logging it and the named terms that it is made of under ``train/``.

        All are 0-d tensors, which are kept for some steps: nobody may write to them afterwards.

        The loggers get running means. The progress bar and ``trainer.callback_metrics`` get the loss of the first, of
        every tenth, and of an epoch's last batch: a call of ``log`` costs as much as all else that Lightning does in a
        step.
        """
        values = {"train/loss": loss.detach()}
        for name, term in terms.items():
            values[f"train/{name}"] = term.detach() if term.requires_grad else term
        self._means.add(values)
        trainer = self._trainer  # None where a step is taken by hand
        if trainer and (batches_processed(trainer) % SHOW_LOSS_EVERY == 0 or trainer.is_last_batch):
            self.log("train/loss", loss.detach(), prog_bar=True, logger=False)
        return loss

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Dropout and the like depend on (seed, batch, rank) only: a resumed run draws what the uninterrupted one does,
        and two ranks draw different numbers."""
        self.reseed(self.global_rank)

    def reseed(self, stream: int, batch: int | None = None) -> None:
        """Make what is drawn next a function of (seed, batch, stream), with ``stream`` below 4096.

        The batch is by default the number of training batches processed.
        """
        batch = batches_processed(self.trainer) if batch is None else batch
        seed = ((global_seed() * 1_000_003 + batch) * 4096 + stream) % (1 << 63)
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def of_all_processes(self, tensor: Tensor) -> Tensor:
        """The rows of all processes, ``[N, ...]`` to ``[processes * N, ...]``, with gradients where there are any.

        The mean that DDP takes of the processes' gradients is then the gradient of the one loss of all rows.
        """
        if self.trainer.world_size == 1:
            return tensor
        gathered = self.all_gather(tensor, sync_grads=tensor.requires_grad)  # [processes, N, ...]
        assert isinstance(gathered, Tensor)
        if gathered.requires_grad:  # gloo's backward garbles a gradient whose rows are not contiguous, as the MMD's
            gathered.register_hook(torch.Tensor.contiguous)  # type: ignore[no-untyped-call]
        return gathered.flatten(0, 1)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """Forget the gradients, without the record for a profiler, which takes longer than that."""
        if type(optimizer) is not self.optimizer_class:  # a strategy's own, which may keep gradients elsewhere
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the gradient norm of each part and the learning rate of each group, every ``log_every_n_steps``."""
        begin_momentum(optimizer)
        if not self._means.due(self.trainer):
            return
        for group in optimizer.param_groups:
            gradients = [p.grad for p in group["params"] if p.grad is not None]
            if gradients:
                norm = torch.nn.utils.get_total_norm(gradients)
                self._means.add({f"train/gradient_norm/{group['name']}": norm.detach()})
            self._means.add({f"train/learning_rate/{group['name']}": torch.tensor(group["lr"])})

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Hand the running means to the loggers where a row is due, and look at them."""
        row = self._means.write(self.trainer)
        if row:
            self.on_running_means(row)

    def on_running_means(self, means: dict[str, float]) -> None:
        """Called with every row of running means, ``train/…``: a method looks here whether it works."""

    # ------------------------------------------------------------------ optimisation
    def learning_rate_factor(self, part: str) -> float:
        """The multiple of ``learning_rate`` at which a part of the network learns."""
        return self.backbone_learning_rate_factor if part == "backbone" else 1.0

    def parameter_groups(self) -> list[dict[str, Any]]:
        """One group for each part that learns: backbone, bottleneck, head, and what a method adds."""
        groups = []
        for name, part in self.named_children():
            parameters = [p for p in part.parameters() if p.requires_grad]
            if parameters:
                rate = self.learning_rate * self.learning_rate_factor(name)
                groups.append({"params": parameters, "lr": rate, "name": name})
        return groups

    def _may_step_fused(self) -> bool:
        """Fused optimizers take off a loss scale by themselves: too late for the logged norms, and where there may be
        one, in mixed precision, Lightning refuses to clip their gradients."""
        if self._trainer is None:
            return True
        plugin = self.trainer.precision_plugin
        clips = bool(getattr(self.trainer, "gradient_clip_val", None)) and isinstance(plugin, MixedPrecision)
        return getattr(plugin, "scaler", None) is None and not clips

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over the parameter groups, its learning rates scheduled per step."""
        groups, arguments = self.parameter_groups(), self.optimizer_arguments
        if self._may_step_fused() and fused_by_default(self.optimizer_class, arguments, groups):
            arguments = arguments | {"fused": True}
        optimizer = self.optimizer_class(groups, **arguments)
        keep_way_of_stepping(optimizer)
        options = dict(self.schedule_options)
        if self.schedule == "constant":
            return optimizer
        if self.schedule == "cosine":
            total = options["total"] = int(self.trainer.estimated_stepping_batches)
            if options["warmup"] >= total and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
                raise ConfigurationError(
                    f"Expected `--model.schedule_options.warmup` to be below the run's {total} optimizer steps, but "
                    f"got {options['warmup']}."
                )
            options["warmup"] = min(options["warmup"], total - 1)
        function = SCHEDULES[self.schedule]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: function(step, **options))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # ------------------------------------------------------------------ checkpoints
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make the checkpoint rebuild its module by itself, wherever the run was started from.

        It names its class, so that ``LightningModule.load_from_checkpoint`` builds the right one (the command line's do
        so already), and it holds its weights, so that building the backbone must not fetch others.
        """
        hyperparameters = checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY]
        hyperparameters["weights"] = hyperparameters["init_from"] = None
        if self.class_names is not None:
            checkpoint["class_names"] = self.class_names
        # of the images that it was trained on, which the data's options may have changed
        data = self.trainer.datamodule if self.trainer.state.fn == "fit" else None  # type: ignore[attr-defined]
        used = getattr(data, "preprocessing", None)
        checkpoint["preprocessing"] = (used if isinstance(used, Preprocessing) else self.preprocessing).plain()
        cls = type(self)
        if cls.__module__ != "__main__":  # that name would mean another module when it is loaded
            hyperparameters.setdefault("_class_path", f"{cls.__module__}.{cls.__qualname__}")
            hyperparameters.setdefault("_instantiator", "lightning.pytorch.cli.instantiate_module")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Know the classes that it was trained on, if no data has named others; hold weights of float64 unrounded."""
        if self._trainer is not None and self.trainer.precision == "64-true":
            self.double()  # Lightning's strategy does so after it has read the weights, which rounds them to float32
        if self.class_names is None:
            self.class_names = checkpoint.get("class_names")
        if "preprocessing" in checkpoint:  # older ones have none
            self.preprocessing = Preprocessing.of(checkpoint["preprocessing"], "the checkpoint")
            object.__setattr__(self.backbone, "preprocessing", self.preprocessing)


def _initialization(init_from: str | None, weights: str | None) -> Initialization | None:
    if init_from is None:
        return None
    if weights is not None and weights.lower() != "none":
        raise ConfigurationError(
            f"Expected `--model.init_from` or `--model.weights`, both of which give the backbone its weights, but got "
            f"{init_from!r} and {weights!r}. For the first add `--model.weights none`."
        )
    return Initialization(init_from)
