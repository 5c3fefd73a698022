"""Keeping freed memory, which holds for a whole process."""

import sys

import pytest

from lightning_topkast import keep_freed_memory
from tests.processes import run

_FAULTS = """
import resource
import sys

import torch

from lightning_topkast import keep_freed_memory

assert not sys.argv[1:] or keep_freed_memory()
size = 40 << 20


def steps(count):
    for _ in range(count):
        held = [torch.zeros(size + (part << 16), dtype=torch.uint8) for part in range(6)]
        del held


steps(5)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
steps(5)
print("faults", resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*arguments):
    done = run([sys.executable, "-c", _FAULTS, *arguments], check=True)
    return int(done.stdout.split()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc's malloc can")
def test_memory_that_is_kept_is_not_mapped_anew():
    assert faults() > 2 * (faults("keep") + 1)  # the pieces that are free may not fit at first


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    assert keep_freed_memory() is False
