"""The reference itself, by hand, and every storage beside it."""

import ast
import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.func import functional_call

from lightning_topkast import L2, Packed, Schedule, Targets, TopKast, reference
from lightning_topkast.reference import Reference

STEPS, STOP = 40, 30
OPTIMIZERS = {
    "SGD with momentum": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=0.01),
    "Adam": lambda parameters: torch.optim.Adam(parameters, 0.01),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, 0.01, weight_decay=0.1),
}


def sgd(parameters):
    return torch.optim.SGD(parameters.values(), lr=0.5)


def test_sets_are_the_largest_entries_and_ties_go_to_the_lowest_index():
    theta = torch.tensor([[1.0, -2.0, 1.0], [0.5, -1.0, 0.0]])
    run = Reference({"w": theta}, {"w": (2, 4)}, {"w": 0.0}, sgd, update_every=10)
    active, updated = run.sets["w"]
    assert active.tolist() == [[True, True, False], [False, False, False]]
    assert updated.tolist() == [[True, True, True], [False, True, False]]
    assert run.alpha("w").tolist() == [[1, -2, 0], [0, 0, 0]]


def test_a_step_by_hand():
    """Gradients at α move θ on B, the penalty shrinks it by lr·λ on A and by lr·λ/D elsewhere in B; C stays."""
    run = Reference({"w": torch.tensor([4.0, -3.0, 2.0, 1.0])}, {"w": (1, 2)}, {"w": 0.1}, sgd, update_every=10)
    run.train_step(lambda alpha: (alpha["w"] * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum() + alpha["w"][1] ** 2)
    # 4 - 0.5·1, less 0.5·0.1 of it; -3 - 0.5·(2 + 2·0), less 0.5·0.1·4 of it
    torch.testing.assert_close(run.parameters["w"].detach(), torch.tensor([3.5 * 0.95, -4 * 0.8, 2.0, 1.0]))
    assert (run.step, run.refreshes) == (1, 0)


def test_an_entry_is_promoted_with_its_stored_value_and_state_outside_b_is_reset():
    def momentum(parameters):
        return torch.optim.SGD(parameters.values(), lr=1.0, momentum=0.5)

    run = Reference({"w": torch.tensor([4.0, 3.5, 3.0])}, {"w": (1, 2)}, {"w": 0.0}, momentum, update_every=2)
    for _ in range(2):
        run.train_step(lambda alpha: 0.75 * alpha["w"][0])
    active, updated = run.sets["w"]
    assert run.refreshes == 1
    assert run.parameters["w"].tolist() == [4 - 0.75 - (0.375 + 0.75), 3.5, 3.0]
    assert active.tolist() == [False, True, False]
    assert updated.tolist() == [False, True, True]
    assert run.optimizer.state[run.parameters["w"]]["momentum_buffer"].tolist() == [0, 0, 0]


def test_exploring_stops():
    run = Reference({"w": torch.tensor([4.0, 3.0, 2.0])}, {"w": (1, 3)}, {"w": 0.0}, sgd, 100, stop_exploring_at=1)
    assert run.sets["w"][1].all()
    run.train_step(lambda alpha: alpha["w"].sum())
    assert torch.equal(*run.sets["w"])
    assert run.refreshes == 1


def test_the_reference_needs_torch_and_nothing_of_ours():
    tree = ast.parse(Path(reference.__file__).read_text(encoding="utf-8"))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) if not node.level}
    modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    assert {module.split(".")[0] for module in modules} - set(sys.stdlib_module_names) == {"torch"}


# --- the library ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("storage", ["masked", "packed", "compact"])
def test_every_storage_does_what_the_reference_does(storage, optimizer):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    model = copy.deepcopy(plain)
    topkast = TopKast(
        model,
        0.8,
        0.6,
        targets=Targets(keep_first_dense=False, keep_last_dense=False),
        schedule=Schedule(3, stop_exploring_at=STOP),
        penalty=L2(strength=0.02),
        storage=Packed(kernels="torch") if storage == "packed" else storage,
    )
    trained = OPTIMIZERS[optimizer](model.parameters())
    topkast.attach(trained)
    counts = {f"{i}.weight": (round(0.2 * n), round(0.4 * n)) for i, n in ((0, 6 * 16), (2, 16 * 12), (4, 12 * 3))}
    run = Reference(
        dict(plain.named_parameters()), counts, dict.fromkeys(counts, 0.02),
        lambda parameters: OPTIMIZERS[optimizer](parameters.values()), update_every=3, stop_exploring_at=STOP,
    )  # fmt: skip
    first = run.sets
    for step in range(STEPS):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        y = torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin(), x[:, 3].abs()], dim=-1)
        trained.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        trained.step()
        run.train_step(lambda alpha, x=x, y=y: nn.functional.mse_loss(functional_call(plain, alpha, x), y))

        assert (topkast.step_count, topkast.refresh_count) == (run.step, run.refreshes)
        assert topkast.weights.keys() == counts.keys()
        for name, weight in topkast.weights.items():
            active, updated = run.sets[name]
            assert torch.equal(weight.active, active), f"{name}: A after step {step}"
            assert torch.equal(weight.updated, updated), f"{name}: B after step {step}"
            torch.testing.assert_close(weight.theta(), run.parameters[name].detach(), rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(model.state_dict()[name], run.alpha(name), rtol=1e-9, atol=1e-12)
    assert run.refreshes == STEPS // 3
    assert torch.equal(active, updated), "exploring has stopped"
    assert all(not torch.equal(first[name][0], run.sets[name][0]) for name in counts), "A never changed"
