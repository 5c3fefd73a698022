"""Run by test_language.py as `python two_ranks.py OVERRIDE ... --- OVERRIDE ...`: each run on two forked ranks.

One import serves all of them; each has torchrun's variables. Both ranks print to this process's own output.
"""

import os
import signal
import sys
import traceback
from itertools import groupby

from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch.utilities import rank_zero_only

from lightning_topkast.app.train import main, set_up_process


def rank_of_two(rank: int, port: int, overrides: list[str]) -> int:
    """Fork a rank; return its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    signal.alarm(100)  # ends a rank that waits for the other in vain
    try:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        os.environ.update({name: str(value) for name, value in ranks.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test")
        rank_zero_only.rank = rank  # what a process that is started with these variables finds out at import
        sys.argv = ["topkast-train", "trainer=ddp_cpu", *overrides]
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


if __name__ == "__main__":
    runs = [list(run) for separates, run in groupby(sys.argv[1:], lambda argument: argument == "---") if not separates]
    set_up_process()
    for run in runs:
        port = find_free_network_port()
        pids = [rank_of_two(rank, port, run) for rank in (0, 1)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        if codes != [0, 0]:
            sys.exit(f"the ranks of {run} ended with {codes}")
