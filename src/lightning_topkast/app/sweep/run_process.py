"""Run one run of a sweep in its own process, so that no failure of it affects the others.

Where the system can fork, the process is forked from a server that has imported everything, since a fresh start would
take as long as a small run.
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
from lightning_topkast.app.limits import LONGEST_TEXT
from lightning_topkast.app.run.describe import describe_start
from lightning_topkast.app.run.train import set_up_process, train
from lightning_topkast.app.run_folder.folder import RunFolder
from lightning_topkast.app.run_folder.result import COMPLETED, FAILED, Status, write_result
from lightning_topkast.app.terminal import say
from lightning_topkast.files import regular_file

LOG_FILE = "run.log"
SWEEP_PID = "TOPKAST_SWEEP_PID"  # environment variable with the process of the whole sweep
_POLL = 1.0  # seconds between two checks of whether that process is alive
_MOST_PRINTED = 1 << 24  # bytes of a log, at its end, in which the error of a run is looked for
_END = 20.0  # seconds in which a run must end after it is told to


def run_in_folder(cfg: DictConfig) -> str:
    """Run the configuration in the folder that Hydra's launcher has created, and return the final status.

    The outcome is in `result.json`, and the output in `run.log`. Nothing but an interruption is raised, since a
    launcher would give up the other runs.
    """
    run = RunFolder(HydraConfig.get().runtime.output_dir)
    folder = run.path
    rank = next((int(os.environ[name]) for name in ("RANK", "SLURM_PROCID") if name in os.environ), 0)
    status = _status(run)
    if status is None or status in COMPLETED:  # a requeued job
        return str(status)
    start = describe_start(cfg)
    if rank == 0:
        write_result(folder, start)
    log = folder / (f"rank{rank}-{LOG_FILE}" if rank else LOG_FILE)
    before = log.stat().st_size if log.exists() else 0  # the output of earlier attempts
    try:
        code = _run_in_process(cfg, log)
        error = what_failed(code, _printed(log, before))
    except Exception as reason:  # the process could not be started
        error = f"{type(reason).__name__}: {reason}"
    status = _status(run)
    if rank == 0 and not (status is None or status in COMPLETED):
        write_result(folder, start.model_copy(update={"status": FAILED, "error": error[:LONGEST_TEXT]}))
    return str(_status(run))


def _status(run: RunFolder) -> Status | None:
    """Return the status, or None if the result cannot be read: it may be of a completed run, and stays as it is."""
    try:
        return run.status
    except OSError as error:
        say(f"topkast-compare: {run.path}: its result cannot be read ({error.strerror})", error=True)
        return None


def _run_in_process(cfg: DictConfig, log: Path) -> int:
    context = _context()
    environment = dict(os.environ)  # the server has an older one
    # As plain data, since pickle does not find the classes behind parts of Hydra's own configuration.
    configs = (OmegaConf.to_container(config, resolve=False) for config in (cfg, HydraConfig.instance().cfg))
    process = context.Process(target=_work, args=(*configs, log, environment), name=log.parent.name)
    process.start()
    # Joblib's processes outlive the process that started them. (The jobs of a cluster are meant to.)
    sweep = os.environ.get(SWEEP_PID) == str(os.getppid()) and os.getppid()
    try:
        while process.is_alive() and (not sweep or sweep == os.getppid()):
            process.join(_POLL)
    finally:
        if process.is_alive():
            process.terminate()
            process.join(_END)
            process.kill()
            process.join()
    if sweep and sweep != os.getppid():
        os._exit(1)  # and give up the runs that wait in this process
    assert process.exitcode is not None
    return process.exitcode


def _context() -> Any:
    methods = multiprocessing.get_all_start_methods()
    method = "forkserver" if "forkserver" in methods else "spawn"
    # A process passes its start method on to its children, and that of joblib, "loky", is not known to them.
    if multiprocessing.get_start_method(allow_none=True) not in (None, *methods):
        multiprocessing.set_start_method(method, force=True)
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([__name__])
    return context


def _work(cfg: dict[str, Any], hydra: dict[str, Any], log: Path, environment: Mapping[str, str]) -> None:
    """Run in the new process, with the exit codes of `topkast-train`."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.clear()
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)  # less what the umask takes
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(file, stream.fileno())
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    setup_globals()
    HydraConfig.instance().cfg = OmegaConf.create(hydra)  # type: ignore[assignment]
    set_up_process()
    with one_line_errors("topkast-train"):
        train(OmegaConf.create(cfg))


def _end_with_parent() -> None:
    """End as on Ctrl-C when the process of the sweep has died."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_END)
    os._exit(1)


def _printed(log: Path, before: int) -> str:
    """Return the end of what a run has printed after the first `before` bytes of its log."""
    try:
        with open(log, "rb", opener=regular_file) as file:
            file.seek(max(before, file.seek(0, os.SEEK_END) - _MOST_PRINTED))
            return file.read(_MOST_PRINTED).decode(errors="replace")
    except FileNotFoundError:
        return ""


def what_failed(code: int, printed: str) -> str:
    """Return the last line of a run's error, or how its process ended.

    Args:
        code: Exit code, negative for a signal.
        printed: Output of the run.
    """
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    if code == EXIT_CODE:  # other libraries such as W&B may print after it
        lines = [line.partition(": ")[2] for line in lines if line.startswith("topkast-train: ")] or lines
    return lines[-1] if code and lines else f"exited with code {code} without a result"
