"""`topkast-consolidate`: convert a distributed checkpoint into a single file."""

from __future__ import annotations

from pathlib import Path

from lightning_topkast.app.commands.common import argument_parser, console_script
from lightning_topkast.app.terminal import say

PROGRAM = "topkast-consolidate"

_DESCRIPTION = """\
Converts a distributed checkpoint of trainer=fsdp2_sharded into a single file, to evaluate or export it, or to resume
from it on one device or with DDP. No code in the folder is run.
"""


def main() -> None:
    """Run the command."""
    with console_script(PROGRAM):
        parser = argument_parser(PROGRAM, _DESCRIPTION)
        parser.add_argument("folder", type=Path, help="the distributed checkpoint")
        parser.add_argument("file", type=Path, help="the file to write")
        given = parser.parse_args()
        if given.file.exists():
            parser.error(f"{given.file} exists already: name another file")
        import lightning_topkast.app.vision  # noqa: F401  before Lightning
        from lightning_topkast.training.sharded_checkpoint import consolidate

        consolidate(given.folder, given.file)
        say(f"wrote {given.file}, {given.file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
