"""Changes the code in small ways, one at a time, and lists the changes that the tests of that file do not notice.

    pip install -e '.[dev,mutants]'
    OMP_NUM_THREADS=1 python reliability/mutants.py [FILES...] [--sample 40] [--seed 0] [--json FILE]

FILES are names below `src/lightning_topkast`, such as `method/schedule.py`; all files with tests in `TESTS` without.
mutmut makes the changes; those of texts are left out. Tests run in processes forked from this one, which has imported
PyTorch, and see a copy of the package with one change. A change is noticed if a test fails or takes very long.
"""

import argparse
import difflib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import lightning.pytorch  # noqa: F401  for the processes forked from this one
import pytest
import torch
from libcst import FormattedString, SimpleString
from mutmut.mutation.file_mutation import create_mutations, deep_replace

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src/lightning_topkast"

# File → its tests, without "tests/test_" and ".py".
TESTS = {
    "method/density.py": "distribution sizes plan",
    "method/penalty.py": "penalty bad_input",
    "method/powerpropagation.py": "powerpropagation",
    "method/rule.py": "selection baselines granularity powerpropagation",
    "method/schedule.py": "schedule run_length",
    "method/selection.py": "selection zeros",
    "method/sharded_selection.py": "sharded_selection zeros",
    "method/stack.py": "experts sharded_selection",
    "method/structure.py": "granularity sharded_selection",
    "method/targets.py": "targets lifecycle",
    "engine/attached.py": "optimizer_state foreign_code invariants",
    "engine/choose.py": "zeros baselines sizes granularity experts sharded_selection",
    "engine/install.py": "packed plan lifecycle sharded_selection",
    "engine/one_pass.py": "one_pass",
    "engine/optimizer_state.py": "optimizer_state",
    "engine/optimizers.py": "optimizers",
    "engine/refresh.py": "interruption whole_steps schedule baselines foreign_code optimizer_state",
    "engine/state.py": "bad_input hostile run_length",
    "engine/step_hooks.py": "optimizers optimizer_state foreign_code penalty packed lifecycle",
    "engine/watch.py": "foreign_code",
    "engine/writes.py": "foreign_code",
    "weights/base.py": "invariants powerpropagation bad_input optimizer_state foreign_code",
    "weights/layouts.py": "packed granularity",
    "weights/loading.py": "foreign_code zeros",
    "weights/masked.py": "invariants interruption foreign_code optimizer_state",
    "weights/orders.py": "optimizer_state",
    "weights/packed.py": "packed optimizer_state averaging foreign_code",
    "weights/shrinkage.py": "penalty sharded_selection",
    "weights/state.py": "bad_input hostile",
    "weights/writes.py": "foreign_code",
    "layers/attention.py": "packed modules",
    "layers/conv.py": "conv",
    "layers/csr.py": "packed export",
    "layers/kinds.py": "packed modules",
    "layers/products.py": "packed",
    "layers/sparse_layer.py": "packed modules experts",
    "ops/compiled.py": "ops",
    "ops/csr/choice.py": "ops",
    "ops/csr/library.py": "ops",
    "ops/csr/linear.py": "ops",
    "ops/csr/pattern.py": "ops",
    "ops/csr/portable.py": "ops",
    "ops/csr/rows.py": "flat ops",
    "ops/conv/choice.py": "conv",
    "ops/conv/conv.py": "conv",
    "ops/conv/library.py": "conv",
    "ops/blocks/choice.py": "block_ops",
    "ops/blocks/library.py": "block_ops",
    "ops/blocks/linear.py": "block_ops",
    "ops/blocks/pattern.py": "block_ops",
    "ops/blocks/portable.py": "block_ops",
    "ops/dtypes.py": "ops block_ops conv",
    "ops/entries.py": "ops conv",
    "ops/flat.py": "flat selection invariants",
    "ops/memory.py": "flat memory",
    "ops/passes.py": "flat one_pass",
    "ops/step.py": "flat one_pass",
}


