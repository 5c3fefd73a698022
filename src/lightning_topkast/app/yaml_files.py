"""Reading YAML files that others may have written, in no more memory and time than they have text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from lightning_topkast.app.errors import AppError
from lightning_topkast.app.limits import DEEPEST, MOST_VALUES
from lightning_topkast.errors import TopKastError
from lightning_topkast.files import read_file

_MOST_BYTES = 1 << 20  # a sweep of a thousand grids has a tenth of it
_LONGEST_NUMBER = 100  # characters; the time for one in base 60, such as 1:30:00, grows with their square


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file as plain data.

    Raises:
        AppError: It is not valid YAML, too large, or no file.
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
        text = read_file(path, _MOST_BYTES).decode("utf-8")
        loader = _Loader(text)
        node = loader.get_single_node()
        size = _size(node, {})
        if size > MOST_VALUES:
            raise AppError(f"{path} cannot be read: its aliases stand for {size:,} values, more than {MOST_VALUES:,}")
        return text, None if node is None else loader.construct_document(node)
    except TopKastError as error:
        raise AppError(f"cannot be read: {error}") from error
    except (ValueError, yaml.YAMLError, RecursionError) as error:  # not UTF-8, not YAML, or too deep
        reason = " ".join(str(error).split())
        raise AppError(f"{path} cannot be read: {reason}") from error


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """PyYAML's loader of plain data, which gives up on what is no configuration before it takes time and memory."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._nodes = self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._nodes += 1
        self._depth += 1
        if self._nodes > MOST_VALUES:
            raise ValueError(f"it has more than {MOST_VALUES:,} values")
        if self._depth > DEEPEST:
            raise ValueError(f"it is nested deeper than {DEEPEST} levels")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_scalar(self, node: yaml.ScalarNode) -> Any:
        is_number = node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
        if is_number and len(node.value) > _LONGEST_NUMBER:
            raise ValueError(f"a number in it has more than {_LONGEST_NUMBER} characters")
        return super().construct_scalar(node)


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
