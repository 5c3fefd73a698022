"""Processes that tests start. They end with the test, and so does all that they start, also when its time is up.

pytest-timeout raises in the main thread, by a signal, so that `finally` is reached in whatever waits for a process.
"""

import os
import signal
import subprocess
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def run(command: list[Any], *, check: bool = False, **options: Any) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run` with captured text; the time limit is the test's."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with started(command, **(pipes | options)) as process:
        out, err = process.communicate()
    done = subprocess.CompletedProcess(command, process.returncode, out, err)
    if check and done.returncode:
        raise AssertionError(f"{command} ended with {done.returncode}:\n{err}")
    return done


@contextmanager
def started(command: list[Any], env: dict[str, str] | None = None, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """As `subprocess.Popen`, in a session of its own."""
    mark = f"STARTED_BY_TEST={uuid.uuid4().hex}"  # also in the environment of what leaves that session
    variables = (os.environ if env is None else env) | dict([mark.split("=")])
    with subprocess.Popen(list(map(str, command)), env=variables, start_new_session=True, **options) as process:
        try:
            yield process
        finally:
            if process.poll() is None and os.name == "posix":
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            for environment in Path("/proc").glob("[0-9]*/environ"):
                with suppress(OSError):  # it has ended, or is somebody else's
                    if mark.encode() in environment.read_bytes():
                        os.kill(int(environment.parent.name), signal.SIGKILL)


@contextmanager
def forked() -> Iterator[list[int]]:
    """A list for ids of forked processes, which end with the block; those that were waited for are to be removed."""
    children: list[int] = []
    try:
        yield children
    finally:
        end(children)


def end(children: Iterable[int]) -> None:
    """Kill these children of this process, and wait for them."""
    for child in children:
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
