"""Calls of loggers, none of which ends a training."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_warn

_P = ParamSpec("_P")
_R = TypeVar("_R")
_ATTRIBUTE = "_topkast_guard"


class Guard:
    """Call a logger until it fails: the first failure is a warning, and later calls of that kind are left out.

    They are left out since a writer that failed in the middle of a line or a record would go on in the middle of it.

    Args:
        logger: the logger.

    Attributes:
        failures: the kinds of calls that are left out, each with the reason.
    """

    def __init__(self, logger: Logger) -> None:
        self.name = type(logger).__name__
        self.failures: dict[str, str] = {}

    def call(self, kind: str, function: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R | None:
        """Return `function(*args, **kwargs)`, or None if this or an earlier call of the same kind failed.

        Args:
            kind: what is logged, in the plural.
        """
        if kind in self.failures:
            return None
        try:
            return self._call(function, *args, **kwargs)
        except Exception as error:
            self.failures[kind] = (str(error).splitlines() or [""])[0] or type(error).__name__
            rank_zero_warn(
                f"{self.name} failed ({self.failures[kind]}): no further {kind} are logged to it, and all else goes on"
            )
            return None

    def _call(self, function: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
        return function(*args, **kwargs)


def guard_of(logger: Logger) -> Guard:
    """Return the guard of a logger, the same at every call."""
    if _ATTRIBUTE not in vars(logger):
        set_guard(logger, Guard(logger))
    guard: Guard = vars(logger)[_ATTRIBUTE]
    return guard


def set_guard(logger: Logger, guard: Guard) -> None:
    """Choose the guard of a logger."""
    vars(logger)[_ATTRIBUTE] = guard
