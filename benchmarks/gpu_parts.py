"""The parts of gpu.py in turn, within a time that is not exceeded, and in a process whose end is not that of the rest.

What a part has measured is known row by row, so that nothing is lost if it fails, hangs, or breaks the device.
"""

import multiprocessing
import os
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from time import monotonic
from typing import Any

import torch
from tables import Row

LEAST = 5.0  # seconds without which a part is not begun
PATIENCE = 1.5  # times a part's own seconds, after which it is ended in the middle of a row


def no_aims(rows: list[Row]) -> list[Row]:
    return []


@dataclass(frozen=True)
class Part:
    """Something that can be timed by itself.

    Args:
        title: of its table.
        sizes: what `measure` is given, by the name of the scale.
        measure: yields rows; a function of a module, since another process calls it.
        aims: rows of the summary, from those of `measure`.
        share: of the time, relative to the other parts' shares. What a part leaves goes to those after it.
    """

    title: str
    sizes: dict[str, Any]
    measure: Callable[[Any, torch.device], Iterator[Row]]
    aims: Callable[[list[Row]], list[Row]] = no_aims
    share: float = 1.0


@dataclass
class Result:
    """What a part has given.

    Args:
        failed: the traceback, or how its process ended.
        left_out: what there was no time for.
        seconds: that it took; None while it runs.
    """

    rows: list[Row] = field(default_factory=list)
    failed: str | None = None
    left_out: str | None = None
    seconds: float | None = None


def run_parts(parts: dict[str, Part], scale: str, device: torch.device, end: float) -> Iterator[tuple[str, Result]]:
    """Yield a part's name and result after each of its rows, and when it has ended.

    Args:
        parts: in the order in which they run.
        scale: the name of the sizes.
        device: of the tensors.
        end: when all of it must be over, by `time.monotonic`, which all processes share.
    """
    worker = _Worker()
    try:
        for place, name in enumerate(parts):
            result, start = Result(), monotonic()
            shares = [part.share for part in list(parts.values())[place:]]
            seconds = (end - start) * shares[0] / sum(shares)
            limit = min(start + PATIENCE * seconds, end)
            if seconds < LEAST:
                result.left_out = f"all of it: {max(seconds, 0):.0f} s were left for it"
            else:
                for _ in worker.run((parts[name], scale, device, start + seconds), result, limit):
                    yield name, result
            result.seconds = monotonic() - start
            yield name, result
    finally:
        worker.stop()


Request = tuple[Part, str, torch.device, float]  # what is timed, the name of its sizes, where, and when it is to end


class _Worker:
    """A process that runs parts; another one after a failure, since the device may be broken for the first."""

    def __init__(self) -> None:
        self.process: multiprocessing.process.BaseProcess | None = None

    def run(self, request: Request, result: Result, limit: float) -> Iterator[None]:
        """Add a part's rows to its result, pausing after each; at the limit it is ended."""
        if self.process is None:
            self._start()
        try:
            self.connection.send(request)
            while self.connection.poll(max(limit - monotonic(), 0)):
                message = self.connection.recv()
                if isinstance(message, _End):
                    result.failed, result.left_out = message.failed, message.left_out
                    break
                result.rows.append(message)
                yield
            else:
                result.left_out = f"what follows its {len(result.rows)} rows: it was ended in the middle of one"
                self.stop()
        except (EOFError, OSError):
            self.stop()
            result.failed = f"its process ended with exit code {self.exit_code}"
        if result.failed:
            self.stop()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,))
        self.process.start()
        theirs.close()

    def stop(self) -> None:
        if self.process is not None:
            self.connection.close()  # which tells it to end
            self.process.join(1)
            self.process.kill()
            self.process.join()
            self.exit_code = self.process.exitcode
            self.process = None


@dataclass(frozen=True)
class _End:
    """A part's last message; the fields are those of `Result`."""

    failed: str | None = None
    left_out: str | None = None


def _serve(connection: Connection) -> None:
    """In the process: time what is asked for, until nobody asks any more."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            part, scale, device, until = connection.recv()
        except EOFError:
            return
        rows, end = 0, _End()
        try:
            for row in part.measure(part.sizes[scale], device):
                connection.send(row)
                rows += 1
                if monotonic() > until:
                    end = _End(left_out=f"what may follow its {rows} rows: its time was over")
                    break
        except BrokenPipeError:
            return
        except Exception:
            end = _End(failed=traceback.format_exc())
        connection.send(end)


def _end_with_parent() -> None:
    """Leave no process on a device when the one that asked has been killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
