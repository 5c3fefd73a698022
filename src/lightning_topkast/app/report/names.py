"""Names of weights and metrics: in order, and as names of files."""

from __future__ import annotations

import re

_LONGEST_SLUG = 100


def natural(name: str) -> list[str | int]:
    """Return a key that sorts `layer.2` before `layer.10`."""
    return [int(part) if number % 2 else part for number, part in enumerate(re.split("([0-9]+)", name))]


def slug(name: str) -> str:
    """Return a name that is valid as a file name and as an id."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", name)[:_LONGEST_SLUG].strip("-.") or "other"
