"""What cannot be honoured is refused with the value, what was expected and the way out, and nothing is overwritten."""

import copy
import math

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from lightning_topkast import L2, NonFiniteWeightError, Schedule, Targets, TopKast, TopKastCallback, TopKastError
from lightning_topkast.distributed import Sharding
from lightning_topkast.weights.state import problem_with
from tests.helpers import (
    MIDDLE,
    Net,
    check_sparse,
    fit,
    make_callback,
    make_net,
    make_trainer,
    nouns,
    parameters_of,
    same,
)

LAST = "layers.4.weight"


# --- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("forward", "backward", "message"),
    [
        (1.0, 0.5, r"expected forward_sparsity to be a number in \[0, 1\).*, got 1.0"),
        (-0.1, 0.0, r"expected forward_sparsity to be .*, got -0.1"),
        (0.5, -0.5, r"expected backward_sparsity to be .*, got -0.5"),
        (90, 80, r"expected forward_sparsity to be .*, got 90"),
        (math.nan, 0.5, r"expected forward_sparsity to be .*, got nan"),
        (0.9, math.inf, r"expected backward_sparsity to be .*, got inf"),
        ("0.9", 0.5, r"expected forward_sparsity to be a number.*, got '0.9'"),
        (0.9, None, r"expected backward_sparsity to be .*, got None"),
        (True, 0.0, r"expected forward_sparsity to be .*, got True"),
        (0.5, 0.9, "expected backward_sparsity <= forward_sparsity, since .*, got 0.9 and 0.5"),
    ],
)
def test_sparsities_out_of_range(forward, backward, message):
    with pytest.raises(TopKastError, match=message):
        TopKastCallback(forward, backward)
    with pytest.raises(TopKastError, match=message):
        TopKast(make_net(), forward, backward)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"update_every": 0}, "expected update_every to be an int of at least 1.*, got 0"),
        ({"update_every": 2.5}, "expected update_every to be .*, got 2.5"),
        (
            {"distribution": "even"},
            "distribution to be one of 'uniform', 'erk', 'global', 'global_normalized', got 'even'",
        ),
        ({"exploration": "greedy"}, "expected exploration to be one of 'magnitude', 'random', got 'greedy'"),
        ({"penalty": "l3"}, "expected penalty to be 'auto' or 'l2' or an object of Penalty or None, got 'l3'"),
        ({"strength": -1}, "expected the penalty's strength to be a number of at least 0, got -1"),
        ({"strength": math.nan}, "expected the penalty's strength to be .*, got nan"),
        ({"strength": math.inf, "penalty": "l1"}, "expected the penalty's strength to be .*, got inf"),
        ({"shrinkage": 1.0}, r"expected L2.shrinkage to be a number in \[0, 1\), got 1.0"),
        ({"storage": "folded"}, "expected storage to be .*, got 'folded'"),
        ({"kernels": "fast", "storage": "packed"}, "expected kernels to be .*, got 'fast'"),
        ({"unsupported": "no", "storage": "auto"}, "expected unsupported to be .*, got 'no'"),
        ({"stop_exploring_at": -1}, "expected stop_exploring_at to be a step.*, got -1"),
        ({"stop_exploring_at": 1.5}, "expected stop_exploring_at to be .*, got 1.5"),
        ({"stop_exploring_at": "half"}, "expected stop_exploring_at to be .*, got 'half'"),
        ({"stop_exploring_at": True}, "expected stop_exploring_at to be .*, got True"),
        ({"overrides": {"a": {"sparsity": 0.5}}}, r"expected overrides\['a'\] to be a mapping with forward_sparsity"),
        ({"overrides": {"a": {}}}, r"expected overrides\['a'\] to be a mapping with forward_sparsity"),
        (
            {"overrides": {"a": {"forward_sparsity": 2}}},
            r"expected overrides\['a'\]: forward_sparsity to be .*, got 2",
        ),
        ({"overrides": {"a": 0.5}}, r"overrides\['a'\]"),
        ({"include": "layers.*"}, "expected include to be a list of strings, or None, got 'layers"),
        ({"exclude": "layers.*"}, "expected exclude to be a list of strings, or None, got 'layers"),
        ({"include_types": "Linear"}, "expected include_types to be a list.*, got 'Linear'"),
        ({"include": [nn.Linear]}, "include"),
        ({"overrides": [0.5]}, r"expected overrides to be a mapping.*, got .0.5."),
        ({"update_every": True}, "expected update_every to be .*, got True"),
        ({"seed": "x"}, "expected seed to be an int.*, got 'x'"),
        ({"seed": 1.0}, "expected seed to be .*, got 1.0"),
        ({"keep_first_dense": "no"}, "expected keep_first_dense to be True or False.*, got 'no'"),
        ({"reset_optimizer_state": 1}, "expected reset_optimizer_state to be .*, got 1"),
    ],
    ids=str,
)
def test_settings_are_checked_where_they_are_given(options, message):
    with pytest.raises(TopKastError, match=message):
        TopKastCallback(0.9, 0.8, **nouns(**options))


