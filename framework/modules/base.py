"""What every classifier shares: the network's parts, optimisation, metrics, prediction, reproducible steps."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, TypeVar

import lightning.pytorch as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from framework.batch import LabelledBatch, PredictionBatch, Predictions
from framework.errors import ConfigurationError, at_least_zero, in_range
from framework.initialization import Initialization
from framework.metrics import test_metrics
from framework.modules.optimization import (
    SCHEDULES,
    Schedule,
    checked_schedule_options,
    optimizer_class_and_arguments,
)
from framework.networks import Bottleneck, NetworkOutputs, Preprocessing, create_backbone
from framework.networks.preprocessing import check_image_size
from framework.progress import batches_processed
from framework.reports import report
from framework.running_means import RunningMeans
from framework.seeding import global_seed

Module = TypeVar("Module", bound=nn.Module)


class ImageClassifier(L.LightningModule):
    """Backbone, bottleneck and head, trained by cross-entropy on labelled images.

    All arguments are plain values, so that a checkpoint rebuilds its module by itself.

    Args:
        num_classes: number of classes ``K``; the command line takes it from the data.
        backbone: name of the backbone, see :func:`framework.networks.create_backbone`.
        weights: pretrained weights of the backbone: ``DEFAULT`` or another name of torchvision's, the path of a local
            file, or None to start at random.
        weights_by_order: the file names its tensors otherwise, but holds the same in the same order.
        init_from: a checkpoint of any classifier of this framework to start from, in place of ``weights``: its
            backbone, which must fit, and its bottleneck and head where they fit. What was taken and what is new is
            reported at the start of ``fit``. The head is new where the data's classes are others.
        backbone_options: more arguments of the backbone, such as ``{stochastic_depth: 0.1}``.
        bottleneck_features: width ``D`` of the layer between backbone and head; 0 for none.
        bottleneck_normalization: ``batch`` or ``none``, after the bottleneck's linear layer.
        bottleneck_dropout: dropout probability after the bottleneck.
        label_smoothing: of the cross-entropy, in [0, 1).
        learning_rate: of new layers (bottleneck, head, discriminators).
        backbone_learning_rate_factor: the backbone learns at this multiple of ``learning_rate``.
        optimizer: name of an optimizer of ``torch.optim``.
        weight_decay: of the optimizer.
        optimizer_options: more arguments of the optimizer; SGD has ``{momentum: 0.9, nesterov: true}`` by default.
        schedule: of the learning rate, per optimizer step ``i``: ``constant``; ``inverse_decay``, ``(1 + gamma i) **
            -beta`` with ``{gamma: 0.001, beta: 0.75}``; ``cosine`` with ``{warmup: 0, minimum: 0.0}``; ``step`` with
            ``{milestones: [...], factor: 0.1}``.
        schedule_options: arguments of the schedule.
        compile: run the backbone (and an alignment loss) through ``torch.compile``.
        channels_last: keep the backbone's images and weights with the channels as the innermost dimension in memory:
            the same numbers but for rounding, faster for convolutions on many devices.
    """

    monitor: ClassVar[tuple[str, str]] = ("val/accuracy", "max")
    """What chooses the best checkpoint."""

    batch_type: ClassVar[type] = LabelledBatch
    """What a training batch is; a datamodule of the framework says what it serves by the same name."""

    views: ClassVar[tuple[int, ...]] = (1,)
    """How many views of a training image the module can take, see ``--data.views``."""

    def __init__(
        self,
        num_classes: int,
        *,
        backbone: str = "resnet18",
        weights: str | None = None,
        weights_by_order: bool = False,
        init_from: str | None = None,
        backbone_options: dict[str, Any] | None = None,
        bottleneck_features: int = 0,
        bottleneck_normalization: Literal["batch", "none"] = "batch",
        bottleneck_dropout: float = 0.0,
        label_smoothing: float = 0.0,
        learning_rate: float = 0.01,
        backbone_learning_rate_factor: float = 0.1,
        optimizer: str = "SGD",
        weight_decay: float = 1e-3,
        optimizer_options: dict[str, Any] | None = None,
        schedule: Schedule = "constant",
        schedule_options: dict[str, Any] | None = None,
        compile: bool = False,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if num_classes < 2:
            raise ConfigurationError(f"Expected `--model.num_classes` to be at least 2, but got {num_classes}.")
        in_range("--model.label_smoothing", label_smoothing, 0, 1)
        at_least_zero("--model.learning_rate", learning_rate)
        at_least_zero("--model.backbone_learning_rate_factor", backbone_learning_rate_factor)
        at_least_zero("--model.bottleneck_features", bottleneck_features)
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        self.learning_rate, self.backbone_learning_rate_factor = learning_rate, backbone_learning_rate_factor
        self.optimizer_class, self.optimizer_arguments = optimizer_class_and_arguments(
            optimizer, weight_decay, optimizer_options
        )
        self.schedule, self.schedule_options = schedule, checked_schedule_options(schedule, schedule_options)
        self.compile_networks = compile

        self._initialization = _initialization(init_from, weights)
        network = create_backbone(backbone, weights, weights_by_order=weights_by_order, **(backbone_options or {}))
        if channels_last:
            network.to(memory_format=torch.channels_last)
            network.register_forward_pre_hook(_to_channels_last)
        self.backbone = self.started("backbone", network)
        self.preprocessing: Preprocessing = self.backbone.preprocessing  # type: ignore[assignment]
        self.bottleneck: nn.Module = nn.Identity()
        self.num_features = int(self.backbone.num_features)  # type: ignore[arg-type]
        if bottleneck_features:
            self.bottleneck = Bottleneck(
                self.num_features, bottleneck_features, bottleneck_normalization, bottleneck_dropout
            )
            self.num_features = bottleneck_features
        self.bottleneck = self.started("bottleneck", self.bottleneck)
        self.head = self.started("head", nn.Linear(self.num_features, num_classes))
        self.class_names: list[str] | None = None  # of the data that it was trained on

        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_metrics = test_metrics(num_classes)
        self.test_confusion = MulticlassConfusionMatrix(num_classes)
        self._means = RunningMeans()

    # ------------------------------------------------------------------ network
    def started(self, name: str, module: Module) -> Module:
        """The same module, begun as the part ``name`` of the checkpoint that ``init_from`` gives, if it fits.

        Backbone, bottleneck and head come through here; so must a head that a method puts in the place of the base's,
        before its batch norms become domain-specific.
        """
        if self._initialization is not None:
            self._initialization.load(name, module)
        return module

    def outputs(self, images: Tensor) -> NetworkOutputs:
        """Features ``[N, D]`` and logits ``[N, K]`` of images ``[N, 3, H, W]``."""
        features = self.bottleneck(self.backbone(images))
        return NetworkOutputs(features, self.head(features))

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[N, K]`` of images ``[N, 3, H, W]``."""
        return self.outputs(images).logits

    def configure_model(self) -> None:
        """Compile in place, which keeps the names in the state dict."""
        if self.compile_networks and not getattr(self.backbone, "_compiled_call_impl", None):
            self.backbone.compile()

    # ------------------------------------------------------------------ before training
    def prepare_data(self) -> None:
        """Refuse data of another kind before anything is built or written."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        given = getattr(data, "batch_type", self.batch_type)
        if given is not self.batch_type and self.trainer.state.fn in ("fit", "validate"):
            raise ConfigurationError(
                f"Expected `--data` to serve a {self.batch_type.__name__}, on which {type(self).__name__} trains, but "
                f"{type(data).__name__} serves a {given.__name__}."
            )
        views = getattr(data, "views", 1)
        if views not in self.views and self.trainer.state.fn == "fit":
            raise ConfigurationError(
                f"Expected `--data.views` to be {' or '.join(map(str, self.views))}, on which {type(self).__name__} "
                f"trains, but got {views}."
            )
        image_size = getattr(data, "image_size", None)
        if image_size is not None and self.trainer.state.fn == "fit":
            check_image_size(self.backbone, str(self.hparams.get("backbone")), image_size)

    def setup(self, stage: str) -> None:
        """Know the data's classes; a head that has learned others, though as many, begins anew."""
        if str(getattr(stage, "value", stage)) != "fit":
            return
        names = getattr(self.trainer.datamodule, "class_names", None)  # type: ignore[attr-defined]
        self.class_names = None if names is None else [str(name) for name in names]
        if self._initialization is not None:  # before a checkpoint is restored, which then has the last word
            self._initialization.compare_classes(self.class_names, dict(self.named_children()))

    def on_fit_start(self) -> None:
        """Say once what the run started from, now that all parts are built; not where it goes on from another."""
        if self._initialization is not None and not self.trainer.ckpt_path:
            report(self._initialization.account())
        self._initialization = None

    # ------------------------------------------------------------------ training
    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """Cross-entropy of a labelled batch."""
        return self.logged_loss(self.classification_loss(self(batch.images), batch.labels))

    def classification_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of logits ``[N, K]`` and class indices ``[N]`` or probabilities ``[N, K]``."""
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)

    def logged_loss(self, loss: Tensor, **terms: Tensor) -> Tensor:
        """``loss``, after logging it and the named terms that it is made of under ``train/``."""
        self.log("train/loss", loss.detach(), prog_bar=True)
        self._means.add({f"train/{name}": term.detach() for name, term in terms.items()})
        return loss

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Dropout and the like depend on (seed, batch, rank) only: a resumed run draws what the uninterrupted one does,
        and two ranks draw different numbers."""
        self.reseed(self.global_rank)

    def reseed(self, stream: int) -> None:
        """Make what is drawn next a function of (seed, batch, stream), with ``stream`` below 4096."""
        seed = ((global_seed() * 1_000_003 + batches_processed(self.trainer)) * 4096 + stream) % (1 << 63)
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the gradient norm of each part and the learning rate of each group, every ``log_every_n_steps``."""
        step = self.trainer.fit_loop.epoch_loop._batches_that_stepped
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every == 0 or (step + 1) % every != 0:
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

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over the parameter groups, its learning rates scheduled per step."""
        optimizer = self.optimizer_class(self.parameter_groups(), **self.optimizer_arguments)
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

    # ------------------------------------------------------------------ evaluation
    def validation_step(self, batch: LabelledBatch, batch_idx: int) -> None:
        """Accuracy and loss of labelled images."""
        logits = self(batch.images)
        self.val_accuracy.update(logits, batch.labels)
        self.log("val/accuracy", self.val_accuracy, prog_bar=True, batch_size=len(logits))
        self.log("val/loss", F.cross_entropy(logits, batch.labels), sync_dist=True, batch_size=len(logits))

    def test_step(self, batch: LabelledBatch, batch_idx: int) -> None:
        """Accuracy, mean class accuracy, macro-F1, calibration and confusion matrix of labelled images."""
        logits = self(batch.images).float()
        self.test_metrics.update(logits, batch.labels)
        self.test_confusion.update(logits, batch.labels)
        self.log_dict(self.test_metrics, batch_size=len(logits))

    def on_test_start(self) -> None:
        """Count anew: the confusion matrix is not logged, so Lightning does not reset it."""
        self.test_confusion.reset()

    def predict_step(self, batch: PredictionBatch, batch_idx: int) -> Predictions:
        """Predicted classes and probabilities, with the paths of the images."""
        probabilities = self(batch.images).float().softmax(dim=1)
        return Predictions(paths=list(batch.paths), classes=probabilities.argmax(dim=1), probabilities=probabilities)

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
        """Know the classes that it was trained on, if no data has named others."""
        if self.class_names is None:
            self.class_names = checkpoint.get("class_names")
        if "preprocessing" in checkpoint:  # older ones have none
            self.preprocessing = Preprocessing.of(checkpoint["preprocessing"], "the checkpoint")
            object.__setattr__(self.backbone, "preprocessing", self.preprocessing)


def _to_channels_last(backbone: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(images.contiguous(memory_format=torch.channels_last) for images in inputs)


def _initialization(init_from: str | None, weights: str | None) -> Initialization | None:
    if init_from is None:
        return None
    if weights is not None and weights.lower() != "none":
        raise ConfigurationError(
            f"Expected `--model.init_from` or `--model.weights`, both of which give the backbone its weights, but got "
            f"{init_from!r} and {weights!r}. For the first add `--model.weights none`."
        )
    return Initialization(init_from)
