"""Randomised runs, each checked step by step against a naive dense oracle: `python reliability/soak.py --minutes 30`.

Every case is drawn from the seed and its number alone, so that a failure can be seen again:
`python reliability/soak.py --seed S --case N`. Ends with 1 if any case failed.
"""

import argparse
import logging
import math
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from random import Random

import torch
from soak_cases import KINDS, Case, draw
from soak_kinds import run_case
from soak_run import Refused

_MEMORY = 24 << 30  # bytes of address space, so that a leak ends this process and not the machine


def draw_case(seed: int, number: int, kind: str | None = None) -> Case:
    return draw(kind, Random(f"{seed}/{number}"))


def soak(numbers: range, seed: int, until: float, kind: str | None = None, failures: float = math.inf) -> Counter[str]:
    """Run cases until the time is up; say what failed, and go on, up to so many failures."""
    counts: Counter[str] = Counter()
    for number in numbers:
        if time.monotonic() >= until or counts["failures"] >= failures:
            break
        case = draw_case(seed, number, kind)
        with tempfile.TemporaryDirectory(prefix="soak-") as folder:
            try:
                run_case(case, Path(folder), counts)
                counts[case.kind] += 1
            except Refused:
                counts["refused"] += 1
            except Exception as error:
                counts["failures"] += 1
                where = traceback.extract_tb(error.__traceback__)[-1]
                print(
                    f"FAILED --seed {seed} --case {number}{f' --kind {kind}' if kind else ''}\n{case.describe()}\n"
                    f"    {type(error).__name__} in {Path(where.filename).name}:{where.lineno}: {error}",
                    flush=True,
                )
        counts["cases"] += 1
    return counts


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="how long (default 30)")
    parser.add_argument("--seed", type=int, help="of all cases; by default another one each time")
    parser.add_argument("--case", type=int, help="run this case alone")
    parser.add_argument("--cases", type=int, default=10**9, help="at most so many")
    parser.add_argument("--kind", choices=KINDS, help="cases of this kind only")
    chosen = parser.parse_args(arguments)
    seed = int.from_bytes(os.urandom(4)) if chosen.seed is None else chosen.seed
    numbers = range(chosen.cases) if chosen.case is None else range(chosen.case, chosen.case + 1)
    print(f"soak: seed {seed}", flush=True)
    start = time.monotonic()
    counts = soak(numbers, seed, start + 60 * chosen.minutes, chosen.kind)
    kinds = ", ".join(f"{counts[kind]} {kind}" for kind in KINDS)
    print(
        f"soak: {counts['cases']} cases ({kinds}, {counts['refused']} refused), {counts['steps']} steps, "
        f"{counts['refreshes']} refreshes, {counts['resumes']} resumes, {counts['kills']} kills, "
        f"{counts['failures']} failures in {time.monotonic() - start:.0f} s; peak memory "
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB"
    )
    return 1 if counts["failures"] or not counts["cases"] else 0


if __name__ == "__main__":  # what holds for the whole process is set only where it is the soak's own
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that children are ended too
    sys.exit(main())
