"""Mixtures of experts: a 3-D parameter holds a matrix per expert, each of which has sets of its own."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from lightning_topkast import (
    Magnitude,
    NonFiniteWeightError,
    Packed,
    RigL,
    Schedule,
    Static,
    Targets,
    TopKast,
    TopKastError,
)
from lightning_topkast.baselines import SET
from lightning_topkast.costs import OptimizerState, Parallel, make_plan
from lightning_topkast.export import load_sparse, save_sparse
from lightning_topkast.layers import SparseLayer, to_dense
from lightning_topkast.method.structure import Block
from lightning_topkast.method.targets import find_targets
from lightning_topkast.reference import draw, largest
from lightning_topkast.settings import Settings
from tests.helpers import OPTIMIZERS, same

EXPERTS, WIDTH, HIDDEN = 3, 8, 12
UP, DOWN = "experts.up", "experts.down"


class Experts(nn.Module):
    """Reads its weights once per expert, as the experts of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH) / 3)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN) / 3)

    def forward(self, x: Tensor, shares: Tensor) -> Tensor:
        outputs = [nn.functional.linear(torch.tanh(x @ self.up[i].T), self.down[i]) for i in range(EXPERTS)]
        return (torch.stack(outputs, -1) * shares[:, None]).sum(-1)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, WIDTH)
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts = Experts()
        self.last = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.last(x + self.experts(x, self.router(x).softmax(-1)))


class Run:
    """A mixture in training, whose steps depend on their number alone."""

    def __init__(self, optimizer: str = "adamw", model: nn.Module | None = None, **options) -> None:
        torch.manual_seed(0)
        self.model = Mixture() if model is None else model
        options.setdefault("schedule", Schedule(3))
        self.topkast = TopKast(self.model, 0.75, 0.5, **options)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters(), 0.05)
        self.topkast.attach(self.optimizer, total_steps=100)

    def step(self, count: int = 1) -> "Run":
        for _ in range(count):
            generator = torch.Generator().manual_seed(self.topkast.step_count)
            if isinstance(self.model, Mixture):
                loss = self.model(torch.randn(9, 5, generator=generator)).square().sum()
            else:
                tokens = torch.randint(32, (2, 16), generator=generator)
                loss = self.model(input_ids=tokens, labels=tokens).loss
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return self

    def saved(self) -> dict:
        states = self.model.state_dict(), self.optimizer.state_dict(), self.topkast.state_dict()
        return copy.deepcopy(dict(zip(("model", "optimizer", "topkast"), states, strict=True)))

    def load(self, saved: dict) -> "Run":
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.topkast.load_state_dict(saved["topkast"])
        return self

    def result(self) -> dict:
        sets = {name: (weight.tiers, weight.theta()) for name, weight in self.topkast.weights.items()}
        return {"α": {name: value.clone() for name, value in self.model.state_dict().items()}, "sets": sets}


def mixtral() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, max_position_embeddings=16,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(config)


def sizes(members: Tensor) -> list[int]:
    """The size of a set in every expert."""
    return members.flatten(1).sum(1).tolist()


# --- which parameters are stacks ----------------------------------------------------------------------------------


def test_experts_are_sparse_by_default():
    targets = {target.name: target for target in find_targets(Mixture(), Targets())}
    assert [name for name, target in targets.items() if target.sparse] == ["router.weight", UP, DOWN]
    assert [name for name, target in targets.items() if target.is_stack] == [UP, DOWN]


class Own(nn.Module):
    """Holds one parameter of a given name and shape."""

    def __init__(self, name: str, *shape: int) -> None:
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.randn(shape)))


class CausalConv(Own):
    pass


class PatchEmbed(Own):
    pass


class Stem(nn.Conv1d):
    pass


