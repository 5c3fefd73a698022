"""Two CPU processes: they hold the same sets, they notice when they don't, and the metrics count over both."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import MIDDLE, fit, make_callback, make_net, make_trainer, parameters_of, plain_path, same


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where ranks.py left what its two ranks found."""
    if not hasattr(os, "fork"):
        pytest.skip("ranks are forked")
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(plain_path()), "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("ranks.py")
    done = subprocess.run(
        [sys.executable, script, folder], env=environment, capture_output=True, text=True, timeout=150, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return folder


def load(path: Path):
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("run", [".", "accumulated", "packed", "unalike", "compact"])
def test_both_ranks_hold_the_same_sets_after_training(folder, run):
    first, second = load(folder / run / "trained-0.pt"), load(folder / run / "trained-1.pt")
    assert same(first, second)
    state, _, refreshes = first
    assert refreshes == 2
    assert int((state["weights"][MIDDLE]["tiers"] == 2).sum()) == 64


@pytest.mark.parametrize(
    ("run", "accumulate", "changes"),
    [
        (".", 1, {}),
        # without synchronisation between accumulated batches (DDP's no_sync), and with sets that a generator decides
        ("accumulated", 2, {"update_every": 2, "exploration": "random"}),
        # |B| values are all that is reduced
        ("packed", 1, {"execution": "packed"}),
        ("unalike", 1, {"execution": "packed"}),
        ("compact", 2, {"update_every": 2, "execution": "compact"}),
    ],
)
def test_two_ranks_train_as_one_process_on_both_shares(folder, tmp_path, run, accumulate, changes):
    """The gradient is the mean over the ranks, so the masked updates are those of the whole batch."""
    state, parameters, _ = load(folder / run / "trained-0.pt")
    callback = make_callback(keep_last_dense=False, penalty_strength=1e-2, **changes)
    model = make_net(optimizer="adamw", lr=0.02)
    fit(make_trainer(tmp_path, callback, accumulate_grad_batches=accumulate), model)
    for name, parameter in parameters_of(model).items():
        torch.testing.assert_close(parameters[name], parameter, rtol=1e-3, atol=1e-5)
    assert torch.equal(state["weights"][MIDDLE]["tiers"], callback.topkast.weights[MIDDLE].tiers)


def test_ranks_that_drift_apart_are_stopped_at_the_next_refresh(folder):
    message = (folder / "drift.txt").read_text()
    assert f"the ranks chose different active sets for '{MIDDLE}'" in message
    assert not (folder / "drifted" / "trained-0.pt").exists()


def test_differing_sets_are_refused_on_every_rank(folder):
    for rank in (0, 1):
        found = load(folder / f"found-{rank}.pt")
        assert found["agreeing"] == "passed"
        assert "different active sets for 'swapped' (1 weights differ)" in found["differing"]


@pytest.mark.parametrize("name", ["Sparsity", "MaskChange", "ReservoirActivation"])
def test_metrics_count_over_both_ranks(folder, name):
    for rank in (0, 1):
        found = load(folder / f"found-{rank}.pt")
        assert found[name] == pytest.approx(found[f"{name} of everything"])
        assert 0 < found[name] < 1
