"""Run by test_shards.py in a process of its own, which forks the ranks: `python shards.py FOLDER WORLD [later]`.

Every check compares weights that are sharded over the ranks with a plain copy of them on the same rank; each rank
writes down what it found. `later` only goes on from what another number of ranks has saved.
"""

import faulthandler
import itertools
import os
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from lightning.pytorch import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from reliability.whole import whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_topkast import NonFiniteWeightError, Ramp, TopKast, TopKastError, Unstructured
from lightning_topkast.baselines import SET, RigL, Static
from lightning_topkast.costs import OptimizerState, Parallel, make_plan
from lightning_topkast.distributed import to_local
from lightning_topkast.settings import Settings
from tests.helpers import (
    MIDDLE,
    OPTIMIZERS,
    Batches,
    Net,
    SaveAfter,
    batches,
    make_callback,
    make_trainer,
    nouns,
    same,
)

OPTIONS = {"forward_sparsity": 0.75, "backward_sparsity": 0.5, "keep_first_dense": False, "keep_last_dense": False}
# uneven over 2 and 4 ranks in every dimension, fewer slices than ranks, and a convolution's
SHAPES = [(7, 5), (16, 12), (3, 9), (13, 2), (6, 5, 3, 3)]


class Bag(nn.Module):
    """Weights of several shapes, which the tests give gradients to."""

    def __init__(self, seed: int = 0, ties: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for i, shape in enumerate(SHAPES):
            layer = nn.Linear(1, 1) if len(shape) == 2 else nn.Conv2d(1, 1, 1)
            values = torch.randn(shape, generator=generator)
            layer.weight = nn.Parameter(values.round() if ties else values)
            layer.bias = None
            self.add_module(f"layer{i}", layer)


def shard(bag: Bag, mesh, placements_of) -> Bag:
    for layer in bag.children():
        placements = placements_of(layer.weight.dim())
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, placements))
    return bag


def gathered(topkast: TopKast) -> dict:
    """θ, sets and counts of every weight, whole."""
    return {
        name: (
            whole(weight.theta()).clone(), whole(weight.tiers).clone(), whole(weight.parameter.detach()).clone(),
            whole(weight.active).clone(), whole(weight.updated).clone(),
            int(weight.active_entries), int(weight.updated_entries), int(weight.never_active_entries), weight.promoted,
            weight.first_reservoir, weight.forward_density, weight.backward_density, weight.is_exploring,
        )
        for name, weight in topkast.weights.items()
    }  # fmt: skip


def train(bag: Bag, topkast: TopKast, optimizer, steps: int, first: int = 0) -> None:
    """Steps with gradients that depend on the step alone."""
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(1000 + step)
        for parameter in bag.parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            if isinstance(parameter, DTensor):
                gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
            parameter.grad = gradient
        optimizer.step()


def run(bag: Bag, steps: int, optimizer: str = "adamw", **options):
    topkast = TopKast(bag, **nouns(**(OPTIONS | {"update_every": 3, "strength": 0.1} | options)))
    made = OPTIMIZERS[optimizer](bag.parameters(), 0.05)
    topkast.attach(made)
    train(bag, topkast, made, steps)
    return topkast, made


def meshes(world: int):
    """Name → mesh and the placements of a weight with so many dimensions, in every way that ranks may share it."""
    line = init_device_mesh("cpu", (world,), mesh_dim_names=("all",))
    found = {f"Shard({dim})": (line, lambda dims, dim=dim: [Shard(min(dim, dims - 1))]) for dim in range(4)}
    found["Replicate"] = (line, lambda dims: [Replicate()])
    if world == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        for pair in itertools.product((Shard(0), Shard(1), Replicate()), repeat=2):
            found[f"{pair[0]}{pair[1]}"] = (square, lambda dims, pair=pair: list(pair))
    return found


def is_refused(bag: Bag, message: str, **options) -> bool:
    try:
        run(bag, 0, **options)
    except TopKastError as error:
        return message in str(error)
    return False


