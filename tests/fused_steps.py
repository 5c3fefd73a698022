"""What must hold of the fused kernels of masked steps. test_fused_steps.py runs it in Triton's interpreter:

    TRITON_INTERPRET=1 python fused_steps.py SEED [--device cuda]

See blocks.py, which does the same for products.
"""

import itertools
import sys
from contextlib import contextmanager
from itertools import chain, pairwise
from unittest import mock

import torch
from torch import Tensor, nn

from lightning_topkast import L1, L2, Block, Schedule, Targets, TopKast
from lightning_topkast.engine import fused_steps
from lightning_topkast.engine.fused_steps import close_weights, open_weights
from lightning_topkast.method.selection import nested_top_k
from lightning_topkast.ops import fused
from lightning_topkast.ops.flat import fill_, flat, mask_outside_, put_, take
from lightning_topkast.ops.fused import launch
from lightning_topkast.ops.step import Entries
from lightning_topkast.weights import MaskedWeight, Traits
from tests.blocks import On, main

ALL = Targets(keep_first_dense=False, keep_last_dense=False)
# of weights, and how far from an aligned address they begin
SIZES = (((7, 0, 64, 65, 1, 1000), 0), ((200,), 1), ((63, 129, 128), 3), ((0, 0), 0), ((5,) * 70, 0))
SPECIAL = (float("nan"), float("inf"), -float("inf"), -0.0, 1e-42)


def dtypes(device: str) -> list[torch.dtype]:
    """The interpreter cuts bfloat16 off, where a GPU rounds."""
    return [dtype for dtype in launch.TYPES if device != "cpu" or dtype != torch.bfloat16]


class Guarded:
    """A 1-D tensor in the middle of a larger one, whose ends nobody may change."""

    def __init__(self, values: Tensor, offset: int) -> None:
        self.whole = values.new_full((values.numel() + 16 + offset,), 77)
        self.begin, self.end = 8 + offset, 8 + offset + values.numel()
        self.values = self.whole[self.begin : self.end]
        self.values.copy_(values)

    def check(self) -> None:
        ends = torch.cat([self.whole[: self.begin], self.whole[self.end :]])
        assert bool((ends == 77).all()), "written beyond a tensor"


def bits(tensor: Tensor) -> Tensor:
    return flat(tensor).view(torch.uint8)


def drawn(on: On, size: int, dtype: torch.dtype, offset: int) -> tuple[Entries, Tensor, list[Guarded]]:
    tiers = on.tiers(1, size).flatten()
    exploring = (tiers == 1).nonzero().flatten()
    values, gradient = on.random(size, dtype=dtype), on.random(size, dtype=dtype)
    for at, each in enumerate(SPECIAL):
        gradient[at :: len(SPECIAL) + 2] = each
        values[at :: 3 * len(SPECIAL)] = each
    factors = tuple(torch.rand(2, generator=on.generator, dtype=torch.float64).tolist())
    guarded = [Guarded(each, offset) for each in (values, gradient, on.random(exploring.numel(), dtype=dtype))]
    given = [each.values for each in guarded]
    members = Guarded(-(tiers > 0).to(torch.int8), offset).values
    return Entries(given[0], members, exploring, given[2], factors), given[1], guarded


def one_by_one(each: Entries, gradient: Tensor | None) -> None:
    if gradient is not None:
        mask_outside_(gradient, each.members)
    put_(each.values, each.exploring, each.explored)


def leave_one_by_one(each: Entries) -> None:
    take(each.values, each.exploring, out=each.explored)
    each.explored.mul_(each.factors[0])
    fill_(each.values, each.exploring, 0)
    mask_outside_(each.values, each.members)
    each.values.mul_(each.factors[1])