def test_override_that_matches_no_sparse_weight():
    with pytest.raises(TopKastError, match=rf"overrides: 'decoder.\*' matches no sparse weight; they are: {MIDDLE}"):
        TopKast(make_net(), 0.75, 0.5, overrides={"decoder.*": {"forward_sparsity": 0.5}})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"include": ["layer.2.weight"]},
            rf"include: 'layer.2.weight' matches no parameter of the model; similar names: .*{MIDDLE}",
        ),
        (
            {"exclude": ["layers.9.*"]},
            r"exclude: 'layers.9.\*' matches no parameter of the model; similar names: .*layers",
        ),
        (
            {"include_types": ["Lienar"]},
            "include_types: 'Lienar' matches no module type .*; similar names: Linear",
        ),
        ({"exclude_types": ["Conv2d"]}, "exclude_types: 'Conv2d' matches no module type of the model"),
    ],
    ids=str,
)
def test_pattern_that_matches_nothing_names_what_is_near(tmp_path, options, message):
    model = make_net()
    before = parameters_of(model)
    with pytest.raises(TopKastError, match=message):
        fit(make_trainer(tmp_path, make_callback(**options)), model)
    assert same(parameters_of(model), before)


def test_nothing_left_to_be_sparse(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with pytest.raises(
        TopKastError, match=r"no weight of the model is sparse: 0.weight \(first candidate\).*keep_first_dense"
    ):
        TopKast(model, 0.75, 0.5)


def test_weight_too_small_for_one_active_entry():
    model = make_net()
    before = parameters_of(model)
    with pytest.raises(
        TopKastError, match=rf"weight '{LAST}' has 32 entries, too few for one active entry.*exclude it"
    ):
        TopKast(model, 0.99, 0.5, targets=Targets(keep_last_dense=False))
    assert same(parameters_of(model), before)


def test_lazy_modules_without_a_shape_are_refused():
    with pytest.raises(TopKastError, match=r"of a lazy module has no shape yet; run one forward pass"):
        TopKast(nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4), nn.Linear(4, 4)), 0.5, 0.25)


def test_fraction_of_an_unlimited_run(tmp_path):
    with pytest.raises(TopKastError, match=r"stop_exploring_at=0.5 is a fraction.*max_steps or max_epochs"):
        fit(make_trainer(tmp_path, make_callback(stop_exploring_at=0.5), max_epochs=-1), make_net())
    net = make_net()
    topkast = TopKast(net, 0.75, 0.5, schedule=Schedule(stop_exploring_at=0.5))
    with pytest.raises(TopKastError, match="total_steps"):
        topkast.attach(torch.optim.SGD(net.parameters(), 0.1))


# --- the penalty --------------------------------------------------------------------------------------------------


def test_penalty_that_overshoots_is_refused_with_the_largest_strength(tmp_path):
    """λ · lr / D = 4 · 0.1 / 0.25 > 1."""
    with pytest.raises(TopKastError, match=rf"strength=4.*'{MIDDLE}' past zero.*choose a strength below 2.5"):
        fit(make_trainer(tmp_path, make_callback(strength=4)), make_net(lr=0.1))


def test_penalty_that_overshoots_at_the_schedulers_peak_is_refused(tmp_path):
    class OneCycle(Net):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=1e-3)
            scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=100)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    torch.manual_seed(0)
    with pytest.raises(TopKastError, match="past zero"):
        fit(make_trainer(tmp_path, make_callback(strength=0.5)), OneCycle())


def test_shrinkage_beside_strength_is_refused():
    with pytest.raises(TopKastError, match="expected either shrinkage or strength of the penalty"):
        L2(shrinkage=0.1, strength=0.1)


