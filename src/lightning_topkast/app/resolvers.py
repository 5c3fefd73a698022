"""Arithmetic for the YAML files, which have none of their own."""

from __future__ import annotations

from numbers import Real
from typing import Any

from omegaconf import OmegaConf


def times(length: Any, factor: Any) -> Any:
    """Return a number of epochs or steps, stretched: `${topkast.times:${recipe.max_epochs},${recipe.schedule}}`.

    What stands for no limit, null or -1, stays as it is; so does text, which is refused where the number is used.

    Raises:
        ValueError: the factor is not a number above 0.
    """
    if not _is_number(factor) or factor <= 0:
        raise ValueError(f"recipe.schedule={factor} is not valid: expected a number above 0, such as 1, 2 or 5")
    return max(1, round(length * factor)) if _is_number(length) and length > 0 else length


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def register_resolvers() -> None:
    """Make them known to OmegaConf; harmless when done twice."""
    OmegaConf.register_new_resolver("topkast.times", times, replace=True)
