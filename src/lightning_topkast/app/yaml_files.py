"""Reading YAML files that others may have written, in no more memory and time than they have text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from lightning_topkast.app.errors import AppError

_MOST_NODES = 100_000  # of a file whose aliases are written out; a sweep of a thousand grids has a tenth of it


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file as plain data.

    Raises:
        AppError: It is not valid YAML, or too large.
        OSError: It cannot be read.
    """
    return _read(path)[1]


def checked_text(path: Path) -> str:
    """Return the text of a YAML file that is valid, and not far larger once its aliases are written out.

    Raises:
        AppError, OSError: Likewise.
    """
    return _read(path)[0]


def _read(path: Path) -> tuple[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        size = _size(node, {})
        if size > _MOST_NODES:
            raise AppError(f"{path} cannot be read: its aliases stand for {size:,} values, more than {_MOST_NODES:,}")
        return text, None if node is None else loader.construct_document(node)
    except (ValueError, yaml.YAMLError, RecursionError) as error:  # not UTF-8, not YAML, or too deep
        reason = " ".join(str(error).split())
        raise AppError(f"{path} cannot be read: {reason}") from error


def _size(node: Any, known: dict[int, int]) -> int:
    """Return the number of values below a node, each as often as aliases repeat it."""
    if node is None:
        return 0
    if id(node) in known:
        if known[id(node)] == 0:
            raise ValueError("an alias in it refers to what it is a part of")
        return known[id(node)]
    known[id(node)] = 0  # until it is counted
    children = node.value if isinstance(node, yaml.CollectionNode) else []
    parts = (part for child in children for part in (child if isinstance(child, tuple) else (child,)))
    known[id(node)] = size = 1 + sum(_size(part, known) for part in parts)
    return size
