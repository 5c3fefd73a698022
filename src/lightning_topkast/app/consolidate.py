"""`topkast-consolidate`: one ordinary checkpoint of a distributed one."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lightning_topkast import TopKastError
from lightning_topkast.training.sharded_checkpoint import consolidate


def main() -> None:
    """Run on the command line's arguments."""
    parser = argparse.ArgumentParser(
        prog="topkast-consolidate",
        description="Make one checkpoint file of a folder that trainer=fsdp2_sharded has saved: to evaluate it, to go "
        "on from it on one device or with DDP, to hand it on. Only read folders that you trust.",
    )
    parser.add_argument("folder", type=Path, help="the distributed checkpoint")
    parser.add_argument("file", type=Path, help="the file to write")
    arguments = parser.parse_args()
    if arguments.file.exists():
        parser.error(f"{arguments.file} exists already: name another file")
    try:
        consolidate(arguments.folder, arguments.file)
    except (TopKastError, OSError) as error:
        print(f"topkast-consolidate: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"wrote {arguments.file}, {arguments.file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
