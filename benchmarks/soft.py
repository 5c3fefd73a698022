"""Soft top-k as a gradient for training sparse networks, beside Top-KAST's own, in three uses.

    OMP_NUM_THREADS=1 python benchmarks/soft.py [--epochs 1] [--sparsity 0.95] [--seeds 0 1 2]

FashionMNIST and an MLP 300-100 with Adam; two layers are sparse, the last one is dense. Every soft variant computes
with the exact top-k, and its backward pass goes through `soft_top_k` at a temperature in means of the scores:

θ: a weight's entries by |θ|. Beside it Top-KAST, and the straight-through gradient.
densities: one choice among both layers by |θ| times a learned factor per layer, of which only this factor gets the soft
    gradient, and θ the straight-through one. Then Top-KAST with the densities that were learned, beside its uniform and
    global ones.
supermask: learned scores over frozen random weights; beside it the straight-through
    gradient, to all scores and to those of the updated set B.

Before these, where a soft top-k has its place: a router that chooses two of eight experts for each input.
"""

import argparse
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from tables import Row, table
from time_to_accuracy import accuracy
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.optim import Adam

from lightning_topkast import L2, TopKast, keep_freed_memory, soft_top_k
from lightning_topkast.app.data import FashionMNIST

SPARSE = ("1.weight", "3.weight")
TEMPERATURES = (0.1, 0.3)
Alphas = Callable[[], Mapping[str, Tensor]]


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )


def hard(scores: Tensor, count: int) -> Tensor:
    """The largest as ones, others as zeros."""
    return torch.zeros_like(scores).index_fill_(0, scores.topk(count).indices, 1.0)


def hard_by_soft(scores: Tensor, count: int, temperature: float) -> Tensor:
    """The largest as ones, with the gradient of the soft top-k."""
    soft = soft_top_k(scores, count, temperature * float(scores.detach().mean()))
    return hard(scores.detach(), count) + soft - soft.detach()


def through(alpha: Tensor, theta: Tensor) -> Tensor:
    """α, whose gradient goes to all of θ."""
    return theta + (alpha - theta).detach()


class Trained:
    """A network whose sparse weights are computed anew for every batch, by one of the methods."""

    def __init__(self, method: str, sparsity: float, temperature: float) -> None:
        self.model, self.density, self.temperature = mlp(), 1 - sparsity, temperature
        weights = dict(self.model.named_parameters())
        self.thetas = {name: weights[name] for name in SPARSE}
        self.own: list[nn.Parameter] = []
        if "supermask" in method:  # of one size a layer, as in Ramanujan et al. 2020
            self.scores = {name: nn.Parameter(torch.rand_like(theta)) for name, theta in self.thetas.items()}
            for theta in self.thetas.values():
                theta.requires_grad_(False)
                theta.copy_(theta.sign() * (2 / (theta.shape[1] * self.density)) ** 0.5)
            self.own += self.scores.values()
        if "densities" in method:
            self.factors = nn.Parameter(torch.zeros(len(SPARSE)))
            self.own.append(self.factors)
        self.alphas: Alphas = getattr(self, method.replace(" ", "_"))

    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad] + self.own

    def __call__(self, x: Tensor) -> Tensor:
        return functional_call(self.model, dict(self.alphas()), (x,))

    def _count(self, theta: Tensor, density: float | None = None) -> int:
        return round((density or self.density) * theta.numel())

    def soft_weights(self) -> Mapping[str, Tensor]:
        return {
            name: theta * hard_by_soft(theta.abs().flatten(), self._count(theta), self.temperature).view_as(theta)
            for name, theta in self.thetas.items()
        }

    def straight_weights(self) -> Mapping[str, Tensor]:
        masks = {name: hard(t.detach().abs().flatten(), self._count(t)).view_as(t) for name, t in self.thetas.items()}
        return {name: through(theta * masks[name], theta) for name, theta in self.thetas.items()}

    def soft_densities(self) -> Mapping[str, Tensor]:
        sizes = [theta.numel() for theta in self.thetas.values()]
        scores = [theta.detach().abs().flatten() for theta in self.thetas.values()]
        scaled = torch.cat([s / s.mean() * f.exp() for s, f in zip(scores, self.factors, strict=True)])
        masks = hard_by_soft(scaled, round(self.density * sum(sizes)), self.temperature).split(sizes)
        self.learned = {n: float(m.detach().mean()) for n, m in zip(SPARSE, masks, strict=True)}
        pairs = zip(self.thetas.items(), masks, strict=True)
        return {n: through(t * (m := mask.view_as(t)).detach(), t) + t.detach() * (m - m.detach())
                for (n, t), mask in pairs}  # fmt: skip

    def soft_supermask(self) -> Mapping[str, Tensor]:
        return {
            name: theta
            * hard_by_soft(self.scores[name].abs().flatten(), self._count(theta), self.temperature).view_as(theta)
            for name, theta in self.thetas.items()
        }

    def straight_supermask(self, updated_density: float = 1.0) -> Mapping[str, Tensor]:
        alphas = {}
        for name, theta in self.thetas.items():
            scores = self.scores[name].flatten()
            updated = hard(scores.detach().abs(), self._count(theta, updated_density))
            mask = hard(scores.detach().abs(), self._count(theta)) + updated * (scores - scores.detach())
            alphas[name] = theta * mask.view_as(theta)
        return alphas

    def straight_supermask_on_B(self) -> Mapping[str, Tensor]:
        return self.straight_supermask(2 * self.density)


