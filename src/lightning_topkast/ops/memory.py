"""Memory on CPU for large tensors that is used again: new pages cost more than what is written to them."""

import ctypes
import os
import threading
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor

_LARGE = 1 << 22  # bytes from which NumPy asks for huge pages, and the C library for new pages each time
_MOST = 1 << 28  # bytes that are kept while nobody uses them

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h

_kept: list[tuple[np.ndarray, "weakref.ref[Any]"]] = []  # memory, and what lives as long as it is used
_lock: threading.Lock


def _begin() -> None:
    global _lock
    _lock = threading.Lock()


_begin()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin)  # another thread of the parent may have held it


def empty(size: int, dtype: torch.dtype) -> Tensor:
    """Return 1-D memory on CPU with anything in it, which may be that of an earlier tensor that is gone.

    Filling new memory takes several times as long. Where there is none to use again NumPy asks for huge pages, which
    PyTorch does not.
    """
    needed = max(size, 1) * dtype.itemsize
    if needed < _LARGE or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return torch.empty(size, dtype=dtype, device="cpu")  # a trace cannot hold the view below
    # without waiting: a signal handler that saves may have interrupted the one who holds the lock
    if _lock.acquire(blocking=False):
        try:
            memory = _used_again(needed)
        finally:
            _lock.release()
    else:
        memory = np.empty(needed, dtype=np.uint8)
    return torch.from_numpy(memory).view(dtype)[:size]


def _used_again(needed: int) -> np.ndarray:
    free = [at for at, (_, user) in enumerate(_kept) if user() is None]
    # not memory for much more, which would stay in use as long
    fitting = [at for at in free if needed <= _kept[at][0].nbytes <= needed * 5 // 4]
    if fitting:
        memory, _ = _kept.pop(fitting[0])
    else:
        memory = np.empty(needed, dtype=np.uint8)
    unused = 0
    for at in reversed(range(len(_kept))):  # the latest stay
        if _kept[at][1]() is None:
            unused += _kept[at][0].nbytes
            if unused > _MOST:
                del _kept[at]
    user = memory[:needed]
    _kept.append((memory, weakref.ref(user)))
    return user


def keep_freed_memory() -> bool:
    """Let this process keep memory that it has freed, for its next tensors, until it ends.

    Without this, glibc returns a tensor above 32 MB to the operating system when it is freed, and the system fills the
    pages of the next one with zeros, which takes up to a third of a training step on CPU. With it the process stays as
    large as it once was, and grows by the pieces between tensors that stay free. `topkast-train` calls it on CPU.

    Returns:
        whether the C library can; only glibc's can.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, or Windows, which has no name for the process
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))
