"""Writes the tables of settings from the code that takes them. Run: python docs/tools/settings.py docs/settings.md

Between `<!-- settings: NAME -->` and `<!-- end -->` a page has the arguments of the class NAME of `lightning_topkast`:
types and defaults from its signature, meanings from its docstring.
"""

import inspect
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import lightning_topkast

_TABLE = re.compile(r"(?<=<!-- settings: )(?P<name>\w+)( -->\n)(?P<table>.*?)(?=<!-- end -->)", re.DOTALL)
_ARGUMENT = re.compile(r"^    (\w+): (.*?)(?=^    \w+: |^\S|\Z)", re.MULTILINE | re.DOTALL)


def renewed(page: str) -> str:
    """Return a page with its tables as the code has them now."""
    return _TABLE.sub(lambda found: found["name"] + found[2] + table(getattr(lightning_topkast, found["name"])), page)


def table(cls: type) -> str:
    """Return a table with one row per argument of a class."""
    meanings = dict(_ARGUMENT.findall((inspect.getdoc(cls) or "").partition("Args:\n")[2]))
    rows = [("argument", "takes", "default", "meaning"), ("---",) * 4]
    for parameter in inspect.signature(cls).parameters.values():
        default = "required" if parameter.default is parameter.empty else f"`{_shown(parameter.default)}`"
        meaning = " ".join(meanings[parameter.name].split()).replace("|", "\\|")
        rows.append((f"`{parameter.name}`", _kind(parameter.annotation), default, meaning))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _kind(annotation: Any) -> str:
    if get_origin(annotation) in (Union, UnionType):
        return ", ".join(_kind(each) for each in get_args(annotation))
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{_shown(choice)}`" for choice in get_args(annotation))
    if annotation is NoneType:
        return "`None`"
    if get_origin(annotation) is Sequence:
        annotation = list[get_args(annotation)]
    return (
        f"`{annotation.__name__}`" if isinstance(annotation, type) and not get_args(annotation) else f"`{annotation}`"
    )


def _shown(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_text(renewed(path.read_text(encoding="utf-8")), encoding="utf-8")
