"""Compiled kernels: building, caching and loading them.

PyTorch's own `cpp_extension.load` would wait forever on the lock file of a killed build, and needs ninja, setuptools
and Python's headers. Here each build has its own folder and its result is moved into place in one step.
"""

import ctypes
import hashlib
import logging
import os
import platform
import re
import shlex
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Literal, get_args

import torch

from lightning_topkast.errors import TopKastError

Kernels = Literal["auto", "torch", "compiled"]

_PATIENCE = 900  # time limit of a build in seconds
_OWN = "set TORCH_EXTENSIONS_DIR to a folder of your own"
_LINES = 8  # of the compiler's output that an error quotes
_INSTRUCTIONS = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"),
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
}

_log = logging.getLogger(__name__)


class _UnsafeCacheError(OSError):
    """Other users could put a library into the cache, which would run as this user."""


class Compiled:
    """The kernels of one C++ source, compiled for this machine and loaded when they are first needed.

    Args:
        source: the C++ file, which registers operators with PyTorch or has functions for `ctypes`.
        what: what they are for, as the log says it.
        without: what happens if they are not available, for the warning; None: nobody needs to know, nor that they are
            compiled, since other code does the same and compiling takes a second.
    """

    def __init__(self, source: Path, what: str, without: str | None = None) -> None:
        self.source = source
        self._what = what
        self._without = without
        self._obstacle: str | None = None
        self._path: Path | None = None
        self._functions: ctypes.CDLL | None = None
        self._lock = threading.RLock()  # a signal handler that saves may interrupt the first use

    def choose(self, name: Kernels, device: torch.device) -> Literal["torch", "compiled"]:
        """Return which kernels to use for tensors on `device`; the first call may compile them.

        Args:
            name: `"auto"` uses the compiled kernels if they are available, and PyTorch's otherwise.
            device: of the tensors.

        Raises:
            TopKastError: `"compiled"` and the kernels are not available.
        """
        if name not in get_args(Kernels):
            raise TopKastError(f"expected kernels to be one of {', '.join(get_args(Kernels))}, got {name!r}")
        if name == "torch":
            return "torch"
        obstacle = self._load_once() if device.type == "cpu" else f"they run on CPU, not on {device.type}"
        if not obstacle:
            return "compiled"
        if name == "compiled":
            raise TopKastError(f"kernels='compiled' is not available: {obstacle}\nUse kernels='auto' or 'torch'.")
        return "torch"

    def functions(self) -> ctypes.CDLL | None:
        """Return the functions of the source, or None if they are not available."""
        if self._functions is None and not self._load_once():
            self._functions = ctypes.CDLL(str(self._path))
        return self._functions

    def _load_once(self) -> str:
        """Load the kernels and return "", or return why they are not available; a failed build is not repeated."""
        with self._lock:
            if self._obstacle is None:
                level = logging.DEBUG if self._without is None else logging.WARNING
                try:
                    self._path = _load(self.source, self._what, _command(), level)
                    self._obstacle = ""
                except (OSError, RuntimeError, subprocess.SubprocessError) as error:
                    self._obstacle = str(error)
                    without = self._without or f"not using {self.source.name}"
                    _log.log(level, "%s, since compiled kernels are not available: %s", without, error)
            return self._obstacle


def _command() -> list[str]:
    """Return the compiler's command without the names of its input and output."""
    if sys.platform == "win32":
        raise OSError("they are not built on Windows")
    mac = sys.platform == "darwin"
    folder = Path(torch.__file__).parent
    capability = torch.backends.cpu.get_cpu_capability()
    level = next((level for level in _INSTRUCTIONS if capability.startswith(level)), None)
    return [
        *shlex.split(os.environ.get("CXX") or ("clang++" if mac else "c++")),
        # nobody asks for the error number of a square root, which would keep it out of vectors
        *("-std=c++20", "-O3", "-fno-math-errno", "-fPIC", "-shared", "-w"),
        *(() if level is None else (*_INSTRUCTIONS[level], f"-DCPU_CAPABILITY={level}", f"-DCPU_CAPABILITY_{level}")),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        f"-I{folder / 'include'}",
        f"-I{folder / 'include' / 'torch' / 'csrc' / 'api' / 'include'}",
        f"-L{folder / 'lib'}",
        # PyTorch uses OpenMP threads; Apple's compiler has none, so the kernels run on one thread there
        *(("-undefined", "dynamic_lookup") if mac else ("-fopenmp",)),
    ]


