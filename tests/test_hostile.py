"""Damaged and hostile files: refused with nothing changed, or taken over with every invariant true; never executed."""

import copy
import functools
import io
import math
import os
import random
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_topkast import NonFiniteWeightError, TopKast, TopKastError
from tests.helpers import (
    SaveAfter,
    batches,
    check_sparse,
    fit,
    make_callback,
    make_net,
    make_trainer,
    nouns,
    parameters_of,
    same,
)

OPTIONS = {
    "forward_sparsity": 0.75, "backward_sparsity": 0.5, "update_every": 3, "delay": 2, "kernels": "torch",
    "keep_first_dense": False, "strength": 1e-3,
}  # fmt: skip


class Touch:
    """Unpickled with its code run, it leaves a file behind."""

    def __init__(self, path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def make_run(storage, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Conv1d(1, 4, 3), nn.Flatten(), nn.Linear(24, 2))
    topkast = TopKast(model, **nouns(storage=storage, **OPTIONS))
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    topkast.attach(optimizer)
    return model, topkast, optimizer


def train(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        x = torch.randn(4, 1, 5, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@functools.cache
def saved(storage):
    """The parts of a run after four steps, with sets that are chosen and yet to take effect, as files hold them."""
    model, topkast, optimizer = make_run(storage)
    train(model, optimizer, 4)
    state = topkast.state_dict()
    assert len(state["selections"]) == 1
    parts = []
    for part in (model.state_dict(), optimizer.state_dict(), state):
        file = io.BytesIO()
        torch.save(part, file)
        parts.append(file.getvalue())
    return parts


def load(data, **options):
    return torch.load(io.BytesIO(data), weights_only=True, **options)


def loaded_run(storage):
    """A run that holds the saved model and optimizer, and waits for the engine's state."""
    model, topkast, optimizer = make_run(storage, seed=1)
    model.load_state_dict(load(saved(storage)[0]))
    optimizer.load_state_dict(load(saved(storage)[1]))
    return model, topkast, optimizer


def everything(model, topkast, optimizer):
    # first, since it accepts the weights that the model has loaded
    parts = (topkast.state_dict(), model.state_dict(), optimizer.state_dict())
    thetas = {name: (weight.theta(), weight.tiers) for name, weight in topkast.weights.items()}
    return copy.deepcopy((thetas, parts, topkast.step_count, topkast.refresh_count))


def check_outcome(storage, state) -> str:
    """Load `state`, which may be anything: it is refused, and all is as it was, or it trains on as it should."""
    model, topkast, optimizer = loaded_run(storage)
    before = everything(model, topkast, optimizer)
    refusal = None
    try:
        topkast.load_state_dict(state)
    except TopKastError as error:
        refusal = str(error)
    if refusal is not None:
        assert same(everything(model, topkast, optimizer), before), f"changed by a state that was refused: {refusal}"
        assert len(refusal) < 800
        return "refused"
    check_sparse(topkast)
    for weight in topkast.weights.values():
        assert torch.isfinite(weight.theta()).all()
        assert not weight.theta().requires_grad
        assert math.isfinite(weight.strength)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a strength that is out of reach is told, and capped
        try:
            train(model, optimizer, 7, first=4)
        except NonFiniteWeightError:  # of numbers so large that the activations overflow
            return "taken"
    check_sparse(topkast)
    assert all(torch.isfinite(weight.theta()).all() for weight in topkast.weights.values())
    return "taken"


# --- the engine's state -------------------------------------------------------------------------------------------


def places(state, path=()):
    """Every place in a nested state, as the path to it."""
    yield path
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def variants(value, rng):
    """What a place may hold instead."""
    things = [
        None, True, -1, 0, 3, 2**40, 10**30, -0.5, math.nan, math.inf, 1e300, "", "masked", b"x", [], {}, [None],
        {0: 1}, {"weights": {}}, [[[]]], torch.zeros(()), torch.zeros(3), torch.empty(0), torch.zeros(2).cfloat(),
    ]  # fmt: skip
    plain = (
        isinstance(value, torch.Tensor)
        and value.dim()
        and value.numel()
        and not value.is_meta
        and not value.is_complex()
    )
    if plain and value.is_contiguous():
        value, shape = value.detach(), value.shape
        shuffled = torch.randperm(value.numel(), generator=torch.Generator().manual_seed(rng.randrange(99)))
        bits = value.clone().view(-1).view(torch.uint8)
        bits[rng.randrange(bits.numel())] ^= 1 << rng.randrange(8)
        things = [
            value.double(), value.half(), value.bool(), value.to(torch.int64), value.flatten(), value[:1],
            torch.zeros_like(value), torch.ones_like(value), value.flatten().flip(0).view(shape),
            torch.full(shape, 7).to(value.dtype), torch.empty(shape, dtype=value.dtype, device="meta"),
            torch.zeros(shape, dtype=value.dtype).to_sparse(), value.flatten()[:1].view([1] * len(shape)).expand(shape),
            torch.empty_permuted(shape, tuple(range(len(shape)))[::-1], dtype=value.dtype).copy_(value),
            value.flatten()[shuffled].view(shape), *things[::4],
        ]  # fmt: skip
        if value.dtype == torch.uint8:
            things += [value * 2, value + 1, 2 - value]
        elif value.dtype != torch.bool:
            huge = torch.where(value != 0, torch.tensor(1e300, dtype=torch.float64), 0)
            things += [value * math.nan, value / 0.0, -value, value * 1e30, huge, nn.Parameter(value)]
        if value.dtype.is_floating_point or value.dtype == torch.uint8:
            things += [bits.view(value.dtype).view(shape)] * 4
    return things


def mutate(state, rng):
    path = rng.choice([p for p in places(state) if p])
    parent = functools.reduce(lambda node, key: node[key], path[:-1], state)
    how = rng.random()
    if how < 0.15:
        del parent[path[-1]]
    elif how < 0.25 and isinstance(parent, dict):
        parent[rng.choice([7, "other", None, ("a",)])] = parent.pop(path[-1])
    elif how < 0.35:
        other = rng.choice([p for p in places(state) if p])
        parent[path[-1]] = copy.deepcopy(functools.reduce(lambda node, key: node[key], other, state))
    else:
        parent[path[-1]] = rng.choice(variants(parent[path[-1]], rng))
    return path


@pytest.mark.parametrize("storage", ["masked", "packed"])
def test_state_itself_is_taken(storage):
    assert check_outcome(storage, load(saved(storage)[2])) == "taken"


@pytest.mark.parametrize("storage", ["masked", "packed"])
@given(seed=st.integers(0, 2**32))
@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@pytest.mark.slow
def test_state_that_was_tampered_with_is_refused_or_harmless(storage, seed):
    state, rng = load(saved(storage)[2]), random.Random(seed)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        mutate(state, rng)
    check_outcome(storage, state)


@pytest.mark.slow
def test_every_single_thing_in_a_state_can_be_missing_or_of_another_kind():
    taken = set()
    for path in [p for p in places(load(saved("masked")[2])) if p]:
        for value in ("missing", None, "text", [None], {"x": 1}, torch.zeros(2)):
            state = load(saved("masked")[2])
            parent = functools.reduce(lambda node, key: node[key], path[:-1], state)
            if isinstance(value, str) and value == "missing":
                del parent[path[-1]]
            else:
                parent[path[-1]] = value
            if check_outcome("masked", state) == "taken":
                taken.add((*path, "missing" if isinstance(value, str) else value))
    # what is None or empty in most runs
    assert taken == {
        ("shrinkage", "missing"), ("shrinkage", None),
        ("selections", 0, "missing"), ("selections", 0, "valid", "missing"),
        *(("selections", 0, "tiers", name, "missing") for name in ("0.weight", "2.weight")),
    }  # fmt: skip


def outside(state, name="0.weight"):
    return state["weights"][name]["tiers"] == 0


# what drawing has found, each in a place of a saved state
FOUND = {
    "too large for float32": (("weights", "0.weight", "latent"), lambda v, out: torch.where(out, 1e300, v.double())),
    "a tier that does not exist": (("selections", 0, "tiers", "0.weight"), lambda v, out: v.masked_fill(v == 0, 7)),
    "sparse": (("weights", "0.weight", "latent"), lambda v, out: v.to_sparse()),
    "without memory": (("weights", "0.weight", "tiers"), lambda v, out: v.to("meta")),
    "sparse next sets": (("selections", 0, "tiers", "0.weight"), lambda v, out: v.to_sparse()),
    "a negative count": (("weights", "0.weight", "first_reservoir"), lambda v, out: -1),
    "more than there are": (("weights", "0.weight", "promoted"), lambda v, out: 10**9),
    "before the start": (("selections", 0, "step"), lambda v, out: -4),
    "no list of sets": (("selections",), lambda v, out: 3),
    "a shrinkage of two": (("shrinkage",), lambda v, out: torch.zeros(2)),
    "a key of another kind": (("weights",), lambda v, out: v | {3: {}, "x": {}}),
    "endless": (("weights", "0.weight", "storage"), lambda v, out: ["x" * 5000]),
    "a version of two": (("version",), lambda v, out: torch.ones(2)),
}


@pytest.mark.parametrize("storage", ["masked", "packed"])
@pytest.mark.parametrize("damage", FOUND)
def test_what_drawing_has_found_is_refused(storage, damage):
    state = load(saved(storage)[2])
    path, change = FOUND[damage]
    parent = functools.reduce(lambda node, key: node[key], path[:-1], state)
    parent[path[-1]] = change(parent[path[-1]], outside(state))
    assert check_outcome(storage, state) == "refused"


@pytest.mark.parametrize("storage", ["masked", "packed"])
@pytest.mark.parametrize("place", ["sets", "next sets", "latent"])
def test_tensors_in_another_memory_order_or_with_a_gradient_are_taken(storage, place):
    state = load(saved(storage)[2])
    weight = state["weights"]["0.weight"]
    if place == "latent":
        weight["latent"] = nn.Parameter(weight["latent"])
    parent, key = (weight, "tiers") if place == "sets" else (state["selections"][0]["tiers"], "0.weight")
    parent[key] = parent[key].t().contiguous().t()
    assert not parent[key].is_contiguous()
    assert check_outcome(storage, state) == "taken"


@pytest.mark.parametrize("storage", ["masked", "packed"])
def test_a_model_with_nan_is_refused_before_the_state_is_taken_over(storage):
    _, topkast, _ = loaded_run(storage)
    topkast.load_state_dict(load(saved(storage)[2]))
    weight = topkast.weights["0.weight"]
    entry = torch.nonzero(weight.active.flatten())[0] if storage == "masked" else 0
    weight.parameter.detach().view(-1)[entry] = math.nan
    state = load(saved(storage)[2])
    state["steps"] = [100]
    with pytest.raises(TopKastError, match="holds NaN or infinity; use another checkpoint"):
        topkast.load_state_dict(state)
    assert topkast.step_count == 4


@pytest.mark.parametrize("state", [None, [], 3, "x", torch.zeros(2), {}, {1: 2}, {"version": torch.ones(3)}], ids=repr)
def test_what_is_no_state_is_refused(state):
    assert check_outcome("masked", state) == "refused"


# --- its file -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["masked", "packed"])
@given(seed=st.integers(0, 2**32))
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@pytest.mark.slow
def test_file_with_damaged_bytes_is_refused_or_harmless(storage, seed):
    rng, data = random.Random(seed), bytearray(saved(storage)[2])
    if rng.random() < 0.3:
        del data[rng.randrange(len(data)) :]
    else:
        for _ in range(rng.choice([1, 1, 3, 20])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = load(bytes(data))
    except Exception:  # torch's own, of many kinds
        return
    check_outcome(storage, state)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["file", "key", "tensor", "number"])
def test_code_in_a_state_is_never_run(tmp_path, zipped, place):
    state = load(saved("masked")[2])
    evil = Touch(tmp_path / "executed")
    if place == "file":
        state = evil
    elif place == "key":
        state["more"] = evil
    elif place == "tensor":
        state["weights"]["0.weight"]["tiers"] = evil
    else:
        state["steps"] = [evil]
    torch.save(state, tmp_path / "state.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        torch.load(tmp_path / "state.pt", weights_only=True)
    assert not (tmp_path / "executed").exists()
    torch.load(tmp_path / "state.pt", weights_only=False)  # or the test shows nothing
    assert (tmp_path / "executed").exists()


# --- Lightning ----------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    fit(make_trainer(tmp_path, make_callback(), SaveAfter(tmp_path / "half.ckpt", 1), max_epochs=2), make_net())
    return tmp_path / "half.ckpt"


def resume(folder, path, **arguments):
    callback, model = make_callback(), make_net(seed=3)
    trainer = make_trainer(folder, callback, max_epochs=3)
    trainer.fit(model, batches(), batches(2, seed=2), ckpt_path=path, **arguments)
    return callback, model


@pytest.mark.parametrize("weights_only", [None, True])
@pytest.mark.parametrize("place", ["callbacks", "hyper_parameters", "state_dict"])
def test_lightning_runs_no_code_of_a_local_checkpoint(tmp_path, checkpoint, place, weights_only):
    content = torch.load(checkpoint, weights_only=True)
    content.setdefault(place, {})["more"] = Touch(tmp_path / "executed")
    torch.save(content, checkpoint)
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        resume(tmp_path, checkpoint, weights_only=weights_only)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("storage", ["masked", "packed"])
def test_damaged_states_in_a_checkpoint_are_refused_by_the_callback(tmp_path, storage):
    fit(
        make_trainer(tmp_path, make_callback(storage=storage), SaveAfter(tmp_path / "half.ckpt", 0), max_epochs=1),
        make_net(),
    )
    key = make_callback(storage=storage).state_key
    for damage in ({"version": 9}, [1], "x", {"shards_in": 3}, {"shards_in": "optimizer_x", "version": 1}):
        content = torch.load(tmp_path / "half.ckpt", weights_only=True)
        content["callbacks"][key] = damage
        torch.save(content, tmp_path / "damaged.ckpt")
        callback, model = make_callback(storage=storage), make_net(seed=3)
        with pytest.raises(TopKastError, match="Top-KAST state"):
            fit(make_trainer(tmp_path, callback, max_epochs=3), model, ckpt_path=tmp_path / "damaged.ckpt")
        assert same(parameters_of(model).keys(), parameters_of(make_net()).keys())
