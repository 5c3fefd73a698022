"""Overrides in Hydra's grammar: writing any value as one, telling them from options, and which ones are only values."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType, QuotedString
from hydra.errors import HydraException

KEY = r"\.*[\w\[\]]+(?:\.[\w\[\]]+)*"  # in an interpolation; leading dots: relative to where it stands
# Interpolations that reach nothing but the configuration: keys, and resolvers of the shipped configuration. Not oc.env.
_INSIDE = re.compile(rf"\$\{{\s*(?:{KEY}\s*\}}|oc\.select\s*:\s*{KEY}\s*[,}}]|topkast\.times\s*:)")
# An interpolation that stands for a value of the configuration or a number, and is not part of a longer text.
_ALONE = re.compile(
    rf"\$\{{\s*(?:{KEY}|oc\.select\s*:\s*{KEY}\s*(?:,\s*\w[\w.+-]*\s*)?"
    rf"|topkast\.times\s*:\s*\$\{{\s*{KEY}\s*\}}\s*,\s*(?:\$\{{\s*{KEY}\s*\}}|[\d.]+)\s*)\s*\}}"
)
_ELSEWHERE = re.compile(r"^\s*(?:[/\\~]|[A-Za-z]:[/\\])|(?:^|[/\\])\.\.(?:[/\\]|$)|://|::")  # absolute, above, or a URL
# Keys of folders that a run writes to, wherever they stand; relative ones lie in the user's working directory.
_WRITTEN = {"paths", "dirpath", "save_dir", "default_root_dir", "cache", "download_folder"}
_SHIPPED = "lightning_topkast.conf"


def quoted(value: str | Path) -> str:
    """Return a text as the quoted value of an override, whatever characters it contains."""
    # A backslash is special only before a quote, and before the end, where one is added.
    escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), str(value))
    return f"'{escaped}'"


def as_override(key: str, value: str) -> str:
    """Return `key=value`, with quotes around a value that Hydra would not take for this text."""
    plain = f"{key}={value}"
    try:
        read = OverridesParser.create().parse_override(plain)
    except HydraException:
        return f"{key}={quoted(value)}"
    return plain if not read.is_sweep_override() and read.value() == value else f"{key}={quoted(value)}"


def for_shell(override: str) -> str:
    """Return an override as it is typed in a shell."""
    if shlex.quote(override) == override:
        return override
    return f'"{override}"' if "'" in override and not set(override) & set('"$`\\!') else shlex.quote(override)


def corrected(override: str) -> str | None:
    """Return an override that Hydra cannot read as it should be typed, or None if quotes do not help."""
    key, _, value = override.partition("=")
    text = f"{key}={quoted(value)}"
    try:
        OverridesParser.create().parse_override(text)
    except HydraException:
        return None
    return for_shell(text) if key and value else None


def split_options(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the options of a command line with their values, and its overrides. Hydra reads options first only."""
    options = list(arguments)
    overrides: list[str] = get_args_parser().parse_known_intermixed_args(options)[0].overrides
    for override in reversed(overrides):
        del options[len(options) - 1 - options[::-1].index(override)]
    return options, overrides


def config_dir(arguments: Sequence[str]) -> str | None:
    """Return the user's own folder of configurations in a command line, if it names one."""
    found: str | None = get_args_parser().parse_known_intermixed_args(list(arguments))[0].config_dir
    return found


def more_than_a_value(text: str) -> str | None:
    """Return what an override does besides setting a value of the shipped configuration, or None.

    Overrides in the folder of a run may come from a stranger. A `_target_` is called, a path as the option of a group
    is read as configuration, an added key reaches any argument, a resolver may read the environment, and files are
    written, replaced and removed where `paths` and `dirpath` say.
    """
    if text.startswith("-"):
        return "is an option of the command line"
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException:
        return "is not valid"
    key = override.key_or_group
    if override.type not in (OverrideType.CHANGE, OverrideType.DEL):
        return "adds a key"
    if override.package is not None or "/" in key or re.split(r"[./]", key)[0] == "hydra":
        return "changes Hydra's own settings, or where a group goes"
    if override.is_sweep_override():
        return "has several values"
    value = None if override.type == OverrideType.DEL else override.value()
    parts = [*key.split("."), *_keys(value)]
    if special := next((part for part in parts if part.startswith("_") and part.endswith("_")), None):
        return f"sets {special}, which may name code"
    if not _WRITTEN.isdisjoint(parts):
        return "names a place, which may be read or written"
    if "download" in parts and value is not False:
        return "may download something"
    texts = list(_texts(value))
    if key in _groups() and not all(re.fullmatch(r"[\w-]+", each) for each in texts):
        return f"names no option of the group {key}"
    if any(reaches_further(each) for each in texts):
        return "uses a resolver that may read more than the configuration"
    if any("${" in each and not _ALONE.fullmatch(each) for each in texts):
        return "puts text together, which may name a place"
    if any(_ELSEWHERE.search(each) for each in texts):
        return "names a place, which may be read or written"
    return None


def reaches_further(text: str, variables: str | None = None) -> bool:
    """Return whether an interpolation in a text may reach more than keys of the configuration that it names.

    Args:
        text: The text.
        variables: How those variables of the environment begin that it may read, too; None: it may read none.
    """
    starts = [found.start() for found in re.finditer(r"\$\{", text)]
    if variables is not None:
        allowed = re.compile(rf"\$\{{\s*oc\.env\s*:\s*{variables}\w*\s*[,}}]")
        starts = [at for at in starts if not allowed.match(text, at)]
    return any(not _INSIDE.match(text, at) for at in starts)


def _groups() -> set[str]:
    return {entry.name for entry in files(_SHIPPED).iterdir() if entry.is_dir()}


def _keys(value: Any) -> Iterator[str]:
    """Yield all keys in a value."""
    for key, child in children(value):
        if isinstance(value, dict):
            yield _plain(key)
        yield from _keys(child)


def _texts(value: Any) -> Iterator[str]:
    """Yield all texts in a value, also those of keys."""
    if isinstance(value, str | QuotedString):
        yield _plain(value)
    for key, child in children(value):
        if isinstance(value, dict):
            yield _plain(key)
        yield from _texts(child)


def children(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield what a dict or list of a configuration holds, each with its key or place; nothing for any other value."""
    if isinstance(value, dict):
        yield from value.items()
    elif isinstance(value, list):
        yield from enumerate(value)


def _plain(value: Any) -> str:
    return value.text if isinstance(value, QuotedString) else str(value)
