"""How the parts of gpu.py time their work on a device, and what they print alike."""

import gc
import sys
from collections.abc import Callable, Iterator
from statistics import median
from time import perf_counter

import torch
from tables import Row

Call = Callable[[], object]

PAIRS = ((0.8, 0.5), (0.9, 0.8), (0.95, 0.9), (0.98, 0.95))  # forward and backward sparsity
_SHORTEST, _LONGEST = 2_000_000, 100_000_000  # cycles that the device sleeps, some 1 and 50 ms


class Clock:
    """Milliseconds of a call between events on the device; by the wall where there is no GPU."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self._ahead = _SHORTEST

    def eager(self, call: Call) -> float:
        """With the device idle at first, as it is where launching takes longer than what is launched."""
        if not self.on_gpu:
            return self.wall(call)
        return self._between_events(call, 0)[0]

    def queued(self, call: Call) -> float:
        """With all of it launched before the device begins: it sleeps until then. In vain if the call waits for it."""
        while self.on_gpu and self._ahead <= _LONGEST:
            ms, was_late = self._between_events(call, self._ahead)
            if not was_late:
                return ms
            self._ahead *= 2
        return self.eager(call)

    def wall(self, call: Call) -> float:
        """Until the device is done, the host's own work included."""
        self._wait()
        start = perf_counter()
        call()
        self._wait()
        return (perf_counter() - start) * 1e3

    def _between_events(self, call: Call, ahead: int) -> tuple[float, bool]:
        """Milliseconds, and whether the device had begun before all was launched."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._wait()
        if ahead:
            torch.cuda._sleep(ahead)
        begin.record()
        call()
        end.record()
        was_late = begin.query()
        self._wait()
        return float(begin.elapsed_time(end)), was_late

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


def medians(calls: dict[str, Call], device: torch.device, rounds: int, queued: bool = True) -> dict[str, float]:
    """Each call in turn, in milliseconds; a call that fails is left out."""
    usable: dict[str, Call] = {}
    for name, call in calls.items():
        try:
            for _ in range(2):  # the first one compiles and tunes
                call()
            usable[name] = call
        except Exception as error:  # a rival may fail in any way
            print(f"{name} failed: {in_a_line(error)}", file=sys.stderr)
    times: dict[str, list[float]] = {name: [] for name in usable}
    clocks = {name: Clock(device) for name in usable}  # each finds out how long its call takes to launch
    for _ in range(rounds):
        for name, call in usable.items():
            times[name].append(clocks[name].queued(call) if queued else clocks[name].eager(call))
    return {name: median(several) for name, several in times.items()}


def filled(row: Row, figures: Iterator[Row], device: torch.device) -> Row:
    """Add figures to a row as they are made. A failure, as of memory, is said in it; a part goes on with its next row.

    All that the figures' making has held is free afterwards.

    Raises:
        RuntimeError: nothing runs on the device any more, as after a kernel has failed; the process must end.
    """
    try:
        for each in figures:
            row |= each
    except Exception as error:  # the other rows are still worth their time
        row["failed"] = in_a_line(error)
    gc.collect()
    if device.type == "cuda":
        try:
            torch.cuda.synchronize()
        except Exception as error:
            raise RuntimeError(f"the device is lost after {row}") from error
        torch.cuda.empty_cache()
    return row


def in_a_line(error: Exception) -> str:
    return (f"{type(error).__name__}: {error}".splitlines() or [""])[0][:160]


def peak_memory(step: Call, device: torch.device) -> float | None:
    """MB that a step needs on the device beyond what lay there before it."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def pair_name(pair: tuple[float, float]) -> str:
    return f"{pair[0]:.0%} / {pair[1]:.0%}"


def device_name(device: torch.device) -> str:
    """What was timed, for a table's title."""
    if device.type != "cuda":
        return "a rehearsal on CPU, whose times mean nothing"
    return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, CUDA {torch.version.cuda}"


def aim(text: str, measured: float | None, limit: float, at_least: bool = False) -> Row:
    """A row of the summary; `measured` is None where no row has it."""
    if measured is None:
        return {"aim": text, "measured": None, "met": "not measured"}
    met = measured >= limit if at_least else measured <= limit
    return {"aim": text, "measured": measured, "met": "met" if met else "not met"}