def bits_of_single_passes(on: On) -> None:
    for dtype in dtypes(on.device):
        for sizes, offset in (
            ((7, 0, 64, 65, 1, 1000), 0),
            ((200,), 1),
            ((63, 129, 128), 3),
            ((0, 0), 0),
            ((5,) * 70, 0),
        ):
            made = [drawn(on, size, dtype, offset) for size in sizes]
            copies = [
                (each._replace(values=each.values.clone(), explored=each.explored.clone()), gradient.clone())
                for each, gradient, _ in made
            ]
            unmasked = [at % 4 == 3 for at in range(len(sizes))]  # gradients that were masked before
            pairs = list(zip(made, unmasked, strict=True))
            fused.open_(
                [fused.Masked(gradient, each.members) for (each, gradient, _), keeps in pairs if not keeps],
                [each for each, _, _ in made],
            )
            for (each, gradient), keeps in zip(copies, unmasked, strict=True):
                one_by_one(each, None if keeps else gradient)
            compare(made, copies)
            fused.close_(each for each, _, _ in made)
            for each, _ in copies:
                leave_one_by_one(each)
            compare(made, copies)


def compare(made: list, copies: list) -> None:
    for (each, gradient, guarded), (expected, expected_gradient) in zip(made, copies, strict=True):
        pairs = (each.values, expected.values), (each.explored, expected.explored), (gradient, expected_gradient)
        for own, other in pairs:
            assert torch.equal(bits(own), bits(other)), f"other bits: {each.values.dtype}, {each.values.shape}"
        for tensor in guarded:
            tensor.check()


def tensors_of_several_types_at_once(on: On) -> None:
    made = [drawn(on, 300, dtype, 0) for dtype in dtypes(on.device)]
    copies = [
        (each._replace(values=each.values.clone(), explored=each.explored.clone()), gradient.clone())
        for each, gradient, _ in made
    ]
    fused.open_([fused.Masked(gradient, each.members) for each, gradient, _ in made], [each for each, _, _ in made])
    fused.close_(each for each, _, _ in made)
    for each, gradient in copies:
        one_by_one(each, gradient)
        leave_one_by_one(each)
    compare(made, copies)


def autograd_notices_what_was_written(on: On) -> None:
    each, gradient, _ = drawn(on, 100, torch.float32, 0)
    versions = [tensor._version for tensor in (each.values, each.explored, gradient)]
    fused.open_([fused.Masked(gradient, each.members)], [each])
    fused.close_([each])
    assert all(
        tensor._version > before
        for tensor, before in zip((each.values, each.explored, gradient), versions, strict=True)
    )


# --- training ---------------------------------------------------------------------------------------------------------


@contextmanager
def launched():
    """Names of the kernels that are started."""
    names: list[str] = []
    start = launch._start

    def starting(kernel, programs, *arguments, **constants):
        names.append(kernel.fn.__name__)
        start(kernel, programs, *arguments, **constants)

    with mock.patch.object(launch, "_start", starting):
        yield names


