"""Arithmetic for YAML files."""

from __future__ import annotations

from numbers import Real
from typing import Any

from omegaconf import OmegaConf


def times(length: Any, factor: Any) -> Any:
    """Multiply a number of epochs or steps: `${topkast.times:${recipe.max_epochs},${recipe.schedule}}`.

    No limit, null or -1, is returned unchanged; so is text, which is refused where the number is used.

    Raises:
        ValueError: The factor is not a positive number.
    """
    if not _is_number(factor) or factor <= 0:
        raise ValueError(f"recipe.schedule={factor} is not valid: expected a number above 0, such as 1, 2 or 5")
    return max(1, round(length * factor)) if _is_number(length) and length > 0 else length


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def register_resolvers() -> None:
    """Register the resolvers with OmegaConf; calling this again has no effect."""
    OmegaConf.register_new_resolver("topkast.times", times, replace=True)
