"""Runs Lightning's own tests with our callback added to every Trainer, and lists what fails only because of it.

    python reliability/lightning_suite.py TREE [TESTS...] [--storage masked] [--json FILE] [-- PYTEST OPTIONS...]

TREE is a source tree of the version of Lightning that is installed, with the requirements of its tests
(`TREE/requirements/pytorch/test.txt`). What fails with the callback runs again without it. What fails in both belongs
to the machine; a test whose failure is listed in `EXPECTED` (or `EXPECTED_PACKED`) is one that forbids what a callback
(or a packed layer) does. Anything else is ours, and the exit status is 1. Tests of models that have nothing to make
sparse are skipped.

    python reliability/lightning_suite.py ~/lightning tests/tests_pytorch/callbacks -- -x -k "not ddp"
"""

import argparse
import fnmatch
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import LightningModule, Trainer

from lightning_topkast import Targets, TopKast, TopKastCallback, TopKastError

ROOT = Path(__file__).resolve().parent.parent
FOLDER = "tests/tests_pytorch"

# Pattern of test names → why they cannot pass with a callback that logs and holds state.
EXPECTED = {
    "*/trainer/logging_/*": "forbids keys and calls of the logger besides its own",
    "*test_log_every_n_steps*": "forbids keys and calls of the logger besides its own",
    "*test_loggers_fit_test_all*": "forbids keys and calls of the logger besides its own",
    "*test_tensorboard_with_accumulated_gradients": "forbids keys and calls of the logger besides its own",
    "*test_throughput_monitor_fit*": "forbids keys and calls of the logger besides its own",
    "*test_throughput_monitor_variable_batch_size": "forbids keys and calls of the logger besides its own",
    "*test_wandb_log_model*": "counts the artifacts, to which we add the checkpoint with its densities",
    "*test_checkpoint_callbacks_are_last": "names all callbacks",
    "*test_attach_model_callbacks": "names all callbacks",
    "*test_configure_external_callbacks": "names all callbacks",
    "*test_strict_loading*": "it replaces load_state_dict by a mock, and we refuse weights that were not loaded",
    "*test_trainer_access_in_configure_optimizers": "it has no optimizer, so nothing is trained, which we refuse",
    "*test_none_optimizer": "it has no optimizer, so nothing is trained, which we refuse",
    "*test_backward_count_with_closure": "it trains with LBFGS, which we refuse",
    "*lbfgs*": "it trains with LBFGS, which we refuse",
    "*test_toggle_untoggle_*": "its optimizers leave out a weight, which we refuse",
    "*test_running_test_after_fitting": "it asks for an accuracy that half of the weights do not reach in two epochs",
    "*_flow*": "its learning rate is 0, to which the shrinkage of the penalty cannot refer",
    "*test_lr_monitor_multiple_param_groups_no_lr_scheduler": "its optimizer leaves out a weight, which we refuse",
    "*test_swa_multiple_lrs": "its optimizer leaves out a weight, which we refuse",
    "*test_lottery_ticket_hypothesis_correctly_reset": "it asks for every weight as it was, and half of them are zero",
    "*test_trainer_spike_detection_integration*": "its weight has one entry, which we refuse in its processes",
    "*test_timer_stops_training": "its limit of milliseconds ends before the second step, if the first is slower",
}
# The same for other storages than masked.
EXPECTED_PACKED = {
    "*test_log_momentum_no_momentum_optimizer*": "it trains with ASGD, which we refuse for packed weights",
    "*test_custom_model_summary_callback_summarize": "names the types of layers, which packed ones replace",
    "*/callbacks/test_pruning.py::*": "prunes weights that packed layers compute",
    "*test_ema_configure_model*": "its configure_model builds the layers anew at every call",
    "*test_trainer_model_hook_system_fit*": "counts the calls of configure_model, of which there is one more",
    "*test_train_eval_mode_restored": "looks at requires_grad of a weight that packed layers compute",
    "*/models/test_cpu.py::*": "compares parameters with those before, which have other shapes",
    "*test_load_model_from_checkpoint*": "compares parameters with those of a model that was not packed",
    "*test_if_inference_output_is_valid*": "exports packed layers to ONNX, for which there is save_onnx",
    "*test_lr_finder.py::test_model_reset_correctly": "the packed model is sparse as soon as it is set up",
    "*test_scale_batch_size.py::test_trainer_reset_correctly*": "the packed model is sparse as soon as it is set up",
    "*_optimizer_manual_optimization_and_*": "counts steps; we first try the optimizer",
    "*_optimizer_automatic_optimization_optimizer_*": "counts steps; we first try the optimizer",
    "*test_model_size_warning_on_unsupported_precision": "counts megabytes, of which packed layers have fewer",
    "*test_double_precision*": "looks at the gradient of a weight that packed layers compute",
    "*test_memory_sharing_disabled": "looks at the memory of a weight that packed layers compute",
}
NOTHING_SPARSE = "no weight of the model is sparse", "has 1 entries, too few for one active entry"


