"""Sets whose sizes vary: ramps of the sparsities, and weights that compete for their places."""

import copy
from fractions import Fraction

import pytest
import torch
from torch import nn

from lightning_topkast import Block, Ramp, Schedule, Targets, TopKast, TopKastError
from lightning_topkast.method.density import normalized
from lightning_topkast.settings import Settings
from tests.helpers import OPTIMIZERS, fit, make_callback, make_net, make_trainer, nouns, same


class Run:
    """Two sparse weights in training; every step's batch follows from the step number."""

    def __init__(self, forward=0.9, backward=0.8, optimizer="adamw", total_steps=None, **options):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 4))
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters(), 0.02)
        options = {"update_every": 5, "keep_last_dense": False, "strength": 1e-2} | options
        self.topkast = TopKast(self.model, forward, backward, **nouns(**options))
        self.topkast.attach(self.optimizer, total_steps=total_steps)
        self.weights = list(self.topkast.weights.values())
        self.done = 0

    def step(self, count=1):
        for _ in range(count):
            generator = torch.Generator().manual_seed(self.done)
            x, y = torch.randn(16, 12, generator=generator), torch.randint(0, 4, (16,), generator=generator)
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(x), y).backward()
            self.optimizer.step()
            self.done += 1
        return self

    def sizes(self):
        return [(int(weight.active.sum()), int(weight.updated.sum())) for weight in self.weights]

    def check(self):
        for weight in self.weights:
            assert not (weight.active & ~weight.updated).any()
            assert torch.equal(weight.parameter.detach(), weight.theta() * weight.active)
            assert (int(weight.active_entries), int(weight.updated_entries)) == (
                int(weight.active.sum()), int(weight.updated.sum()),
            )  # fmt: skip


RAMP = Ramp(0.5, 0.0, begin=10, end=30, power=1)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_ramp_leads_from_the_first_sparsities_to_the_runs_own(optimizer):
    run = Run(ramp=RAMP, optimizer=optimizer)
    assert run.sizes()[0] == (300, 600)
    expected = {
        9: (300, 600),
        10: (300, 600),
        15: (240, 480),
        20: (180, 360),
        25: (120, 240),
        30: (60, 120),
        40: (60, 120),
    }
    for step in range(1, 41):
        run.step().check()
        if step in expected:
            assert run.sizes()[0] == expected[step], step


def test_a_ramp_ends_at_its_own_step_between_two_refreshes():
    run = Run(ramp=Ramp(0.0, 0.0, begin=0, end=7)).step(6)
    assert run.sizes()[0][0] > 60
    assert run.step().sizes()[0] == (60, 120)


def test_fractions_of_a_ramp_belong_to_the_run():
    ramp = Ramp(0.5, 0.0, begin=0.25, end=0.75, power=1)
    assert Run(ramp=ramp, total_steps=40).step(20).sizes() == Run(ramp=RAMP).step(20).sizes()
    with pytest.raises(
        TopKastError, match=r"Ramp.begin=0.25 is a fraction of the run, but the length of the run is not known"
    ):
        Run(ramp=ramp)


def test_exploration_stops_on_a_ramp_too():
    run = Run(ramp=RAMP, stop_exploring_at=20).step(20)
    assert run.sizes()[0] == (180, 180)
    assert run.step(20).sizes()[0] == (60, 60)


@pytest.mark.parametrize(
    "options", [{"ramp": RAMP}, {"distribution": "global"}, {"distribution": "global_normalized"}], ids=str
)
@pytest.mark.parametrize("middle", [3, 17, 35])
def test_a_resumed_run_equals_the_whole_one_bit_for_bit(options, middle):
    whole, first, resumed = Run(**options).step(40), Run(**options).step(middle), Run(**options)
    resumed.model.load_state_dict(first.model.state_dict())
    resumed.optimizer.load_state_dict(first.optimizer.state_dict())
    resumed.topkast.load_state_dict(first.topkast.state_dict())
    resumed.done = middle
    resumed.step(40 - middle).check()
    assert same(whole.topkast.state_dict(), resumed.topkast.state_dict())


def test_a_second_fit_begins_at_the_start_of_the_ramp(tmp_path):
    callback, model = make_callback(ramp=Ramp(0.25, 0.0, 0, 1.0)), make_net()
    sizes = []
    for _ in range(2):
        fit(make_trainer(tmp_path, callback), model)
        weight = next(iter(callback.topkast.weights.values()))
        sizes.append(int(weight.active_entries))
        callback.topkast.restart()
        assert int(weight.active_entries) == 192
    assert sizes == [64, 64]


