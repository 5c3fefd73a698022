"""Kills trainings again and again, and compares what they end with to an uninterrupted one, bit for bit.

    OMP_NUM_THREADS=1 python reliability/kills.py [--kills 15] [--ranks 1 2] [--seed 0] [--json FILE]

Every training is a small one with a checkpoint every few steps. It is killed by SIGKILL, one rank or all of them, at
a random moment or where it waits to be: in the middle of a refresh, or of writing a checkpoint. Then it is started
again from the checkpoint, until it ends. The processes are forked from this one, which has imported everything.
`--plugin lightning` shows that the comparison can fail: Lightning's own writing, with the folder for temporary files
on another file system (TMPDIR=/dev/shm), loses the checkpoint.
"""

import argparse
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from killable import STUCK, Kind, Moment, Place, Target, newest_checkpoint, train
from torch import Tensor, nn

Row = dict[str, Any]

KINDS = [
    Kind("masked", 1),
    Kind("masked", 2),
    Kind("masked", 2, strategy="fsdp2"),
    Kind("packed", 1, accumulate=2, delay=1),
    Kind("packed", 2),
    Kind("packed", 2, accumulate=2, delay=1),
    Kind("packed", 2, strategy="fsdp2"),
    Kind("packed", 2, strategy="fsdp2", accumulate=2, delay=1),
]
KILLS_A_TRAINING = 8  # then it is left alone, so that it ends
NAMES = {
    Moment.STARTING: "starting", Moment.TRAINING: "in a step", Moment.CHOOSING: "choosing",
    Moment.REFRESHING: "in a refresh", Moment.WRITING: "writing", Moment.ENDED: "ending",
}  # fmt: skip


class Trial:
    """Trainings of one kind in a folder.

    Args:
        kind: how they train.
        folder: an empty one.
        generator: decides when and whom to kill.
    """

    def __init__(self, kind: Kind, folder: Path, generator: random.Random) -> None:
        self.kind, self.folder, self.random = kind, folder, generator
        self.place = Place()
        self.kills: Counter[str] = Counter()
        self.victims: Counter[str] = Counter()
        self.trainings = 0
        self.slowest_survivor = 0.0

    def run(self, kills: int) -> Row:
        """Kill `kills` times; what happened.

        Raises:
            RuntimeError: a checkpoint is damaged or older than the one before, a process hangs, or a training ends
                otherwise than the uninterrupted one.
        """
        whole = self._training(0)
        while self.kills.total() < kills:
            self.trainings += 1
            ended = self._training(min(KILLS_A_TRAINING, kills - self.kills.total()))
            for rank, (one, other) in enumerate(zip(whole, ended, strict=True)):
                if differing := difference(one, other):
                    raise RuntimeError(f"{self.kind}: rank {rank} ended with another {differing}")
        row: Row = {"training": str(self.kind), "kills": self.kills.total()}
        row |= {name: self.kills[name] for name in NAMES.values()}
        row |= {
            "trainings": self.trainings,
            "victims": ", ".join(f"{n} {who}" for who, n in sorted(self.victims.items())),
        }
        return row | ({"survivor, s": self.slowest_survivor} if self.kind.ranks > 1 else {})

    def _training(self, kills: int) -> list[Any]:
        """Train to the end in spite of so many kills; what every rank ended with."""
        folder = self.folder / str(self.trainings)
        folder.mkdir()
        done, step = 0, 0
        for _ in range(10 * kills + 1):
            killed = self._start(folder, wanted=done < kills)
            done += killed
            _, now = newest_checkpoint(folder)
            if now < step:
                raise RuntimeError(f"{self.kind}: the checkpoint went back from step {step} to {now}")
            step = now
            if not killed:
                break
        return [torch.load(folder / f"ended-{rank}.pt", weights_only=True) for rank in range(self.kind.ranks)]

    def _start(self, folder: Path, wanted: bool) -> bool:
        """Start all ranks and, if that is wanted, kill some before they end; return whether that was done."""
        self.place.clear()
        target, delay, from_training = self._plan() if wanted else (None, 0.0, False)
        processes = Processes(self.kind, folder, self.place, target)
        due: float | None = None if from_training else time.monotonic() + delay
        deadline = time.monotonic() + 600
        while processes.poll():
            if time.monotonic() > deadline:
                processes.kill(list(processes.running))
                raise RuntimeError(f"{self.kind}: a process hangs")
            if due is None and self.place.moment(0) != Moment.STARTING:
                due = time.monotonic() + delay
            there = self.place.waits(target.rank) if target else due is not None and time.monotonic() > due
            if wanted and there and len(processes.running) == self.kind.ranks:
                self._kill(processes, target)
                return True
            time.sleep(0.0005)
        return False

    def _plan(self) -> tuple[Target | None, float, bool]:
        """Where to kill, or else after how many seconds, from the start or from the first step."""
        draw = self.random
        kind_of_kill = draw.choices(["in a refresh", "writing", "from the first step", "from the start"], [3, 3, 5, 1])[
            0
        ]
        if kind_of_kill == "in a refresh":
            moment = draw.choice([Moment.REFRESHING, Moment.CHOOSING]) if self.kind.delay else Moment.REFRESHING
            return Target(draw.randrange(self.kind.ranks), moment, draw.randint(1, 6)), 0, False
        if kind_of_kill == "writing" and self.kind.strategy == "fsdp2":  # each rank writes a file, of many tensors
            return (
                Target(draw.randrange(self.kind.ranks), Moment.WRITING, draw.randint(1, 50), draw.randrange(2)),
                0,
                False,
            )
        if kind_of_kill == "writing":
            return Target(0, Moment.WRITING, draw.randint(1, 3), draw.randrange(4)), 0, False
        return None, draw.uniform(0, 0.4), kind_of_kill == "from the first step"

    def _kill(self, processes: "Processes", target: Target | None) -> None:
        """Kill one rank or all, and see that those left end too."""
        alone = [[rank] for rank in processes.running]
        victims = self.random.choice([*alone, list(processes.running)] if self.kind.ranks > 1 else alone)
        if any(self.place.moment(rank) == Moment.STARTING for rank in processes.running):
            # before the ranks have met, only what has started them (srun, torchrun, Lightning) ends those left
            victims = list(processes.running)
        processes.kill(victims)
        at_target = target is not None and target.rank in victims
        self.kills[NAMES[target.moment if at_target else self.place.moment(victims[0])]] += 1
        self.victims["all" if len(victims) == self.kind.ranks else f"rank {victims[0]}"] += 1
        since = time.monotonic()
        while processes.poll(may_fail=True):
            time.sleep(0.005)
            if time.monotonic() - since > 2 * STUCK.total_seconds():
                processes.kill(list(processes.running))
                raise RuntimeError(f"{self.kind}: a rank outlives another that was killed")
        if len(victims) < self.kind.ranks:
            self.slowest_survivor = max(self.slowest_survivor, time.monotonic() - since)