def check_placements(world: int) -> dict:
    found = {}
    cases = [{}, {"exploration": "random"}, {"stop_exploring_at": 5, "optimizer": "momentum"}, {"penalty": "l1"}]
    alone = {"backward_sparsity": 0.75, "stop_updating_at": 100, "strength": None}
    cases += [alone | {"rule": rule} for rule in (Static(), SET(0.4), RigL(0.6))]
    cases += [{"powerpropagation": 2.0}, {"ramp": Ramp(0.25, 0.0, begin=1, end=7)}]
    cases += [{"structure": "block", "block": [2, 3]}]
    cases += [{"structure": Unstructured(fan_in=(0.5, 1.5))}]
    plain = [gathered(run(Bag(ties=i == 0), 8, **case)[0]) for i, case in enumerate(cases)]
    for j, (name, (mesh, placements_of)) in enumerate(meshes(world).items()):
        for i, case in enumerate(cases):
            if world == 2 or i == 0 or (i + j) % 3 == 0:
                bag = shard(Bag(ties=i == 0), mesh, placements_of)
                if i == len(cases) - 1 and any(each.is_shard() and each.dim for each in placements_of(2)):
                    found[f"{name} {case}"] = is_refused(bag, "needs whole rows", **case)
                    continue
                found[f"{name} {case}"] = same(plain[i], gathered(run(bag, 8, **case)[0]))
    return found


def check_norm_penalty(mesh) -> float:
    plain, _ = run(Bag(), 8, penalty="norm")
    sharded, _ = run(shard(Bag(), mesh, lambda dims: [Shard(0)]), 8, penalty="norm")
    pairs = zip(gathered(plain).values(), gathered(sharded).values(), strict=True)
    differences = [float((one[0] - other[0]).abs().max()) for one, other in pairs]
    return max(*differences, abs(float(plain.penalty()) - float(sharded.penalty())))


