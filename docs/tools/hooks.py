"""Lets the pages link to the repository's other files, which become part of the site.

In a page a link leads where it leads in the repository, so that the pages also read well there. A file outside docs/
is published as repository/<path>: Markdown and program text as a page, anything else as it is.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
PUBLISHED = "repository"
_LINK = re.compile(
    r"(?<!\!)\[(?P<text>[^\]]*)\]\((?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)"
    r"|!\[[^\]]*\]\((?P<image>[^)\s]+)\)"
)
_FENCE = re.compile(r"(^```.*?^```[^\n]*$)", re.MULTILINE | re.DOTALL)
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".cff": "yaml", "": "text"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files that are linked to, and those that these link to."""
    waiting = [_source(file.src_uri) for file in files.documentation_pages()]
    while waiting:
        page = waiting.pop()
        for linked in _linked_files(page):
            uri = _published(linked)
            if uri.startswith(f"{PUBLISHED}/") and files.get_file_from_path(uri) is None:
                files.append(_file(linked, uri, config))
                if linked.endswith(".md"):
                    waiting.append(linked)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links of the repository into links of the site."""
    source = _source(page.file.src_uri)
    if not (ROOT / source).is_file():
        return markdown  # program text
    parts = _FENCE.split(markdown)
    for number, text in enumerate(parts):
        if not _FENCE.match(text):
            parts[number] = _LINK.sub(lambda link: _rewritten(link, source, page.file.src_uri), text)
    return "".join(parts)


def _rewritten(link: re.Match[str], source: str, uri: str) -> str:
    target = link["target"] or link["image"]
    if _is_elsewhere(target):
        return link[0]
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    if (ROOT / path).is_dir():
        return link["text"]  # a site has no folders
    relative = posixpath.relpath(_published(path), posixpath.dirname(uri) or ".")
    return link[0].replace(f"]({target}", f"]({relative}")


def _linked_files(page: str) -> list[str]:
    """Paths in the repository of the files that a page of it links to; what is missing is MkDocs' to report."""
    text = _FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
    targets = [link["target"] or link["image"] for link in _LINK.finditer(text)]
    folder = posixpath.dirname(page)
    paths = [posixpath.normpath(posixpath.join(folder, target)) for target in targets if not _is_elsewhere(target)]
    return [path for path in paths if not path.startswith("..") and (ROOT / path).is_file()]


def _is_elsewhere(target: str) -> bool:
    return "://" in target or target.startswith(("/", "mailto:"))


def _source(uri: str) -> str:
    """A page's path in the repository."""
    return uri.removeprefix(f"{PUBLISHED}/") if uri.startswith(f"{PUBLISHED}/") else f"docs/{uri}"


def _published(path: str) -> str:
    """The URI of a file of the repository among the site's sources."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"{PUBLISHED}/{path}" + (".md" if Path(path).suffix in _LANGUAGES else "")


def _file(path: str, uri: str, config: MkDocsConfig) -> File:
    suffix = Path(path).suffix
    if suffix in _LANGUAGES:
        text = (ROOT / path).read_text(encoding="utf-8")
        return File.generated(config, uri, content=f"# {path}\n\n```{_LANGUAGES[suffix]}\n{text}```\n")
    if path == "README.md":  # says what the pages say: they are to be found, not it
        content = "---\nsearch:\n  exclude: true\n---\n" + (ROOT / path).read_text(encoding="utf-8")
        return File.generated(config, uri, content=content)
    return File.generated(config, uri, abs_src_path=str(ROOT / path))
