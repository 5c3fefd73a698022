"""Properties over drawn inputs: selection on every path, sizes of the sets, settings, saved states."""

import io
import warnings
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_topkast import TopKast, TopKastError
from lightning_topkast.method.density import erdos_renyi_kernel, uniform
from lightning_topkast.method.schedule import Schedule, Timeline
from lightning_topkast.method.selection import _tiers_torch, nested_top_k, top_k_then_random
from tests.helpers import check_sparse, nouns, same

drawn = settings(deadline=None, derandomize=True, database=None)
sizes = st.integers(1, 24)
densities = st.floats(0, 1, exclude_max=True)


def by_sorting(scores, count):
    """The largest entries, ties to the lowest index, as a bool tensor."""
    values = scores.double().flatten().tolist()
    chosen = torch.zeros(len(values), dtype=torch.bool)
    chosen[sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]] = True
    return chosen.view(scores.shape)


# --- selection ----------------------------------------------------------------------------------------------------


@given(data=st.data())
@settings(drawn, max_examples=150)
def test_numpy_torch_and_sorting_choose_alike_whatever_the_numbers(data):
    floats = st.floats(0, width=32, allow_nan=False, allow_infinity=False)  # denormals and huge ones among them
    values = data.draw(
        st.lists(st.one_of(floats, st.sampled_from([0.0, -0.0, 1.0, 1e-45, 3e38])), min_size=1, max_size=60)
    )
    scores = torch.tensor(values, dtype=data.draw(st.sampled_from([torch.float32, torch.float64])))
    updated = data.draw(st.integers(0, scores.numel()))
    active = data.draw(st.integers(0, updated))
    expected = by_sorting(scores, updated).byte() + by_sorting(scores, active).byte()
    assert torch.equal(nested_top_k(scores, (updated, active)), expected)
    assert torch.equal(_tiers_torch(scores, (updated, active)), expected)


@given(data=st.data())
@settings(drawn, max_examples=100)
def test_random_exploration_draws_exactly_from_what_is_not_active(data):
    levels = data.draw(st.sampled_from([1, 3, 100]))
    scores = torch.tensor(data.draw(st.lists(st.integers(0, levels), min_size=1, max_size=50))).float()
    lottery = torch.tensor(
        data.draw(st.lists(st.sampled_from([0.0, 0.5, 0.9]), min_size=len(scores), max_size=len(scores)))
    )
    updated = data.draw(st.integers(0, len(scores)))
    active = data.draw(st.integers(0, updated))
    tiers = top_k_then_random(scores, active, updated, lottery)
    assert torch.equal(tiers == 2, by_sorting(scores, active))
    assert int((tiers == 1).sum()) == updated - active
    drawn_ones, left = lottery[tiers == 1], lottery[tiers == 0]
    assert not len(drawn_ones) or not len(left) or drawn_ones.min() >= left.max()


# --- sizes --------------------------------------------------------------------------------------------------------


def bag(shapes):
    """A model of weights of these shapes."""
    model = nn.Sequential()
    for shape in shapes:
        layer = nn.Linear(1, 1, bias=False) if len(shape) == 2 else nn.Conv1d(1, 1, 1, bias=False)
        layer.weight = nn.Parameter(torch.randn(shape))
        model.append(layer)
    return model


models = st.lists(
    st.one_of(st.tuples(sizes, sizes), st.tuples(sizes, sizes, st.integers(1, 3))), min_size=1, max_size=5
)


@given(shapes=models, forward=densities, backward=densities, distribution=st.sampled_from(["uniform", "erk"]))
@settings(drawn, max_examples=100)
def test_sets_have_the_sizes_that_the_distribution_gives(shapes, forward, backward, distribution):
    backward = min(forward, backward)
    named = {f"{i}.weight": shape for i, shape in enumerate(shapes)}
    densities_of = {"uniform": uniform, "erk": erdos_renyi_kernel}[distribution]
    asked = [densities_of(named, 1 - sparsity) for sparsity in (forward, backward)]
    wanted = [{name: round(d * prod(named[name])) for name, d in each.items()} for each in asked]
    options = {"distribution": distribution, "keep_first_dense": False, "keep_last_dense": False}
    if not all(wanted[0].values()):
        with pytest.raises(TopKastError, match="too few for one active entry"):
            TopKast(bag(shapes), forward, backward, **nouns(**options))
        return
    topkast = TopKast(bag(shapes), forward, backward, **nouns(**options))
    for name, weight in topkast.weights.items():
        active, updated = int(weight.active.sum()), int(weight.updated.sum())
        if distribution == "global":  # weights compete: only their sums are given
            continue
        assert (active, updated) == (wanted[0][name], max(wanted[1][name], active))
        assert 1 <= active <= updated <= prod(named[name])
    together = [sum(int(weight.tiers.ge(tier).sum()) for weight in topkast.weights.values()) for tier in (2, 1)]
    assert together == [sum(wanted[0].values()), sum(max(wanted[1][name], wanted[0][name]) for name in named)]
    total = sum(map(prod, shapes))
    for sparsity, counts in ((forward, wanted[0]), (backward, wanted[1])):
        assert abs(sum(counts.values()) - (1 - sparsity) * total) <= 0.5 * len(shapes) + 1e-6 * total