class Experts(nn.Module):
    """Five experts: uneven over 2 and 4 ranks, of which the last has none."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 6, 4, generator=torch.Generator().manual_seed(0)).mul(3).round())


def check_experts(world: int, mesh, rank: int) -> dict:
    """Train whole experts on every rank as all of them on one; note what is refused."""
    found = {}
    alone = {"backward_sparsity": 0.75, "stop_updating_at": 100, "strength": None}
    cases = [
        {},
        {"exploration": "random"},
        {"structure": "block", "block": [2, 3]},
        {"structure": "2:4", "forward": 0.5},
        {"structure": Unstructured(fan_in=(0.5, 1.5))},
    ]
    cases += [alone | {"rule": rule} for rule in (Static(), SET(0.4), RigL(0.6))]
    for case in cases:
        options = {"forward_sparsity": case.pop("forward", 0.75)} | case
        plain = gathered(run(nn.Sequential(Experts()), 8, **options)[0])
        for placement in (Shard(0), Replicate()):
            bag = shard(nn.Sequential(Experts()), mesh, lambda dims, placement=placement: [placement])
            found[f"{placement} {case}"] = same(plain, gathered(run(bag, 8, **options)[0]))
    try:
        run(shard(nn.Sequential(Experts()), mesh, lambda dims: [Shard(1)]), 0)
    except TopKastError as error:
        found["refused"] = str(error)
    bag = shard(nn.Sequential(Experts()), mesh, lambda dims: [Shard(0)])
    topkast = TopKast(bag, **nouns(**OPTIONS))
    if rank == 0:  # in A, since what is written outside is zeroed
        bag[0].weight.detach().to_local()[to_local(topkast.weights["0.weight"].active)] = float("nan")
    try:
        topkast.refresh()
    except NonFiniteWeightError as error:
        found["nan on rank 0"] = str(error)
    return found


def check_refusals(mesh, rank: int) -> dict:
    found = {}
    for options in ({"storage": "packed"}, {"delay": 1}):
        try:
            TopKast(shard(Bag(), mesh, lambda dims: [Shard(0)]), **nouns(**OPTIONS, **options))
        except TopKastError as error:
            found[str(options)] = str(error)
    bag = shard(Bag(), mesh, lambda dims: [Shard(0)])
    topkast = TopKast(bag, **nouns(**OPTIONS))
    before = {name: weight.tiers.to_local().clone() for name, weight in topkast.weights.items()}
    values = bag.layer1.weight.detach().to_local()
    kept = values.clone()
    if rank == 0:  # in A, since what is written outside is zeroed
        values[to_local(topkast.weights["layer1.weight"].active)] = float("nan")
    try:
        topkast.refresh()
    except NonFiniteWeightError as error:
        found["nan on rank 0"] = str(error)
    values.copy_(kept)
    found["sets kept"] = all(same(weight.tiers.to_local(), before[name]) for name, weight in topkast.weights.items())
    damaged = topkast.state_dict()
    if rank == dist.get_world_size() - 1:
        damaged["weights"]["layer1.weight"]["tiers"].to_local().zero_()
    try:
        topkast.load_state_dict(damaged)
    except TopKastError as error:
        found["damaged on the last rank"] = str(error)
    for name, key in {"latent on rank 0": "latent", "sets on rank 0": "tiers"}.items():
        damaged = topkast.state_dict()
        if rank == 0:
            part = damaged["weights"]["layer1.weight"][key].to_local()
            part.fill_(float("nan") if key == "latent" else 3)
        try:
            topkast.load_state_dict(damaged)
        except TopKastError as error:
            found[name] = str(error)
    state = topkast.state_dict()
    if rank == 0:
        values[topkast.weights["layer1.weight"].tiers.to_local() == 0] = 1.0
    try:
        topkast.load_state_dict(state)
    except TopKastError as error:
        found["model on rank 0"] = str(error)
    topkast.accept_writes(closely=True)
    unlike = topkast.state_dict()
    if rank == 0:
        unlike["weights"]["layer1.weight"]["strength"] = float("nan")
    for name, state in (("unlike on rank 0", unlike), ("whole on rank 0 only", topkast.state_dict(gathered=True))):
        try:
            topkast.load_state_dict(state)
        except TopKastError as error:
            found[name] = str(error)
    return found


def check_write_on_one_rank(mesh, rank: int) -> dict:
    """Other code writes outside A on one rank alone: no other waits for it, and only what it wrote is lost."""
    topkast, _ = run(shard(Bag(), mesh, lambda dims: [Shard(0)]), 1)
    found, before = {}, {name: weight.theta() for name, weight in topkast.weights.items()}
    for name, act in {
        "look": topkast.warn_if_dense, "save": topkast.state_dict, "step": topkast.accept_writes,
    }.items():  # fmt: skip
        if rank == 0:
            for weight in topkast.weights.values():
                if name == "look":
                    with torch.no_grad():
                        weight.parameter.to_local().add_(1.0)
                else:  # which no counter of a DTensor shows
                    weight.parameter.detach().to_local().add_(1.0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            act()
            topkast.accept_writes(closely=True)
        found[name] = [str(each.message) for each in caught]
        found[f"sparse after {name}"] = all(not weight.stray_entries for weight in topkast.weights.values())
    rest = {name: to_local(weight.active) for name, weight in topkast.weights.items()}
    found["reservoir kept"] = all(
        same(to_local(weight.theta())[~rest[name]], to_local(before[name])[~rest[name]])
        for name, weight in topkast.weights.items()
    )
    return found


def check_replicas(world: int, rank: int) -> str:
    """Two copies of two shards, of which one drifts."""
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("copies", "shards"))
    bag = shard(Bag(), mesh, lambda dims: [Replicate(), Shard(0)])
    topkast = TopKast(bag, **nouns(**OPTIONS))
    if rank == world - 1:
        bag.layer1.weight.detach().to_local().copy_(bag.layer1.weight.detach().to_local().flip(0))
        bag.layer1.weight.detach().to_local().mul_(torch.rand(12, generator=torch.Generator().manual_seed(5)))
    try:
        topkast.refresh()
    except TopKastError as error:
        return str(error)
    return ""


def check_state(folder: Path, world: int, mesh) -> dict:
    """Saved in shards and whole, and loaded over other shards, in the middle of an interval."""
    found = {}
    bag = shard(Bag(), mesh, lambda dims: [Shard(0)])
    topkast, optimizer = run(bag, 4)
    state = {"model": bag.state_dict(), "topkast": topkast.state_dict()}
    dcp.save(state, checkpoint_id=folder / f"of-{world}")
    complete = {
        "model": {name: whole(value) for name, value in bag.state_dict().items()},
        "topkast": topkast.state_dict(gathered=True),
        "optimizer": optimizer.state_dict(),
    }
    if dist.get_rank() == 0:
        torch.save(complete["model"], folder / f"model-of-{world}.pt")
        torch.save(complete["topkast"], folder / f"whole-of-{world}.pt")
    else:
        found["gathered on other ranks"] = all(
            weight["tiers"].numel() == 0 for weight in complete["topkast"]["weights"].values()
        )
    dist.barrier()
    for name, placements_of in (("same", lambda dims: [Shard(0)]), ("other", lambda dims: [Shard(1)])):
        again = shard(Bag(seed=9), mesh, placements_of)
        resumed = TopKast(again, **nouns(update_every=3, strength=0.1, **OPTIONS))
        new = {"model": again.state_dict(), "topkast": resumed.state_dict()}
        dcp.load(new, checkpoint_id=folder / f"of-{world}")
        again.load_state_dict(new["model"])
        resumed.load_state_dict(new["topkast"])
        found[f"shards, {name}"] = same(gathered(topkast), gathered(resumed))

        again = shard(Bag(seed=9), mesh, placements_of)
        resumed = TopKast(again, **nouns(update_every=3, strength=0.1, **OPTIONS))
        model = torch.load(folder / f"model-of-{world}.pt", weights_only=True)
        for key, parameter in again.named_parameters():
            parameter.detach().copy_(distribute_tensor(model[key], parameter.device_mesh, parameter.placements))
        resumed.load_state_dict(torch.load(folder / f"whole-of-{world}.pt", weights_only=True))
        found[f"whole, {name}"] = same(gathered(topkast), gathered(resumed))
        found[f"steps, {name}"] = resumed.step_count == 4
    return found


def make_mlp(width: int = 21) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 10), nn.Tanh(), nn.Linear(10, 3))


def fit_mlp(model, mesh=None, steps: int = 9):
    """Train on random data, of which the ranks along `mesh` see a share each."""
    with torch.no_grad():
        model(torch.zeros(8, 6))  # a forward pass alone, after which FSDP2 leaves the root's weights gathered
    topkast = TopKast(model, **nouns(update_every=3, strength=1e-2, **(OPTIONS | {"backward_sparsity": 0.6})))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    topkast.attach(optimizer)
    generator = torch.Generator().manual_seed(1)
    share, count = (mesh.get_local_rank(), mesh.size()) if mesh is not None else (0, 1)
    for step in range(steps):
        x, y = torch.randn(8, 6, generator=generator), torch.randn(8, 3, generator=generator)
        x, y = x.chunk(count)[share], y.chunk(count)[share]
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        if step % 4 == 0:
            with torch.no_grad():
                model(x)
    return topkast


def check_no_stale_copy(model, topkast: TopKast) -> list[float]:
    """How far outputs are from those of the shards after a refresh and a release that follow a forward pass."""
    x, differences = torch.ones(8, 6), []
    for change in (topkast.refresh, topkast.release):
        with torch.no_grad():
            for parameter in model.parameters():  # so that the refresh has something to change
                parameter.detach().mul_(torch.full((), -1.5))
            model.reshard()
            model(x)
            change()
            at_once = model(x)
            model.reshard()
            differences.append(float((at_once - model(x)).abs().max()))
    return differences


def check_fsdp(world: int) -> dict:
    """FSDP2 alone, per layer and as a whole; over tensor parallelism; two copies of shards."""
    line = init_device_mesh("cpu", (world,), mesh_dim_names=("data",))
    models = {}
    for name in ("layers", "root"):
        model = make_mlp()
        for layer in model if name == "layers" else ():
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=line)
        models[name] = fully_shard(model, mesh=line), line
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    even = 20  # tensor parallelism wants it so
    if world == 2:
        models["tensor parallel"] = parallelize_module(make_mlp(even), line, plan), None
    else:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        model = parallelize_module(make_mlp(even), square["tensor"], plan)
        models["fsdp over tensor parallel"] = fully_shard(model, mesh=square["data"]), square["data"]
        models["two copies"] = fully_shard(make_mlp(), mesh=square), line
    found = {}
    for name, (model, mesh) in models.items():
        plain = fit_mlp(make_mlp(even if "tensor" in name else 21))
        sharded = fit_mlp(model, mesh)
        one, other = gathered(plain), gathered(sharded)
        close = all(torch.allclose(one[key][0], other[key][0], rtol=1e-3, atol=1e-5) for key in one)
        alike = all(same(one[key][1], other[key][1]) for key in one)
        dtensors = sum(isinstance(weight.parameter, DTensor) for weight in sharded.weights.values())
        found[name] = {"θ": close, "sets": alike, "sharded": dtensors, "promoted": any(v[8] for v in other.values())}
        if name == "root":
            found["stale"] = check_no_stale_copy(model, sharded)
    return found


def check_bytes(world: int, mesh) -> dict:
    """What a plan says of each kind of memory, and what this rank has of it."""

    def build():
        return nn.Sequential(nn.Linear(64, 95), nn.Tanh(), nn.Linear(95, 64))

    with torch.device("meta"):
        planned = make_plan(
            build(), [torch.zeros(1, 64)], Settings(**nouns(**OPTIONS)), OptimizerState(torch.optim.Adam),
            Parallel(world, "fsdp2"),
        ).bytes  # fmt: skip
    torch.manual_seed(0)
    model = fully_shard(build(), mesh=mesh)
    topkast = TopKast(model, **nouns(**OPTIONS))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    topkast.attach(optimizer)
    model(torch.randn(4, 64)).square().sum().backward()
    optimizer.step()
    weights, parameters = topkast.weights.values(), list(model.parameters())
    state = [to_local(value).nbytes for entry in optimizer.state.values() for value in entry.values()]
    return {
        "weights": (planned.weights, sum(to_local(parameter).nbytes for parameter in parameters)),
        "gradients": (planned.gradients, sum(to_local(parameter.grad).nbytes for parameter in parameters)),
        "optimizer": (planned.optimizer, sum(state)),
        "masks": (planned.masks, sum(weight._mask.nbytes + weight._never_active.nbytes for weight in weights)),
        "latent": (planned.latent, sum(weight._latent.nbytes for weight in weights)),
        "indices": (planned.indices, sum(weight._exploring.nbytes + weight._explored.nbytes for weight in weights)),
    }


class ShardedNet(Net):
    """The small net, its weights sharded over all ranks."""

    def configure_model(self):
        if not isinstance(self.layers, FSDPModule):
            fully_shard(self.layers[2], mesh=self.device_mesh["data_parallel"])
            fully_shard(self.layers, mesh=self.device_mesh["data_parallel"])


class SaveAtStart(Callback):
    """Saves before any step, when the optimizer has no state yet."""

    def __init__(self, path) -> None:
        self.path = path

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 0:
            trainer.save_checkpoint(self.path)


class Share(Batches):
    """A rank's rows of every batch."""

    def __iter__(self):
        rank, world = dist.get_rank(), dist.get_world_size()
        return iter([(x.chunk(world)[rank], y.chunk(world)[rank]) for x, y in list.__iter__(self)])