@pytest.mark.parametrize(
    "module",
    [
        Own("positions", 1, 16, 8),
        Own("cls_token", 1, 1, 8),
        Own("logit_scale", 4, 1, 1),
        Own("pos_embed", 4, 4, 8),
        Own("proj_bias", 3, 4, 8),
        Own("weight", 4, 8),
        Own("weight", 2, 3, 4, 8),
        CausalConv("weight", 8, 8, 3),
        PatchEmbed("weight", 8, 8, 3),
        nn.Conv1d(8, 8, 3),
        Stem(8, 8, 3),
        nn.Bilinear(4, 5, 6),
        nn.utils.parametrizations.spectral_norm(nn.Conv1d(8, 8, 3)),
    ],
    ids=lambda module: f"{type(module).__name__} {next(iter(module.state_dict()))}",
)
def test_what_only_looks_like_a_stack_is_none(module):
    targets = find_targets(nn.Sequential(nn.Linear(4, 4), module, nn.Linear(4, 4), nn.Linear(4, 4)), Targets())
    assert not any(target.is_stack for target in targets)


@pytest.mark.parametrize(
    ("model", "config"),
    [
        ("Mixtral", {"num_local_experts": 4}),
        ("Qwen3Moe", {"num_experts": 4, "moe_intermediate_size": 24, "num_experts_per_tok": 2, "head_dim": 8}),
        ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}),
        ("DeepseekV3", {
            "n_routed_experts": 4, "moe_intermediate_size": 24, "num_experts_per_tok": 2, "n_group": 1,
            "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4, "v_head_dim": 8,
        }),
        ("GraniteMoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    ],
)  # fmt: skip
def test_most_of_a_mixture_of_transformers_is_sparse(model, config):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{model}Config")(
        vocab_size=32, hidden_size=16, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16, **config,
    )  # fmt: skip
    with torch.device("meta"):
        net = getattr(transformers, f"{model}ForCausalLM")(config)
    targets = find_targets(net, Targets())
    stacks = [target for target in targets if target.is_stack]
    assert {target.shape[0] for target in stacks} == {4}
    assert all(target.sparse for target in stacks)
    experts = sum(p.numel() for name, p in net.named_parameters() if ".experts." in name and "bias" not in name)
    assert sum(target.shape.numel() for target in stacks) >= experts > 0
    assert sum(t.shape.numel() for t in targets if t.sparse) > 0.85 * sum(
        t.shape.numel() for t in targets if t.reason not in ("embedding", "last candidate")
    )


# --- sets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", ["random", "ties", "zeros", "one large expert"])
@pytest.mark.parametrize("storage", ["masked", "compact"])
def test_every_expert_has_its_largest_entries_exactly(values, storage):
    torch.manual_seed(1)
    module = Own("theta", 4, 5, 7)
    theta = module.theta.detach()
    if values == "ties":
        theta.round_()
    elif values == "zeros":
        theta[1:] = 0
    elif values == "one large expert":
        theta[2] *= 1000
    magnitudes = theta.abs().flatten(1).tolist()
    weight = TopKast(module, 0.75, 0.5, storage=storage, include=["theta"]).weights["theta"]
    active, updated = round(0.25 * 35), round(0.5 * 35)
    lots = torch.tensor(draw(0, 0, "theta", (4, 5, 7))).view(4, 35).tolist()
    for expert, entries in enumerate(magnitudes):
        for members, count in ((weight.active, active), (weight.updated, updated)):
            expected = sorted(largest(entries, count, lots[expert]))
            assert members[expert].flatten().nonzero().flatten().tolist() == expected
    assert (weight.active_count, weight.updated_count) == (4 * active, 4 * updated)


KINDS = {
    "magnitude": {},
    "set": {"rule": SET(0.4), "backward_sparsity": 0.75},
    "rigl": {"rule": RigL(0.4), "backward_sparsity": 0.75},
    "static": {"rule": Static(), "backward_sparsity": 0.75},
    "blocks": {"structure": Block(4, 2)},
    "uneven blocks": {"structure": Block(5, 3)},
    "erk": {"distribution": "erk"},
    "delay": {"schedule": None},
}


