"""Which optimizers train sparse weights; all others are refused by name, because of their state or their update."""

import inspect
from collections import OrderedDict

import pytest
import torch
from torch import nn

from lightning_topkast import Packed, TopKast, TopKastError, register_optimizer
from lightning_topkast.engine import optimizers
from tests.helpers import check_sparse

STORAGES = {"masked": "masked", "packed": Packed(kernels="torch", products="sparse"), "compact": "compact"}

# class of torch.optim → the storages with which it trains
EVERY = ("masked", "packed", "compact")
SUPPORTED = {
    "ASGD": ("masked",),
    "Adadelta": EVERY,
    "Adafactor": ("masked",),
    "Adagrad": EVERY,
    "Adam": EVERY,
    "AdamW": EVERY,
    "Adamax": EVERY,
    "LBFGS": (),
    "Muon": ("masked",),
    "NAdam": EVERY,
    "RAdam": EVERY,
    "RMSprop": EVERY,
    "Rprop": EVERY,
    "SGD": EVERY,
    "SparseAdam": (),  # takes sparse gradients only
}
OPTIONS = {
    "SGD": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1},
    "Adagrad": {"lr": 0.05, "initial_accumulator_value": 0.3},
    "RMSprop": {"lr": 1e-3, "momentum": 0.9, "centered": True},
    "Adam": {"lr": 0.01, "amsgrad": True},
}


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2))


def trained(make_optimizer, storage="masked", steps=10):
    """Ten steps with three refreshes; return the engine and the optimizer."""
    model = mlp()
    topkast = TopKast(model, 0.75, 0.5, update_every=3, penalty=None, storage=STORAGES[storage])
    # Muon takes matrices only
    matrices = [p for name, p in model.named_parameters() if name in topkast.weights or p.dim() == 2]
    optimizer = make_optimizer(matrices)
    topkast.attach(optimizer)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(8, 6, generator=generator)
        optimizer.zero_grad()
        (model(x)[:, 0] - x[:, 0] * x[:, 1]).square().mean().backward()
        optimizer.step()
    return topkast, optimizer


def maker(name, **options):
    options = options or OPTIONS.get(name, {"lr": 0.01})
    return lambda parameters: getattr(torch.optim, name)(parameters, **options)


def test_every_optimizer_of_torch_is_in_the_table():
    found = {
        name
        for name, each in vars(torch.optim).items()
        if inspect.isclass(each) and issubclass(each, torch.optim.Optimizer) and each is not torch.optim.Optimizer
    }
    assert found == set(SUPPORTED)


@pytest.mark.parametrize("name", [name for name, storages in SUPPORTED.items() if storages])
def test_optimizer_trains_alike_in_every_storage_or_is_refused_by_name(name):
    expected, _ = trained(maker(name))
    check_sparse(expected)
    assert (expected.step_count, expected.refresh_count) == (10, 3)
    for storage in ("packed", "compact"):
        if storage not in SUPPORTED[name]:
            ours, theirs = rf"{name} looks at the shape of a weight.*2\.weight.*'masked'", "Muon only supports 2D"
            with pytest.raises((TopKastError, ValueError), match=f"{ours}|{theirs}"):
                trained(maker(name), storage)
            continue
        topkast, _ = trained(maker(name), storage)
        assert torch.allclose(topkast.weights["2.weight"].theta(), expected.weights["2.weight"].theta(), atol=1e-5)


@pytest.mark.parametrize("name", [name for name, storages in SUPPORTED.items() if "packed" in storages])
def test_state_of_entries_outside_b_is_that_of_entries_which_were_never_updated(name):
    """Also where it does not begin at zero: Adagrad's sums and Rprop's step sizes."""
    never = torch.zeros(16, 16)
    topkast, optimizer = trained(maker(name), steps=9)
    weight = topkast.weights["2.weight"]
    state = optimizer.state[weight.parameter]
    fresh = nn.Parameter(torch.zeros(16, 16))
    beginner = maker(name)([fresh])
    fresh.grad = never
    beginner.step()
    checked = 0
    for key, value in state.items():
        if value.shape == (16, 16):
            expected = beginner.state[fresh][key][~weight.updated]
            assert torch.allclose(value[~weight.updated], expected, atol=1e-7), key  # Adamax adds its eps
            checked += 1
    assert checked or name == "SGD"


@pytest.mark.parametrize("name", ["LBFGS", "SparseAdam"])
@pytest.mark.parametrize("storage", ["masked", "packed"])
def test_optimizer_that_cannot_is_refused_at_the_start(name, storage):
    with pytest.raises(
        (TopKastError, RuntimeError), match=f"{name} cannot train sparse weights|does not support dense"
    ):
        trained(lambda parameters: getattr(torch.optim, name)(parameters, lr=0.01), storage)


# --- optimizers of others ---------------------------------------------------------------------------------------------