def fit_with_lightning(folder: Path, *others, ckpt_path=None, seed=0, distributed=True, apart=False):
    world = dist.get_world_size()
    sizes = (1, world) if apart else (world, 1)
    callback = make_callback(strength=1e-2)
    torch.manual_seed(seed)
    model = ShardedNet(optimizer="adamw", lr=0.02)
    trainer = make_trainer(
        folder, callback, *others, max_epochs=4, gradient_clip_val=0.05, num_sanity_val_steps=1,
        use_distributed_sampler=False, devices=world,
        strategy=ModelParallelStrategy(*sizes, save_distributed_checkpoint=distributed),
    )  # fmt: skip
    trainer.fit(model, Share(batches()), Share(batches(2, seed=2)), ckpt_path=ckpt_path)
    logged = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("topkast")}
    return gathered(callback.topkast), callback.topkast.step_count, logged


def check_lightning(folder: Path, world: int) -> dict:
    found = {}
    try:
        fit_with_lightning(folder, apart=True)
    except TopKastError as error:
        found["each on its own"] = str(error)
    half, one_file = folder / f"half-{world}.ckpt", folder / f"file-{world}.ckpt"
    state, found["steps"], found["logged"] = fit_with_lightning(folder, SaveAfter(half, epoch=1))
    again, _, _ = fit_with_lightning(folder, SaveAfter(one_file, epoch=1), distributed=False)
    found["saved otherwise"] = same(state, again)
    # torch counts a step of Adam's there, so that the run differs
    _, found["steps after saving at the start"], _ = fit_with_lightning(folder, SaveAtStart(folder / f"start-{world}"))
    for name, path in (("shards", half), ("one file", one_file)):
        resumed, steps, _ = fit_with_lightning(folder, ckpt_path=path, seed=7)
        found[f"resumed from {name}"] = same(state, resumed) and steps == found["steps"]
    meta = torch.load(half / "meta.pt", weights_only=True)
    found["no tensor in the small file"] = "torch.Tensor" not in str(
        {type(v) for w in next(iter(meta["callbacks"].values()))["weights"].values() for v in w.values()}
    )
    torch.save({"state": state, "model": {MIDDLE: state[MIDDLE][2]}}, folder / f"state-{world}.pt")
    return found