def _load(source: Path, what: str, command: list[str], level: int) -> Path:
    key = [torch.__version__, platform.machine(), *command, *_texts(source)]
    name = f"{source.parent.name}_{source.stem}_{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.so"
    path = _cache() / name
    if _intact(path):
        try:
            torch.ops.load_library(path)
            return path
        except OSError as error:
            _log.info("building %s again, since it cannot be loaded: %s", path, error)
    _build(source, what, command, path, level)
    torch.ops.load_library(path)
    return path


def _texts(source: Path) -> list[str]:
    """Return the texts of a source and of our headers, which it includes in quotes."""
    text = source.read_text()
    headers = re.findall(r'^#include "(.+)"', text, re.MULTILINE)
    return [text, *(part for header in headers for part in _texts(source.parent / header))]


def _cache() -> Path:
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path(caches, "torch_extensions")
    folder = Path(root, "lightning_topkast").absolute()
    for missing in reversed([path for path in (folder, *folder.parents) if not path.exists()]):
        missing.mkdir(mode=0o700, exist_ok=True)
    folder = folder.resolve()
    _check_own(folder)
    for above in folder.parents:  # whoever may write there can put another folder in the place of ours
        mode = above.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise _UnsafeCacheError(f"all users may write to {above}, above the cache of compiled kernels; {_OWN}")
    return folder


def _check_own(path: Path) -> None:
    """Refuse a file or folder of the cache that another user owns or may write to; root may do all anyway."""
    status = path.stat()
    if status.st_uid not in (0, os.geteuid()):
        raise _UnsafeCacheError(f"{path}, for compiled kernels, belongs to another user (uid {status.st_uid}); {_OWN}")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise _UnsafeCacheError(
            f"other users may write to {path}, for compiled kernels; remove it, or if nobody has: chmod go-w {path}"
        )


def _digest_of(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _intact(path: Path) -> bool:
    """Return whether a built library is unchanged; loading a truncated one could end the process.

    Raises:
        OSError: another user may have changed it, and its digest with it.
    """
    try:
        for file in (path, _digest_of(path)):
            _check_own(file)
        return _digest_of(path).read_text() == hashlib.sha256(path.read_bytes()).hexdigest()
    except _UnsafeCacheError:
        raise
    except (OSError, UnicodeDecodeError):
        return False


def _build(source: Path, what: str, command: list[str], path: Path, level: int) -> None:
    # as a warning it is seen where nobody has set up logging
    _log.log(level, "compiling the kernels for %s for this machine: about ten seconds, once (to %s)", what, path)
    with tempfile.TemporaryDirectory(prefix="build_", dir=path.parent) as folder:
        built, digest = Path(folder, path.name), Path(folder, "digest")
        try:
            result = subprocess.run(
                [*command, str(source), "-o", str(built), "-ltorch_cpu", "-lc10"],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_PATIENCE,
            )
        except FileNotFoundError as error:
            raise OSError(f"no C++ compiler '{command[0]}'; install one, or set the variable CXX to one") from error
        if result.returncode or not built.exists():
            lines = (result.stderr or result.stdout).strip().splitlines()[-_LINES:]
            raise OSError("\n".join([f"'{command[0]}' failed with exit status {result.returncode}", *lines]))
        digest.write_text(hashlib.sha256(built.read_bytes()).hexdigest())
        for file in (built, digest):
            file.chmod(0o600)  # whatever the umask allows others
        os.replace(built, path)
        os.replace(digest, _digest_of(path))
