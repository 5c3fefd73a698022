"""HTML pages, each a single file without external resources."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FunctionLoader
from markupsafe import Markup, escape

from lightning_topkast.app.errors import AppError
from lightning_topkast.errors import TopKastError
from lightning_topkast.files import atomic_file, read_file

PAGE, PICTURES = "report.html", "report"
_MOST_BYTES = 1 << 28  # of an earlier page


@dataclass(frozen=True)
class Inline:
    """A picture in a page.

    Attributes:
        name: Name of its PNG file beside the page.
        label: Description of the picture.
        markup: An SVG or img element.
        caption: Text below the picture.
    """

    name: str
    label: str
    markup: Markup
    caption: str = ""


def inline_png(name: str, label: str, content: bytes, caption: str = "") -> Inline:
    """Return a PNG file as an img element."""
    source = b64encode(content).decode("ascii")
    return Inline(name, label, Markup('<img alt="{}" src="data:image/png;base64,{}">').format(label, source), caption)


def render(template: str, **values: Any) -> str:
    """Render a template of the package; everything but `Markup` is escaped, and no script but its own can run."""
    loader = FunctionLoader(lambda name: files(__package__).joinpath("templates", name).read_text(encoding="utf-8"))
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["yaml"] = lambda value: yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)
    environment.filters["day"] = lambda date: str(date)[:16].replace("T", " ") + " UTC"
    environment.globals |= {"script": partial(_script, environment), "hash_of": partial(_hash_of, environment)}
    environment.filters["breakable"] = lambda name: escape(name).replace(".", Markup(".<wbr>"))
    return environment.get_template(template).render(**values)


def _script(environment: Environment, name: str) -> Markup:
    return Markup(environment.get_template(name).render())


def _hash_of(environment: Environment, name: str) -> str:
    """Return the source of a script as a Content-Security-Policy names it."""
    digest = sha256(_script(environment, name).encode()).digest()
    return f"'sha256-{b64encode(digest).decode()}'"


def write_page(folder: Path, html: str, pictures: Mapping[str, bytes]) -> Path:
    """Write a page and its pictures, remove the pictures of an earlier report, and return the page.

    A link in the folder, which may come from somebody else, is replaced; what it refers to is left alone.

    Raises:
        AppError: The folder of the pictures is a link.
    """
    beside = folder / PICTURES
    if beside.is_symlink():
        raise AppError(f"{beside} is a link: the pictures of a report go into a folder of their own; remove the link")
    for old in _pictures_of(folder / PAGE) - pictures.keys():
        (beside / f"{old}.png").unlink(missing_ok=True)
    for name, content in pictures.items():
        with atomic_file(beside / f"{name}.png") as partial:
            partial.write_bytes(content)
    with atomic_file(folder / PAGE) as partial:
        partial.write_text(html, encoding="utf-8", errors="replace")
    return folder / PAGE


def _pictures_of(page: Path) -> set[str]:
    """Return the names of the pictures in a page; other files in their folder are not ours to remove."""
    try:
        text = read_file(page, _MOST_BYTES).decode("utf-8", errors="replace")
    except (OSError, TopKastError):
        return set()
    return set(re.findall(r'<figure id="([\w.-]+)">', text))
