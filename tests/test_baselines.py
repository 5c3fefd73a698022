"""Static, SET, RigL and gradual pruning: what each drops and grows by its paper, and what training keeps of it."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from lightning_topkast import NonFiniteWeightError, Ramp, Rule, TopKast, TopKastError
from lightning_topkast.baselines import SET, RigL, Static
from lightning_topkast.engine.choose import Choice, choose
from lightning_topkast.method.selection import drop_and_grow
from lightning_topkast.method.structure import Unstructured
from lightning_topkast.settings import Settings
from tests.helpers import OPTIMIZERS, batches, make_callback, make_net, make_trainer, nouns, same


def gradual(begin=0, end=30):
    """Gradual magnitude pruning: magnitude with a ramp, after which the sets stay."""
    return {"ramp": Ramp(begin=begin, end=end), "stop_updating_at": end, "penalty": None}


RULES = {"static": Static(), "set": SET(), "rigl": RigL(), "gradual": gradual()}
rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


# --- what is dropped and what is grown, by hand -----------------------------------------------------------------------


def grown(scores, active, growth, kept, count):
    return drop_and_grow(torch.tensor(scores), torch.tensor(active).bool(), torch.tensor(growth), kept, count).tolist()


def test_smallest_active_entries_are_dropped_and_best_others_grow():
    #       the reservoir's own size counts nothing: 9 is not active
    assert grown([5.0, 1.0, 3.0, 9.0, 0.0, 0.0], [1, 1, 1, 0, 0, 0], [0.0, 0.0, 0.0, 0.1, 0.3, 0.2], 2, 1) == [
        1, 0, 1, 0, 1, 0,
    ]  # fmt: skip


def test_a_dropped_entry_may_grow_again_at_once():
    assert grown([5.0, 1.0, 0.0], [1, 1, 0], [0.0, 2.0, 1.0], 1, 1) == [1, 1, 0]


def test_a_kept_entry_takes_no_place_of_those_that_grow():
    assert grown([5.0, 1.0, 0.0, 0.0], [1, 1, 0, 0], [9.0, 0.0, 1.0, 2.0], 1, 1) == [1, 0, 0, 1]


def test_active_zeros_are_kept_before_reservoir_entries_and_ties_go_to_the_lowest_index():
    assert grown([0.0, 0.0, 0.0, 0.0], [0, 1, 0, 1], [0.0, 0.0, 0.0, 0.0], 1, 1) == [1, 1, 0, 0]


def test_drop_and_grow_is_what_sorting_gives():
    generator = np.random.default_rng(0)
    for _ in range(200):
        n = int(generator.integers(2, 40))
        # few levels, so that there are ties
        scores, growth = (generator.integers(0, 5, n).astype(np.float32) for _ in range(2))
        active = generator.permutation(n) < generator.integers(1, n + 1)
        dropped = int(generator.integers(0, active.sum() + 1))
        by_size = sorted(np.flatnonzero(active), key=lambda i: (-scores[i], i))
        kept = set(by_size[: active.sum() - dropped])
        by_growth = sorted((i for i in range(n) if i not in kept), key=lambda i: (-growth[i], i))
        expected = [int(i in kept | set(by_growth[:dropped])) for i in range(n)]
        assert grown(scores, active, growth, int(active.sum()) - dropped, dropped) == expected


@pytest.mark.parametrize(("passed", "share"), [(0.0, 0.3), (0.5, 0.15), (1.0, 0.0), (1 / 3, 0.225)])
def test_rigl_drops_ever_less_as_a_cosine_and_set_always_the_same(passed, share):
    assert RigL(0.3).fraction(passed) == pytest.approx(share)
    assert SET(0.3).fraction(passed) == 0.3


# --- in training ------------------------------------------------------------------------------------------------------


class Run:
    """A small network in training; every step's batch follows from the step number."""

    def __init__(self, rule=None, sparsity=0.8, optimizer="momentum", total_steps=40, state_dict=None, **options):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 4))
        self.model.load_state_dict(state_dict or self.model.state_dict())
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters(), 0.05)
        rule = rule if isinstance(rule, dict) else {"rule": rule or "magnitude"}
        options = {"update_every": 5} | rule | options
        self.topkast = TopKast(self.model, sparsity, sparsity, **nouns(**options))
        self.topkast.attach(self.optimizer, total_steps=total_steps)
        self.weight = self.topkast.weights["2.weight"]
        self.done = 0

    def backward(self):
        generator = torch.Generator().manual_seed(self.done)
        x, y = torch.randn(16, 12, generator=generator), torch.randint(0, 4, (16,), generator=generator)
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(x), y).backward()

    def step(self, count=1):
        for _ in range(count):
            self.backward()
            self.optimizer.step()
            self.done += 1
        return self


