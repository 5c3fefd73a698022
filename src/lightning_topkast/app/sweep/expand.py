"""Read a sweep from a file, and expand its grids of overrides into runs with unique names."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser

from lightning_topkast.app.errors import AppError, did_you_mean
from lightning_topkast.app.run.settings import without_places
from lightning_topkast.app.yaml_files import read_yaml

_FIRST, _LAST = ("data", "model", "sparsity"), ("seed",)  # in the name of a run
_LONGEST = 80


@dataclass(frozen=True)
class Sweep:
    """Grids of runs.

    Attributes:
        grids: Lists of overrides in Hydra's grammar; each grid has every combination of the values in its comma lists.
        common: Overrides of all grids; a grid's own override of the same key takes precedence.
    """

    grids: list[list[str]]
    common: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Run:
    """One point of a grid: the name of its folder, and its overrides."""

    name: str
    overrides: tuple[str, ...]


def read_sweep(name: str) -> Sweep:
    """Read a sweep from a YAML file.

    Args:
        name: A path, or the name of a file in the folder `sweeps` beside this module.

    Raises:
        AppError: There is no such file, or it is not a valid sweep.
    """
    path = Path(name)
    if not path.is_file():
        known = {file.stem: file for file in _shipped()}
        if name not in known:
            raise AppError(f"there is no sweep '{name}': {did_you_mean(name, known)}; or give the path of a YAML file")
        path = known[name]
    try:
        content = read_yaml(path)
    except OSError as error:
        raise AppError(f"the sweep {path} cannot be read: {error}") from error
    form = "expected the keys `grids`, a list of lists of overrides, and optionally `common`, a list of overrides"
    if not isinstance(content, dict) or "grids" not in content or content.keys() - {"grids", "common"}:
        raise AppError(f"the sweep {path} is not valid: {form}")
    grids, common = content["grids"], content.get("common") or []
    if not isinstance(grids, list) or not grids or not all(_are_overrides(each) for each in [common, *grids]):
        raise AppError(f"the sweep {path} is not valid: {form}")
    return Sweep(grids, common)


def expand(sweep: Sweep, more: Sequence[str], loader: ConfigLoader) -> list[Run]:
    """Return the unique runs of a sweep in the order of its grids.

    Args:
        sweep: The grids.
        more: Overrides of the command line, which take precedence.
        loader: Resolves values such as `glob(*)`.

    Raises:
        OverrideParseException: An override is not valid.
    """
    parser = OverridesParser.create(config_loader=loader)
    runs: dict[str, Run] = {}
    for grid in sweep.grids:
        # Hydra's own grammar and product; the last override of a key counts.
        for point in BasicSweeper.split_arguments(parser.parse_overrides([*sweep.common, *grid, *more]), None)[0]:
            name = run_name(point)
            runs.setdefault(name, Run(name, tuple(point)))
    return list(runs.values())


def run_name(overrides: Iterable[str]) -> str:
    """Return a readable and safe name for a run's folder, at most 80 characters long and unique by the last seven."""
    canonical = sorted(set(without_places(overrides)))
    digest = hashlib.sha256("\n".join(canonical).encode()).hexdigest()[:7]
    words = [re.sub(r"[^A-Za-z0-9._]+", "_", _word(override)) for override in sorted(canonical, key=_place)]
    seed = [words.pop()] if canonical and words and words[-1].startswith(_LAST) else []
    room = _LONGEST - len("-".join(["", *seed, digest]))
    return "-".join(part for part in ["-".join(words)[:room].strip("-_."), *seed, digest] if part)


def _word(override: str) -> str:
    key, _, value = override.partition("=")
    if key in _FIRST:
        return value
    return f"{key.rpartition('.')[2]}{value}" if key in _LAST else f"{key.rpartition('.')[2]}_{value}"


def _place(override: str) -> tuple[int, str]:
    key = override.partition("=")[0]
    if key in _FIRST:
        return _FIRST.index(key), ""
    return len(_FIRST) + (key in _LAST), override


def _are_overrides(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(override, str) for override in value)


def _shipped() -> list[Path]:
    # not one of Hydra's groups, which topkast-train would offer as options
    return sorted((Path(__file__).parent / "sweeps").glob("*.yaml"))