def check_other_ranks(folder: Path, other: int) -> bool:
    """Go on from what `other` ranks have saved half-way: the run ends as theirs did, but for the order of sums."""
    theirs = torch.load(folder / f"state-{other}.pt", weights_only=True)["state"][MIDDLE]
    resumed, _, _ = fit_with_lightning(folder, ckpt_path=folder / f"half-{other}.ckpt", seed=7)
    close = torch.allclose(theirs[0], resumed[MIDDLE][0], rtol=1e-3, atol=1e-5)
    return close and same(theirs[1], resumed[MIDDLE][1])


def as_torchrun_does(rank: int, world: int) -> None:
    """Tell Lightning that the processes are there already."""
    os.environ |= {"TORCHELASTIC_RUN_ID": "tests", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "GROUP_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # of the group, which exists already


def ranks(rank: int, folder: Path, world: int, later: bool) -> None:
    faulthandler.dump_traceback_later(1500, exit=True)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    store = f"file://{folder}/rendezvous-{world}-{later}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=300))
    as_torchrun_does(rank, world)
    mesh = init_device_mesh("cpu", (world,))
    if later:
        found = {"other ranks": check_other_ranks(folder, other=4)}
    else:
        found = {
            "placements": check_placements(world),
            "norm": check_norm_penalty(mesh),
            "refusals": check_refusals(mesh, rank),
            "writes": check_write_on_one_rank(mesh, rank),
            "experts": check_experts(world, mesh, rank),
            "state": check_state(folder, world, mesh),
            "fsdp": check_fsdp(world),
            "lightning": check_lightning(folder, world),
            "bytes": check_bytes(world, mesh),
        }
    if world == 4:
        found["replicas"] = check_replicas(world, rank)
        found["other ranks"] = check_other_ranks(folder, other=2)
    torch.save(found, folder / f"found-{world}-{rank}{'-later' if later else ''}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    arguments = (Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:] == ["later"])
    mp.start_processes(ranks, arguments, nprocs=arguments[1], start_method="fork")