class Training:
    """A network with weights of several shapes, one of which is never used."""

    def __init__(self, on: On, is_fused: bool, make_optimizer, dtype=torch.float32, each_by_itself=False, **options):
        torch.manual_seed(on.seed % 1000)
        self.model = nn.Sequential(
            nn.Conv2d(4, 8, 2), nn.ReLU(), nn.Flatten(),
            *chain(*([nn.Linear(*sizes), nn.ReLU()] for sizes in pairwise((32, 24, 16, 8)))),
        ).to(on.device, dtype, memory_format=torch.channels_last)  # fmt: skip
        self.model.add_module("unused", nn.Linear(8, 8, device=on.device, dtype=dtype))
        options = {"schedule": Schedule(update_every=2), "targets": ALL} | options
        self.topkast = TopKast(self.model, 0.75, 0.5, **options)
        self.is_fused, self.on, self.dtype = is_fused, on, dtype
        groups = [[each.weight] for each in self.model if hasattr(each, "weight")]
        groups = groups if each_by_itself else [list(self.model.parameters())]
        self.optimizers = [make_optimizer(group) for group in groups]
        self.topkast.attach(*self.optimizers, total_steps=400)

    def train(self, steps: int, masks_first: bool = False) -> "Training":
        generator = torch.Generator().manual_seed(1)
        works = fused.works if self.is_fused else lambda *_: False
        with mock.patch.object(fused, "works", works):
            for _ in range(steps):
                images = torch.randn(4, 4, 3, 3, generator=generator).to(self.on.device, self.dtype)
                self.model[:-1](images).square().mean().backward()
                for optimizer in self.optimizers:
                    if masks_first:
                        self.topkast.prepare_step(optimizer)
                    optimizer.step()
                self.model.zero_grad()
        return self

    def everything(self) -> list[Tensor]:
        state = [value for each in self.optimizers for values in each.state.values() for value in values.values()]
        weights = self.topkast.weights.values()
        sets = [tensor for weight in weights for tensor in (weight.theta(), weight.tiers)]
        return [*self.model.parameters(), *sets, *(value for value in state if isinstance(value, Tensor))]


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.01)


def training_has_the_same_bits(on: On) -> None:
    for name, options in {
        "SGD": {},
        "Adam": {"make_optimizer": adam},
        "float64": {"dtype": torch.float64},
        "blocks": {"structure": Block(2, 2), "targets": Targets(include_types=["Linear"])},
        "L1, not by these kernels": {"penalty": L1(strength=1e-3)},
        "no penalty": {"penalty": None},
        "powerpropagation, not by these kernels": {"powerpropagation": 2.0},
        "an optimizer for each parameter": {"make_optimizer": sgd, "each_by_itself": True},
        "sets that stop": {"schedule": Schedule(update_every=2, stop_exploring_at=6)},
    }.items():
        options = {"make_optimizer": sgd} | options
        for masks_first in (False, True):
            runs = [Training(on, is_fused, **options).train(9, masks_first) for is_fused in (True, False)]
            for own, other in zip(*(run.everything() for run in runs), strict=True):
                assert torch.equal(bits(own), bits(other)), name
            assert runs[0].topkast.is_intact, name
            for weight in runs[0].topkast.weights.values():
                assert weight.is_settled, name
                assert not weight.was_written, name


def kernels_are_few(on: On) -> None:
    run = Training(on, True, sgd, schedule=Schedule(update_every=100))
    run.train(3)
    with launched() as names:
        run.train(1)
    assert names == ["open_kernel", "take_kernel", "mask_kernel"], names
    with launched() as names:
        run.train(1, masks_first=True)
    assert names == ["open_kernel", "open_kernel", "take_kernel", "mask_kernel"], names
    with launched() as names:
        Training(on, True, sgd, penalty=L1(strength=1e-3)).train(1)
    assert "take_kernel" not in names, "L1 depends on the entries"


def tables_are_written_once_if_nothing_moves(on: On) -> None:
    each, gradient, _ = drawn(on, 300, torch.float32, 0)
    launch._kept.cache_clear()
    with mock.patch.object(torch, "_foreach_add_", wraps=torch._foreach_add_) as write:
        for _ in range(5):
            fused.open_([fused.Masked(gradient, each.members)], [each])
            fused.close_([each])
    assert write.call_count <= 4, write.call_count


def gradient_of_two_weights_is_masked_by_both(on: On) -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)).to(on.device)
    topkast = TopKast(model, 0.5, 0.25, targets=ALL)
    optimizer = sgd(model.parameters())
    topkast.attach(optimizer)
    first, second = topkast.weights.values()
    gradient = on.random(8, 8)
    for layer in model:
        layer.weight.grad = gradient
    topkast.mask_gradients()
    assert torch.equal(gradient != 0, first.updated & second.updated)