@given(forward=densities, backward=densities, own=densities)
@settings(drawn, max_examples=60)
def test_an_override_decides_for_its_weight_alone(forward, backward, own):
    shapes, backward = [(20, 30), (10, 60), (40, 15)], min(forward, backward)
    options = {"keep_first_dense": False, "keep_last_dense": False}
    if round((1 - max(forward, own)) * 600) < 1:
        return
    plain = TopKast(bag(shapes), forward, backward, **nouns(**options)).weights
    overridden = TopKast(
        bag(shapes), forward, backward, **nouns(overrides={"1.*": {"forward_sparsity": own}}, **options)
    ).weights
    assert overridden["1.weight"].active_count == round((1 - own) * 600)
    assert overridden["1.weight"].updated_count >= overridden["1.weight"].active_count
    for name in ("0.weight", "2.weight"):
        assert overridden[name].active_count == plain[name].active_count
        assert overridden[name].updated_count == plain[name].updated_count


# --- schedule -----------------------------------------------------------------------------------------------------


@given(every=st.integers(1, 50), stop=st.one_of(st.none(), st.integers(0, 200)))
@settings(drawn, max_examples=60)
def test_every_interval_has_one_refresh_and_exploration_stops_once(every, stop):
    timeline = Timeline(Schedule(every, stop_exploring_at=stop))
    refreshes = [step for step in range(1, 201) if timeline.refreshes_after(step)]
    assert set(refreshes) == set(range(every, 201, every)) | ({stop} - {None, 0})
    explores = [timeline.explores_at(step) for step in range(201)]
    assert explores == sorted(explores, reverse=True)
    assert sum(explores) == (201 if stop is None else min(stop, 201))


@given(moment=st.floats(0, 1), total=st.integers(1, 10**9))
@settings(drawn, max_examples=60)
def test_a_fraction_is_a_step_of_the_run(moment, total):
    step = Timeline.of(Schedule(stop_exploring_at=moment), None, total).schedule.stop_exploring_at
    assert isinstance(step, int)
    assert 0 <= step <= total
    assert abs(step - moment * total) <= 0.5 + 1e-6 * total


# --- settings -----------------------------------------------------------------------------------------------------

VALUES = {
    "forward_sparsity": [0.0, 0.5, 0.75, 0, -0.1, 1.0, 1, 90, "0.5", None, True, float("nan")],
    "backward_sparsity": [0.0, 0.25, 0.5, 0.9, 2, "x", None],
    "update_every": [1, 2, 3, 0, -1, 2.0, None, True, "3"],
    "delay": [0, 0, 1, 2, -1, 1.0, None],
    "distribution": ["uniform", "erk", "even", None, 3],
    "exploration": ["magnitude", "random", "greedy", None],
    "stop_exploring_at": [None, 0, 2, 0.5, 1.0, -1, 1.5, "half", True],
    "penalty": ["l2", "l1", "norm", "l3", "auto", None],
    "strength": [0.0, 1e-4, 1, -1, float("inf"), "1", None],
    "shrinkage": [None, 0.0, 0.1, 1.0, -0.1, "x"],
    "overrides": [None, {}, {"*": {"forward_sparsity": 0.5}}, {"*": 0.5}, {"nothing": {"forward_sparsity": 0.5}}, [1]],
    "include": [None, ["*"], ["*weight"], [], "x", [3], ["nothing"]],
    "exclude": [None, ["0.*"], [], 3],
    "include_types": [None, ["Linear"], ["Nothing"], "Linear"],
    "keep_first_dense": [True, False, None, 1],
    "keep_last_dense": [True, False, "no"],
    "reset_optimizer_state": [True, False, None],
    "storage": ["masked", "packed", "compact", "auto", "folded", None],
    "kernels": ["torch", "fast", None],
    "unsupported": ["masked", "error", "yes"],
    "seed": [0, 7, -3, 1.0, "x", None],
}
GOOD = {"forward_sparsity": 0.5, "backward_sparsity": 0.25, "kernels": "torch", "update_every": 3}


