"""Keeps what the pages show beneath a `$` what the commands print. Run: python docs/tools/outputs.py docs/tutorial.md

A block of the language `console` begins with `$ command`. The lines beneath are a selection of what the command
printed, in order, with `...` where some were left out; the commands of a page run one after the other in one folder.
"""

import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

Run = Callable[[list[str]], str]
"""Takes a command's words and returns what it printed."""

_BLOCK = re.compile(r"^```console\n\$ (?P<command>[^\n]+)\n(?P<shown>.*?)^```$", re.MULTILINE | re.DOTALL)
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
# what differs from run to run: a run's folder, W&B's name for it, and how long it took
_CHANGES = re.compile(r"\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d-\d{6}|offline-run-\w+-\w+|[\d.]+ ± [\d.]+ s")
LEFT_OUT = "..."


class NotPrinted(AssertionError):
    """A page shows a line that the command does not print."""


@dataclass(frozen=True)
class Block:
    """A command and the lines that a page shows of its output."""

    command: str
    shown: list[str]
    start: int
    end: int  # of the shown lines in the page


def blocks(page: str) -> Iterator[Block]:
    """Yield the console blocks of a page in their order."""
    for found in _BLOCK.finditer(page):
        yield Block(found["command"], found["shown"].splitlines(), found.start("shown"), found.end("shown"))


def renewed(block: Block, output: str) -> list[str]:
    """Return the shown lines as they are now printed.

    Raises:
        NotPrinted: one is not printed, beneath those above it.
    """
    printed = iter([line.rstrip() for line in output.splitlines()])
    now = []
    for line in block.shown:
        if line == LEFT_OUT:
            now.append(line)
        elif (found := next((each for each in printed if same(line, each)), None)) is not None:
            now.append(found)
        else:
            raise NotPrinted(
                f"`{block.command}` does not print this line, or not in this place:\n{line}\nbut\n{output}"
            )
    return now


def same(shown: str, printed: str) -> bool:
    """Whether two lines say the same: words and counts alike, fractions as close as two processors have them."""
    shown, printed = (_CHANGES.sub("", line) for line in (shown, printed))
    words = [re.sub(r"[ :-]+", " ", _NUMBER.sub("#", line)).strip() for line in (shown, printed)]
    numbers = [_NUMBER.findall(line) for line in (shown, printed)]
    return words[0] == words[1] and all(map(_close, *numbers))


def _close(one: str, other: str) -> bool:
    if "." not in one + other:
        return one == other
    first, second = (float(number.replace(",", "")) for number in (one, other))
    return abs(first - second) <= max(0.05, 0.1 * abs(first))


def renew(path: Path, run: Run) -> None:
    """Write what the commands of a page print into it."""
    page = path.read_text(encoding="utf-8")
    pieces, end = [], 0
    for block in blocks(page):
        now = renewed(block, run(shlex.split(block.command)))
        pieces += [page[end : block.start], "".join(f"{line}\n" for line in now)]
        end = block.end
    path.write_text("".join([*pieces, page[end:]]), encoding="utf-8")


def main() -> None:
    """Renew the pages that are named."""
    for name in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as folder:

            def run(words: list[str], folder: str = folder) -> str:
                program = [str(Path(sys.executable).parent / words[0]), *words[1:]]
                done = subprocess.run(
                    program, cwd=folder, capture_output=True, text=True, timeout=1800, check=True, encoding="utf-8"
                )
                # Tables first where a program writes its progress beside them.
                return (done.stderr + done.stdout).replace(f"{Path(folder).resolve()}/", "")

            renew(Path(name), run)


if __name__ == "__main__":
    main()