def in_training(on: On) -> list[MaskedWeight]:
    """Weights after their first selection, with values outside A, and gradients."""
    weights = []
    for sides in ((8, 9), (3, 5)):
        parameter = nn.Parameter(on.random(*sides))
        size = parameter.numel()
        weight = MaskedWeight("weight", parameter, size // 4, size // 2, Traits(penalty=L2(strength=0.1)))
        weight.apply(nested_top_k(weight.magnitudes().cpu(), (size // 2, size // 4)).to(on.device))
        weight.shrinkage.strength = 0.1
        parameter.grad = torch.ones_like(parameter)
        weights.append(weight)
    return weights


@torch.no_grad()
def interrupted_step_loses_no_value(on: On) -> None:
    """Whatever line of what opens and closes weights is the last: each has θ of before or after, and goes on."""
    fused.works(torch.device(on.device), torch.float32)  # so that its trial is not interrupted, which takes long
    for line in itertools.count(1):
        weights = in_training(on)
        before = [weight.theta() for weight in weights]
        reached = interrupt_at(line, open_weights, weights, weights)
        for weight, expected in zip(weights, before, strict=True):
            weight.recover()
            assert torch.equal(weight.theta(), expected), f"opening, line {line}"
            assert weight.is_sparse
        if not reached:
            break
    assert line > 20
    for line in itertools.count(1):
        weights = in_training(on)
        open_weights(weights, weights)
        for weight in weights:
            weight.parameter.add_(0.5 * weight.updated)
        updated = [weight.theta() for weight in weights]
        reached = interrupt_at(line, close_weights, [(weight, 0.1) for weight in weights])
        for weight, expected in zip(weights, updated, strict=True):
            weight.recover()
            tiers, factors = weight.tiers, weight.entries(0.1).factors
            taken = torch.where(tiers == 1, expected * factors[0], expected)
            after = torch.where(tiers == 2, expected * factors[1], taken)
            assert any(torch.equal(weight.theta(), each) for each in (expected, taken, after)), f"closing, line {line}"
            assert weight.is_sparse
        if not reached:
            break
    assert line > 20


def interrupt_at(line: int, function, *arguments) -> bool:
    """Call a function, and raise KeyboardInterrupt as the `line`-th of our lines begins; return whether it was."""
    files = fused_steps.__file__, launch.__file__, fused.step.__file__
    codes, seen = {MaskedWeight.end_step.__code__, MaskedWeight.begin_step.__code__}, 0

    def trace(frame, event, _):
        nonlocal seen
        if frame.f_code.co_filename not in files and frame.f_code not in codes:
            return None
        if event == "line":
            seen += 1
            if seen == line:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function(*arguments)
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def captured_steps_train_the_same(on: On) -> None:
    """On a GPU only: see test_captured_step.py, which has a stand-in for graphs."""
    if on.device == "cpu":
        return
    losses = []
    for captures in (True, False):
        run = Training(on, True, sgd, schedule=Schedule(update_every=4))
        images = torch.zeros(4, 4, 3, 3, device=on.device)

        def step(run=run, images=images):
            run.optimizers[0].zero_grad()
            loss = run.model[:-1](images).square().mean()
            loss.backward()
            run.optimizers[0].step()
            return loss

        step = run.topkast.capture(step) if captures else step
        generator = torch.Generator().manual_seed(1)
        found = []
        for _ in range(20):
            images.copy_(torch.randn(4, 4, 3, 3, generator=generator))
            found.append(float(step()))
        losses.append(found)
        assert run.topkast.is_intact
    assert losses[0] == losses[1]


CHECKS = (
    bits_of_single_passes,
    tensors_of_several_types_at_once,
    autograd_notices_what_was_written,
    training_has_the_same_bits,
    kernels_are_few,
    tables_are_written_once_if_nothing_moves,
    gradient_of_two_weights_is_masked_by_both,
    interrupted_step_loses_no_value,
    captured_steps_train_the_same,
)

if __name__ == "__main__":
    main(CHECKS, __doc__)