@rules
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_counts_are_exact_and_the_weight_is_zero_outside_the_active_set_at_every_step(rule, optimizer):
    run = Run(rule, optimizer=optimizer)
    for step in range(40):
        run.step()
        active = run.weight.active
        assert torch.equal(active, run.weight.updated)
        assert not run.weight.parameter.detach()[~active].any()
        if not isinstance(rule, dict) or step + 1 >= 30:
            assert int(active.sum()) == 120


@rules
def test_the_network_learns(rule):
    def loss(model):
        generator = torch.Generator().manual_seed(99)
        x = torch.randn(256, 12, generator=generator)
        return nn.functional.cross_entropy(model(x), (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long())

    run = Run(rule, total_steps=200)
    before = loss(run.model).item()
    for _ in range(200):
        run.optimizer.zero_grad()
        loss(run.model).backward()
        run.optimizer.step()
    assert loss(run.model).item() < before / 2


def test_static_never_changes_its_random_set():
    run = Run(Static())
    before, theta = run.weight.active, Run().weight.theta()  # Top-KAST keeps what the model was made with
    largest = theta.abs().flatten().topk(120).indices
    assert int(before.flatten()[largest].sum()) < 120, "the first set is drawn, not chosen by size"
    run.step(40)
    assert torch.equal(run.weight.active, before)
    assert not torch.equal(Run(Static(), seed=1).weight.active, before)
    assert torch.equal(Run(Static()).weight.active, before)


@pytest.mark.parametrize("rule", [SET(0.25), RigL(0.5)], ids=["set", "rigl"])
def test_a_grown_entry_starts_from_zero_and_a_dropped_one_is_forgotten(rule):
    run = Run(rule).step(4)
    before = run.weight.active
    run.step()
    entered, left = run.weight.active & ~before, before & ~run.weight.active
    assert int(entered.sum()) == int(left.sum()) > 0
    assert not run.weight.theta()[entered].any()
    assert not run.weight.theta()[left].any()
    momentum = run.optimizer.state[run.weight.parameter]["momentum_buffer"]
    assert not momentum[entered].any()
    run.step()
    assert run.weight.theta()[entered].any(), "and then it learns"


def test_set_drops_the_smallest_of_the_active_set_and_grows_at_random():
    run = Run(SET(0.25)).step(4)
    before = run.weight.active
    run.topkast.recover()
    reference = Run(SET(0.25), update_every=1000).step(5)  # the same training without the refresh
    reference_before = reference.weight.active
    assert torch.equal(before, reference_before)
    magnitudes = reference.weight.theta().abs()
    run.step()
    kept = magnitudes.masked_fill(~before, -1).flatten().topk(90).indices
    assert run.weight.active.flatten()[kept].all()
    assert int((run.weight.active & before).sum()) in range(90, 98), "few of those dropped are drawn again"


def test_rigl_grows_where_the_dense_gradient_of_the_step_before_was_largest():
    run = Run(RigL(0.5), total_steps=40).step(4)
    before = run.weight.active
    dense = Run(RigL(0.5), update_every=1000).step(4)
    dense.backward()
    gradient = dense.weight.parameter.grad.abs()
    magnitudes = dense.step().weight.theta().abs()
    run.step()
    dropped = int(0.25 * (1 + math.cos(math.pi * 5 / 40)) * 120)
    kept = torch.zeros_like(before).flatten()
    kept[magnitudes.masked_fill(~before, -1).flatten().topk(120 - dropped).indices] = True
    best = gradient.flatten().masked_fill(kept, -1).topk(dropped).indices
    expected = kept.clone()
    expected[best] = True
    assert torch.equal(run.weight.active.flatten(), expected)


def test_rigl_sees_the_whole_gradient_although_it_was_masked_for_clipping_before():
    plain, clipped = Run(RigL(0.5)), Run(RigL(0.5))
    for run in (plain, clipped):
        for _ in range(5):
            run.backward()
            if run is clipped:
                for _ in range(2):  # also when it is asked for twice
                    run.topkast.mask_gradients()
                assert not run.weight.parameter.grad[~run.weight.updated].any()
            run.optimizer.step()
            run.done += 1
    assert torch.equal(plain.weight.active, clipped.weight.active)


def test_rigl_ignores_the_gradient_of_a_step_that_was_skipped():
    plain, skipping = Run(RigL(0.5)).step(4), Run(RigL(0.5)).step(4)
    skipping.backward()
    skipping.weight.parameter.grad.fill_(float("inf"))
    skipping.topkast.mask_gradients()  # and then a gradient scaler skips the step
    assert torch.equal(plain.step().weight.active, skipping.step().weight.active)


def test_rigl_grows_nothing_by_the_gradient_of_an_older_step():
    run = Run(RigL(0.5)).step(5)
    for steps in (0, 2):  # that of step 5 was used, and those of 6 and 7 are not looked at
        run.step(steps)
        active, values = run.weight.active, run.weight.parameter.detach()
        values[active] = values[active].flip(0)  # so that others are the smallest
        run.topkast.refresh()
        assert torch.equal(run.weight.active, active)


def test_rigl_records_the_last_gradient_that_was_not_masked():
    run = Run(RigL(0.5)).step(4)
    run.backward()
    whole = run.weight.parameter.grad.abs().clone()
    run.topkast.mask_gradients()
    run.topkast.mask_gradients()
    assert torch.equal(run.weight.gradient_magnitudes, whole)
    run.weight.parameter.grad.copy_(3 * whole)  # of another backward pass
    run.topkast.mask_gradients()
    assert torch.equal(run.weight.gradient_magnitudes, 3 * whole)


def test_rigl_refuses_a_gradient_that_is_not_finite_and_leaves_the_sets_alone():
    run = Run(RigL(0.5)).step(4)
    before = run.weight.active
    run.backward()
    run.weight.parameter.grad[~before] = float("nan")
    with pytest.raises(NonFiniteWeightError, match="or its gradient holds NaN or infinity at step 5"):
        run.optimizer.step()
    assert torch.equal(run.weight.active, before)


def test_sets_stand_still_from_where_refreshes_stop():
    run = Run(RigL(0.5), stop_updating_at=0.5, total_steps=40)
    changes = []
    for _ in range(40):
        before = run.weight.active
        run.step()
        changes.append(not torch.equal(before, run.weight.active))
    assert [step for step, changed in enumerate(changes, 1) if changed] == [5, 10, 15]


def test_gradual_pruning_follows_the_cubic_schedule():
    run = Run(gradual(begin=10), sparsity=0.9)
    sizes = []
    for _ in range(40):
        run.step()
        sizes.append(int(run.weight.active.sum()))
    share = {step: 0.9 - 0.9 * (1 - max(0, step - 10) / 20) ** 3 for step in (5, 10, 15, 20, 25)}
    for step, sparsity in share.items():
        assert sizes[step - 1] == round((1 - sparsity) * 600), step
    assert sizes[:14] == [600] * 14
    assert sizes[29:] == [60] * 11


def test_gradual_pruning_keeps_the_largest_and_leaves_pruned_values_alone():
    run = Run(gradual(), optimizer="adamw").step(10)
    active, theta = run.weight.active, run.weight.theta()
    assert theta[active].abs().min() >= theta[~active].abs().max()
    run.step(4)
    assert torch.equal(run.weight.theta()[~active], theta[~active])


# --- what holds for all ----------------------------------------------------------------------------------------------


def assert_goes_on_as(whole, first, resumed, middle):
    """Take over `first`'s state but for the model's, which `resumed` has, and end as `whole` did."""
    resumed.optimizer.load_state_dict(first.optimizer.state_dict())
    resumed.topkast.load_state_dict(first.topkast.state_dict())
    resumed.done = middle
    resumed.step(32 - middle)
    assert same(whole.topkast.state_dict(), resumed.topkast.state_dict())
    assert same(dict(whole.model.state_dict()), dict(resumed.model.state_dict()))


@rules
@pytest.mark.parametrize("middle", [3, 5, 17])
def test_a_resumed_run_equals_the_whole_one_bit_for_bit(rule, middle):
    whole, first, resumed = Run(rule, optimizer="adamw"), Run(rule, optimizer="adamw"), Run(rule, optimizer="adamw")
    whole.step(32)
    first.step(middle)
    resumed.model.load_state_dict(first.model.state_dict())
    assert_goes_on_as(whole, first, resumed, middle)


@rules
@pytest.mark.parametrize("middle", [5, 17])
def test_a_run_resumed_with_a_model_that_was_loaded_before_equals_the_whole_one(rule, middle):
    """As in Lightning, which loads the model before training starts: the first sets must not cost it anything."""
    whole, first = Run(rule, optimizer="adamw").step(32), Run(rule, optimizer="adamw").step(middle)
    resumed = Run(rule, optimizer="adamw", state_dict=first.model.state_dict())
    assert_goes_on_as(whole, first, resumed, middle)


@rules
@pytest.mark.filterwarnings("ignore:the run has ended before its sparsities")
def test_a_resumed_fit_equals_the_whole_one(rule, tmp_path):
    def fit(epochs, ckpt_path=None):
        rule_or_ramp = rule if isinstance(rule, dict) else {"rule": rule, "strength": None}
        changes = {"backward_sparsity": 0.75, "update_every": 2} | rule_or_ramp | {"stop_updating_at": 20}
        callback = make_callback(**changes)
        model, trainer = make_net(optimizer="adamw", lr=0.02), make_trainer(tmp_path, callback, max_epochs=epochs)
        trainer.fit(model, batches(), batches(2, seed=2), ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return dict(model.state_dict())

    whole = fit(6)
    fit(3)
    assert same(fit(6, tmp_path / "3.ckpt"), whole)


def test_a_sparse_network_keeps_its_connections_and_zeros_are_drawn_at_random():
    trained = Run(SET()).step(17).model.state_dict()
    again = Run(SET(), state_dict=trained)
    assert same(dict(again.model.state_dict()), dict(trained))
    zeros = Run(Static(), state_dict=trained | {"2.weight": torch.zeros(30, 20)}).weight.active
    assert int(zeros.sum()) == 120
    assert zeros.any(dim=1).sum() > 20, "not the first rows"


@pytest.mark.parametrize("rule", ["static", "set", "rigl"])
def test_no_penalty_is_applied_unless_the_rule_explores(rule):
    run = Run(rule).step(3)
    assert run.weight.strength == 0
    assert float(run.topkast.penalty()) == 0


@pytest.mark.parametrize("rule", [Static(), SET()], ids=["static", "set"])
def test_packed_training_is_masked_training(rule):
    def trained(storage):
        run = Run.__new__(Run)
        torch.manual_seed(0)
        run.model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 4))
        options = {"update_every": 5, "storage": storage, "kernels": "torch"}
        run.topkast = TopKast(run.model, 0.8, 0.8, **nouns(rule=rule, **options))
        run.optimizer = OPTIMIZERS["momentum"](run.model.parameters(), 0.05)
        run.topkast.attach(run.optimizer)
        run.weight, run.done = run.topkast.weights["2.weight"], 0
        return run.step(22).weight

    masked, packed = trained("masked"), trained("packed")
    assert torch.equal(masked.active, packed.active)
    torch.testing.assert_close(masked.theta(), packed.theta(), rtol=1e-4, atol=1e-6)
    assert not packed.theta()[~packed.active].any()