class Wrapped(torch.optim.Optimizer):
    """Passes every step on, and keeps no state."""

    def __init__(self, base):
        super().__init__([{"params": group["params"]} for group in base.param_groups], base.defaults)
        self.base = base
        self.param_groups = base.param_groups

    def step(self, closure=None):
        return self.base.step(closure)


class Unhooked(torch.optim.Optimizer):
    """A wrapper whose constructor does not call PyTorch's, as accelerate's."""

    def __init__(self, base):
        self.optimizer = base

    state = property(lambda self: self.optimizer.state)
    param_groups = property(lambda self: self.optimizer.param_groups)
    defaults = property(lambda self: self.optimizer.defaults)

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure=None):
        return self.optimizer.step(closure)

    def train(self):
        pass

    def eval(self):
        pass


@pytest.mark.parametrize("wrap", [Wrapped, Unhooked])
@pytest.mark.parametrize("storage", ["masked", "packed"])
def test_state_inside_a_wrapper_is_reset_and_moved(wrap, storage):
    expected, _ = trained(maker("Adam"), storage)
    topkast, _ = trained(lambda parameters: wrap(maker("Adam")(parameters)), storage)
    assert torch.equal(topkast.weights["2.weight"].theta(), expected.weights["2.weight"].theta())
    assert (topkast.step_count, topkast.refresh_count) == (10, 3)


class Slow(Wrapped):
    """Averages the weights by itself, in a list that is no state."""

    def __init__(self, base):
        super().__init__(base)
        self.slow = [[p.detach().clone() for p in group["params"]] for group in self.param_groups]


class Lookahead(Wrapped):
    pass


class Keeping(torch.optim.SGD):
    """Keeps a tensor of its own for each weight."""

    def step(self, closure=None):
        name, value = self.kept
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter].setdefault(name, value.clone())
        return super().step(closure)


class Second(Keeping):
    """Keeps a matrix for each dimension, as Shampoo does."""

    kept = "left", torch.eye(5)


class Paired(Keeping):
    """Keeps two numbers for each weight."""

    kept = "pair", torch.ones(2)


class Copies(torch.optim.SGD):
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter].setdefault("z", parameter.detach().clone())
        return super().step(closure)


class Swaps(torch.optim.SGD):
    def train(self):
        pass

    def eval(self):
        pass


class Relative(torch.optim.SGD):
    """Scales each weight's update by its mean square, which counts zeros."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.mul_(parameter.detach().square().mean())
        return super().step(closure)


@pytest.mark.parametrize("storage", ["masked", "packed"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: Slow(torch.optim.SGD(p, lr=0.1)), r"Slow keeps a tensor in the shape of '2.weight' in its 'slow'"),
        (lambda p: Lookahead(torch.optim.SGD(p, lr=0.1)), r"Lookahead cannot train sparse weights: it keeps a copy"),
        (lambda p: Second(p, lr=0.1), r"Second keeps a tensor of shape .* of '2.weight' as 'left'.*register_optimizer"),
        (
            lambda p: Paired(p, lr=0.1),
            r"Paired keeps a tensor of shape \(2,\) of '2.weight' as 'pair'.*register_optimizer",
        ),
        (lambda p: Copies(p, lr=0.1), r"Copies keeps a value for every entry of '2.weight' as 'z'.*register_optimizer"),
        (lambda p: Swaps(p, lr=0.1), r"Swaps swaps the weights by its train\(\) and eval\(\)"),
    ],
)
def test_optimizer_whose_state_is_not_known_is_refused_by_its_first_step(make, message, storage):
    with pytest.raises(TopKastError, match=message):
        trained(make, storage, steps=1)


def test_optimizer_that_looks_at_all_entries_is_refused_for_packed_weights_only():
    check_sparse(trained(lambda p: Relative(p, lr=0.1))[0])
    with pytest.raises(TopKastError, match="Relative looks at the shape of a weight"):
        trained(lambda p: Relative(p, lr=0.1), "packed")


class Projects(torch.optim.SGD):
    """Looks at the rows of a weight where the gradient is orthogonal to it, as AdamP does."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                weight, gradient = parameter.detach(), parameter.grad
                if gradient is not None and (weight * gradient).sum().abs() < 1e-6 * weight.norm() * gradient.norm():
                    rows = weight.reshape(len(weight), -1).norm(dim=1)
                    gradient.mul_(rows.view(-1, *[1] * (weight.dim() - 1)))
        return super().step(closure)


def test_optimizer_that_looks_at_rows_now_and_then_is_refused_for_packed_weights_only():
    check_sparse(trained(lambda p: Projects(p, lr=0.1))[0])
    with pytest.raises(TopKastError, match="Projects looks at the shape of a weight"):
        trained(lambda p: Projects(p, lr=0.1), "packed")


class Bare(torch.optim.Optimizer):
    """A wrapper that makes the hooks of steps itself, and no others."""

    def __init__(self, inner):
        self.inner, self.param_groups, self.defaults = inner, inner.param_groups, {}
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
        self._patch_step_function()

    @property
    def state(self):
        return self.inner.state

    def step(self, closure=None):
        return self.inner.step(closure)


