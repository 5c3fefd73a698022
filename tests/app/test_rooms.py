"""The rooms of the application: imports point downwards only."""

import ast
from pathlib import Path

import pytest

from lightning_topkast import app

FOLDER = Path(app.__file__).parent
FLOORS = [{"errors", "vision", "formatting", "terminal", "overrides", "interpolations", "resolvers", "limits", "yaml_files"}, {"data", "models", "run_folder"}, {"run"}, {"sweep", "export"}, {"report"}, {"commands"}]  # fmt: skip  # noqa: E501
ROOMS = sorted(path.name for path in FOLDER.iterdir() if (path / "__init__.py").exists())


def imported(file):
    """The rooms of the application that a file imports from, also within functions."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            parts = name.split(".")
            if parts[:2] == ["lightning_topkast", "app"]:
                yield from parts[2:3] or [alias.name for alias in node.names]


@pytest.mark.parametrize("room", ROOMS)
def test_room_imports_from_lower_rooms_only(room):
    floor = next(number for number, rooms in enumerate(FLOORS) if room in rooms)
    lower = set().union(*FLOORS[:floor])
    found = {name for file in (FOLDER / room).rglob("*.py") for name in imported(file)}
    assert found - {room} <= lower
