"""One run of a sweep, in a process of its own: what it breaks or leaves behind, down to being killed, stays with it.

The process is forked from a server that has imported everything already, where the system can fork: a fresh start
would cost as much as a small run.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import setup_globals
from omegaconf import DictConfig, OmegaConf

from lightning_topkast.app.errors import EXIT_CODE, one_line_errors
from lightning_topkast.app.result import DONE, FAILED, describe_start, status, write_result
from lightning_topkast.app.train import set_up_process, train

LOG_FILE = "run.log"
SWEEP_PID = "TOPKAST_SWEEP_PID"  # the variable that names the process of the whole sweep
_LOOK = 1.0  # seconds between two looks at whether that one is there
_END = 20.0  # seconds that a run may take to end once it is told to


def run_job(cfg: DictConfig) -> str:
    """Run what `cfg` describes in its folder, which Hydra's launcher has made, and return the status it ends with.

    All that happens to the run is in its `result.json`, and what it prints in its `run.log`. This function raises
    nothing but an interruption, so that no launcher gives up the other runs.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    rank = next((int(os.environ[name]) for name in ("RANK", "SLURM_PROCID") if name in os.environ), 0)
    if status(folder) in DONE:  # a requeued job
        return status(folder)
    start = describe_start(cfg)
    if rank == 0:
        write_result(folder, start)
    log = folder / (f"rank{rank}-{LOG_FILE}" if rank else LOG_FILE)
    before = log.stat().st_size if log.exists() else 0  # what earlier attempts have printed
    try:
        code = _run_in_process(cfg, log)
        error = what_failed(code, log.read_bytes()[before:].decode(errors="replace") if log.exists() else "")
    except Exception as reason:  # no process could be started
        error = f"{type(reason).__name__}: {reason}"
    if rank == 0 and status(folder) not in DONE:
        write_result(folder, {**start, "status": FAILED, "error": error})
    return status(folder)


def _run_in_process(cfg: DictConfig, log: Path) -> int:
    context = _context()
    environment = dict(os.environ)  # that of the server is older
    # As plain data: the classes behind parts of Hydra's own configuration can't be found by pickle.
    configs = (OmegaConf.to_container(config, resolve=False) for config in (cfg, HydraConfig.instance().cfg))
    process = context.Process(target=_work, args=(*configs, log, environment), name=log.parent.name)
    process.start()
    # Joblib's processes outlive the one that has started them. (A cluster's jobs shall.)
    sweep = os.environ.get(SWEEP_PID) == str(os.getppid()) and os.getppid()
    try:
        while process.is_alive() and (not sweep or sweep == os.getppid()):
            process.join(_LOOK)
    finally:
        if process.is_alive():
            process.terminate()
            process.join(_END)
            process.kill()
            process.join()
    if sweep and sweep != os.getppid():
        os._exit(1)  # with the runs that wait in this process
    assert process.exitcode is not None
    return process.exitcode


def _context() -> Any:
    methods = multiprocessing.get_all_start_methods()
    method = "forkserver" if "forkserver" in methods else "spawn"
    # A process tells those it starts its own method, and joblib's, "loky", is known nowhere else.
    if multiprocessing.get_start_method(allow_none=True) not in (None, *methods):
        multiprocessing.set_start_method(method, force=True)
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([__name__])
    return context


def _work(cfg: dict[str, Any], hydra: dict[str, Any], log: Path, environment: Mapping[str, str]) -> None:
    """What the process does; its exit code is that of `topkast-train`."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.clear()
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(file, stream.fileno())
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    setup_globals()
    HydraConfig.instance().cfg = OmegaConf.create(hydra)  # type: ignore[assignment]
    set_up_process()
    with one_line_errors():
        train(OmegaConf.create(cfg))


def _end_with_parent() -> None:
    """End as on Ctrl-C when the sweep's process is gone without having been able to say so."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_END)
    os._exit(1)


def what_failed(code: int, printed: str) -> str:
    """Return the last line of a run's error, or how its process was ended.

    Args:
        code: its exit code, negative for a signal.
        printed: all that it has printed.
    """
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    if code == EXIT_CODE:  # others may print after it, W&B for one
        lines = [line.partition(": ")[2] for line in lines if line.startswith("topkast-train: ")] or lines
    return lines[-1] if code and lines else f"ended with code {code} and without a result"
