"""Refusals of option values that cannot be, in words that name the flag."""

from __future__ import annotations

from collections.abc import Sequence

from framework.errors import ConfigurationError


def check_at_least(flag: str, value: int | None, least: int) -> None:
    """Refuse a value below ``least``."""
    if value is not None and value < least:
        raise ConfigurationError(f"Expected `{flag}` to be at least {least}, but got {value}.")


def check_fraction(flag: str, value: float) -> None:
    """Refuse a share outside [0, 1)."""
    if not 0 <= value < 1:
        raise ConfigurationError(f"Expected `{flag}` to be in [0, 1), but got {value}.")


def check_amount(flag: str, value: int | float | None) -> None:
    """Refuse what is neither a whole number from 1 on nor a share up to 1.0."""
    fits = value is None or (value >= 1 if isinstance(value, int) else 0 < value <= 1)
    if not fits or isinstance(value, bool):
        raise ConfigurationError(
            f"Expected `{flag}` to be a whole number from 1 on, or a share above 0 and up to 1.0, but got {value}."
        )


def check_cache(storage: str) -> None:
    """Refuse a place for decoded images that there is not."""
    if storage not in ("none", "memory", "disk"):
        raise ConfigurationError(f"Expected `--data.cache` to be 'none', 'memory' or 'disk', but got {storage!r}.")


def check_workers(workers: str | None) -> None:
    """Refuse a kind of workers that there is not."""
    if workers not in (None, "threads", "processes"):
        raise ConfigurationError(f"Expected `--data.workers` to be 'threads' or 'processes', but got {workers!r}.")


def check_augment_on(place: str) -> None:
    """Refuse a place for random views that there is not."""
    if place not in ("loader", "device"):
        raise ConfigurationError(f"Expected `--data.augment_on` to be 'loader' or 'device', but got {place!r}.")


def check_resize(resize_size: int, image_size: int) -> None:
    """Refuse a crop larger than what it is taken from."""
    if resize_size < image_size:
        raise ConfigurationError(
            f"Expected `--data.resize_size` to be at least `--data.image_size` = {image_size}, but got {resize_size}."
        )


def check_statistics(mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
    """Refuse a normalisation that is not of three channels, or divides by 0."""
    for flag, values in (("--data.mean", mean), ("--data.std", std)):
        if values is None:
            continue
        if len(values) != 3 or (flag == "--data.std" and min(values) <= 0):
            raise ConfigurationError(f"Expected `{flag}` to be three numbers (std above 0), but got {values}.")


def check_augmentation(crop_scale: Sequence[float], color_jitter: float, grayscale: float, blur: float) -> None:
    """Refuse an area that no crop can have, a jitter beyond all hues, and what is no probability."""
    if len(crop_scale) != 2 or not 0 < crop_scale[0] <= crop_scale[1] <= 1:
        raise ConfigurationError(
            "Expected `--data.crop_scale` to be two shares of the image's area, the smaller first, above 0 and up to "
            f"1, but got {crop_scale}."
        )
    if not 0 <= color_jitter <= 2.5:  # 0.2 of it is the hue's part, of which 0.5 is all there is
        raise ConfigurationError(f"Expected `--data.color_jitter` to be from 0 to 2.5, but got {color_jitter}.")
    for flag, value in (("--data.grayscale", grayscale), ("--data.blur", blur)):
        if not 0 <= value <= 1:
            raise ConfigurationError(f"Expected `{flag}` to be a probability, from 0 to 1, but got {value}.")
