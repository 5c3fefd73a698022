"""Parts for tests of benchmarks/gpu_parts.py, whose process imports them."""

import os
import time


def rows(size, device):
    for number in range(size):
        yield {"number": number}


def slow(size, device):
    for number in range(size):
        yield {"number": number}
        time.sleep(1)


def hangs(size, device):
    yield {"number": 0}
    time.sleep(600)


def raises(size, device):
    yield {"number": 0}
    raise ValueError("a part is broken")


def dies(size, device):
    yield {"number": 0}
    os._exit(7)


def number_aims(rows):
    return [{"aim": "rows", "measured": len(rows), "met": "met"}]
