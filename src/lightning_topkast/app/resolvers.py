"""Arithmetic for YAML files, and what they may learn of the environment."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Real
from typing import Any

from omegaconf import OmegaConf
from omegaconf.resolvers import oc


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


@contextmanager
def environment(answer: Callable[..., Any]) -> Iterator[None]:
    """Let `answer(name, default)` stand for the resolver `oc.env` within the block; `default` may be missing."""
    OmegaConf.register_new_resolver("oc.env", answer, replace=True)
    try:
        yield
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)
