"""Run by test_homes.py in a process of its own, which forks the ranks: `python homes.py FOLDER WORLD`.

Every check compares packed weights whose θ is shared by the host memory of the ranks with a copy on the same rank that
shares nothing; each rank writes down what it found.
"""

import copy
import faulthandler
import sys
import tracemalloc
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from reliability.nouns import nouns
from reliability.whole import whole
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_topkast import NonFiniteWeightError, TopKast, TopKastError
from lightning_topkast.baselines import SET, Static
from lightning_topkast.distributed import RowSharding, Shares, exchange, host_group
from lightning_topkast.layers import packed_weights
from tests.helpers import OPTIMIZERS, same

OPTIONS = {
    "forward_sparsity": 0.75, "backward_sparsity": 0.5, "keep_first_dense": False, "keep_last_dense": False,
    "update_every": 3, "strength": 0.1, "storage": "packed", "kernels": "torch",
}  # fmt: skip
# uneven over 2, 3 and 4 ranks, fewer rows than ranks, one dimension, and a convolution's
SHAPES = [(7, 5), (16, 12), (3, 9), (13, 2), (40,), (6, 5, 3, 3)]
BLOCKS = [(28, 8), (4, 12), (12, 4), (40,), (8, 4, 3, 3)]  # of 4 × 4
RUNS = {
    "momentum": {"optimizer": "momentum"},
    "adam": {"optimizer": "adam"},
    "adamw": {"optimizer": "adamw"},
    "fused": {"optimizer": "fused"},
    "compiled": {"kernels": "auto"},
    "ties": {"ties": True},
    "random": {"exploration": "random"},
    "random, blocks": {"exploration": "random", "block": (4, 4)},
    "blocks": {"block": (4, 4)},
    "blocks, delayed": {"block": (4, 4), "delay": 2},
    "delayed": {"delay": 2},
    "delayed, random": {"delay": 1, "exploration": "random"},
    "2:4": {"structure": "2:4", "forward_sparsity": 0.5, "backward_sparsity": 0.25},
    "SET": {"rule": SET(0.3), "backward_sparsity": 0.75, "strength": None, "stop_updating_at": 100},
    "static": {"rule": Static(), "backward_sparsity": 0.75, "strength": None},
    "norm": {"penalty": "norm"},
    "stop": {"stop_exploring_at": 10},
    "power": {"powerpropagation": 2.0},
    "erk": {"distribution": "erk"},
    "compact": {"storage": "compact", "kernels": None},
}


