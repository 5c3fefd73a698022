"""Run by test_nodes.py as `python slurm_tasks.py FOLDER`: forks the two tasks of a SLURM job.

One import serves all tasks; each has SLURM's variables, its own command line and a log.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from lightning.fabric.plugins.environments.lightning import find_free_network_port

from tests.app.rank_process import train_as_rank

OPTIONS = [
    "trainer=slurm", "trainer.accelerator=cpu", "trainer.precision=32-true", "logger=none", "data.batch_size=32",
    "trainer.limit_train_batches=10", "trainer.limit_val_batches=1", "trainer.strategy.timeout.seconds=200",
]  # fmt: skip


def task(rank: int, port: int, overrides: list[str], log: Path) -> int:
    """Fork a task; return its process id."""
    pid = os.fork()
    if pid:
        return pid
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    slurm = {"PROCID": rank, "LOCALID": rank, "NODEID": 0, "NTASKS": 2, "NTASKS_PER_NODE": 2, "NNODES": 1}
    slurm |= {"JOB_ID": 4242, "STEP_ID": 0, "JOB_NAME": "train"}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PATH": "/nowhere"}
    train_as_rank(rank, {f"SLURM_{name}": value for name, value in slurm.items()} | meeting, [*OPTIONS, *overrides])


def job(name: str, *overrides: str, rank1: tuple[str, ...] = (), signalled: bool = False) -> None:
    """Run both tasks to their end and note their exit codes.

    Task 1 alone may get the signals: in the fourth epoch that to requeue, and once the job is saved that to end.
    """
    log, result = Path(f"{name}.log"), Path(f"{name}.json")
    port = find_free_network_port()
    pids = [task(rank, port, [*overrides, *(rank1 if rank else ())], log) for rank in (0, 1)]
    saved = Path("outputs/slurm-4242-0/hpc_ckpt_1.ckpt")
    codes: dict[int, int] = {}
    end = time.monotonic() + 600
    while len(codes) < 2 and time.monotonic() < end:
        if signalled and log.exists() and "epoch 3/" in log.read_text():
            os.kill(pids[1], signal.SIGUSR1)
            signalled = False
        if name == "asked" and saved.exists():
            time.sleep(0.5)  # training has gone on
            os.kill(pids[1], signal.SIGTERM)
            name = "asked and ended"
        for pid in pids:
            if pid not in codes and (status := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(status[1])
        time.sleep(0.05)
    for pid in set(pids) - codes.keys():
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    result.write_text(json.dumps([codes.get(pid) for pid in pids]))


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    job("asked", "trainer.max_epochs=100000", signalled=True)
    job("unshared", "trainer.max_epochs=100000", rank1=("hydra.run.dir=elsewhere",))