def test_wrapper_without_hooks_on_its_state_trains(storage):
    topkast, _ = trained(lambda p: Bare(torch.optim.Adam(p, lr=0.1)), storage)
    check_sparse(topkast)
    assert topkast.step_count > 0


def test_state_that_is_declared_is_reset_and_moved(monkeypatch):
    class Counted(torch.optim.SGD):
        """Begins to count the updates of an entry at 5, and keeps a copy of the weight that it never uses."""

        def step(self, closure=None):
            for group in self.param_groups:
                for parameter in group["params"]:
                    state = self.state[parameter]
                    state.setdefault("age", torch.full_like(parameter, 5.0)).add_(parameter.grad != 0)
                    state.setdefault("note", parameter.detach().clone())
            return super().step(closure)

    monkeypatch.setattr(optimizers, "_KNOWN", dict(optimizers._KNOWN))
    with pytest.raises(TopKastError, match=r"register_optimizer\(Counted, \{'age'"):
        trained(lambda p: Counted(p, lr=0.1))
    register_optimizer(Counted, {"age": 5.0}, shared=["note"], elementwise=True)
    topkast, optimizer = trained(lambda p: Counted(p, lr=0.1), steps=9)
    weight = topkast.weights["2.weight"]
    age = optimizer.state[weight.parameter]["age"]
    assert bool((age[~weight.updated] == 5).all())
    assert int((age[weight.updated] == 5).sum()) < int((age[weight.updated] > 5).sum())


def keeping(name, starts):
    """A class of this name, as of another library, that adds the gradients up in its state, from these values on."""

    class Keeping(torch.optim.Optimizer):
        def __init__(self, parameters, lr=0.01):
            super().__init__(parameters, {"lr": lr})

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for parameter in group["params"]:
                    for key, start in starts.items():
                        kept = self.state[parameter].setdefault(key, torch.full_like(parameter, start))
                        kept.add_(parameter.grad)
                        parameter.sub_(group["lr"] * (kept - start))

    Keeping.__name__ = name
    return Keeping


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("Adan", ("exp_avg", "exp_avg_sq", "previous_grad", "neg_pre_grad", "exp_avg_nest")),
        ("AdEMAMix", ("exp_avg", "exp_avg_sq", "exp_avg_slow")),
        ("Another", ("exp_avg", "exp_avg_sq", "exp_inf", "square_avg", "grad_avg", "acc_delta", "prev")),
    ],
)
@pytest.mark.parametrize("storage", ["packed", "compact"])
def test_state_of_a_known_class_of_another_library_begins_at_zero_again(name, keys, storage):
    made = keeping(name, dict.fromkeys(keys, 0.0))
    masked, optimizer = trained(made, steps=9)  # a refresh has just been
    weight = masked.weights["2.weight"]
    for key in keys:
        kept = optimizer.state[weight.parameter][key]
        assert not kept[~weight.updated].any(), key
        assert kept[weight.updated].any(), key
    packed = trained(made, storage, steps=9)[0].weights["2.weight"]
    assert torch.allclose(packed.theta(), weight.theta(), atol=1e-5)


@pytest.mark.parametrize(("name", "key"), [("LARS", "mu"), ("AdamP", "exp_avg"), ("Aida", "exp_avg")])
def test_class_of_another_library_that_looks_at_whole_weights_trains_masked_only(name, key):
    topkast, optimizer = trained(keeping(name, {key: 0.0}), steps=9)
    weight = topkast.weights["2.weight"]
    assert not optimizer.state[weight.parameter][key][~weight.updated].any()
    with pytest.raises(TopKastError, match=f"{name} looks at the shape of a weight"):
        trained(keeping(name, {key: 0.0}), "packed")


def thirds() -> dict:
    """The optimizers of pytorch_optimizer by name, or nothing where it is not installed."""
    try:
        import pytorch_optimizer
    except ImportError:
        return {}
    return {name: pytorch_optimizer.load_optimizer(name) for name in pytorch_optimizer.get_supported_optimizers()}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(thirds()) or [pytest.param("", marks=pytest.mark.skip("no pytorch_optimizer"))])
def test_optimizer_of_pytorch_optimizer_trains_alike_or_is_refused(name):
    results = {}
    for storage in ("masked", "packed"):
        try:
            results[storage] = trained(lambda p: thirds()[name](p, lr=1e-3), storage)[0].weights["2.weight"].theta()
        except TopKastError:
            continue
        except (RuntimeError, ValueError, TypeError, AttributeError, ImportError):
            pytest.skip("needs more than parameters and a learning rate")
    if len(results) == 2:
        # Aida's scale of a layer sums its squares in another order
        assert torch.allclose(results["masked"], results["packed"], atol=1e-2 if name == "aida" else 1e-5)
    assert "packed" not in results or "masked" in results
