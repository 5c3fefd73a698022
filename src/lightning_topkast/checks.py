"""Checks of values that users give, each with an error that says what was expected."""

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from numbers import Real
from typing import Any, get_args

from lightning_topkast.errors import TopKastError


def check(condition: bool, name: str, value: Any, expected: str) -> None:
    """Raise a `TopKastError` unless `condition` holds."""
    if not condition:
        raise TopKastError(f"expected {name} to be {expected}, got {value!r}")


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Refuse a value that is not one of the strings of a `Literal` type."""
    known = get_args(choices)
    check(value in known, name, value, f"one of {', '.join(map(repr, known))}")


def check_bool(name: str, value: Any) -> None:
    """Refuse what is neither True nor False."""
    check(isinstance(value, bool), name, value, "True or False")


def check_sparsities(forward: Any, backward: Any, where: str = "") -> None:
    """Refuse sparsities out of range: 0 <= backward <= forward < 1."""
    for name, value in (("forward_sparsity", forward), ("backward_sparsity", backward)):
        check(is_number(value) and 0 <= value < 1, f"{where}{name}", value, "a number in [0, 1)")
    if backward > forward:
        raise TopKastError(
            f"expected {where}backward_sparsity <= {where}forward_sparsity, since the updated set B holds the active "
            f"set A, got {backward} and {forward}"
        )


def is_number(value: Any) -> bool:
    """Whether a value is a finite real number, and not a bool."""
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def is_count(value: Any, least: int) -> bool:
    """Whether a value is an int of at least `least`, and not a bool."""
    return isinstance(value, int) and is_number(value) and value >= least


def plain(value: Any) -> Any:
    """Return dicts and lists where a configuration library passes containers of its own."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    return value


def name_matches(name: str, pattern: str) -> bool:
    """Return whether a glob pattern matches a name; a name always matches itself, also with brackets in it."""
    return name == pattern or fnmatchcase(name, pattern)