def test_a_shorthand_beside_its_noun_is_refused():
    with pytest.raises(TopKastError, match="expected either update_every or schedule, got both"):
        TopKast(make_net(), 0.75, 0.5, update_every=3, schedule=Schedule(delay=1))
    with pytest.raises(TopKastError, match=r"expected either include or targets.*targets=Targets\(include="):
        TopKast(make_net(), 0.75, 0.5, include=[MIDDLE], targets=Targets(keep_first_dense=False))


def test_learning_rate_beyond_the_known_peak_warns_and_stops_at_zero():
    model = make_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    topkast = TopKast(model, 0.75, 0.5, penalty=L2(strength=1.0)).attach(optimizer)
    weight = topkast.weights[MIDDLE]
    optimizer.param_groups[0]["lr"] = 0.5
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with pytest.warns(UserWarning, match=rf"exploring entries of '{MIDDLE}' past zero"):
        optimizer.step()
    assert (weight.theta()[weight.updated & ~weight.active] == 0).all()


# --- NaN and infinity ---------------------------------------------------------------------------------------------


class Poison(Callback):
    """Writes a value into the last weight, so that others are chosen before it, when `step` steps are done."""

    def __init__(self, callback, step: int, value: float) -> None:
        self.callback, self.step, self.value, self.state = callback, step, value, None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            weight = self.callback.topkast.weights[LAST]
            first = weight.active.nonzero()[0]
            with torch.no_grad():
                pl_module.layers[4].weight[tuple(first)] = self.value

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for parameter in pl_module.parameters():  # so that only what was written is not finite
            parameter.grad.nan_to_num_(0, 0, 0)


OTHER_CALLBACKS = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")


@OTHER_CALLBACKS
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_weight_at_a_refresh_is_named_and_no_set_is_changed(tmp_path, value):
    callback = make_callback(update_every=6, keep_last_dense=False)
    save = ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=4, save_top_k=-1)
    model = make_net()
    trainer = make_trainer(tmp_path, callback, Poison(callback, 5, value), save, enable_checkpointing=True)
    with pytest.raises(
        NonFiniteWeightError, match=rf"weight '{LAST}' holds NaN or infinity at step 6.*last checkpoint"
    ):
        fit(trainer, model)

    topkast = callback.topkast
    assert topkast.refresh_count == 0
    check_sparse(topkast)
    saved = torch.load(tmp_path / "saved" / "step=4.ckpt", weights_only=True)
    state = saved["callbacks"][callback.state_key]["weights"]
    for name, weight in topkast.weights.items():
        assert torch.equal(weight.tiers, state[name]["tiers"]), "the sets were left as they were"
    assert torch.isfinite(topkast.weights[MIDDLE].theta()).all()

    again, resumed = make_callback(update_every=6, keep_last_dense=False), make_net(seed=3)
    fit(make_trainer(tmp_path, again), resumed, ckpt_path=tmp_path / "saved" / "step=4.ckpt")
    assert again.topkast.step_count == 8
    check_sparse(again.topkast)


def test_non_finite_weight_at_the_start_is_refused_and_nothing_is_overwritten():
    model = make_net()
    with torch.no_grad():
        model.layers[4].weight[0, 0] = math.nan
    before = parameters_of(model)
    with pytest.raises(NonFiniteWeightError, match=rf"'{LAST}' holds NaN or infinity at step 0"):
        TopKast(model, 0.75, 0.5, targets=Targets(keep_last_dense=False))
    del before[LAST]
    assert same({name: parameters_of(model)[name] for name in before}, before)


# --- checkpoints --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A run of one epoch, saved."""
    folder = tmp_path_factory.mktemp("checkpoint")
    trainer = fit(make_trainer(folder, make_callback(), max_epochs=1), make_net())
    trainer.save_checkpoint(folder / "model.ckpt")
    return folder / "model.ckpt"


@OTHER_CALLBACKS
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"forward_sparsity": 0.5},
            r"expected \|A\| = 128 and \|B\| = 128, got 64 and 128.*sparsities",
        ),
        ({"backward_sparsity": 0.25}, r"expected \|A\| = 64 and \|B\| = 192, got 64 and 128"),
        ({"keep_last_dense": False}, rf"other sparse weights: missing \['{LAST}'\]"),
        ({"include": [MIDDLE]}, "expected a checkpoint with the Top-KAST state.*resume with the include and exclude"),
        ({"exclude": [LAST]}, "expected a checkpoint with the Top-KAST state"),
    ],
    ids=str,
)
def test_checkpoint_of_another_run_is_refused(tmp_path, checkpoint, options, message):
    with pytest.raises(TopKastError, match=message):
        fit(make_trainer(tmp_path, make_callback(**options)), make_net(), ckpt_path=checkpoint)