class Bag(nn.Module):
    """Weights of several shapes, which the tests give gradients to."""

    def __init__(self, shapes, seed: int = 0, ties: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for i, shape in enumerate(shapes):
            layer = nn.Linear(1, 1) if len(shape) < 3 else nn.Conv2d(1, 1, 1)
            values = torch.randn(shape, generator=generator)
            layer.weight = nn.Parameter(values.round() if ties else values)
            layer.bias = None
            self.add_module(f"layer{i}", layer)


def gradients(topkast: TopKast, step: int) -> None:
    """Give every weight a gradient that depends on the step alone."""
    generator = torch.Generator().manual_seed(1000 + step)
    for weight in topkast.weights.values():
        dense = torch.randn(weight.shape, generator=generator).view(-1)
        values = dense if weight.storage == "masked" else dense[weight.layout.indices().long()]
        weight.parameter.grad = torch.zeros_like(weight.parameter)
        weight.parameter.grad.view(-1)[: values.numel()] = values


def train(topkast: TopKast, optimizer, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        gradients(topkast, step)
        optimizer.step()


def run(theta: str, steps: int, optimizer: str = "adamw", ties: bool = False, seed: int = 0, shapes=None, **options):
    shapes = shapes or (BLOCKS if "block" in options else SHAPES)
    options = {key: value for key, value in (OPTIONS | options).items() if value is not None}
    topkast = TopKast(Bag(shapes, seed, ties), **nouns(theta=theta, **options))
    fused = {"fused": lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr, fused=True)}
    made = (OPTIMIZERS | fused)[optimizer](topkast.model.parameters(), 0.05)
    topkast.attach(made)
    train(topkast, made, steps)
    return topkast, made


def everything(topkast: TopKast, optimizer) -> dict:
    """What both runs must have alike, whole; a collective."""
    weights = {
        name: (
            whole(weight.theta()), whole(weight.tiers), weight.alpha(), weight.parameter.detach(), weight.promoted,
            int(weight.active_entries), int(weight.updated_entries), int(weight.never_active_entries),
            weight.first_reservoir, weight.is_exploring,
        )
        for name, weight in topkast.weights.items()
    }  # fmt: skip
    state = whole(topkast.state_dict())
    return copy.deepcopy({"weights": weights, "optimizer": optimizer.state_dict(), "state": state})


def shares_theta(topkast: TopKast) -> bool:
    return all(weight.sharding.is_sharded for weight in topkast.weights.values() if len(weight.shape) > 1)


def check_runs(steps: int) -> dict:
    found = {}
    for name, options in RUNS.items():
        sharded, whole_ones = (run(theta, steps, **options) for theta in ("sharded", "replicated"))
        found[name] = same(everything(*sharded), everything(*whole_ones))
        found[f"{name}, shared"] = shares_theta(sharded[0])
    return found


def check_exchange(rank: int, world: int) -> dict:
    """Random ranges of a sequence go to random other ranges."""
    group, found = host_group(), {}
    assert group is not None
    generator = torch.Generator().manual_seed(0)

    def boundaries(count: int) -> list[int]:
        inner = torch.randint(count + 1, (world - 1,), generator=generator).sort().values.tolist()
        return [0, *inner, count]

    def ranges(shares: Shares, values):
        return torch.cat([values[begin:end] for begin, end in shares.ranges[rank]])

    for dtype in (torch.float32, torch.uint8, torch.bfloat16, torch.int64):
        alike = []
        for count in (0, 1, 3, 50, 1000):
            values = torch.randint(100, (count,), generator=generator).to(dtype)
            cut = int(torch.randint(count + 1, (), generator=generator))
            one, tail = boundaries(cut), [cut + each for each in boundaries(count - cut)]
            two_runs, slices = Shares.between(one, tail), Shares.between(boundaries(count))
            copies = Shares([[(0, count)]] * world, replicas=list(range(world)))
            for before in (two_runs, slices, copies):
                for after in (two_runs, slices, copies):
                    got = exchange(ranges(before, values), before, after, group)
                    alike.append(got.dtype == dtype and torch.equal(got, ranges(after, values)))
        found[f"exchange of {dtype}"] = all(alike)
    for shape, height in (((7, 5), 1), ((28, 8), 4), ((4, 3), 4), ((6, 5, 3), 2)):
        dense = torch.randn(shape, generator=generator)
        sharding = RowSharding(dense.shape, group, height)
        part = sharding.to_local(dense)
        distributed, on_rank_0 = sharding.to_dtensor(part), sharding.full_tensor(part)
        found[f"rows of {shape}"] = all([  # a list, since every rank takes part in each
            part.shape == sharding.local_shape,
            part.shape[0] % height == 0,
            torch.equal(distributed.full_tensor(), dense),
            torch.equal(sharding.to_local(distributed), part),
            rank > 0 or torch.equal(on_rank_0, dense),
            int(sharding.sum(torch.tensor(part.numel()))) == dense.numel(),
        ])  # fmt: skip
    return found


def check_states(folder: Path, rank: int) -> dict:
    """A state that was saved whole or in shards goes on the same, here and where θ is replicated."""
    found = {}
    for name in ("adamw", "blocks", "blocks, delayed", "delayed", "2:4"):
        options = RUNS[name]
        trained, optimizer = run("sharded", 7, **options)
        model, momenta = copy.deepcopy(trained.model.state_dict()), copy.deepcopy(optimizer.state_dict())
        gathered = trained.state_dict(gathered=True)
        if rank == 0:
            torch.save(gathered, folder / "whole.pt")
        dist.barrier()
        states = {"whole": torch.load(folder / "whole.pt", weights_only=True), "shards": trained.state_dict()}
        train(trained, optimizer, 8, first=7)
        expected = everything(trained, optimizer)
        for kind, theta in (("whole", "sharded"), ("whole", "replicated"), ("shards", "sharded")):
            resumed, again = run(theta, 0, seed=5, **options)
            resumed.model.load_state_dict(model)
            again.load_state_dict(copy.deepcopy(momenta))
            resumed.load_state_dict(states[kind])
            train(resumed, again, 8, first=7)
            found[f"{name}: {kind} to {theta}"] = same(everything(resumed, again), expected)
        dist.barrier()
    return found


def check_other_values() -> dict:
    """Values that are loaded into a model in training, and averages of it, end as where θ is replicated."""
    found = {}
    for name in ("adamw", "blocks"):
        ends = {}
        for theta in ("sharded", "replicated"):
            topkast, optimizer = run(theta, 7, **RUNS[name])
            average = copy.deepcopy(topkast.model)
            train(topkast, optimizer, 5, first=7)
            averages = packed_weights(average)
            for key, weight in topkast.weights.items():
                weight.sparsify_average(averages[key], weight.active)
            averages = {key: whole(weight.theta()) for key, weight in averages.items()}
            other = Bag(BLOCKS if "block" in RUNS[name] else SHAPES, seed=3)
            topkast.model.load_state_dict(other.state_dict())
            train(topkast, optimizer, 5, first=12)
            ends[theta] = averages, everything(topkast, optimizer)
            topkast.release()
            ends[theta] += ({key: value.detach() for key, value in topkast.model.named_parameters()},)
        found[f"{name}: averages"] = same(ends["sharded"][0], ends["replicated"][0])
        found[f"{name}: loaded"] = same(ends["sharded"][1], ends["replicated"][1])
        found[f"{name}: released"] = same(ends["sharded"][2], ends["replicated"][2])
    return found


def refusal(act) -> str:
    try:
        act()
    except (TopKastError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def check_refusals(rank: int, world: int) -> dict:
    """What goes wrong on one rank is an error on all, and nothing has changed."""
    found = {}
    for name in ("adamw", "blocks", "delayed"):
        topkast, optimizer = run("sharded", 4, **RUNS[name])
        before = everything(topkast, optimizer)
        weight = topkast.weights["layer1.weight"]
        weight.parameter.detach()[0] = torch.nan  # in the first row, which is at home on rank 0
        try:
            topkast.refresh()
        except NonFiniteWeightError as error:
            found[f"{name}: NaN"] = str(error)
        found[f"{name}: sets kept"] = same(
            [whole(each.tiers) for each in topkast.weights.values()], [w[1] for w in before["weights"].values()]
        )
    topkast, _ = run("sharded", 4)
    if rank == world - 1:
        topkast.weights["layer1.weight"].parameter.detach()[3] += 1
    found["drift"] = refusal(topkast.refresh)

    topkast, _ = run("sharded", 4)
    for key, value in {"tiers": 3, "latent": torch.nan, "never_active": None}.items():
        damaged = topkast.state_dict()
        weight = damaged["weights"]["layer1.weight"]
        if value is None:
            weight[key] = weight[key].to_local()[:1]
        elif rank == 1:  # the last rank may have no rows
            weight[key].to_local().fill_(value)
        found[f"damaged {key}"] = refusal(lambda damaged=damaged: topkast.load_state_dict(damaged))
    return found


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that an operator has made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else [made]:
            if isinstance(each, torch.Tensor):
                self.bytes = max(self.bytes, each.untyped_storage().nbytes())
        return made


def check_memory() -> dict:
    """What each rank keeps, and the largest it ever allocates in steps and refreshes."""
    found = {}
    for name, options in {"entries": {}, "blocks": {"block": (16, 16)}}.items():
        kept, largest = {}, {}
        for theta in ("sharded", "replicated"):
            setting = {"forward_sparsity": 0.95, "backward_sparsity": 0.9, "update_every": 2}
            topkast, optimizer = run(theta, 2, shapes=[(1024, 768)], **setting, **options)
            (weight,) = topkast.weights.values()
            host = [weight._theta, weight._tiers, weight._never_active, weight._scores]
            kept[theta] = sum(each.untyped_storage().nbytes() for each in host if each is not None)
            for step in range(2, 6):
                gradients(topkast, step)
                tracemalloc.start()
                with Largest() as mode:
                    optimizer.step()
                largest[theta] = max(largest.get(theta, 0), mode.bytes, tracemalloc.get_traced_memory()[1])
                tracemalloc.stop()
        dense = 4 * 1024 * 768
        found[f"kept, {name}"] = kept["sharded"] / kept["replicated"]
        found[f"largest, {name}"] = largest["sharded"] / dense
        found[f"largest replicated, {name}"] = largest["replicated"] / dense
    return found


def ranks(rank: int, folder: Path, world: int) -> None:
    faulthandler.dump_traceback_later(600, exit=True)  # a rank that waits for another says where
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    found = check_exchange(rank, world)
    found |= check_runs(steps=30 if world == 2 else 18)
    found |= check_states(folder, rank)
    found |= check_other_values()
    found |= check_refusals(rank, world)
    found |= check_memory()
    torch.save(found, folder / f"found-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    folder, world = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    mp.start_processes(ranks, (folder, world), nprocs=world, start_method="fork")
