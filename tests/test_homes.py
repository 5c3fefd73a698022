"""Packed weights that several processes share, in host memory and by FSDP2, train as in one process."""

import os
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from tests import processes
from tests.helpers import plain_path
from tests.homes import FSDP2, KINDS, PLANNED, RUNS, kinds_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
WORLDS = [2, 4]
STATES = ["adamw", "blocks", "blocks, delayed", "delayed", "2:4"]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Gives what homes.py has found on every rank of so many; it takes minutes, so it runs once for all workers."""
    if not hasattr(os, "fork"):
        pytest.skip("ranks are forked")
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "homes"
    with FileLock(f"{folder}.lock"):
        if not (folder / "ended").exists():
            folder.mkdir()
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(plain_path()), "OMP_NUM_THREADS": "1"}
            command = [sys.executable, Path(__file__).with_name("homes.py"), folder, *WORLDS]
            done = processes.run(command, env=environment, cwd=folder)
            (folder / "ended").write_text(done.stderr if done.returncode else "")
    failure = (folder / "ended").read_text()
    assert not failure, failure

    def found(world: int) -> list[dict]:
        return [torch.load(folder / f"{world}/found-{rank}.pt", weights_only=True) for rank in range(world)]

    return found


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", RUNS)
def test_processes_that_share_a_weight_train_it_as_one_does(found, world, name):
    """Bit for bit, with θ shared; the values too in slices (FSDP2), and in two copies of slices (HSDP)."""
    for rank in found(world):
        for kind in kinds_of(name, world):
            assert rank[f"{name}, {kind}"]
            assert rank[f"{name}, {kind}, shared"]
            assert rank[f"{name}, {kind}, sliced"]
            assert rank[f"{name}, {kind}, shown"]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", FSDP2)
def test_fsdp2_computes_as_one_process_on_all_data(found, world, name):
    for rank in found(world):
        if name != "copies" or world == 4:
            own = {key: value for key, value in rank.items() if key.startswith(f"fsdp2, {name}: ")}
            assert len(own) == 6
            assert all(own.values()), own


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", ["entries", "blocks"])
def test_distributed_checkpoints_go_on_in_as_many_ranks_and_in_others(found, world, name):
    for rank in found(world):
        assert rank[f"{name} from {world}"]
        assert world == 2 or rank[f"{name} from 2"]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", ["entries", "blocks", "delayed"])
def test_trainers_resume_and_consolidate_packed_weights_under_fsdp2(found, world, name):
    for number, rank in enumerate(found(world)):
        own = {key: value for key, value in rank.items() if key.startswith(f"lightning, {name}: ")}
        assert len(own) == 5 + (name == "entries" or (name == "blocks" and number == 0))
        assert all(own.values()), own


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
@pytest.mark.parametrize("what", ["averages", "loaded", "released", "histograms"])
def test_other_values_and_averages_are_as_with_replicated_theta(found, world, name, what):
    assert all(rank[f"{name}: {what}"] for rank in found(world))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize("name", ["adamw", "blocks", "delayed"])
def test_nan_on_one_rank_is_an_error_on_all(found, world, name, kind):
    for rank in found(world):
        assert "weight 'layer1.weight' holds NaN or infinity at step 4" in rank[f"{name}, {kind}: NaN"]
        assert rank[f"{name}, {kind}: sets kept"]


@pytest.mark.parametrize("world", WORLDS)
def test_ranks_wait_for_one_that_hangs_as_long_as_in_collectives_of_the_run(found, world):
    assert all(rank["timeouts"] == [True, True] for rank in found(world))


@pytest.mark.parametrize("world", WORLDS)
def test_values_that_differ_between_ranks_are_noticed_at_the_refresh(found, world):
    assert all("the ranks chose different active sets for 'layer1.weight'" in rank["drift"] for rank in found(world))


@pytest.mark.parametrize("world", WORLDS)
def test_what_cannot_be_is_refused_and_changes_nothing(found, world):
    for rank in found(world):
        assert "call state_dict(gathered=True) in all" in rank["one rank would save its part"]
        assert "cannot be pickled while processes share its θ" in rank["pickle"]
        assert "call fully_shard before the optimizer is made" in rank["attached before fully_shard"]
        assert "cannot become dense" in rank["release"]
        assert "cannot become dense" in rank["exclude"]
        assert rank["neither has changed anything"]
        assert rank["loaded after a forward pass"]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("key", ["tiers", "latent", "never_active"])
def test_a_state_that_is_damaged_on_one_rank_is_refused_on_all(found, world, key):
    assert all("does not fit weight 'layer1.weight'" in rank[f"damaged {key}"] for rank in found(world))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", PLANNED)
def test_plan_says_what_the_rank_with_the_largest_part_has_and_sends(found, world, name):
    for rank in found(world):
        *held, (planned_sent, sent) = rank[f"plan, {name}"]
        for planned, own in held:
            assert own == pytest.approx(planned, rel=0.01)
        assert sent == pytest.approx(planned_sent, rel=0.05)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", ["entries", "blocks"])
def test_a_network_on_the_meta_device_is_born_as_in_one_process(found, world, name):
    for rank in found(world):
        assert rank[f"born, {name}"]
        assert rank[f"born, {name}: shared"]
        assert rank["born: largest"] <= 1 / world + 0.02


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("sets", ["entries", "random", "blocks"])
def test_no_rank_keeps_or_makes_more_than_its_share(found, world, sets):
    """The aims on four ranks: 0.27 of the host memory of one process, 0.26 of its device's."""
    for rank in found(world):
        for kind in ("sharded", "slices"):
            assert rank[f"host, {sets}, {kind}"] <= 1 / world + 0.02
            # a little is needed per entry that moves
            assert rank[f"largest, {sets}, {kind}"] <= rank[f"largest, {sets}, replicated"] / world + 0.1
        assert rank[f"device, {sets}, slices"] <= 1 / world + 0.01
        # so what is dense is seen: θ, or the tiers of entries where there are blocks
        assert rank[f"largest, {sets}, replicated"] >= (0.25 if sets == "blocks" else 1)
