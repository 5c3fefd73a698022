"""Packed weights whose θ several processes share in their host memory train as if each had all of it."""

import os
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from tests import processes
from tests.helpers import plain_path
from tests.homes import RUNS

pytestmark = pytest.mark.slow
WORLDS = [2, 4]
STATES = ["adamw", "blocks", "blocks, delayed", "delayed", "2:4"]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Gives what homes.py has found on every rank of so many; it runs once for each number."""
    if not hasattr(os, "fork"):
        pytest.skip("ranks are forked")

    @cache
    def found(world: int) -> list[dict]:
        folder = tmp_path_factory.mktemp("homes")
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(plain_path()), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, Path(__file__).with_name("homes.py"), folder, str(world)]
        done = processes.run(command, env=environment, cwd=folder)
        assert done.returncode == 0, done.stderr
        return [torch.load(folder / f"found-{rank}.pt", weights_only=True) for rank in range(world)]

    return found


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", RUNS)
def test_shared_theta_trains_bit_for_bit_as_replicated_theta(found, world, name):
    for rank in found(world):
        assert rank[name]
        assert rank[f"{name}, shared"]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", STATES)
def test_saved_states_go_on_bit_for_bit(found, world, name):
    for rank in found(world):
        assert rank[f"{name}: whole to sharded"]
        assert rank[f"{name}: whole to replicated"]
        assert rank[f"{name}: shards to sharded"]


@pytest.mark.parametrize("world", WORLDS)
def test_ranges_of_a_sequence_move_between_ranks(found, world):
    for rank in found(world):
        moves = {name: value for name, value in rank.items() if name.startswith(("exchange", "rows of"))}
        assert len(moves) == 8
        assert all(moves.values())


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", ["adamw", "blocks"])
@pytest.mark.parametrize("what", ["averages", "loaded", "released"])
def test_other_values_and_averages_are_as_with_replicated_theta(found, world, name, what):
    assert all(rank[f"{name}: {what}"] for rank in found(world))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", ["adamw", "blocks", "delayed"])
def test_nan_on_one_rank_is_an_error_on_all(found, world, name):
    for rank in found(world):
        assert "weight 'layer1.weight' holds NaN or infinity at step 4" in rank[f"{name}: NaN"]
        assert rank[f"{name}: sets kept"]


@pytest.mark.parametrize("world", WORLDS)
def test_values_that_differ_between_ranks_are_noticed_at_the_refresh(found, world):
    assert all("the ranks chose different active sets for 'layer1.weight'" in rank["drift"] for rank in found(world))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("key", ["tiers", "latent", "never_active"])
def test_a_state_that_is_damaged_on_one_rank_is_refused_on_all(found, world, key):
    assert all("does not fit weight 'layer1.weight'" in rank[f"damaged {key}"] for rank in found(world))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("kind", ["entries", "blocks"])
def test_no_rank_keeps_or_makes_more_than_its_share(found, world, kind):
    """The aim on four ranks is 0.27 of what one process keeps; the largest allocation may add a little per entry."""
    for rank in found(world):
        assert rank[f"kept, {kind}"] <= 1 / world + 0.02
        assert rank[f"largest, {kind}"] <= 1 / world + 0.1
        assert rank[f"largest replicated, {kind}"] >= 1  # so the measurement sees dense tensors
