"""What the interpolations of a configuration refer to, and how much they stand for.

OmegaConf resolves an interpolation anew wherever it is used: thirty lines such as `b: ${a}${a}` fill all memory.
"""

from __future__ import annotations

import re
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lightning_topkast.app.errors import AppError
from lightning_topkast.app.overrides import KEY

_MOST_VALUES = 1_000_000  # and characters of text, written out; of a run of the shipped configuration 10 thousand

_MOST_ALIASES = 100  # `a: ${b}` in the path of another interpolation
_ALIAS = re.compile(rf"\s*\$\{{\s*({KEY})\s*\}}\s*")
_REFERENCE = re.compile(rf"\$\{{\s*(?:oc\.select\s*:\s*)?({KEY})\s*[,}}]")


def check_size(config: DictConfig) -> None:
    """Refuse a configuration, or a part of one, that is far larger once its interpolations are written out.

    Raises:
        AppError: It is, or a value refers to itself.
    """
    texts_of(config)


def texts_of(config: DictConfig) -> set[str]:
    """Return all texts that a configuration, or a part of one, holds or refers to; raises like `check_size`."""
    walk = _Walk(OmegaConf.to_container(config._get_root(), resolve=False))
    try:
        size = walk.size(_target(config._get_full_key(None), ()))
    except RecursionError:
        raise AppError("the configuration is nested too deeply, or a chain of its interpolations is too long") from None
    if size > _MOST_VALUES:
        raise AppError(f"the interpolations of the configuration stand for {size:,} values, more than {_MOST_VALUES:,}")
    return walk.texts


class _Walk:
    """Follows the interpolations of a configuration.

    Args:
        root: The configuration as plain data.
    """

    def __init__(self, root: Any) -> None:
        self.root = root
        self.texts: set[str] = set()
        self._sizes: dict[tuple[str, ...], int | None] = {}

    def size(self, path: tuple[str, ...]) -> int:
        """Return the number of values and characters at a path, written out; 0 if there is nothing."""
        path, node, rest = self._nearest(path)
        for _ in range(_MOST_ALIASES):
            alias = _ALIAS.fullmatch(node) if rest and isinstance(node, str) else None
            if alias is None:
                break
            path, node, rest = self._nearest((*_target(alias[1], path), *rest))
        if path not in self._sizes:
            self._sizes[path] = None  # until it is known
            self._sizes[path] = self._size(path, node)
        if (found := self._sizes[path]) is None:
            raise AppError(f"the configuration's {'.'.join(path) or 'root'} refers to itself")
        return found

    def _size(self, path: tuple[str, ...], node: Any) -> int:
        if isinstance(node, dict | list):
            keys = node if isinstance(node, dict) else range(len(node))
            return 1 + sum(self.size((*path, str(key))) for key in keys)
        if not isinstance(node, str):
            return 1
        self.texts.add(node)
        return len(node) + sum(self.size(_target(key, path)) for key in _REFERENCE.findall(node))

    def _nearest(self, path: tuple[str, ...]) -> tuple[tuple[str, ...], Any, tuple[str, ...]]:
        """Return the path of the node at a path, or of the text before it; the node; and what is left of the path."""
        node = self.root
        for depth, key in enumerate(path):
            if isinstance(node, str):
                return path[:depth], node, path[depth:]
            if isinstance(node, dict):
                node = next((child for name, child in node.items() if str(name) == key), None)
            else:
                node = node[int(key)] if isinstance(node, list) and key.isdigit() and int(key) < len(node) else None
        return path, node, ()


def _target(key: str, path: tuple[str, ...]) -> tuple[str, ...]:
    """Return the path that a key, which may begin with dots, stands for in the text at `path`."""
    names = re.findall(r"[^.\[\]]+", key)
    up = len(key) - len(key.lstrip("."))
    return (*(path[: max(len(path) - up, 0)] if up else ()), *names)
