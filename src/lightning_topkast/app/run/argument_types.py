"""Values of another type than what they are given to takes, told before anything is built.

Python does not check types, so that text in place of a number fails far from its cause, or not at all.
"""

from __future__ import annotations

import collections.abc
import types
from importlib.resources import files
from typing import Any, Union, get_args, get_origin, get_type_hints

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from lightning_topkast.app.errors import CONFIG_MODULE, CONFIG_NAME, AppError
from lightning_topkast.app.run.settings import recorded

Kinds = set[type]  # of _WORDS
_WORDS: dict[type, str] = {
    int: "an int", float: "a number", bool: "true or false", list: "a list", type(None): "null",
}  # fmt: skip
_LISTS = (list, tuple, collections.abc.Sequence, collections.abc.Iterable)


def check_values(cfg: DictConfig) -> None:
    """Refuse values of another type than those of the main configuration file, as far as these tell a type.

    Raises:
        AppError: A switch is not true or false, or text or a list stands where a number is expected.
    """
    shipped = OmegaConf.create(files(CONFIG_MODULE).joinpath(f"{CONFIG_NAME}.yaml").read_text(encoding="utf-8"))
    for key, default in _leaves(OmegaConf.to_container(shipped)):
        if isinstance(default, bool | int | float):
            _check(cfg, key, OmegaConf.select(cfg, key), type(default))


def check_arguments(config: Any, plain: Any) -> None:
    """Refuse arguments of another type than their annotation names, where both are plain: numbers, switches, lists.

    Args:
        config: A part of a configuration.
        plain: The same, resolved.

    Raises:
        AppError: An argument does not fit.
    """
    if not isinstance(config, DictConfig) or not isinstance(plain, dict):
        return
    annotations = _annotations(plain.get("_target_"))
    for name, value in plain.items():
        key = config._get_full_key(name)
        _check(config._get_root(), key, value, annotations.get(name))
        check_arguments(config._get_node(name), value)


def _check(root: Any, key: str, value: Any, annotation: Any) -> None:
    kinds, of_each = _kinds(annotation), _kinds_of_elements(annotation)
    if kinds is None or value is None or value == "???":
        return
    inside = isinstance(value, list) and list in kinds and of_each is not None
    if not _fits(value, kinds):
        expected = _words(kinds)
    elif inside and not all(each is None or _fits(each, of_each or set()) for each in value):
        expected = f"a list, each of it {_words(of_each or set())}"
    else:
        return
    shown: Any = recorded(root)  # without variables of the environment
    for part in key.split("."):
        shown = shown[part]
    raise AppError(f"{key}={shown} is not valid: expected {expected}")


def _words(kinds: Kinds) -> str:
    return " or ".join(word for kind, word in _WORDS.items() if kind in kinds and (kind, float in kinds) != (int, True))


def _fits(value: Any, kinds: Kinds) -> bool:
    if isinstance(value, list):
        return list in kinds
    if isinstance(value, bool):
        return kinds != {list}
    if isinstance(value, int):
        return bool({int, float, bool} & kinds)
    if isinstance(value, float):
        return float in kinds or (int in kinds and value.is_integer())
    return not isinstance(value, str)  # what is built by another target may be anything


def _kinds(annotation: Any) -> Kinds | None:
    """Return what an annotation allows of `_WORDS`, or None if it is unknown or allows text."""
    if get_origin(annotation) in (Union, types.UnionType):
        found = [_kinds(each) for each in get_args(annotation)]
        return None if None in found else set().union(*(each for each in found if each is not None))
    origin = get_origin(annotation) or annotation
    if origin is Tensor:
        return set()
    if origin in _LISTS:  # a text is a sequence of texts
        return {list} if not get_args(annotation) or _kinds_of_elements(annotation) is not None else None
    return {origin} if isinstance(origin, type) and origin in _WORDS else None


def _kinds_of_elements(annotation: Any) -> Kinds | None:
    """Return what a list may hold, if that is the same for all of its places."""
    elements = {each for each in get_args(annotation) if each is not Ellipsis}
    return _kinds(elements.pop()) if get_origin(annotation) in _LISTS and len(elements) == 1 else None


def _annotations(target: Any) -> dict[str, Any]:
    """Return the annotations of what a target names, as far as they can be evaluated."""
    if not isinstance(target, str):
        return {}
    try:
        found = get_object(target)
        return get_type_hints(getattr(found, "__init__") if isinstance(found, type) else found)  # noqa: B009
    except Exception:  # no such target, which is told when it is built, or names that exist only for type checkers
        return {}


def _leaves(node: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(node, dict):
        return [(prefix[:-1], node)]
    return [leaf for name, child in node.items() for leaf in _leaves(child, f"{prefix}{name}.")]
