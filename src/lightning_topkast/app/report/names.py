"""Names of weights and metrics: short, in order, and as names of files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile

_LONGEST_SLUG = 100


def natural(name: str) -> list[str | int]:
    """Return a key that sorts `layer.2` before `layer.10`."""
    return [int(part) if number % 2 else part for number, part in enumerate(re.split("([0-9]+)", name))]


def short(name: str, most: int = 34) -> str:
    """Return a name of at most `most` characters, shortened in the middle."""
    kept = most - 1
    return name if len(name) <= most else f"{name[: kept - kept // 2]}…{name[len(name) - kept // 2 :]}"


def short_names(names: Sequence[str], most: int) -> list[str]:
    """Return names of at most `most` characters that tell apart what the names tell apart.

    If a name is too long, the beginning that all have in common is shortened first. Names that would read alike even so
    are numbered.
    """
    if all(len(name) <= most for name in names):
        return list(names)
    columns = zip(*(name.split(".") for name in names), strict=False)
    common = ".".join(parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, columns))
    if len(names) > 1 and len(common) > 5:
        begin = common[:4].rstrip(".")
        found = [short(f"{begin}…{name[len(common) + 1 :]}", most) for name in names]
    else:
        found = [short(name, most) for name in names]
    if len(set(found)) < len(found):
        found = [short(f"{number}: {name}", most) for number, name in enumerate(found, start=1)]
    return found


def slug(name: str) -> str:
    """Return a name that is valid as a file name and as an id."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", name)[:_LONGEST_SLUG].strip("-.") or "other"