@pytest.mark.parametrize("kind", KINDS)
def test_experts_train_as_weights_of_their_own(kind):
    """A mixture whose experts are single matrices has the same sets after every step, and trains alike."""

    class Apart(nn.Module):
        def __init__(self, experts: Experts) -> None:
            super().__init__()
            self.up = nn.ParameterList([nn.Parameter(each.clone()) for each in experts.up.detach()])
            self.down = nn.ParameterList([nn.Parameter(each.clone()) for each in experts.down.detach()])
            self.forward = Experts.forward.__get__(self)

    options = dict(KINDS[kind])
    backward = options.pop("backward_sparsity", 0.5)
    if kind == "delay":
        options["schedule"] = Schedule(3, delay=1)
    else:
        options["schedule"] = Schedule(3)
    runs = []
    for apart in (False, True):
        torch.manual_seed(0)
        model = Mixture()
        if apart:
            model.experts = Apart(model.experts)
        include = ["experts.*"]
        topkast = TopKast(
            model, 0.75, backward, targets=Targets(include, keep_first_dense=False, keep_last_dense=False), **options
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        topkast.attach(optimizer, total_steps=100)
        found = []
        for step in range(10):
            optimizer.zero_grad()
            x = torch.randn(9, 5, generator=torch.Generator().manual_seed(step))
            model(x).square().sum().backward()
            optimizer.step()
            each = topkast.weights
            if apart:
                found.append([torch.stack([each[f"{name}.{i}"].tiers for i in range(EXPERTS)]) for name in (UP, DOWN)])
            else:
                found.append([each[name].tiers for name in (UP, DOWN)])
        runs.append((found, topkast.refresh_count))
    if kind in ("set", "rigl", "static"):  # what is drawn depends on a weight's name
        (one, _), (other, _) = runs
        assert [[sizes(t == 2) for t in step] for step in one] == [[sizes(t == 2) for t in step] for step in other]
        assert same(one[0], one[-1]) == (kind == "static")
        return
    assert same(runs[0], runs[1])
    assert not same(runs[0][0][0], runs[0][0][-1])


def test_each_row_of_an_expert_has_groups_of_its_own():
    """7 inputs: the last group of 4 has 3 entries, in every row of every expert."""
    module = Own("theta", 2, 3, 7)
    weight = TopKast(module, 0.5, 0.25, structure="2:4", include=["theta"]).weights["theta"]
    padded = nn.functional.pad(weight.active, (0, 1)).view(2, 3, 2, 4)
    assert (padded.sum(-1) == 2).all()
    assert sizes(weight.updated) == [round(0.75 * 21)] * 2


@pytest.mark.parametrize("distribution", ["global", "global_normalized"])
def test_experts_compete_where_the_distribution_is_global(distribution):
    torch.manual_seed(0)
    module = Own("theta", 4, 5, 6)
    module.theta.detach()[2] *= 1e6
    weight = TopKast(module, 0.75, 0.75, distribution=distribution, include=["theta"]).weights["theta"]
    assert weight.active[2].all()
    assert sum(sizes(weight.active)) == weight.active_count == 32  # with "uniform" these are 8 in each


def test_random_exploration_is_drawn_in_every_expert():
    weight = Run(rule=Magnitude("random")).step(4).topkast.weights[UP]
    assert sizes(weight.updated) == [48] * EXPERTS
    exploring = (weight.updated & ~weight.active).flatten(1)
    assert not torch.equal(exploring[0], exploring[1])


def test_a_density_too_small_for_an_expert_is_refused_though_the_stack_has_enough():
    with pytest.raises(TopKastError, match="each matrix of weight 'theta' has 12 entries, too few for one active"):
        TopKast(Own("theta", 50, 3, 4), 0.97, 0.9, include=["theta"])


def test_nan_in_an_expert_is_refused():
    run = Run()
    run.model.experts.up.detach()[run.topkast.weights[UP].active] = math.nan
    with pytest.raises(NonFiniteWeightError, match=f"'{UP}'"):
        run.topkast.refresh()


# --- storage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [Mixture, mixtral])
@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_compact_experts_train_as_masked_ones_bit_for_bit(build, optimizer):
    check_compact_is_masked(build, optimizer)


@pytest.mark.parametrize(
    "options",
    [
        {"structure": Block(4, 2)},
        {"schedule": Schedule(3, delay=2)},
        {"schedule": Schedule(3, delay=2), "structure": Block(4, 2)},
        {"rule": Magnitude("random")},
        {"schedule": Schedule(3, stop_exploring_at=5)},
        {"powerpropagation": 2.0},
    ],
    ids=str,
)
def test_so_they_do_with_every_setting(options):
    check_compact_is_masked(Mixture, "adamw", exclude=["router.*"], **options)


def check_compact_is_masked(build, optimizer: str, **options) -> None:
    results = []
    for storage in ("masked", "compact"):
        torch.manual_seed(0)
        run = Run(optimizer, build(), storage=storage, **options).step(9)
        results.append(run.result())
    assert {weight.storage for weight in run.topkast.weights.values()} == {"compact"}
    assert same(*results)


@pytest.mark.parametrize("before", ["masked", "compact"])
@pytest.mark.parametrize("after", ["masked", "compact"])
def test_a_resumed_run_goes_on_bit_for_bit(before, after):
    """Also in the middle of an interval, and with the other storage."""
    whole = Run(storage=before).step(11)
    saved = Run(storage=before).step(5).saved()
    resumed = Run(storage=after)
    resumed.step(2)  # so that nothing of the new run is left
    assert same(resumed.load(saved).step(6).result(), whole.result())


def test_mixtral_resumes_bit_for_bit():
    whole = Run(model=mixtral(), storage="compact").step(7)
    saved = Run(model=mixtral(), storage="compact").step(4).saved()
    assert same(Run(model=mixtral(), storage="compact").load(saved).step(3).result(), whole.result())


def test_loaded_weights_are_chosen_again_in_every_expert():
    run = Run(storage="compact")
    state = copy.deepcopy(run.model.state_dict())
    state[UP] = torch.randn_like(state[UP]) * torch.tensor([1.0, 1000.0, 1.0])[:, None, None]
    run.model.load_state_dict(state)
    weight = run.topkast.weights[UP]
    assert (sizes(weight.active), sizes(weight.updated)) == ([24] * EXPERTS, [48] * EXPERTS)


@pytest.mark.parametrize("storage", ["masked", "compact"])
def test_zeros_that_are_loaded_are_drawn_in_every_expert_as_for_a_run_that_begins_with_them(storage):
    values = torch.zeros(4, 5, 7)
    values[:, 2, :3] = 1.0
    trained, begun = Own("theta", 4, 5, 7), Own("theta", 4, 5, 7)
    begun.load_state_dict({"theta": values})
    run, other = (Run(model=module, storage=storage, include=["theta"]) for module in (trained, begun))
    trained.load_state_dict({"theta": values})
    active = run.topkast.weights["theta"].active
    assert torch.equal(active, other.topkast.weights["theta"].active)
    assert not torch.equal(active[0], active[1])


def test_packed_products_leave_experts_compact():
    run = Run(storage=Packed(kernels="torch", unsupported="error"))
    assert {name: weight.storage for name, weight in run.topkast.weights.items()} == {
        "router.weight": "packed", UP: "compact", DOWN: "compact",
    }  # fmt: skip
    assert run.model.experts._parameters["up"].numel() == 48 * EXPERTS


class Beside(Experts):
    """Holds a matrix before its stacks."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.scale = nn.Parameter(torch.randn(WIDTH, WIDTH) / 3)
        stacks = Experts()
        self.up, self.down = stacks.up, stacks.down

    def forward(self, x, shares):
        return super().forward(x @ self.scale, shares)


@pytest.mark.parametrize(("make", "weights"), [(Experts, 2), (Beside, 3)])
def test_a_dense_weight_is_made_once_per_pass_though_every_expert_reads_it(make, weights, monkeypatch):
    model = Mixture()
    model.experts = make()
    layer = Run(model=model, storage="compact", include=["experts.*"]).model.experts
    assert isinstance(layer, SparseLayer)
    first, again = layer.up, layer.up
    assert first is not again  # outside a pass nothing is kept
    x, shares = torch.randn(4, WIDTH), torch.rand(4, EXPERTS)
    made = []
    kind = type(layer.packed_weights["up"].layout)
    unpack = kind.unpack
    monkeypatch.setattr(kind, "unpack", lambda layout, values: made.append(1) or unpack(layout, values))
    for passes in (1, 2):
        layer(x, shares)
        assert len(made) == weights * passes
    assert "unpacked" not in layer.__dict__


def test_a_weight_read_without_gradients_does_not_lose_those_of_the_pass():
    class Careful(Experts):
        def forward(self, x: Tensor, shares: Tensor) -> Tensor:
            with torch.no_grad():
                self.scale = self.up.abs().max()
            return super().forward(x, shares)

    torch.manual_seed(0)
    model = Mixture()
    model.experts = Careful()
    run = Run(model=model, storage="compact")
    before = run.topkast.weights[UP].theta()
    assert not torch.equal(run.step().topkast.weights[UP].theta(), before)


def test_to_dense_gives_ordinary_experts_back():
    run = Run(storage="compact").step(4)
    alpha = run.result()["α"]
    model = to_dense(run.model)
    assert type(model.experts) is Experts
    assert same({name: value.clone() for name, value in model.state_dict().items()}, alpha)


# --- what is said of them -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["masked", "compact"])
@pytest.mark.parametrize("distribution", ["uniform", "erk"])
def test_plan_and_summary_agree(storage, distribution):
    options = {"storage": storage, "distribution": distribution}
    topkast = TopKast(Mixture(), 0.75, 0.5, **options)
    rows = {row.name: row for row in topkast.summary().rows}
    with torch.device("meta"):
        plan = make_plan(
            Mixture(), [torch.zeros(4, 5)], Settings(0.75, 0.5, **options),
            OptimizerState(lambda parameters: torch.optim.SGD(parameters, lr=0.1)), Parallel(),
        )  # fmt: skip
    layers = {layer.name: layer for layer in plan.layers}
    for name in (UP, DOWN):
        row, layer = rows[name], layers[name]
        assert (layer.shape, layer.size, layer.active, layer.updated) == (row.shape, row.size, row.active, row.updated)
        assert (layer.storage, layer.reason) == (row.storage, "")
        assert layer.forward_flops == pytest.approx(layer.dense_forward_flops * row.forward_density, abs=1)
        assert layer.dense_forward_flops == 2 * WIDTH * HIDDEN * EXPERTS
        assert layer.bytes.weights == topkast.weights[name].parameter.nbytes
        if storage == "compact":
            assert layer.bytes.indices == topkast.weights[name].layout.nbytes


@pytest.mark.parametrize(("implementation", "dtype"), [("batched_mm", torch.float32), ("grouped_mm", torch.bfloat16)])
def test_a_plan_counts_the_products_of_tokens_with_their_experts(implementation, dtype):
    with torch.device("meta"):
        model = mixtral().to(dtype)
        model.config._experts_implementation = implementation
        plan = make_plan(
            model, [torch.zeros(3, 16, dtype=torch.long)], Settings(0.75, 0.5),
            OptimizerState(lambda parameters: torch.optim.SGD(parameters, lr=0.1)), Parallel(),
        )  # fmt: skip
    layers = {layer.name: layer for layer in plan.layers if ".experts." in layer.name}
    tokens, experts_per_token = 16, 2
    for name, (inputs, outputs) in {"gate_up_proj": (16, 48), "down_proj": (24, 16)}.items():
        layer = layers[f"model.layers.1.mlp.experts.{name}"]
        assert layer.dense_forward_flops == 2 * tokens * experts_per_token * inputs * outputs
        assert layer.forward_flops == pytest.approx(layer.dense_forward_flops * layer.forward_density, rel=1e-3)


def test_erk_counts_experts_as_matrices():
    """As many entries, and as many in each expert, as if the experts were layers."""

    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.ModuleList(nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(EXPERTS))
            self.other = nn.Linear(40, 30, bias=False)

    class Together(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = Own("weight", EXPERTS, HIDDEN, WIDTH)
            self.other = nn.Linear(40, 30, bias=False)

    ends = Targets(keep_first_dense=False, keep_last_dense=False)
    apart, together = (TopKast(kind(), 0.9, 0.8, distribution="erk", targets=ends) for kind in (Apart, Together))
    weights = together.weights
    one = apart.weights["wide.0.weight"]
    assert sizes(weights["wide.weight"].active) == [one.active_count] * EXPERTS
    assert sizes(weights["wide.weight"].updated) == [one.updated_count] * EXPERTS
    assert weights["other.weight"].active_count == apart.weights["other.weight"].active_count


def test_experts_are_exported_bit_for_bit(tmp_path):
    run = Run(storage="compact").step(4)
    state = run.model.state_dict()
    save_sparse(state, tmp_path / "model.safetensors")
    assert same({name: value.clone() for name, value in load_sparse(tmp_path / "model.safetensors").items()},
                {name: value.clone() for name, value in state.items()})  # fmt: skip
