r"""Top-KAST on one page: plain, slow and complete. Read it first; the tests hold every storage of the library to it.

A sparse weight θ has n entries, a forward density D and a backward density D + M. Its entries fall into three sets:

========================  ======================================  =========  ==================  ========
set                       members                                 forward    gradient            penalty
========================  ======================================  =========  ==================  ========
A, the active ones        the round(D·n) largest in \|θ\|         α = θ      yes                 λ
B\A, the exploring ones   the next, up to round((D + M)·n)        α = 0      yes, taken at α     λ / D
C, the reservoir          the rest                                α = 0      no                  none
========================  ======================================  =========  ==================  ========

The network computes with α, and the optimizer updates θ. An entry keeps its value of θ when it changes sets.
Where not all entries that are zero belong to a set, those that do are drawn at random.

Source: Jayakumar et al., "Top-KAST: Top-K Always Sparse Training", NeurIPS 2020, arXiv 2106.03517.
"""

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Sets = tuple[Tensor, Tensor]  # A and B, as bool tensors in the weight's shape; C is what is not in B


def largest(
    values: Sequence[float], count: int, drawn: Sequence[float] | None = None, among: Iterable[int] | None = None
) -> list[int]:
    """Return the indices of the `count` largest values, exactly that many.

    Of values that are zero, those with the largest numbers drawn come first; of equal ones, the lowest indices.
    """

    def rank(index: int) -> tuple[float, float, int]:
        return -values[index], -drawn[index] if drawn is not None and values[index] == 0 else 0, index

    return sorted(range(len(values)) if among is None else among, key=rank)[:count]


def draw(seed: int, step: int, name: str, shape: Sequence[int]) -> list[float]:
    """Return a number in [0, 1) for each entry of a weight, the same whoever draws it, and whenever."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{step}/{name}".encode()))
    return torch.rand(torch.Size(shape), generator=generator).flatten().tolist()


def mask(indices: Iterable[int], shape: Sequence[int]) -> Tensor:
    """Return a bool tensor which is true at these flat indices."""
    members = torch.zeros(shape, dtype=torch.bool)
    members.view(-1)[list(indices)] = True
    return members


class Reference:
    """One run of Top-KAST.

    Example::

        reference = Reference(dict(model.named_parameters()), {"0.weight": (10, 20)}, {"0.weight": 1e-4}, make_sgd, 100)
        for batch in batches:
            reference.train_step(lambda alpha: functional_call(model, alpha, batch).square().mean())

    Args:
        parameters: name → θ of every parameter of the model, the dense ones too; copied.
        counts: name → (number of entries in A, number of entries in B) of every sparse weight.
        strength: name → λ of every sparse weight.
        make_optimizer: from name → parameter to the optimizer that trains them.
        update_every: optimizer steps from one refresh, which chooses A and B again, to the next.
        stop_exploring_at: the step from which on B = A; None for never.
        seed: of what is drawn at random.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        counts: Mapping[str, tuple[int, int]],
        strength: Mapping[str, float],
        make_optimizer: Callable[[dict[str, nn.Parameter]], Optimizer],
        update_every: int,
        stop_exploring_at: int | None = None,
        seed: int = 0,
    ) -> None:
        self.parameters = {name: nn.Parameter(value.detach().clone()) for name, value in parameters.items()}
        self.counts, self.strength = counts, strength
        self.update_every, self.stop_exploring_at, self.seed = update_every, stop_exploring_at, seed
        self.optimizer = make_optimizer(self.parameters)
        self.step = self.refreshes = 0
        self.sets = self.choose()

    @property
    def explores(self) -> bool:
        return self.stop_exploring_at is None or self.step < self.stop_exploring_at

    def choose(self) -> dict[str, Sets]:
        """Choose the sets of every sparse weight by its present θ."""
        return {name: self.choose_for(name) for name in self.counts}

    def choose_for(self, name: str) -> Sets:
        theta, (active, updated) = self.parameters[name].detach(), self.counts[name]
        magnitudes = theta.abs().double().flatten().tolist()
        drawn = draw(self.seed, self.step, name, theta.shape)
        return (
            mask(largest(magnitudes, active, drawn), theta.shape),
            mask(largest(magnitudes, updated if self.explores else active, drawn), theta.shape),
        )

    def alpha(self, name: str) -> Tensor:
        """Return what the network computes with: θ on A, zero elsewhere."""
        theta = self.parameters[name].detach()
        return theta * self.sets[name][0] if name in self.sets else theta

    def train_step(self, compute_loss: Callable[[dict[str, Tensor]], Tensor]) -> None:
        """Take one optimizer step, and refresh where that is due.

        Args:
            compute_loss: from name → α to the loss.
        """
        alphas = {name: self.alpha(name).clone().requires_grad_() for name in self.parameters}
        gradients = torch.autograd.grad(compute_loss(alphas), list(alphas.values()))
        if self.update(dict(zip(alphas, gradients, strict=True))):
            self.refresh_if_due()

    def update(self, gradients: Mapping[str, Tensor | None]) -> bool:
        """Apply the gradients, which were taken at α, to θ on B; return whether any sparse weight has one."""
        before = {name: self.parameters[name].detach().clone() for name in self.sets}
        for name, parameter in self.parameters.items():
            gradient = gradients.get(name)
            if gradient is not None and name in self.sets:
                gradient = gradient * self.sets[name][1]
            # like the parameter in memory, by whose order a fused optimizer goes
            parameter.grad = None if gradient is None else torch.empty_like(parameter).copy_(gradient)
        for name, (_, updated) in self.sets.items():
            self.parameters[name].detach()[~updated] = 0  # the optimizer's weight decay sees B alone
        self.optimizer.step()
        rates = {id(p): group["lr"] for group in self.optimizer.param_groups for p in group["params"]}
        stepped = False
        for name, (active, updated) in self.sets.items():
            parameter = self.parameters[name]
            theta = parameter.detach()
            theta[~updated] = before[name][~updated]  # θ on C stays, bit for bit
            if parameter.grad is None:
                continue
            stepped = True
            # The penalty depends on no data. It is decoupled from the gradient, as AdamW's weight decay is: inside an
            # adaptive optimizer's gradient the factor 1/D would be divided away again.
            strength, density = self.strength[name], self.counts[name][0] / theta.numel()
            for members, scaled in ((active, strength), (updated & ~active, strength / density)):
                theta[members] = self.shrink(theta[members], rates[id(parameter)] * scaled)
        self.step += stepped
        return stepped

    def shrink(self, values: Tensor, amount: float) -> Tensor:
        """Return θ after a step along the gradient of ½λθ², or ½(λ/D)θ²; `amount` is the learning rate times that."""
        return values * max(1 - amount, 0.0)

    def refresh_if_due(self) -> None:
        if self.step % self.update_every == 0 or self.step == self.stop_exploring_at:
            self.refresh()

    def refresh(self) -> None:
        """Choose A and B again."""
        self.apply(self.choose())

    def apply(self, sets: Mapping[str, Sets]) -> None:
        """Give every weight its new sets. θ stays as it is; an entry outside B has no optimizer state."""
        self.sets = dict(sets)
        self.refreshes += 1
        for name, (_, updated) in self.sets.items():
            self.reset_state(name, ~updated)

    def reset_state(self, name: str, members: Tensor) -> None:
        """Set the optimizer's state of these entries to zero: momenta and averages, not the count of steps."""
        parameter = self.parameters[name]
        for value in self.optimizer.state.get(parameter, {}).values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                value[members] = 0