def test_a_rule_of_ones_own_decides_the_sets():
    class Corner(Rule):
        def choose(self, candidates):
            tiers = torch.zeros_like(candidates.scores, dtype=torch.uint8)
            tiers.view(-1)[: candidates.updated_count] = 1
            tiers.view(-1)[: candidates.active_count] = 2
            return tiers

    weight = TopKast(nn.Sequential(nn.Linear(4, 4)), 0.75, 0.5, rule=Corner(), include=["0.weight"]).weights["0.weight"]
    assert weight.tiers.flatten().tolist() == [2] * 4 + [1] * 4 + [0] * 8


def test_choosing_alone_and_together_draws_the_same_for_the_same_seed():
    run = Run(SET())
    choice = Choice(SET(), Unstructured(), seed=3, step=5, counts={"2.weight": (120, 120)})
    first, second = (choose([run.weight], choice)["2.weight"] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"rule": RigL(), "backward_sparsity": 0.5},
            "expected backward_sparsity to equal forward_sparsity, got 0.5 and 0.8",
        ),
        ({"rule": SET(), "powerpropagation": 2.0}, "SET grows entries from zero, where powerpropagation=2.0 leaves no"),
        ({"rule": RigL(), "storage": "packed"}, "needs the gradient of every entry"),
        ({"rule": SET(), "delay": 3}, "expected delay=0 with SET, got 3"),
        (
            {"rule": Static(), "shrinkage": 1e-3},
            "Static does not explore: expected penalty=None and stop_expl",
        ),
        ({"rule": "rigl", "stop_exploring_at": 3}, "RigL does not explore"),
        ({"rule": "pruning"}, "expected rule to be 'magnitude' or 'set' or 'rigl' or 'static' or an object of Rule"),
        ({"ramp": Ramp(), "storage": "packed"}, "a ramp changes the sizes"),
        ({"rule": SET(), "overrides": {"*": {"backward_sparsity": 0.1}}}, r"forward_sparsity in overrides\['\*'\]"),
        ({"rule": SET(), "stop_updating_at": 1.5}, "expected stop_updating_at to be .*, got 1.5"),
    ],
)
def test_what_a_rule_cannot_do_is_refused_with_the_way_out(options, message):
    with pytest.raises(TopKastError, match=message):
        Settings(**nouns(**({"forward_sparsity": 0.8, "backward_sparsity": 0.8} | options)))


@pytest.mark.parametrize("fraction", [0, 1, -0.1, "half", True])
def test_a_drop_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(ValueError, match=r"expected drop_fraction to be a number in \(0, 1\)"):
        SET(fraction)


def test_rigl_refuses_a_run_whose_length_is_not_known():
    with pytest.raises(TopKastError, match="RigL depends on the progress of the run, but its length is not known"):
        Run(RigL(), total_steps=None)
    Run(RigL(), total_steps=None, stop_updating_at=30).step(10)
