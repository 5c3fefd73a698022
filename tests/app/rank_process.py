"""What a forked process does that is one rank of `topkast-train`."""

import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import NoReturn

from lightning.pytorch.utilities import rank_zero_only

from lightning_topkast.app.commands.train import main


def train_as_rank(rank: int, variables: Mapping[str, object], arguments: Sequence[str]) -> NoReturn:
    """Train with `arguments` under further environment variables, and exit with the command's code."""
    code = 1
    try:
        os.environ.update({name: str(value) for name, value in variables.items()})
        rank_zero_only.rank = rank  # what a process that is started with these variables finds out at import
        sys.argv = ["topkast-train", *arguments]
        main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