class Added:
    """A plugin for pytest: the callback is in every Trainer, and outcomes go to a file."""

    def __init__(self, storage: str | None, file: Path) -> None:
        self.file, self.outcomes = file, dict[str, str]()
        if storage is not None:
            add_callback(storage)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Keep the worst outcome of a test's parts."""
        if report.when == "call" or not report.passed:
            before = self.outcomes.get(report.nodeid)
            self.outcomes[report.nodeid] = report.outcome if before in (None, "passed", "skipped") else before

    def pytest_sessionfinish(self) -> None:
        """Write the outcomes."""
        self.file.write_text(json.dumps(self.outcomes))


class Callback(TopKastCallback):
    """Skips a test whose model has nothing to make sparse."""

    def _build(self, trainer: Trainer, pl_module: LightningModule) -> TopKast:
        try:
            return super()._build(trainer, pl_module)
        except TopKastError as error:
            if any(words in str(error) for words in NOTHING_SPARSE):
                pytest.skip("nothing to make sparse")
            raise


def add_callback(storage: str) -> None:
    """Let every Trainer have a callback, as a user would add it."""
    make = Trainer.__init__

    @functools.wraps(make)
    def init(self: Trainer, *arguments: Any, **options: Any) -> None:
        given = options.get("callbacks") or []
        others = [given] if not isinstance(given, list) else given
        targets = Targets(keep_first_dense=False, keep_last_dense=False)
        added = Callback(0.5, 0.25, targets=targets, storage=storage)
        make(self, *arguments, **options | {"callbacks": [*others, added]})

    Trainer.__init__ = init  # type: ignore[method-assign]


def run(tree: Path, storage: str | None, tests: list[str], given: list[str]) -> dict[str, str]:
    """Run tests in another process; return their outcomes by name."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "outcomes.json")
        path = os.pathsep.join(filter(None, [str(ROOT), str(tree / "tests"), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, str(Path(__file__).resolve()), str(tree), *tests, "--inside", str(file)]
        command += ([] if storage is None else ["--storage", storage]) + ["--", *given]
        subprocess.run(command, cwd=tree, env={**os.environ, "PYTHONPATH": path}, check=False)
        outcomes: dict[str, str] = json.loads(file.read_text()) if file.exists() else {}
    return outcomes


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree", type=Path, help="source tree of the installed version of Lightning")
    parser.add_argument("tests", nargs="*", default=[FOLDER], help="files or folders, seen from TREE; all without")
    parser.add_argument("--storage", default="masked", help="of the callback")
    parser.add_argument("--json", type=Path, help="write all outcomes here")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    own, given = sys.argv[1:], []
    if "--" in own:
        own, given = own[: own.index("--")], own[own.index("--") + 1 :]
    options = parser.parse_args(own)
    tree = options.tree.expanduser().resolve()
    if not (tree / FOLDER).is_dir():
        parser.error(f"expected a source tree of Lightning with '{FOLDER}', got '{options.tree}'")
    if options.inside is not None:
        storage = options.storage if "--storage" in own else None
        return int(pytest.main([*options.tests, *given], plugins=[Added(storage, options.inside)]))
    with_callback = run(tree, options.storage, options.tests, given)
    if not with_callback:
        print("no test has run", file=sys.stderr)
        return 2
    failed = [name for name, outcome in with_callback.items() if outcome == "failed"]
    without = run(tree, None, failed, given) if failed else {}
    ours = [name for name in failed if without.get(name) == "passed"]
    expected = EXPECTED if options.storage == "masked" else EXPECTED | EXPECTED_PACKED
    reasons = {name: next((why for one, why in expected.items() if fnmatch.fnmatch(name, one)), "") for name in ours}
    print(f"\nwith the callback: {dict(Counter(with_callback.values()))}")
    print(f"failed, and fail without it too: {len(failed) - len(ours)}")
    for why, count in Counter(filter(None, reasons.values())).items():
        print(f"expected, {count}: {why}")
    unexpected = [name for name, why in reasons.items() if not why]
    print("\n".join(["not expected:", *unexpected]) if unexpected else "nothing else fails because of it")
    if options.json is not None:
        options.json.write_text(json.dumps({"with": with_callback, "without": without, "expected": reasons}, indent=1))
    return int(bool(unexpected))


if __name__ == "__main__":
    sys.exit(main())