def changes_of(file: Path) -> list[str]:
    """Return the file's code with each of the changes."""
    module, mutations, *_ = create_mutations(str(file), file.read_text())
    nodes = [each for each in mutations if not isinstance(each.original_node, SimpleString | FormattedString)]
    codes = (deep_replace(module, each.original_node, each.mutated_node).code for each in nodes)  # type: ignore[union-attr]
    return list(dict.fromkeys(codes))


def overlay(folder: Path, file: str, code: str) -> None:
    """Make `folder` hold the package with one changed file; all others are links."""
    package = folder / PACKAGE.name
    for at in [package, *(package / each for each in reversed(Path(file).parents))]:
        at.mkdir(exist_ok=True)
        for entry in (PACKAGE / at.relative_to(package)).iterdir():
            link = at / entry.name
            if entry.name != "__pycache__" and not link.exists():
                if entry.is_dir() and Path(file).is_relative_to(link.relative_to(package)):
                    continue
                link.symlink_to(entry)
    (package / file).unlink()
    (package / file).write_text(code)


def passes(file: str, code: str, seconds: float) -> bool:
    """Return whether the tests of a file pass with this code, within this time."""
    with tempfile.TemporaryDirectory() as folder:
        overlay(Path(folder), file, code)
        child = os.fork()
        if child == 0:
            code_of_exit = 1
            try:
                os.setsid()
                code_of_exit = _test(folder, file)
            finally:
                os._exit(code_of_exit)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status) == 0
            time.sleep(0.02)
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return False


def _test(folder: str, file: str) -> int:
    os.chdir(ROOT)
    sys.path[:0] = [folder, str(ROOT)]
    sys.dont_write_bytecode = True
    tests = [f"tests/test_{name}.py" for name in TESTS[file].split()]
    # plugins are imported already, since this process was forked
    options = [
        "-x",
        "-q",
        "-m",
        "not slow",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore::pytest.PytestAssertRewriteWarning",
    ]
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        return int(pytest.main([*options, *tests]))


def survivors(file: str, sample: int | None, generator: random.Random) -> tuple[int, Iterator[list[str]]]:
    """Return the number of changes, and those that no test notices as lines of a difference."""
    path = PACKAGE / file
    before, begun = path.read_text(), time.monotonic()
    if not passes(file, before, 3600):
        sys.exit(f"the tests of {file} ({TESTS[file]}) fail without any change")
    seconds = 10 + 3 * (time.monotonic() - begun)
    changes = changes_of(path)
    if sample is not None:
        changes = generator.sample(changes, min(sample, len(changes)))

    def unnoticed() -> Iterator[list[str]]:
        for code in changes:
            if passes(file, code, seconds):
                lines = difflib.unified_diff(before.splitlines(), code.splitlines(), file, file, lineterm="", n=0)
                yield list(lines)[2:]

    return len(changes), unnoticed()


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", default=list(TESTS), help="below src/lightning_topkast")
    parser.add_argument("--sample", type=int, help="so many changes of each file, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    if unknown := [file for file in options.files if file not in TESTS]:
        parser.error(f"expected files with tests ({', '.join(TESTS)}), got {', '.join(unknown)}")
    torch.set_num_threads(1)
    rows = dict[str, dict[str, Any]]()
    for file in options.files:
        count, found = survivors(file, options.sample, random.Random(f"{options.seed} {file}"))
        left = []
        for difference in found:
            left.append(difference)
            print("\n".join(["not noticed:", f"  {file}", *(f"  {line}" for line in difference)]), flush=True)
        rows[file] = {"changes": count, "noticed": count - len(left), "left": left}
        print(f"{file}: {count - len(left)} of {count} noticed", flush=True)
        if options.json is not None:
            options.json.write_text(json.dumps(rows, indent=1))
    total, noticed = (sum(row[key] for row in rows.values()) for key in ("changes", "noticed"))
    print(f"all: {noticed} of {total} noticed ({noticed / max(total, 1):.1%})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
