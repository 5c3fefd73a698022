"""State of the optimizer that other code puts back: it is used with the sets that it belongs to, or begins anew."""

import copy
import gc
import warnings
from itertools import permutations

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from lightning_topkast import Schedule, TopKast, TopKastError
from tests.helpers import MIDDLE, batches, check_sparse, fit, make_callback, make_net, make_trainer, same

KINDS = ["masked", "packed", "compact"]
ANEW = r"the optimizer's state of 2.weight was saved with other sets than the present ones.*topkast.load_state_dict"


class Run:
    """A plain loop, with the state of everything at any moment."""

    def __init__(self, kind, optimizer="adam", **options):
        torch.manual_seed(0)
        self.model = make_net().layers
        timing = {} if "schedule" in options else {"update_every": 2}
        options = timing | {"penalty": None, "storage": kind} | options
        self.topkast = TopKast(self.model, 0.75, 0.5, **options)
        self.make = {
            "adam": lambda: torch.optim.Adam(self.model.parameters(), lr=0.05),
            "adagrad": lambda: torch.optim.Adagrad(self.model.parameters(), lr=0.2, initial_accumulator_value=0.5),
        }[optimizer]
        self.optimizer = self.make()
        self.topkast.attach(self.optimizer)
        self.weight = self.topkast.weights["2.weight"]

    def train(self, steps, seed=1):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.model(torch.randn(4, 6, generator=generator)).square().mean().backward()
            self.optimizer.step()

    def idle(self):
        """Take a step without a gradient, so that Adam's momenta shrink to 9 tenths."""
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()

    def other_weights(self, seed=9):
        """Dense ones for the model."""
        generator = torch.Generator().manual_seed(seed)
        return {name: torch.randn(each.shape, generator=generator) for name, each in self.model.state_dict().items()}

    def state(self):
        parts = {"model": self.model, "topkast": self.topkast, "optimizer": self.optimizer}
        return {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}

    def load(self, state, *names):
        for name in names or state:
            getattr(self, name).load_state_dict(copy.deepcopy(state[name]))

    def momenta(self, key="exp_avg"):
        """In the weight's own shape, zero outside B."""
        return dense(self.weight, self.optimizer.state[self.weight.parameter][key])

    def thetas(self):
        return {name: weight.theta() for name, weight in self.topkast.weights.items()}


def dense(weight, values, sets=None):
    if values.shape == weight.shape:
        return values.clone()
    order = (sets or weight.sets).indices().long()
    whole = torch.zeros(weight.size)
    whole[order] = values[: order.numel()]
    return whole.view(weight.shape)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", list(permutations(("topkast", "optimizer", "attach"))))
