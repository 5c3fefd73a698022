"""Two and three CPU processes: they hold the same sets, they notice when they don't, and the metrics count over all."""

import json
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_topkast import TopKastError
from tests.helpers import MIDDLE, Net, fit, make_callback, make_trainer, parameters_of, run_ranks, same
from tests.ranks import RIGL, VARYING
from tests.reductions import ALIKE, ALIKE_OF_3, FIRST, LOSSY, SECOND

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Gives what ranks.py leaves of so many ranks; it runs once for each number."""

    @cache
    def ranks(world: int) -> Found:
        folder = tmp_path_factory.mktemp("ranks")
        run_ranks("ranks.py", folder, str(world))
        return Found(folder, world)

    return ranks


@pytest.fixture(params=[2, 3])
def found(request, ranks):
    return ranks(request.param)


@pytest.fixture
def two(ranks):
    return ranks(2)


class Found:
    def __init__(self, folder: Path, world: int) -> None:
        self.folder, self.world = folder, world
        self.reductions = self.load("reduced")

    def load(self, name: str) -> list:
        """What every rank saved under this name."""
        return [torch.load(self.folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(self.world)]


def all_same(found: list) -> bool:
    return all(same(one, other) for one, other in pairwise(found))


RUNS = {
    "masked": {},
    "packed": {"storage": "packed"},  # |B| values are all that is reduced
    # without synchronisation between accumulated batches (DDP's no_sync), and with sets that a generator decides
    "accumulated": {"accumulate": 2, "update_every": 2, "exploration": "random"},
    "sparse": {},
    "unalike": {"storage": "packed"},
    "compact": {"accumulate": 2, "update_every": 2, "storage": "compact"},
    "rigl": RIGL,
    "varying": VARYING,
    "composed": {},
}


def runs_of(found: Found) -> list[str]:
    return list(RUNS)[: 4 if found.world == 3 else None]


def test_all_ranks_hold_the_same_sets_after_training(found):
    for run in runs_of(found):
        ranks = found.load(f"{run}/trained")
        assert all_same(ranks), run
        state, _, refreshes, _ = ranks[0]
        assert refreshes == (3 if run == "varying" else 2)
        assert int((state["weights"][MIDDLE]["tiers"] == 2).sum()) == 64


class OnAllShares(Net):
    """One process on every rank's share: the mean of their means, which unequal shares tell from the batch's."""

    def __init__(self, world: int) -> None:
        super().__init__(optimizer="adamw", lr=0.02)
        self.world = world

    def loss(self, batch):
        shares = zip(*(tensor.tensor_split(self.world) for tensor in batch), strict=True)
        return torch.stack([super(OnAllShares, self).loss(share) for share in shares]).mean()


def test_ranks_train_as_one_process_on_all_shares(found, tmp_path):
    """The gradient is the mean over the ranks, so the masked updates are those of the whole batch."""
    for run in runs_of(found):
        state, parameters, _, _ = found.load(f"{run}/trained")[0]
        changes = dict(RUNS[run])
        accumulate = changes.pop("accumulate", 1)
        callback = make_callback(**({"keep_last_dense": False, "strength": 1e-2} | changes))
        torch.manual_seed(0)
        model = OnAllShares(found.world)
        fit(make_trainer(tmp_path, callback, accumulate_grad_batches=accumulate), model)
        for name, parameter in parameters_of(model).items():
            torch.testing.assert_close(parameters[name], parameter, rtol=1e-3, atol=1e-5)
        assert torch.equal(state["weights"][MIDDLE]["tiers"], callback.topkast.weights[MIDDLE].tiers), run
        saved = callback.topkast.state_dict()["weights"]
        for name in saved:
            torch.testing.assert_close(state["weights"][name]["latent"], saved[name]["latent"], rtol=1e-3, atol=1e-5)


# --- in a plain loop ----------------------------------------------------------------------------------------------


alike = pytest.mark.parametrize(
    ("world", "name"),
    [(2, name) for name in ALIKE] + [(3, name) for name in ALIKE_OF_3],
)


@alike
def test_distributed_plain_loop_trains_as_one_process(ranks, world, name):
    found = ranks(world)
    runs = found.reductions[0][name]
    assert all_same([rank[name] for rank in found.reductions])
    assert same(runs["dense"]["tiers"], runs["alone"]["tiers"])
    for key in ("parameters", "thetas"):
        for weight, value in runs["dense"][key].items():
            torch.testing.assert_close(value, runs["alone"][key][weight], rtol=1e-4, atol=1e-6)


@alike
def test_sparse_all_reduce_trains_as_the_dense_one_does(ranks, world, name):
    """By two ranks, whose sum has one order, bit for bit."""
    runs = ranks(world).reductions[0][name]
    dense, sparse = runs["dense"], runs["sparse"]
    assert dense["steps"] == sparse["steps"] == (6 if name == "overflow" else 7)
    assert same(dense["tiers"], sparse["tiers"])
    for key in ("parameters", "thetas"):
        for weight, value in dense[key].items():
            if world == 2:
                assert torch.equal(sparse[key][weight], value), weight
            torch.testing.assert_close(sparse[key][weight], value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sparse["norms"], dense["norms"])


@alike
def test_gradient_is_zero_where_nothing_is_sent(ranks, world, name):
    runs = ranks(world).reductions[0][name]
    assert runs["sparse"]["nonzero outside B"] == 0
    if "storage" not in ALIKE[name].get("options", {}):
        assert runs["dense"]["nonzero outside B"] > 0


@pytest.mark.parametrize("name", LOSSY)
def test_hooks_of_torch_reduce_what_is_sent(two, name):
    sparse, dense = two.reductions[0][name]["sparse"], two.reductions[0]["plain"]["dense"]
    assert all_same([rank[name] for rank in two.reductions])
    assert sparse["nonzero outside B"] == 0
    assert not torch.equal(sparse["norms"][-1], dense["norms"][-1]), "it compresses"
    torch.testing.assert_close(sparse["norms"][0], dense["norms"][0], rtol=1e-2, atol=0)


def test_two_engines_may_have_a_hook_each(two):
    nested, one = two.reductions[0]["nested"]["sparse"], two.reductions[0]["two engines"]["sparse"]
    assert same(nested, one)


def test_values_of_the_updated_set_are_all_that_is_sent_of_a_weight(two):
    sent = two.reductions[0]["sent"]
    plain = two.reductions[0]["plain"]["dense"]
    sparse = sum(tiers.numel() for tiers in plain["tiers"].values())
    updated = sum(int(tiers.count_nonzero()) for tiers in plain["tiers"].values())
    dense = sum(value.numel() for value in plain["parameters"].values()) - sparse
    assert 0 < updated < sparse
    assert sent["sizes"] == [dense + updated] * 7
    shapes = dict(sent["shapes"])
    assert shapes[tuple(plain["parameters"]["first.weight"].shape)] == (4, 3, 3, 3)
    for name in (FIRST, SECOND):
        tiers = plain["tiers"][name]
        assert shapes[tuple(tiers.shape)] == (int(tiers.count_nonzero()),)


# --- in Lightning -------------------------------------------------------------------------------------------------


def test_callback_sends_sparsely_without_changing_the_weights(two):
    assert same(two.load("sparse/trained"), two.load("masked/trained"))


def test_every_fit_has_its_hook(two):
    assert json.loads((two.folder / "hooks.json").read_text()) == [["sparse_all_reduce_hook"]] * 2


def test_a_hook_of_ones_own_is_composed_with_the_callbacks(two):
    composed, masked = two.load("composed/trained"), two.load("masked/trained")
    assert same([rank[:3] for rank in composed], [rank[:3] for rank in masked])
    state, parameters, _, sizes = composed[0]
    tiers = [weight["tiers"] for weight in state["weights"].values()]
    whole = sum(value.numel() for value in parameters.values())
    assert sizes == [whole - sum(int((each == 0).sum()) for each in tiers)] * 8


def refusals(found: Found) -> dict[str, str]:
    return json.loads((found.folder / "refusals.json").read_text())


def test_ranks_that_drift_apart_are_stopped_at_the_next_refresh(two):
    assert f"the ranks chose different active sets for '{MIDDLE}'" in refusals(two)["drifted"]
    assert not (two.folder / "drifted" / "trained-0.pt").exists()


def test_a_second_hook_is_refused_with_the_way_to_compose_it(two):
    message = refusals(two)["hooked"]
    assert "all_reduce='sparse_bf16' is a communication hook" in message
    assert "DDPStrategy(ddp_comm_hook=callback.all_reduce_hook(hook))" in message


def test_callbacks_that_differ_in_all_reduce_are_refused(two):
    assert "since their gradients are reduced together, got dense, sparse" in refusals(two)["differing"]


def test_all_reduce_is_refused_where_ddp_is_not_what_reduces(tmp_path):
    callback = make_callback(all_reduce="sparse")
    strategy = SimpleNamespace(model=nn.Linear(2, 2))
    trainer = SimpleNamespace(callbacks=[callback], strategy=strategy, world_size=2)
    with pytest.raises(TopKastError, match="all_reduce='sparse' needs DDP"):
        callback._reduce_gradients(trainer, [])
    fit(make_trainer(tmp_path, callback), Net())  # a single device reduces nothing


def test_unknown_all_reduce_is_refused():
    with pytest.raises(TopKastError, match=r"expected all_reduce to be 'dense' or 'sparse' or .*, got 'bf16'"):
        make_callback(all_reduce="bf16")


# --- sets and metrics ---------------------------------------------------------------------------------------------


def test_differing_sets_are_refused_on_every_rank(found):
    for rank in found.load("found"):
        assert rank["agreeing"] == "passed"
        assert "different active sets for 'swapped' (1 weights differ)" in rank["differing"]


@pytest.mark.parametrize("name", ["Sparsity", "MaskChange", "ReservoirActivation"])
def test_metrics_count_over_all_ranks(found, name):
    for rank in found.load("found"):
        assert rank[name] == pytest.approx(rank[f"{name} of everything"])
        assert 0 < rank[name] < 1