# --- global ----------------------------------------------------------------------------------------------------------


def test_weights_compete_for_as_many_places_as_uniform_has():
    run, uniform = Run(distribution="global"), Run()
    for _ in range(20):
        run.step().check()
        theta = torch.cat([weight.theta().flatten() for weight in run.weights]).abs()
        assert [sum(each) for each in zip(*run.sizes(), strict=True)] == [72, 144]
    run.topkast.refresh()
    theta = torch.cat([weight.theta().flatten() for weight in run.weights]).abs()
    active = torch.cat([weight.active.flatten() for weight in run.weights])
    updated = torch.cat([weight.updated.flatten() for weight in run.weights])
    assert torch.equal(active.nonzero().flatten(), theta.topk(72).indices.sort().values)
    assert torch.equal(updated.nonzero().flatten(), theta.topk(144).indices.sort().values)
    assert run.sizes() != uniform.sizes()


def test_weights_compete_by_scores_divided_by_their_mean():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 3, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[40.0, -30], [20, 10]]))  # mean 25: 1.6 1.2 0.8 0.4
        model[1].weight.copy_(torch.tensor([[0.5, -1], [1.5, 2], [3, 4]]))  # mean 2: 0.25 0.5 0.75 1 1.5 2
    sets = {
        "global": ([[2, 2], [2, 2]], [[0, 0], [0, 0], [1, 2]]),
        "global_normalized": ([[2, 2], [1, 0]], [[0, 0], [0, 2], [2, 2]]),
    }
    for distribution, expected in sets.items():
        everywhere = Targets(keep_first_dense=False, keep_last_dense=False)
        made = TopKast(copy.deepcopy(model), 0.5, 0.4, targets=everywhere, distribution=distribution)
        assert tuple(weight.tiers.tolist() for weight in made.weights.values()) == expected


@pytest.mark.parametrize("distribution", ["global", "global_normalized"])
def test_the_size_of_a_weight_decides_only_where_scores_are_not_normalized(distribution):
    run, larger = Run(distribution=distribution), Run(distribution=distribution)
    larger.model.load_state_dict(run.model.state_dict())
    with torch.no_grad():
        for weight, factor in zip(larger.weights, (64.0, 1.0), strict=True):
            weight.parameter.mul_(factor)
            weight._latent.mul_(factor)
            weight._explored.mul_(factor)
    for each in (run, larger):
        each.topkast.refresh()
    alike = all(torch.equal(one.tiers, two.tiers) for one, two in zip(run.weights, larger.weights, strict=True))
    assert alike is (distribution == "global_normalized")