class Processes:
    """The ranks of one start."""

    def __init__(self, kind: Kind, folder: Path, place: Place, target: Target | None) -> None:
        self.folder = folder
        self.running: dict[int, int] = {}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(kind.ranks):
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    with (folder / f"{rank}.log").open("w") as log:
                        os.dup2(log.fileno(), 1)
                        os.dup2(log.fileno(), 2)
                    train(kind, folder, rank, port, place, target)
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stderr.flush()
                    os._exit(code)
            self.running[rank] = pid

    def poll(self, may_fail: bool = False) -> bool:
        """Whether any is still running."""
        for rank, pid in list(self.running.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del self.running[rank]
                if os.waitstatus_to_exitcode(status) and not may_fail:
                    self.kill(list(self.running))
                    raise RuntimeError(f"rank {rank} failed: {(self.folder / f'{rank}.log').read_text()[-2000:]}")
        return bool(self.running)

    def kill(self, ranks: list[int]) -> None:
        """End these ranks as the system's memory killer would, all before any is waited for."""
        for rank in ranks:
            os.kill(self.running[rank], signal.SIGKILL)
        for rank in ranks:
            os.waitpid(self.running.pop(rank), 0)


def difference(one: Any, other: Any, where: str = "end") -> str | None:
    """Where two nested structures of tensors and primitives first differ, if they do."""
    if isinstance(one, Tensor):
        return None if torch.equal(one, other) else where
    if isinstance(one, dict) and one.keys() == other.keys():
        found = (difference(one[key], other[key], f"{where}/{key}") for key in one)
    elif isinstance(one, list | tuple) and len(one) == len(other):
        found = (difference(*pair, f"{where}/{index}") for index, pair in enumerate(zip(one, other, strict=True)))
    else:
        return None if one == other else where
    return next((place for place in found if place), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=15, help="of every kind of training (default: %(default)s)")
    parser.add_argument("--storage", nargs="+", default=["masked", "packed"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--plugin", choices=["ours", "lightning"], default="ours", help="what writes the checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])  # imports much; autograd must not run before forking
    rows: list[Row] = []
    for kind in KINDS:
        if kind.storage not in arguments.storage or kind.ranks not in arguments.ranks:
            continue
        with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix="kills-") as folder:
            trial = Trial(
                replace(kind, plugin=arguments.plugin), Path(folder), random.Random(f"{arguments.seed} {kind}")
            )
            try:
                rows.append(trial.run(arguments.kills))
                print(", ".join(f"{key}: {value}" for key, value in rows[-1].items()), flush=True)
            except Exception as error:
                sys.exit(f"after {trial.kills.total()} kills ({dict(trial.kills)}): {error}")
    print("every killed training ended with the uninterrupted one's weights, θ, sets and optimizer state")
    if arguments.json:
        arguments.json.write_text(json.dumps({"seed": arguments.seed, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
