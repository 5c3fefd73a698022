"""What a run over two nodes does when a process, the network or a node fails: network namespaces as nodes. Needs root.

    python reliability/multinode.py                  all cases, printed and written to results/multinode.json
    python reliability/multinode.py link_cut         one of them

Each node is a network namespace of its own with one process on the CPU (gloo); a veth pair joins them. torchrun starts
the processes on each node, in a loop that starts torchrun itself again, as docs/cluster.md advises. Every case must end
with exactly the weights, optimizer state and masks of an undisturbed run of two processes on one machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results" / "multinode.json"
PORT = 29400
LOST = re.compile(r"the connection to another process is lost|exitcode: -9|rendezvous.*(fail|error)", re.IGNORECASE)
EPOCH = re.compile(r"^epoch (\d+)/\d+:", re.MULTILINE)

# The processes of each attempt get a store of their own: in the one that torchrun shares with them they find addresses
# that an earlier attempt has left (pytorch issue 135712).
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}

# As in docs/cluster.md: a node that has lost the others, or torchrun itself, is tried again, so many times.
SUPERVISOR = 'for attempt in $(seq "$0"); do "$@" && exit 0; sleep 1; done; exit 1'


class Network:
    """Two namespaces and the link between them; every process in them ends with it."""

    addresses = ("10.99.0.1", "10.99.0.2")

    def __init__(self) -> None:
        tag = secrets.token_hex(3)
        self.spaces = (f"tk{tag}a", f"tk{tag}b")
        self.links = (f"v{tag}a", f"v{tag}b")

    def __enter__(self) -> Network:
        try:
            for space in self.spaces:
                ip("netns", "add", space)
                ip("-n", space, "link", "set", "lo", "up")
            ip("-n", self.spaces[0], "link", "add", self.links[0], "type", "veth", "peer", self.links[1],
               "netns", self.spaces[1])  # fmt: skip
            for space, link, address in zip(self.spaces, self.links, self.addresses, strict=True):
                ip("-n", space, "address", "add", f"{address}/24", "dev", link)
                ip("-n", space, "link", "set", link, "up")
                # torchrun's own connections wait without a timeout of theirs: until TCP gives up resending, after 15
                # minutes by default, with 6 tries after some 25 s.
                ip("netns", "exec", space, "sh", "-c", "echo 6 > /proc/sys/net/ipv4/tcp_retries2")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for node, space in enumerate(self.spaces):
            with contextlib.suppress(subprocess.CalledProcessError):
                self.kill(node)
                ip("netns", "delete", space)  # takes its end of the link, and so the other one, with it

    def pids(self, node: int) -> list[int]:
        return [int(pid) for pid in ip("netns", "pids", self.spaces[node]).split()]

    def kill(self, node: int) -> None:
        """Take a node's processes away at once, the loop around torchrun first of all."""
        for pid in self.pids(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def set_link(self, state: str) -> None:
        ip("-n", self.spaces[1], "link", "set", self.links[1], state)

    def worker(self, node: int) -> int:
        """The training process of a node: the one that torchrun has told its rank."""
        for pid in self.pids(node):
            with contextlib.suppress(OSError):
                if b"\0RANK=" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes():
                    return pid
        raise LookupError(f"node {node} has no training process")


class Job:
    """One run over both nodes; its standard output and error are kept by the node, with times."""

    def __init__(self, network: Network, folder: Path, overrides: list[str], attempts: int = 6) -> None:
        self.network, self.folder, self.overrides, self.attempts = network, folder, overrides, attempts
        folder.mkdir(parents=True)
        self.processes: list[subprocess.Popen[bytes]] = []
        self.begun = time.monotonic()
        for node in (0, 1):
            self.processes.append(self.start(node))

    def start(self, node: int) -> subprocess.Popen[bytes]:
        link, address = self.network.links[node], self.network.addresses[node]
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d",
            f"--rdzv-endpoint={self.network.addresses[0]}:{PORT}", "--rdzv-id=job", f"--local-addr={address}",
            "--max-restarts=3", f"--rdzv-conf=is_host={int(node == 0)},read_timeout=15,join_timeout=60",
            "--shutdown-timeout=5", "--monitor-interval=0.2",
            "-m", "lightning_topkast.app.commands.train", "trainer=multinode", *self.overrides,
        ]  # fmt: skip
        inside = ["ip", "netns", "exec", self.network.spaces[node]]
        with (self.folder / f"node{node}.log").open("ab") as log:
            return subprocess.Popen(
                [*inside, "bash", "-c", SUPERVISOR, str(self.attempts), *command],
                cwd=self.folder, stdout=log, stderr=log, start_new_session=True,
                env=os.environ | ENVIRONMENT | {"GLOO_SOCKET_IFNAME": link},
            )  # fmt: skip

    def log(self) -> str:
        return "".join(file.read_text(errors="replace") for file in sorted(self.folder.glob("node*.log")))

    def wait_for(self, happened: Callable[[str], Any], seconds: float, what: str) -> float:
        """Wait until the logs show it; return the seconds since the job began."""
        end = time.monotonic() + seconds
        while not happened(self.log()):
            if time.monotonic() > end:
                raise TimeoutError(f"{what} did not happen within {seconds} s:\n{self.log()[-6000:]}")
            time.sleep(0.1)
        return time.monotonic() - self.begun

    def finish(self, seconds: float) -> float:
        end = time.monotonic() + seconds
        for process in self.processes:
            try:
                code = process.wait(timeout=max(end - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                raise TimeoutError(f"the job did not end within {seconds} s:\n{self.log()[-6000:]}") from None
            if code != 0:
                raise RuntimeError(f"a node ended with code {code}:\n{self.log()[-6000:]}")
        return time.monotonic() - self.begun


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=60).stdout


def available() -> str | None:
    """None where namespaces can be made, else the reason why not."""
    if shutil.which("ip") is None or not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "needs root and `ip`"
    try:
        with Network():
            return None
    except (subprocess.CalledProcessError, OSError) as error:
        return f"network namespaces can't be made here: {getattr(error, 'stderr', error)}"


def epochs(log: str) -> int:
    return len(EPOCH.findall(log))


# What goes wrong; each begins in the middle of training and returns when it has done its harm and mended it.


def nothing(job: Job) -> None:
    """No fault."""


def worker_killed(job: Job) -> None:
    """The training process of one node gets SIGKILL."""
    os.kill(job.network.worker(1), signal.SIGKILL)


def link_cut(job: Job, seconds: float = 20.0) -> None:
    """The link goes down and comes up again after a while."""
    job.network.set_link("down")
    time.sleep(seconds)
    job.network.set_link("up")


def node_killed(job: Job) -> None:
    """The second node vanishes with its torchrun, and is started again after 3 s."""
    job.network.kill(1)
    time.sleep(3)
    job.processes[1] = job.start(1)


def first_node_killed(job: Job) -> None:
    """The node that hosts torchrun's store vanishes, and is started again after 3 s."""
    job.network.kill(0)
    time.sleep(3)
    job.processes[0] = job.start(0)


CASES = {case.__name__: case for case in (nothing, worker_killed, link_cut, node_killed, first_node_killed)}


def overrides(epochs: int, timeout: int) -> list[str]:
    """Epochs of 10 steps, each with a checkpoint at its end; `timeout` in seconds."""
    return [
        "logger=none", "test=false", "data.batch_size=32", "trainer.limit_train_batches=10", "trainer.accelerator=cpu",
        "trainer.limit_val_batches=1", f"trainer.max_epochs={epochs}", f"trainer.strategy.timeout.seconds={timeout}",
        "sparsity.schedule.update_every=7", "callbacks.checkpoint=null",
    ]  # fmt: skip


def reference(folder: Path, options: list[str]) -> Path:
    """Train two processes on one machine, undisturbed; return the last checkpoint."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        "-m", "lightning_topkast.app.commands.train", "trainer=multinode", *options, f"hydra.run.dir={folder}/run",
    ]  # fmt: skip
    folder.mkdir(parents=True)
    with subprocess.Popen(command, cwd=folder, env=os.environ | ENVIRONMENT, stdout=subprocess.DEVNULL) as process:
        try:
            code = process.wait(timeout=1500)
        finally:
            process.terminate()  # torchrun then ends its processes
    if code:
        raise RuntimeError(f"the undisturbed run ended with code {code}")
    return folder / "run" / "checkpoints" / "last.ckpt"


def run_case(fault: Callable[[Job], None], folder: Path, options: list[str], expected: Path) -> dict[str, Any]:
    """Train over two nodes through `fault`; return what happened when, in seconds, and whether the result is exact."""
    with Network() as network:
        job = Job(network, folder, options)
        job.wait_for(lambda log: epochs(log) >= 5, 600, "training")
        before = job.log()
        at = time.monotonic() - job.begun
        found: dict[str, Any] = {"fault": fault.__name__, "first_epochs_at": at}
        if fault is not nothing:
            with watching(job, before) as seen:
                fault(job)
                mended = time.monotonic() - job.begun
                job.wait_for(lambda _: "resumed" in seen, 1200, "a restart")
            found |= {
                "detected_after": seen["lost"] - at, "mended_after": mended - at,
                "training_again_after": seen["resumed"] - at,
            }  # fmt: skip
        found["total"] = job.finish(1200)
        log = job.log()
    found["error"] = next((line for line in log.splitlines() if "connection to another process is lost" in line), None)
    found["resumed_from"] = re.findall(r"resuming from \S+, step (\d+)", log)
    (last,) = folder.glob("outputs/torchrun-job/checkpoints/last.ckpt")
    found["exact"] = differences(last, expected) == []
    return found


def link_gone(folder: Path, options: list[str]) -> dict[str, Any]:
    """Cut the link for good, with nobody to start torchrun again; return when each node gave up, in seconds."""
    with Network() as network:
        job = Job(network, folder, options, attempts=1)
        job.wait_for(lambda log: epochs(log) >= 5, 600, "training")
        network.set_link("down")
        cut = time.monotonic()
        found: dict[str, Any] = {"fault": "link_gone"}
        for node in (1, 0):
            code = job.processes[node].wait(timeout=1500)
            found[f"node{node}"] = {"ended_after": time.monotonic() - cut, "code": code}
        last = [(folder / f"node{node}.log").read_text(errors="replace").splitlines() for node in (0, 1)]
    found["errors"] = [[line for line in log if "connection to another process is lost" in line][:1] for log in last]
    return found


@contextlib.contextmanager
def watching(job: Job, before: str) -> Iterator[dict[str, float]]:
    """Note when the logs first tell of a loss, and when training has gone on."""
    seen: dict[str, float] = {}
    done = threading.Event()
    begun = {file: file.stat().st_size for file in job.folder.glob("node*.log")}

    def watch() -> None:
        while not done.wait(0.05):
            new = {file: file.read_bytes()[size:].decode(errors="replace") for file, size in begun.items()}
            if "lost" not in seen and any(LOST.search(text) for text in new.values()):
                seen["lost"] = time.monotonic() - job.begun
            for text in new.values():
                if "resumed" not in seen and EPOCH.search(
                    text.rpartition("resuming from")[2] if "resuming from" in text else ""
                ):
                    seen["resumed"] = time.monotonic() - job.begun

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def differences(path: Path, expected: Path) -> list[str]:
    """Name what differs between two checkpoints in weights, optimizer, schedule and the callback's state."""
    one, other = (torch.load(file, weights_only=True, map_location="cpu") for file in (path, expected))
    names = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch")
    parts = {name: (one[name], other[name]) for name in names}
    for key in one["callbacks"]:
        if key.startswith("TopKast"):
            parts[key] = (one["callbacks"][key], other["callbacks"][key])
    return [name for name, (a, b) in parts.items() if not same(a, b)]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def main() -> None:
    names = [*CASES, "link_gone"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(names)}; all without any")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--timeout", type=int, default=10, help="of trainer.strategy, in seconds")
    parser.add_argument("--keep", type=Path, help="a folder for logs and checkpoints")
    arguments = parser.parse_args()
    cases = arguments.cases or names
    if not set(cases) <= set(names):
        parser.error(f"no such case among {cases}: choose from {names}")
    reason = available()
    if reason:
        raise SystemExit(reason)
    options = overrides(arguments.epochs, arguments.timeout)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        expected = reference(folder / "reference", options)
        found = []
        for case in cases:
            if case == "link_gone":
                found.append(link_gone(folder / case, options))
            else:
                found.append(run_case(CASES[case], folder / case, options, expected))
            print(json.dumps(found[-1], indent=1), flush=True)
    if cases == names:
        RESULTS.write_text(json.dumps({"timeout": arguments.timeout, "cases": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