@pytest.mark.slow
@given(data=st.data())
@settings(drawn, max_examples=250)
def test_settings_train_or_are_refused_with_the_value_and_what_was_expected(data):
    names = data.draw(st.sets(st.sampled_from(sorted(VALUES)), min_size=1, max_size=5))
    changes = {name: data.draw(st.sampled_from(VALUES[name]), label=name) for name in sorted(names)}
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    refusal = ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            topkast = TopKast(model, **nouns(**(GOOD | changes)))
            optimizer = torch.optim.AdamW(model.parameters(), 0.05)
            topkast.attach(optimizer)
        except TopKastError as error:
            refusal = str(error)
        except TypeError as error:  # the noun has no such field: L1 no shrinkage, packed storage no state to reset
            if "unexpected keyword argument" not in str(error):
                raise
            refusal = str(error)
        if refusal:
            wrong = [name for name in changes if name in refusal]
            no_weight = "no weight of the model is sparse" in refusal or "no optimizer" in refusal
            assert wrong or no_weight, refusal
            assert any(word in refusal for word in ("expected", "takes", "matches no", "give", "leave", "Name", "are:"))
            if not topkast_was_built(model):
                assert same(dict(model.state_dict()), before)
            return
        for step in range(4):
            optimizer.zero_grad()
            model(torch.randn(3, 6, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            optimizer.step()
            if any(weight.active_count < weight.size for weight in topkast.weights.values()):
                check_exact(topkast)
    assert topkast.step_count == 4


def topkast_was_built(model):
    """Whether it was `attach` that refused, which leaves the model sparse."""
    return any((parameter == 0).any() or parameter.dim() == 1 for parameter in (model[0].weight, model[2].weight))


def check_exact(topkast):
    for name, weight in topkast.weights.items():
        assert int(weight.active.sum()) == weight.active_count
        assert int(weight.updated.sum()) == (weight.updated_count if topkast.exploring else weight.active_count)
        assert not topkast.model.state_dict()[name][~weight.active].any()


# --- saved states -------------------------------------------------------------------------------------------------


@given(
    shapes=models,
    saved=st.sampled_from(["masked", "packed", "compact"]),
    loaded=st.sampled_from(["masked", "packed", "compact"]),
    forward=st.floats(0, 0.9),
    steps=st.integers(0, 5),
    delay=st.integers(0, 1),
    exploration=st.sampled_from(["magnitude", "random"]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
@settings(drawn, max_examples=60)
def test_a_state_from_a_file_gives_the_same_weights_and_sets(
    shapes, saved, loaded, forward, steps, delay, exploration, dtype
):
    if any(round((1 - forward) * prod(shape)) < 1 for shape in shapes):
        return
    options = {
        "forward_sparsity": forward, "backward_sparsity": forward / 2, "update_every": 2, "delay": delay,
        "exploration": exploration, "keep_first_dense": False, "keep_last_dense": False, "kernels": "torch",
    }  # fmt: skip

    def parts(storage):
        model = bag(shapes).to(dtype)
        topkast = TopKast(model, **nouns(storage=storage, **options))
        return model, topkast, topkast.attach(optimizer := torch.optim.SGD(model.parameters(), 0.1)) and optimizer

    model, topkast, optimizer = parts(saved)
    for step in range(steps):
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
            parameter.grad = noise.to(dtype)
        optimizer.step()
    file = io.BytesIO()
    torch.save((model.state_dict(), topkast.state_dict()), file)
    file.seek(0)
    others, state = torch.load(file, weights_only=True)
    other, resumed, _ = parts(loaded)
    other.load_state_dict(others)
    resumed.load_state_dict(state)
    assert resumed.step_count == topkast.step_count == steps
    for name, weight in topkast.weights.items():
        assert torch.equal(resumed.weights[name].theta(), weight.theta())
        assert torch.equal(resumed.weights[name].tiers, weight.tiers)
    for name, weight in resumed.weights.items():
        state["weights"][name]["storage"] = weight.storage
    assert same(dict(resumed.state_dict()), state)
    if forward > 0.1 and all(round((1 - forward) * prod(shape)) < prod(shape) for shape in shapes):
        check_sparse_or_packed(resumed, loaded)


def check_sparse_or_packed(topkast, storage):
    if storage == "masked":
        check_sparse(topkast)
    check_exact(topkast)
