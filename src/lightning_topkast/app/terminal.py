"""What the application prints. All of it goes through here, since names and messages may come from files of others."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.text import Text

from lightning_topkast.text import printable


def say(text: object, *, error: bool = False) -> None:
    """Print a text with its control characters escaped, on standard output or error."""
    print(printable(str(text)), file=sys.stderr if error else sys.stdout, flush=True)


class Terminal(Console):
    """A console of rich that shows every text as it is: without markup and emoji in it, control characters escaped."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Return a text to be shown, also that of a cell."""
        return super().render_str(printable(text), **options)
