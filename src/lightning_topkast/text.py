"""Text from models and files as it may be shown: names can hold anything, also what a terminal or a page obeys."""

import re
from collections.abc import Sequence
from itertools import takewhile


def printable(text: str) -> str:
    r"""Return a text in which control characters and the like are escaped, as `\x1b`, except for line ends and tabs.

    They could rewrite a terminal's lines, colours or title. What turns the direction of writing is escaped, too.
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode("ascii") for char in text
    )


def markdown(text: str) -> str:
    """Return a text for a line of Markdown or a cell of a table: on one line, without columns and HTML of its own."""
    return re.sub(r"[\\|<]", r"\\\g<0>", printable(" ".join(text.split())))


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