def test_checkpoint_with_states_by_type_is_resumed(tmp_path):
    """As Lightning saved them before version 1.5; it still reads them."""
    callback, trainer, model = make_callback(), make_trainer(tmp_path), make_net()
    trainer.state.fn = TrainerFn.FITTING
    callback.on_load_checkpoint(trainer, model, {"callbacks": {ModelCheckpoint: {}}})
    with pytest.raises(TopKastError, match="expected a checkpoint with the Top-KAST state"):
        callback.on_load_checkpoint(trainer, model, {"callbacks": {ModelCheckpoint: {}, "TopKastCallback{}": {}}})


def test_checkpoint_of_other_layers_is_refused(tmp_path, checkpoint):
    """The model's own state dict is compared first, by torch."""
    with pytest.raises(RuntimeError, match=r"size mismatch for layers.2.weight"):
        fit(make_trainer(tmp_path, make_callback()), make_net(width=12), ckpt_path=checkpoint)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.98])
def test_truncated_checkpoint_is_refused_before_anything_changes(tmp_path, checkpoint, share):
    """Lightning reads the file before any callback sees it; `topkast-train` says it in one line (tests/app)."""
    data = checkpoint.read_bytes()
    (tmp_path / "short.ckpt").write_bytes(data[: int(share * len(data))])
    model, callback = make_net(seed=3), make_callback()
    before = parameters_of(model)
    with pytest.raises((EOFError, OSError, RuntimeError)):
        fit(make_trainer(tmp_path, callback), model, ckpt_path=tmp_path / "short.ckpt")
    assert same(parameters_of(model), before)
    assert callback.topkast is None


def active_to_reservoir(state):
    state["tiers"][state["tiers"] == 2] = 0


def one_more_active(state):
    state["tiers"].view(-1)[(state["tiers"].view(-1) != 2).nonzero()[0]] = 2


def other_active(state):
    """Right counts, but another active set than the saved α has."""
    tiers = state["tiers"].view(-1)
    inside, outside = (tiers == 2).nonzero()[0], (tiers == 0).nonzero()[0]
    tiers[inside], tiers[outside] = 0, 2


def latent_with(value):
    def damage(state):
        state["latent"].view(-1)[(state["tiers"].view(-1) == 0).nonzero()[0]] = value

    return damage


DAMAGES = {
    "tiers that count too few": (active_to_reservoir, r"tiers hold \|A\| = 0"),
    "tiers that count too many": (one_more_active, r"tiers hold \|A\| = 65"),
    "tiers beyond 2": (lambda state: state["tiers"].add_(1), "tiers"),
    "tiers of another set": (other_active, "latent values|not zero outside"),
    "tiers as floats": (lambda state: state.update(tiers=state["tiers"].float()), "got torch.float32"),
    "tiers of another shape": (lambda state: state.update(tiers=state["tiers"].view(-1)), r"'tiers' to be .* \(256,\)"),
    "tiers missing": (lambda state: state.pop("tiers"), "expected 'tiers' to be of type Tensor, got NoneType"),
    "latent as integers": (
        lambda state: state.update(latent=state["latent"].int()),
        "expected 'latent' to be .* got torch.int32",
    ),
    "latent of another shape": (
        lambda state: state.update(latent=state["latent"][:4]),
        r"expected 'latent' to be .*\(4, 16\)",
    ),
    "latent with NaN": (latent_with(math.nan), "latent values hold NaN, infinity or active entries"),
    "latent with infinity": (latent_with(math.inf), "latent values hold NaN, infinity or active entries"),
    "latent missing": (lambda state: state.pop("latent"), "expected 'latent' to be of type Tensor"),
    "never_active as text": (lambda state: state.update(never_active=""), "'never_active' to be of type Tensor"),
    "strength as text": (lambda state: state.update(strength="strong"), "'strength' to be of type float, got str"),
    "strength NaN": (lambda state: state.update(strength=math.nan), "strength"),
    "count as text": (lambda state: state.update(active_count="64"), "expected 'active_count' to be of type int"),
    "no dict at all": (None, "expected a dict, got list"),
}  # fmt: skip


