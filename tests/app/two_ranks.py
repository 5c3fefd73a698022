"""Run by test_language.py as `python two_ranks.py OVERRIDE ... --- OVERRIDE ...`: each run on two forked ranks.

One import serves all of them; each has torchrun's variables. Both ranks print to this process's own output.
"""

import os
import signal
import sys
from itertools import groupby

from lightning.fabric.plugins.environments.lightning import find_free_network_port

from lightning_topkast.app.run.train import set_up_process
from tests.app.rank_process import train_as_rank


def rank_of_two(rank: int, port: int, overrides: list[str]) -> int:
    """Fork a rank; return its process id."""
    pid = os.fork()
    if pid:
        return pid
    signal.alarm(1500)  # ends a rank that waits for the other in vain
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    train_as_rank(rank, ranks | meeting, ["trainer=ddp_cpu", *overrides])


if __name__ == "__main__":
    runs = [list(run) for separates, run in groupby(sys.argv[1:], lambda argument: argument == "---") if not separates]
    set_up_process()
    for run in runs:
        port = find_free_network_port()
        pids = [rank_of_two(rank, port, run) for rank in (0, 1)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        if codes != [0, 0]:
            sys.exit(f"the ranks of {run} ended with {codes}")
