"""Writing overrides for Hydra's parser."""

from __future__ import annotations

from pathlib import Path


def quoted(path: str | Path) -> str:
    """Return a path as a quoted value of an override, whatever letters are in it."""
    text = str(path).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{text}'"