def test_training_chooses_by_normalized_scores():
    run = Run(distribution="global_normalized")
    for _ in range(20):
        run.step().check()
        assert [sum(each) for each in zip(*run.sizes(), strict=True)] == [72, 144]
    run.topkast.refresh()
    theta = torch.cat([(weight.theta().abs() / weight.theta().abs().mean()).flatten() for weight in run.weights])
    active = torch.cat([weight.active.flatten() for weight in run.weights])
    assert torch.equal(active.nonzero().flatten(), theta.topk(72).indices.sort().values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_scores_are_normalized_exactly(dtype):
    scores = torch.rand(7, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = normalized(scores)
    exact = sum(Fraction(value) for value in scores.flatten().tolist()) / scores.numel()
    mean = torch.tensor(float(exact), dtype=torch.float64).to(found.dtype)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(
        found, scores.to(found.dtype) / mean, rtol=1e-15 if dtype == torch.float64 else 0, atol=0
    )
    assert normalized(torch.zeros(3, 4, dtype=dtype)).tolist() == torch.zeros(3, 4).tolist()


def test_a_weight_of_zeros_competes_without_harm():
    run = Run(distribution="global_normalized")
    with torch.no_grad():
        for each in (run.weights[1].parameter, run.weights[1]._latent, run.weights[1]._explored):
            each.zero_()
    run.topkast.refresh()
    assert run.sizes()[1] == (0, 0)
    run.step(10).check()


def test_the_table_says_how_weights_compete():
    for distribution, said in (("global", False), ("global_normalized", True)):
        table = " ".join(str(Run(distribution=distribution).topkast.summary()).split())
        assert "the weights compete for active entries" in table
        assert ("by scores divided by their weight's mean" in table) is said


def test_a_weight_with_an_override_does_not_compete():
    run = Run(distribution="global", overrides={"4.*": {"forward_sparsity": 0.5, "backward_sparsity": 0.5}}).step(10)
    assert run.sizes() == [(60, 120), (60, 60)]


def test_a_weight_may_lose_all_its_places_without_harm():
    run = Run(distribution="global")
    with torch.no_grad():
        run.weights[1].parameter.mul_(1e-6)
    run.topkast.refresh()
    run.weights[1]._latent.mul_(1e-6)
    run.weights[1]._explored.mul_(1e-6)
    run.topkast.refresh()
    assert run.sizes()[1] == (0, 0)
    run.step(10).check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distribution": "global", "storage": "packed"}, "distribution='global' changes the sizes of a weight's sets"),
        ({"distribution": "global_normalized", "storage": "packed"}, "distribution='global_normalized' changes the"),
        ({"distribution": "global", "delay": 2}, "and delay=0, got storage='masked' and delay=2"),
        ({"ramp": RAMP, "storage": "compact"}, "a ramp changes the sizes of a weight's sets"),
        ({"ramp": Ramp(0.95, 0.0, 0, 5)}, "expected Ramp.forward_sparsity to be at most 0.9, the run's own, got 0.95"),
        ({"ramp": 0.5}, "expected ramp to be an object of Ramp or None, got 0.5"),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(options, message):
    with pytest.raises(TopKastError, match=message):
        Settings(**nouns(**({"forward_sparsity": 0.9, "backward_sparsity": 0.8} | options)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0.2, 0.3, 0, 5), "expected Ramp.backward_sparsity <= Ramp.forward_sparsity.*, got 0.3 and 0.2"),
        ((0.2, 0.1, 0, 5, 0), "expected Ramp.power to be a number above 0, got 0"),
        ((0.2, 0.1, 5, 5), "got begin=5 and end=5"),
        ((0.2, 0.1, 0.5, 0.25), "expected the ramp to end after it begins"),
        ((0.2, 0.1, -1, 5), "expected Ramp.begin to be a step .*, got -1"),
    ],
)
def test_a_ramp_out_of_range_is_refused(values, message):
    with pytest.raises(TopKastError, match=message):
        Ramp(*values)


def test_a_ramp_of_a_fraction_and_a_step_that_end_before_they_begin_is_refused():
    with pytest.raises(TopKastError, match="got begin=30 and end=20"):
        Run(ramp=Ramp(0.5, 0.0, begin=30, end=0.5), total_steps=40)


def test_weight_that_an_optimizer_is_given_after_a_ramp_is_as_sparse_as_the_others():
    model = nn.Sequential(nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 2))
    topkast = TopKast(
        model, 0.9, 0.9, penalty=None, targets=Targets(keep_first_dense=False), ramp=Ramp(begin=0, end=8),
        schedule=Schedule(update_every=4, stop_updating_at=8),
    )  # fmt: skip
    first, *rest = model
    optimizer = torch.optim.SGD([parameter for layer in rest for parameter in layer.parameters()], lr=0.05)
    topkast.attach(optimizer)

    def step():
        optimizer.zero_grad()
        model(torch.randn(4, 20)).square().mean().backward()
        optimizer.step()

    for _ in range(3):
        step()
    with pytest.warns(UserWarning, match="no attached optimizer holds 0.weight"):
        step()
    for _ in range(6):
        step()
    optimizer.add_param_group({"params": list(first.parameters())})
    step()
    assert [weight.forward_density for weight in topkast.weights.values()] == [0.1, 0.1]


