"""Text from models and files as it may be shown: names can hold anything, also what a terminal or a page obeys."""

import re


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