def train(net: Any, parameters: Iterable[nn.Parameter], data: FashionMNIST, epochs: int, seed: int,
          attach: Callable[[Adam], None] = lambda optimizer: None) -> float:  # fmt: skip
    """Accuracy on the validation images."""
    optimizer = Adam(parameters, lr=1e-3, fused=True)
    attach(optimizer)
    for epoch in range(epochs):
        data.seed = 1000 * seed + epoch
        for x, y in data.train_dataloader():
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
    return 100 * accuracy(net, list(data.val_dataloader()))


def topkast(sparsity: float, data: FashionMNIST, epochs: int, seed: int, **settings: Any) -> float:
    torch.manual_seed(seed)
    model = mlp()
    backward = 1 - 2 * (1 - sparsity)
    made = TopKast(model, sparsity, backward, include=list(SPARSE), update_every=10, penalty=L2(shrinkage=1e-3),
                   **settings)  # fmt: skip
    return train(model, model.parameters(), data, epochs, seed, made.attach)


ROUTES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "hard top-2, which gives the router no gradient": lambda scores: hard_rows(scores),
    "hard top-2, softmax as their weights": lambda scores: 2 * hard_rows(scores) * scores.softmax(-1),
    "hard top-2, gradient of the soft one": lambda scores: (
        hard_rows(scores) + (soft := soft_top_k(scores, 2, 0.3)) - soft.detach()
    ),
    "soft top-2, which computes all experts": lambda scores: soft_top_k(scores, 2, 0.3),
}


def hard_rows(scores: Tensor) -> Tensor:
    return torch.zeros_like(scores).scatter(1, scores.topk(2).indices, 1.0)


def routed(route: Callable[[Tensor], Tensor], seed: int) -> float:
    """Share (%) of the targets' variance that two of eight experts leave, on eight clusters with a linear map each."""
    torch.manual_seed(100 + seed)
    centres, maps = 3 * torch.randn(8, 8), torch.randn(8, 8, 4)
    router, experts = nn.Linear(8, 8), nn.Parameter(0.3 * torch.randn(8, 8, 4))
    optimizer = Adam([*router.parameters(), experts], lr=1e-2)

    def error(size: int) -> Tensor:
        cluster = torch.randint(8, (size,))
        x = centres[cluster] + torch.randn(size, 8)
        y = torch.einsum("bi,bio->bo", x, maps[cluster] + maps[(cluster + 1) % 8]) / 2
        outputs = (route(router(x)).unsqueeze(-1) * torch.einsum("bi,eio->beo", x, experts)).sum(1)
        return F.mse_loss(outputs, y) / y.var()

    for _ in range(500):
        optimizer.zero_grad()
        error(128).backward()
        optimizer.step()
    return 100 * float(error(4000).detach())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--sparsity", type=float, default=0.95, help="(default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", help="of the data, if it is not where the Debian package or torchvision put it")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    errors = {name: [routed(route, seed) for seed in arguments.seeds] for name, route in ROUTES.items()}
    rows: list[Row] = [{"route": name, "unexplained (%)": statistics.mean(each)} for name, each in errors.items()]
    table("Two of eight experts, 500 steps", rows)
    data = FashionMNIST(arguments.folder, batch_size=128, val_size=1 / 12)
    data.prepare_data()
    data.setup("fit")
    budget = data, arguments.epochs
    found: dict[tuple[str, str, Any], list[float]] = {}
    for seed in arguments.seeds:

        def note(use: str, gradient: str, accuracy: float, temperature: Any = None) -> None:
            found.setdefault((use, gradient, temperature), []).append(accuracy)

        def trained(method: str, temperature: float = 1.0, seed: int = seed) -> tuple[Trained, float]:
            torch.manual_seed(seed)
            net = Trained(method, arguments.sparsity, temperature)
            return net, train(net, net.parameters(), *budget, seed)

        for distribution in ("uniform", "global"):
            accuracy = topkast(arguments.sparsity, *budget, seed, distribution=distribution)
            if distribution == "uniform":
                note("θ", "Top-KAST", accuracy)
            note("densities", f"Top-KAST, {distribution}", accuracy)
        note("θ", "straight-through", trained("straight weights")[1])
        note("supermask", "straight-through", trained("straight supermask")[1])
        note("supermask", "straight-through on B", trained("straight supermask on B")[1])
        for temperature in TEMPERATURES:
            note("θ", "soft", trained("soft weights", temperature)[1], temperature)
            note("supermask", "soft", trained("soft supermask", temperature)[1], temperature)
            net, accuracy = trained("soft densities", temperature)
            note("densities", "soft, while they are learned", accuracy, temperature)
            overrides = {
                name: {"forward_sparsity": 1 - density, "backward_sparsity": max(0.0, 1 - 2 * density)}
                for name, density in net.learned.items()
            }
            again = topkast(arguments.sparsity, *budget, seed, overrides=overrides)
            note("densities", "Top-KAST, with those learned", again, temperature)
    rows = [
        {"use": use, "gradient": gradient, "temperature": temperature, "accuracy": f"{statistics.mean(values):.2f}",
         "seeds": " ".join(f"{value:.2f}" for value in values)}
        for (use, gradient, temperature), values in sorted(found.items(), key=lambda each: (each[0][0], str(each[0])))
    ]  # fmt: skip
    table(f"FashionMNIST, MLP 300-100, {arguments.sparsity:.0%} sparse, {arguments.epochs} epochs", rows)


if __name__ == "__main__":
    main()