def two_rates(**options):
    """A network of which a second optimizer trains the last layers; it steps every fifth time."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(20, 20) for _ in range(4)))
    topkast = TopKast(
        model, 0.8, 0.6, penalty=None, targets=Targets(keep_first_dense=False, keep_last_dense=False), **options
    )
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.05, momentum=0.9) for part in (model[:2], model[2:])]
    topkast.attach(*optimizers)
    return model, topkast, optimizers


def train(model, optimizers, steps, begin=0):
    generator = torch.Generator().manual_seed(1)
    batches = torch.randn(begin + steps, 4, 20, generator=generator)[begin:]
    for step, batch in enumerate(batches, start=begin + 1):
        model.zero_grad()
        model(batch).square().mean().backward()
        optimizers[0].step()
        if step % 5 == 0:
            optimizers[1].step()


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": Schedule(update_every=2), "ramp": Ramp(0.2, 0.1, begin=0, end=12)},
        {"schedule": Schedule(update_every=2, stop_exploring_at=6)},
    ],
    ids=["ramp", "stop"],
)
def test_optimizers_that_step_at_different_rates_resume_exactly(options):
    whole, topkast, optimizers = two_rates(**options)
    for step in range(16):
        state = [copy.deepcopy(each.state_dict()) for each in (whole, topkast, *optimizers)]
        train(whole, optimizers, 1, begin=step)
        model, resumed, others = two_rates(**options)
        for each, saved in zip((model, resumed, *others), state, strict=True):
            each.load_state_dict(saved)
        train(model, others, 1, begin=step)
        assert same(resumed.state_dict(), topkast.state_dict()), step


@pytest.mark.parametrize("shape", [14, 10, 40])
def test_ramp_in_blocks_that_do_not_divide_is_not_refreshed_when_it_is_attached(shape):
    model = nn.Sequential(*(nn.Linear(shape, shape) for _ in range(3)))
    ramp = Ramp(0.25, 0.1, begin=0, end=200)
    topkast = TopKast(model, 0.9, 0.8, structure=Block(4, 4) if shape < 40 else Block(16, 16), ramp=ramp)
    topkast.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    assert topkast.refresh_count == 0


@pytest.mark.parametrize("penalty", ["auto", None])
def test_groups_given_to_two_optimizers_follow_the_schedule(penalty):
    model = nn.Sequential(*(nn.Linear(20, 20) for _ in range(6)))
    topkast = TopKast(
        model, 0.8, 0.6, penalty=penalty, schedule=Schedule(update_every=2), ramp=Ramp(0.2, 0.1, begin=0, end=4),
        targets=Targets(keep_first_dense=False, keep_last_dense=False),
    )  # fmt: skip
    optimizers = [torch.optim.SGD(model[at].parameters(), lr=0.05) for at in (0, 1)]
    topkast.attach(*optimizers)

    def step():
        model(torch.randn(4, 20)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()

    step()
    with pytest.warns(UserWarning, match="no attached optimizer holds"):
        step()
    for _ in range(4):
        step()
    for optimizer, at in zip(optimizers, (2, 3), strict=True):
        optimizer.add_param_group({"params": list(model[at].parameters())})
    step()
    densities = {name: weight.forward_density for name, weight in topkast.weights.items()}
    assert [densities[f"{at}.weight"] for at in range(4)] == [0.2] * 4


@pytest.mark.parametrize("power", [1, 3])
def test_rigl_reaches_the_sparsity_of_a_ramp(power):
    model = nn.Sequential(*(nn.Linear(20, 20) for _ in range(3)))
    topkast = TopKast(
        model, 0.9, 0.9, rule="rigl", penalty=None, ramp=Ramp(end=0.75, power=power),
        schedule=Schedule(10, stop_updating_at=0.75),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    topkast.attach(optimizer, total_steps=80)
    for _ in range(80):
        optimizer.zero_grad()
        model(torch.randn(4, 20)).square().mean().backward()
        optimizer.step()
    assert [weight.forward_density for weight in topkast.weights.values()] == [0.1]


def test_tied_weights_that_were_loaded_to_train_on_are_kept_beside_two_averages():
    first = nn.Linear(20, 20)
    model = nn.Sequential(first, nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 20))
    model[2].weight = first.weight
    topkast = TopKast(model, 0.8, 0.6, penalty=None, targets=Targets(keep_first_dense=False, keep_last_dense=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    topkast.attach(optimizer)
    model(torch.randn(4, 20)).square().mean().backward()
    optimizer.step()

    def load_others():
        others = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
        model.load_state_dict(others | {"2.weight": others["0.weight"]})

    load_others()
    alpha = copy.deepcopy(model.state_dict())
    theta = {name: weight.theta() for name, weight in topkast.weights.items()}
    load_others()
    load_others()
    model.load_state_dict(alpha)
    assert all(torch.equal(weight.theta(), theta[name]) for name, weight in topkast.weights.items())