class TwoParts(Sharding):
    """Stands for a weight of which another process holds a part with a problem."""

    sums = 0

    def sum(self, value):
        self.sums += 1
        return value + 1


@pytest.mark.parametrize(
    ("strength", "message"), [(0.0, "another process found a problem in its part"), (math.nan, "expected 'strength'")]
)
def test_problem_that_one_process_finds_is_heard_of_by_all(strength, message):
    weight = TopKast(make_net(), 0.75, 0.5).weights[MIDDLE]
    state, sharding = weight.state_dict() | {"strength": strength}, TwoParts(MIDDLE, weight.parameter)
    problem = problem_with(state, weight.parameter, weight.active_count, weight.updated_count, sharding)
    assert problem.startswith(message)
    assert sharding.sums == 1, "each process sums as often as the others"


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_state_is_refused_by_name_and_nothing_is_overwritten(damage):
    change, message = DAMAGES[damage]
    model = make_net()
    topkast = TopKast(model, 0.75, 0.5, targets=Targets(keep_last_dense=False)).attach(
        torch.optim.SGD(model.parameters(), lr=0.1)
    )
    state = copy.deepcopy(topkast.state_dict())
    if change is None:
        state["weights"][MIDDLE] = []
    else:
        change(state["weights"][MIDDLE])
    before = copy.deepcopy(topkast.state_dict()), parameters_of(model)
    with pytest.raises(TopKastError, match=rf"does not fit weight '{MIDDLE}': .*({message})"):
        topkast.load_state_dict(state)
    assert same((topkast.state_dict(), parameters_of(model)), before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 99}, "expected a Top-KAST state of format version 2, got 99; a state of version 1 can be resumed"),
        ({"version": None}, "format version 2, got None"),
        ({"weights": None}, "damaged: it lacks valid weights or step counts"),
        ({"steps": None}, "damaged"),
        ({"steps": ["4"]}, "damaged"),
        ({"steps": [-4]}, "damaged"),
        ({"steps": [4, 4]}, "expected a Top-KAST state with 1 optimizers, got 2"),
        ({"refresh_count": "many"}, "damaged"),
    ],
    ids=str,
)
def test_damaged_head_of_the_state_is_refused_and_nothing_is_overwritten(changes, message):
    model = make_net()
    topkast = TopKast(model, 0.75, 0.5).attach(torch.optim.SGD(model.parameters(), lr=0.1))
    before = copy.deepcopy(topkast.state_dict())
    with pytest.raises(TopKastError, match=message):
        topkast.load_state_dict(copy.deepcopy(before) | changes)
    assert same(topkast.state_dict(), before)


def test_state_without_the_model_it_belongs_to_is_refused():
    states = []
    for seed in (0, 1):
        model = make_net(seed=seed)
        states.append(TopKast(model, 0.75, 0.5))
    with pytest.raises(TopKastError, match="not zero outside the saved active set; load the model's own state dict"):
        states[0].load_state_dict(states[1].state_dict())


# --- the plain loop -----------------------------------------------------------------------------------------------


def test_optimizers_that_are_not_supported_are_refused():
    model = make_net()
    topkast = TopKast(model, 0.75, 0.5)
    with pytest.raises(TopKastError, match="LBFGS cannot train sparse weights: it evaluates its closure many times"):
        topkast.attach(torch.optim.LBFGS(model.parameters()))
    with pytest.raises(TopKastError, match="holds none of the sparse weights"):
        topkast.attach(torch.optim.SGD(make_net().parameters(), lr=0.1))
    with pytest.raises(TopKastError, match=r"expected a torch\.optim\.Optimizer, got object"):
        topkast.attach(object())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    topkast.attach(optimizer)
    with pytest.raises(TopKastError, match="already attached"):
        topkast.attach(optimizer)


def test_embedding_with_sparse_gradients_is_refused():
    model = nn.Sequential(nn.Embedding(20, 8, sparse=True), nn.Linear(8, 8))
    with pytest.raises(TopKastError, match=r"'0.weight' has sparse gradients, which cannot be masked.*sparse=False"):
        TopKast(model, 0.75, 0.5, include=["0.weight"])