@pytest.mark.parametrize("stop", [None, 3], ids=["", "stops"])
def test_state_is_put_back_in_any_order(kind, order, stop):
    """Also where the sets have to be chosen again, since exploration is over by a schedule that has changed."""
    run = Run(kind)
    run.train(4)
    state = run.state()
    resumed = Run(kind, schedule=Schedule(2, stop_exploring_at=stop))
    resumed.train(3, seed=5)
    if order[-1] != "attach" or stop:  # a run that is put back while it is attached, or a new one
        resumed.topkast.detach()
        resumed.load(state, "model")
        for what in order:
            resumed.topkast.attach(resumed.optimizer) if what == "attach" else resumed.load(state, what)
    else:
        resumed.load(state, "model", *order[:-1])
    if stop is None:
        run.train(3, seed=7)
        resumed.train(3, seed=7)
        assert same(run.thetas(), resumed.thetas())
    else:
        resumed.idle()
        assert not resumed.weight.is_exploring
        torch.testing.assert_close(resumed.momenta(), torch.where(resumed.weight.active, run.momenta() * 0.9, 0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", [("topkast", "optimizer"), ("optimizer", "topkast")])
def test_state_that_names_no_sets_is_that_of_the_sets_that_are_loaded(kind, order):
    """As an optimizer saves it that calls no hooks, and as earlier versions of this package did."""
    run = Run(kind, update_every=4)
    run.train(6)
    state, updated = run.state(), run.weight.updated
    for each in state["optimizer"]["state"].values():
        each.pop("topkast_sets", None)
    resumed = Run(kind, schedule=Schedule(4, stop_exploring_at=3))
    resumed.load(state, "model", *order)
    resumed.idle()
    assert not torch.equal(resumed.weight.updated, updated)
    torch.testing.assert_close(resumed.momenta(), torch.where(resumed.weight.active, run.momenta() * 0.9, 0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["loaded", "while detached", "into an optimizer made anew", "saved while detached"])
@pytest.mark.parametrize("optimizer", ["adam", "adagrad"])
def test_state_of_other_sets_is_never_that_of_other_entries(kind, how, optimizer):
    run = Run(kind, optimizer, update_every=3)
    key, start = {"adam": ("exp_avg", 0.0), "adagrad": ("sum", 0.5)}[optimizer]
    run.train(4)
    if how == "saved while detached":
        run.topkast.detach()
    saved, before, order = copy.deepcopy(run.optimizer.state_dict()), run.momenta(key), run.weight.tiers
    if how == "saved while detached":
        run.topkast.attach(run.optimizer)
    run.train(3)
    assert not torch.equal(run.weight.tiers, order)
    if how == "while detached":
        run.topkast.detach()
    if how == "into an optimizer made anew":
        run.optimizer = run.make()
    run.optimizer.load_state_dict(saved)
    if how == "while detached":
        run.topkast.attach(run.optimizer)
    if kind == "masked":
        run.idle()
        shrinks = 0.9 if optimizer == "adam" else 1.0
        expected = torch.where(run.weight.updated, before * shrinks, start)
    else:
        with pytest.warns(UserWarning, match=ANEW):
            run.idle()
        expected = start * run.weight.updated
    torch.testing.assert_close(run.momenta(key), expected)
    run.train(4)
    check_sparse(run.topkast)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["attached", "detached", "detached, and saved"])
def test_state_follows_weights_that_are_loaded(kind, how):
    run = Run(kind, update_every=100)
    run.train(3)
    before, updated = run.momenta(), run.weight.updated
    if how != "attached":
        run.topkast.detach()
    run.model.load_state_dict(run.other_weights())
    if how == "detached, and saved":  # and put back into an optimizer that knows nothing
        state = run.optimizer.state_dict()
        run.optimizer = run.make()
        run.optimizer.load_state_dict(state)
    if how != "attached":
        run.topkast.attach(run.optimizer)
    run.idle()
    assert not torch.equal(run.weight.updated, updated)
    torch.testing.assert_close(run.momenta(), torch.where(run.weight.updated, before * 0.9, 0))


@pytest.mark.parametrize("kind", KINDS)
def test_state_saved_between_weights_that_are_swapped_while_detached_is_whole(kind):
    run = Run(kind, update_every=100)
    run.train(3)
    before = run.momenta()
    run.topkast.detach()
    backup = copy.deepcopy(run.model.state_dict())
    run.model.load_state_dict(run.other_weights())
    run.state()
    run.model.load_state_dict(backup)
    state = run.optimizer.state_dict()
    run.optimizer = run.make()
    run.optimizer.load_state_dict(state)
    run.topkast.attach(run.optimizer)
    run.idle()
    torch.testing.assert_close(run.momenta(), before * 0.9)


@pytest.mark.parametrize("kind", KINDS)
def test_state_put_back_before_the_sets_change_is_kept(kind):
    run = Run(kind, update_every=100)
    run.train(1)
    before = run.momenta()
    run.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    run.idle()
    torch.testing.assert_close(run.momenta(), before * 0.9)


@pytest.mark.parametrize("kind", KINDS)
def test_saving_changes_no_state_and_saves_what_fits(kind):
    """Weights are swapped in and out again, and everything is saved in between."""
    run, other = Run(kind, schedule=Schedule(3, delay=2)), Run(kind, schedule=Schedule(3, delay=2))
    for each in (run, other):
        each.train(4)  # a selection is under way
    backup = copy.deepcopy(run.model.state_dict())
    run.model.load_state_dict(run.other_weights())
    momenta, sets = dense(other.weight, other.optimizer.state[other.weight.parameter]["exp_avg"]), run.weight.sets
    state = run.state()
    number = next(n for n, p in enumerate(run.model.parameters()) if p is run.weight.parameter)
    saved = dense(run.weight, state["optimizer"]["state"][number]["exp_avg"], sets)
    assert torch.equal(saved, torch.where(run.weight.updated, momenta, 0))
    run.model.load_state_dict(backup)
    for each in (run, other):
        each.train(4, seed=7)
    assert same(run.thetas(), other.thetas())
    assert torch.equal(run.momenta(), other.momenta())


@pytest.mark.parametrize("kind", KINDS)
def test_step_that_only_makes_the_state_for_a_checkpoint_counts_for_none(kind):
    run = Run(kind)
    before = run.thetas()
    get_optimizer_state_dict(run.model, run.optimizer)
    assert run.topkast.step_count == 0
    assert torch.equal(run.weight.theta(), before["2.weight"])
    run.model(torch.ones(4, 6)).square().mean().backward()
    run.optimizer.step(closure=None)
    assert run.topkast.step_count == 1
    assert not torch.equal(run.weight.theta(), before["2.weight"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:a .* was copied while it is trained")
def test_a_copy_goes_on_alike(kind):
    run = Run(kind)
    run.train(3)
    other = copy.copy(run)
    other.model, other.topkast, other.optimizer = copy.deepcopy((run.model, run.topkast, run.optimizer))
    other.weight = other.topkast.weights["2.weight"]
    other.topkast.attach(other.optimizer)
    for each in (run, other):
        each.train(3, seed=7)
    assert same(run.thetas(), other.thetas())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", ["swapped", "put back"])
def test_state_follows_a_refresh_by_hand_and_weights_that_are_loaded_after_it(kind, first):
    run = Run(kind, update_every=100)
    run.train(4)
    state = run.state()
    others = run.other_weights(9), run.other_weights(10)
    if first == "swapped":
        run.model.load_state_dict(others[0])
        run.model.load_state_dict(state["model"])
    else:
        run.load(state)
    run.topkast.refresh()
    before = run.momenta()
    run.model.load_state_dict(others[1])
    run.idle()
    torch.testing.assert_close(run.momenta(), torch.where(run.weight.updated, before * 0.9, 0))


@pytest.mark.parametrize("kind", KINDS)
def test_state_follows_a_refresh_while_detached(kind):
    run = Run(kind, update_every=100)
    run.train(4)
    before = run.momenta()
    run.topkast.detach()
    run.topkast.refresh()
    saved = copy.deepcopy(run.optimizer.state_dict())
    for how in ("as it is", "saved"):
        if how == "saved":
            run.topkast.detach()
            run.optimizer = run.make()
            run.optimizer.load_state_dict(saved)
        run.topkast.attach(run.optimizer)
        run.idle()
        torch.testing.assert_close(run.momenta(), torch.where(run.weight.updated, before * 0.9, 0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:a .* was copied while it is trained")
@pytest.mark.parametrize("order", [("model", "topkast", "optimizer"), ("model", "optimizer", "topkast")])
def test_a_copy_between_loading_and_the_next_step_goes_on_alike(kind, order):
    run = Run(kind)
    run.train(3)
    run.model.load_state_dict(run.other_weights())
    other = copy.copy(run)
    vars(other).update(zip(order, copy.deepcopy([getattr(run, part) for part in order]), strict=True))
    other.weight = other.topkast.weights["2.weight"]
    other.topkast.attach(other.optimizer)
    for each in (run, other):
        each.train(3, seed=7)
    assert same(run.thetas(), other.thetas())


def test_dense_weights_loaded_into_a_copy_are_chosen_from_by_magnitude():
    run = Run("masked")
    run.train(2)
    model, topkast = copy.deepcopy((run.model, run.topkast))
    values = torch.randn(16, 16)
    model.load_state_dict(model.state_dict() | {"2.weight": values})
    topkast.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    assert torch.equal(topkast.weights["2.weight"].theta(), values)
    check_sparse(topkast)


@pytest.mark.parametrize("kind", KINDS)
def test_state_of_all_optimizers_follows_the_step_of_one(kind):
    run = Run(kind, update_every=100)
    second = torch.optim.SGD(run.model.parameters(), lr=0.01, momentum=0.9)
    run.topkast.detach()
    run.topkast.attach(run.optimizer, second)
    run.train(2)
    run.optimizer, first = second, run.optimizer
    run.train(2)
    before = run.momenta("momentum_buffer")
    run.model.load_state_dict(run.other_weights())
    run.optimizer = first
    run.idle()
    run.optimizer = second
    run.idle()
    torch.testing.assert_close(run.momenta("momentum_buffer"), torch.where(run.weight.updated, before * 0.9, 0))


def test_engine_that_was_taken_over_has_no_part_in_what_is_saved():
    run = Run("masked")
    run.train(2)
    later = TopKast(run.model, 0.75, 0.25, update_every=2, penalty=None)
    later.attach(run.optimizer)
    run.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    run.train(2)
    live = run.optimizer.state[later.weights["2.weight"].parameter]["exp_avg"]
    number = next(n for n, p in enumerate(run.model.parameters()) if p is later.weights["2.weight"].parameter)
    assert torch.equal(run.optimizer.state_dict()["state"][number]["exp_avg"], live)
    assert int(torch.count_nonzero(live)) > int(run.weight.updated_entries)


@pytest.mark.parametrize("kind", ["masked", "packed"])
def test_resumed_run_may_end_exploration_earlier(tmp_path, kind):
    trainer = fit(
        make_trainer(tmp_path, make_callback(storage=kind), max_epochs=2), make_net(optimizer="adam", lr=0.01)
    )
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    callback, model = make_callback(storage=kind, stop_exploring_at=5), make_net(optimizer="adam", lr=0.01)
    fit(make_trainer(tmp_path, callback, max_epochs=4), model, ckpt_path=tmp_path / "run.ckpt")
    assert not callback.topkast.weights[MIDDLE].is_exploring
    check_sparse(callback.topkast)
    if kind == "packed":
        masked, other = make_callback(storage="masked", stop_exploring_at=5), make_net(optimizer="adam", lr=0.01)
        fit(make_trainer(tmp_path, masked, max_epochs=4), other, ckpt_path=tmp_path / "run.ckpt")
        theirs, ours = (each.topkast.weights[MIDDLE].theta() for each in (masked, callback))
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_strength_is_kept_whether_the_state_is_loaded_before_or_after_the_optimizer_is_attached(kind):
    run = Run(kind, penalty="auto")
    run.train(1)
    for group in run.optimizer.param_groups:
        group["lr"] = 0.001  # a scheduler has lowered it, and nobody knows its peak
    state, strength = run.state(), run.weight.strength
    for attached in (False, True):
        resumed = Run(kind, penalty="auto")
        if not attached:
            resumed.topkast.detach()
        resumed.load(state, "model", "optimizer", "topkast")
        if not attached:
            resumed.topkast.attach(resumed.optimizer)
        assert resumed.weight.strength == strength > 0


@pytest.mark.parametrize("kind", KINDS)
def test_strength_is_kept_by_an_optimizer_that_is_attached_anew_and_not_by_a_new_run(kind):
    run = Run(kind, penalty="auto")
    strength = run.weight.strength
    for group in run.optimizer.param_groups:
        group["lr"] /= 10
    run.topkast.detach()
    run.topkast.attach(run.optimizer)
    assert run.weight.strength == strength > 0
    run.topkast.restart()
    assert run.weight.strength == pytest.approx(10 * strength)


def test_strength_is_worked_out_after_a_state_was_loaded_that_knew_no_learning_rate():
    models = [make_net().layers, make_net().layers]
    new, old = (TopKast(model, 0.75, 0.5, penalty="auto") for model in models)
    models[0].load_state_dict(models[1].state_dict())
    new.load_state_dict(old.state_dict())
    new.attach(torch.optim.SGD(models[0].parameters(), lr=0.1))
    assert all(weight.strength > 0 for weight in new.weights.values())


def test_a_new_fit_after_a_checkpoint_was_tested_has_the_strength_of_its_own_learning_rate(tmp_path):
    callback, model = make_callback(penalty="auto", strength=None), make_net(lr=0.1)
    trainer = fit(make_trainer(tmp_path, callback, max_epochs=1), model)
    strength = callback.topkast.weights[MIDDLE].strength
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning.pytorch")
        trainer.test(model, batches(2), ckpt_path=tmp_path / "run.ckpt", verbose=False)
    model.hparams.lr = 0.01
    fit(make_trainer(tmp_path, callback, max_epochs=1), model)
    assert callback.topkast.weights[MIDDLE].strength == pytest.approx(10 * strength)


def test_state_of_another_number_of_optimizers_is_refused_when_they_are_attached():
    run = Run("masked")
    resumed = Run("masked")
    resumed.topkast.detach()
    resumed.topkast.load_state_dict(run.topkast.state_dict())
    halves = [torch.optim.SGD([parameter], lr=0.1) for parameter in list(run.model.parameters())[:2]]
    with pytest.raises(TopKastError, match="expected 1 optimizers, as in the Top-KAST state that was loaded, got 2"):
        resumed.topkast.attach(*halves)


def test_state_that_holds_something_else_than_a_fingerprint_begins_anew():
    run = Run("packed", update_every=100)
    run.train(2)
    state = copy.deepcopy(run.optimizer.state_dict())
    for each in state["state"].values():
        if "topkast_sets" in each:
            each["topkast_sets"] = torch.ones(3)
    run.optimizer.load_state_dict(state)
    with pytest.warns(UserWarning, match=ANEW):
        run.idle()
    assert not run.momenta().any()


def test_state_of_packed_weights_names_its_sets_and_that_of_others_does_not():
    for kind in KINDS:
        run = Run(kind)
        run.train(2)
        assert not any("topkast_sets" in state for state in run.optimizer.state.values())
        marked = ["topkast_sets" in state for state in run.optimizer.state_dict()["state"].values()]
        assert sum(marked) == (0 if kind == "masked" else 1)


def test_optimizers_made_anew_leave_nothing_behind():
    run = Run("masked")
    for _ in range(20):
        run.optimizer = torch.optim.SGD(run.model.parameters(), lr=0.01)
        run.train(1)
    (hooks,) = run.topkast._attached.hooks
    gc.collect()
    assert len(hooks.optimizers) == len(hooks._handles) == 1
    for _ in range(5):
        run.topkast.detach()
        run.topkast.attach(run.optimizer)
    assert len(run.optimizer._optimizer_state_dict_post_hooks) == 1
    assert len(run.optimizer._optimizer_load_state_dict_post_hooks) == 1
