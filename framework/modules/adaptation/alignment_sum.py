"""Sums of alignment losses, named and weighted from the command line: CDAN + MCC, DAN + MCC and the like.

CDAN + MCC: Jin et al., "Minimum Class Confusion for Versatile Domain Adaptation", ECCV 2020, add MCC to CDAN; Rangwani
et al., "A Closer Look at Smoothness in Domain Adversarial Training", ICML 2022, build on that sum.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from framework.errors import ConfigurationError, at_least_zero, did_you_mean
from framework.modules.adaptation.base import AlignmentLoss, DomainAdaptation
from framework.networks import NetworkOutputs


def alignment_terms() -> dict[str, type[AlignmentLoss]]:
    """Every alignment loss that has a name, by that name; those of other packages too, once they are imported."""

    def below(base: type[AlignmentLoss]) -> Iterator[type[AlignmentLoss]]:
        for cls in base.__subclasses__():
            yield cls
            yield from below(cls)

    # a loss that is derived from another one has its own name or, if it inherits that, none
    named = {vars(cls)["term"]: cls for cls in below(AlignmentLoss) if vars(cls).get("term")}
    return dict(sorted(named.items()))


@contextmanager
def options_of_the_term(name: str) -> Iterator[None]:
    """Within this context an error that names an option of a loss names it as one of the term ``name``."""
    try:
        yield
    except ConfigurationError as error:
        own = inspect.signature(alignment_terms()[name].__init__).parameters.keys() - {"backbone"}
        flags = re.compile(rf"--model\.({'|'.join(own)})\b")
        raise ConfigurationError(flags.sub(rf"--model.term_options.{name}.\1", str(error))) from error


class WeightedAlignmentSum(AlignmentLoss):
    """``sum over the terms of weight * loss(source, target, progress)``.

    Diagnostics: of each term its value, ``<term>``, and its own diagnostics, ``<term>/<name>``.

    Args:
        losses: the terms by name.
        weights: their weights by the same names.
    """

    def __init__(self, losses: Mapping[str, AlignmentLoss], weights: Mapping[str, float]) -> None:
        super().__init__()
        self.losses = nn.ModuleDict(dict(losses))
        self.weights = {name: float(weights[name]) for name in losses}

    def forward(self, source: NetworkOutputs, target: NetworkOutputs, progress: Tensor) -> Tensor:
        """The weighted sum, a scalar."""
        values, diagnostics = [], {}
        for name, loss in self.losses.items():
            value = loss(source, target, progress)
            values.append(self.weights[name] * value)
            diagnostics[name] = value.detach()
            for key, diagnostic in loss.diagnostics.items():  # type: ignore[union-attr, operator]
                diagnostics[f"{name}/{key}"] = diagnostic
        self.diagnostics = diagnostics
        return torch.stack(values).sum()

    def try_images(self, image_size: int) -> None:
        """Every term tries."""
        for name, loss in self.losses.items():
            with options_of_the_term(name):
                loss.try_images(image_size)  # type: ignore[operator]

    def complaints(self, means: dict[str, float], progress: float) -> Iterator[tuple[str, str]]:
        """Those of the terms, with the term's name."""
        for name, loss in self.losses.items():
            own = {key.replace(f"train/{name}/", "train/"): value for key, value in means.items()}
            for key, sentence in loss.complaints(own, progress):  # type: ignore[operator]
                yield f"{name}/{key}", f"term {name!r}: {sentence}"


class AlignmentSum(DomainAdaptation):
    """Any alignment losses together, for example ``--model AlignmentSum --model.terms.cdan 1 --model.terms.mcc 1``.

    Args:
        num_classes: number of classes ``K``.
        terms: weight of each loss by its name; :func:`alignment_terms` lists the names. Default: CDAN + MCC.
        term_options: options of each loss by the term's name, such as ``{mcc: {temperature: 2.0}}``.
        options: those of :class:`~framework.modules.adaptation.DomainAdaptation`; ``trade_off`` weighs the whole sum.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        terms: dict[str, float] | None = None,
        term_options: dict[str, dict[str, Any]] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(num_classes, **options)
        terms = {"cdan": 1.0, "mcc": 1.0} if terms is None else terms
        term_options = term_options or {}
        known = alignment_terms()
        if not terms:
            raise ConfigurationError(f"Expected `--model.terms` to name losses ({', '.join(known)}), but got none.")
        for flag, names in (("--model.terms", known), ("--model.term_options", terms)):
            for name in terms if names is known else term_options:
                if name not in names:
                    raise ConfigurationError(
                        f"Expected `{flag}` to name losses among {', '.join(names)}, but got {name!r}. "
                        f"{did_you_mean(name, names)}"
                    )
        for name, weight in terms.items():
            at_least_zero(f"--model.terms.{name}", weight)
        losses = {name: self._loss(name, known[name], term_options.get(name, {})) for name in terms}
        self.alignment = WeightedAlignmentSum(losses, terms)

    def _loss(self, name: str, cls: type[AlignmentLoss], options: dict[str, Any]) -> AlignmentLoss:
        accepted = inspect.signature(cls.__init__).parameters
        given: dict[str, Any] = {"num_features": self.num_features, "num_classes": self.num_classes}
        given |= {"backbone": self.backbone, "passes": self.passes}
        for key in options:
            others = [other for other in accepted if other not in {"self", *given}]
            if key not in others:
                raise ConfigurationError(
                    f"Expected `--model.term_options.{name}` to be options of {cls.__name__} ({', '.join(others)}), "
                    f"but got {key!r}. {did_you_mean(key, others)}"
                )
        with options_of_the_term(name):
            return cls(**{key: value for key, value in given.items() if key in accepted}, **options)
