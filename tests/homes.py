"""Run by test_homes.py in a process of its own, which forks the ranks: `python homes.py FOLDER WORLD...`.

Every check compares packed weights whose θ is shared by the host memory of the ranks with a copy on the same rank that
shares nothing; each rank writes down what it found. `--steps 200` only trains, so long, with a refresh every 10 steps,
and prints how many of the runs ended alike.
"""

import argparse
import copy
import faulthandler
import os
import pickle
import tracemalloc
import warnings
from collections import Counter
from datetime import timedelta
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from reliability.nouns import nouns
from reliability.whole import whole
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lightning_topkast import Block, NonFiniteWeightError, TopKast, TopKastCallback, TopKastError, Unstructured
from lightning_topkast.baselines import SET, Static
from lightning_topkast.costs import OptimizerState, Parallel, make_plan
from lightning_topkast.distributed import RowSharding, Shares, exchange, host_group, to_local
from lightning_topkast.engine import materialize
from lightning_topkast.layers import packed_weights
from lightning_topkast.method import selection
from lightning_topkast.settings import Settings
from lightning_topkast.telemetry.media import split_histogram
from lightning_topkast.training.sharded_checkpoint import consolidate
from tests.helpers import OPTIMIZERS, Batches, SaveAfter, make_trainer, same

OPTIONS = {
    "forward_sparsity": 0.75, "backward_sparsity": 0.5, "keep_first_dense": False, "keep_last_dense": False,
    "update_every": 3, "strength": 0.1, "storage": "packed", "kernels": "torch",
}  # fmt: skip
TIMEOUT = timedelta(seconds=1000)
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
    "random, blocks": {"exploration": "random", "structure": "block", "block": (4, 4)},
    "blocks": {"structure": "block", "block": (4, 4)},
    "blocks, delayed": {"structure": "block", "block": (4, 4), "delay": 2},
    "delayed": {"delay": 2},
    "delayed, random": {"delay": 1, "exploration": "random"},
    "2:4": {"structure": "2:4", "forward_sparsity": 0.5, "backward_sparsity": 0.25},
    "fan-in": {"structure": Unstructured(fan_in=(0.5, 1.5))},
    "fan-in, delayed, ties": {"structure": Unstructured(fan_in=(1, 1)), "delay": 1, "ties": True},
    "fan-in, blocks": {"structure": Block(4, 4, fan_in=(0, 1.5)), "block": (4, 4)},
    "SET": {"rule": SET(0.3), "backward_sparsity": 0.75, "strength": None, "stop_updating_at": 100},
    "static": {"rule": Static(), "backward_sparsity": 0.75, "strength": None},
    "norm": {"penalty": "norm"},
    "stop": {"stop_exploring_at": 10},
    "power": {"powerpropagation": 2.0},
    "erk": {"distribution": "erk"},
    "compact": {"storage": "compact", "kernels": None},
}
# for long
LONG = {
    f"{optimizer}, {sets}, {choice}": {"optimizer": optimizer, "update_every": 10} | structure | options
    for optimizer in ("momentum", "adam", "fused")
    for sets, structure in {"entries": {}, "blocks": {"structure": "block", "block": (4, 4)}}.items()
    for choice, options in {
        "l2": {}, "l1": {"penalty": "l1"}, "no penalty": {"strength": 0.0}, "random": {"exploration": "random"},
    }.items()
}  # fmt: skip


KINDS = ["sharded", "slices", "copies"]


class Bag(nn.Module):
    """Weights of several shapes, which the tests give gradients to."""

    def __init__(self, shapes, seed: int = 0, ties: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for i, shape in enumerate(shapes):
            layer = nn.Linear(1, 1) if len(shape) < 3 else nn.Conv2d(shape[1], shape[0], shape[2])
            values = torch.randn(shape, generator=generator)
            layer.weight = nn.Parameter(values.round() if ties else values)
            layer.bias = None
            self.add_module(f"layer{i}", layer)


def gradients(topkast: TopKast, step: int) -> None:
    """Give every weight a gradient that depends on the step alone."""
    generator = torch.Generator().manual_seed(1000 + step)
    for weight in topkast.weights.values():
        dense, parameter = torch.randn(weight.shape, generator=generator).view(-1), weight.parameter
        values = dense[weight.layout.indices().long()]
        gradient = torch.zeros(parameter.shape)
        gradient[: values.numel()] = values
        if isinstance(parameter, DTensor):
            gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
        parameter.grad = gradient


def train(topkast: TopKast, optimizer, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        gradients(topkast, step)
        optimizer.step()


def mesh_of(kind: str):
    """Of all ranks in a line, or of two copies."""
    world = dist.get_world_size()
    return init_device_mesh(
        "cpu", (2, world // 2) if kind == "copies" else (world,), mesh_dim_names=("a", "b")[: 1 + (kind == "copies")]
    )


def run(kind: str, steps: int, optimizer: str = "adamw", ties: bool = False, seed: int = 0, shapes=None, **options):
    """Train; θ is "replicated", "sharded", or the values are too: in "slices", or in two "copies" of slices."""
    shapes = shapes or (BLOCKS if "block" in options else SHAPES)
    options = {key: value for key, value in (OPTIONS | options).items() if value is not None}
    theta = "replicated" if kind == "replicated" else "sharded"
    topkast = TopKast(Bag(shapes, seed, ties), **nouns(theta=theta, **options))
    if kind in ("slices", "copies"):
        fully_shard(topkast.model, mesh=mesh_of(kind))
    fused = {"fused": lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr, fused=True)}
    made = (OPTIMIZERS | fused)[optimizer](topkast.model.parameters(), 0.05)
    topkast.attach(made)
    train(topkast, made, steps)
    return topkast, made


def everything(topkast: TopKast, optimizer) -> dict:
    """What both runs must have alike, whole; a collective."""
    weights = {
        name: (
            whole(weight.theta()), whole(weight.tiers), whole(weight.alpha()), whole(weight.parameter.detach()),
            weight.promoted,
            int(weight.active_entries), int(weight.updated_entries), int(weight.never_active_entries),
            weight.first_reservoir, weight.is_exploring,
        )
        for name, weight in topkast.weights.items()
    }  # fmt: skip
    state = whole(topkast.state_dict(gathered=False))
    return copy.deepcopy({"weights": weights, "optimizer": whole(optimizer.state_dict()), "state": state})


def shares_theta(topkast: TopKast) -> bool:
    return all(weight.sharding.is_sharded for weight in topkast.weights.values() if len(weight.shape) > 1)


def check_runs(steps: int) -> dict:
    found = {}
    for name, options in RUNS.items():
        expected = everything(*run("replicated", steps, **options))
        for kind in kinds_of(name, dist.get_world_size()):
            topkast, optimizer = run(kind, steps, **options)
            got = everything(topkast, optimizer)
            # of slices a norm is summed in another order, and a fused optimizer rounds their ends otherwise
            alike = close if name in ("norm", "fused") else same
            found[f"{name}, {kind}"] = alike(got, expected)
            found[f"{name}, {kind}, shared"] = shares_theta(topkast)
            sliced = [isinstance(weight.parameter, DTensor) for weight in topkast.weights.values()]
            found[f"{name}, {kind}, sliced"] = all(sliced) if kind in KINDS[1:] else not any(sliced)
            shown = [each for w in topkast.weights.values() for each in (w.theta(), w.alpha(), w.tiers)]
            dtensors = [isinstance(each, DTensor) for each in shown]
            found[f"{name}, {kind}, shown"] = all(dtensors) if kind in KINDS[1:] else not any(dtensors)
    return found


def kinds_of(name: str, world: int) -> list[str]:
    """The kinds of sharing for a run: small collectives of four ranks take long on few cores."""
    if world == 2:
        return KINDS[:2]
    return KINDS if name in ("adamw", "blocks", "delayed", "norm") else KINDS[1:2]


def close(one, other) -> bool:
    """Whether sets, counts and structure are the same, and numbers nearly."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(close(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(close, one, other))
    if isinstance(one, torch.Tensor) and one.is_floating_point():
        return torch.allclose(one, other, rtol=1e-4, atol=1e-6)
    return same(one, other)


FSDP2 = {
    "plain": {},
    "blocks": {"structure": "block", "block": (4, 4)},
    "compiled": {"kernels": "auto"},
    "compact": {"storage": "compact", "kernels": None},
    "delayed": {"delay": 1},
    "power": {"powerpropagation": 2.0},
    "accumulated": {"accumulate": 2},
    "clipped": {"clip": 0.05},
    "checkpointed": {"checkpointed": True},
    "kept gathered": {"reshard_after_forward": False},
    "copies": {"kind": "copies"},
    "bf16": {"bf16": True},
    "born on meta": {"device": "meta"},
}


class Net(nn.Module):
    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16)) for _ in range(2))
        self.head = nn.Linear(16, 4)
        self.checkpointed = checkpointed

    def forward(self, x):
        for block in self.blocks:
            x = x + (checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x))
        return self.head(x)


def fit(
    alone: bool, accumulate=1, clip=None, checkpointed=False, kind="slices", bf16=False, steps=13, device="cpu",
    **options,
):  # fmt: skip
    """Train a network on its ranks' shares of batches, or alone on all of them."""
    more = {"reshard_after_forward": options.pop("reshard_after_forward", True)}
    if bf16:
        more["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    settings = {
        key: value for key, value in (OPTIONS | {"keep_last_dense": True} | options).items() if value is not None
    }
    with torch.device("cpu" if alone else device):
        model = Net(checkpointed)
    torch.manual_seed(0)  # from which the network's weights are drawn
    topkast = TopKast(model, **nouns(theta="replicated" if alone else "sharded", **settings))
    if not alone:
        for module in (*model.blocks, model):
            fully_shard(module, mesh=mesh_of(kind), **more)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    with torch.no_grad():
        model(torch.zeros(2, 16))  # after which FSDP2 leaves the root's weights gathered
    topkast.attach(optimizer)
    generator, rank, world = torch.Generator().manual_seed(1), dist.get_rank(), dist.get_world_size()
    norms = []
    for _ in range(steps):
        for turn in range(accumulate):
            x, y = (torch.randn(8, size, generator=generator) for size in (16, 4))
            if not alone:
                x, y = x.chunk(world)[rank], y.chunk(world)[rank]
                model.set_requires_gradient_sync(turn == accumulate - 1)
            nn.functional.mse_loss(model(x).float(), y).backward()
        if clip is not None:
            topkast.mask_gradients()
            norms.append(float(whole(nn.utils.clip_grad_norm_(model.parameters(), clip))))
        optimizer.step()
        optimizer.zero_grad()
    return topkast, optimizer, norms


def check_fsdp2() -> dict:
    """Forward and backward passes under FSDP2, beside one process on all data."""
    found = {}
    for name, options in FSDP2.items():
        if options.get("kind") == "copies" and dist.get_world_size() < 4:
            continue
        topkast, _, norms = fit(False, **options)
        alone, _, expected = fit(True, **{key: value for key, value in options.items() if key != "kind"})
        weights = [(topkast.weights[key], weight) for key, weight in alone.weights.items()]
        tolerance = {"rtol": 0.1, "atol": 0.1} if name == "bf16" else {"rtol": 1e-3, "atol": 1e-5}
        tiers = [(whole(one.tiers), other.tiers) for one, other in weights]
        if name == "bf16":  # in which the products differ
            overlap = [float(((one == 2) & (other == 2)).sum() / (other == 2).sum()) for one, other in tiers]
            found[f"fsdp2, {name}: sets"] = min(overlap) > 0.9
        else:
            found[f"fsdp2, {name}: sets"] = all(same(*pair) for pair in tiers)
        close_thetas = [torch.allclose(whole(one.theta()), other.theta(), **tolerance) for one, other in weights]
        found[f"fsdp2, {name}: θ"] = all(close_thetas)
        found[f"fsdp2, {name}: sliced"] = all(isinstance(one.parameter, DTensor) for one, _ in weights)
        found[f"fsdp2, {name}: norms"] = all(abs(a - b) < 1e-3 * b for a, b in zip(norms, expected, strict=True))
        # what other code sees is zero outside A
        alpha = {key: whole(value) for key, value in topkast.model.state_dict().items()}
        active = {key: whole(weight.active) for key, weight in topkast.weights.items()}
        found[f"fsdp2, {name}: α"] = all(same(alpha[key] != 0, members) for key, members in active.items())
        found[f"fsdp2, {name}: penalty"] = close(topkast.penalty(), alone.penalty()) or name == "bf16"
    return found


class Truncated(nn.Linear):
    def reset_parameters(self):
        nn.init.trunc_normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)


class Orthogonal(nn.Linear):
    """What it does cannot be done row by row."""

    def reset_parameters(self):
        nn.init.orthogonal_(self.weight)
        nn.init.normal_(self.bias)


class Scaled(nn.Linear):
    """Computes with its weight."""

    def reset_parameters(self):
        nn.init.normal_(self.weight)
        with torch.no_grad():
            self.weight.div_(self.weight.abs().max())
        nn.init.ones_(self.bias)


class OneRow(nn.Linear):
    """Writes to a view of its weight."""

    def reset_parameters(self):
        nn.init.normal_(self.weight)
        with torch.no_grad():
            self.weight[3].fill_(7.0)
        nn.init.ones_(self.bias)


class Convolution(nn.Conv2d):
    def reset_parameters(self):
        nn.init.normal_(self.weight)
        nn.init.zeros_(self.bias)


class Seeded(nn.Linear):
    """Draws with a generator of its own, before and while it does what cannot be done by rows."""

    generator = torch.Generator()

    def reset_parameters(self):
        nn.init.uniform_(self.bias, generator=self.generator)
        nn.init.orthogonal_(self.weight, generator=self.generator)


class Assigned(nn.Linear):
    """Gives its weight other memory."""

    def reset_parameters(self):
        self.weight.data = torch.randn(self.weight.shape)
        nn.init.zeros_(self.bias)


class Caught(nn.Linear):
    """Goes on after an error."""

    def reset_parameters(self):
        nn.init.zeros_(self.bias)
        try:
            nn.init.orthogonal_(self.weight)
        except Exception:
            nn.init.ones_(self.weight)


class Parent(nn.Module):
    """Draws the weights of its child, too."""

    def __init__(self, draw) -> None:
        super().__init__()
        self.scale, self.child, self.draw = nn.Parameter(torch.empty(3)), nn.Linear(22, 20), draw

    def reset_parameters(self):
        nn.init.normal_(self.scale)
        self.draw(self.child.weight)


class Head(nn.Linear):
    """Changes a row of a weight that another module has drawn."""

    def reset_parameters(self):
        nn.init.normal_(self.bias)
        with torch.no_grad():
            self.weight[0].fill_(2.0)


def check_birth() -> dict:
    """A network on the meta device is drawn as in one process, by rows, so that none has a dense weight."""
    materialize._CHUNK = 64
    found = {}
    for name, options in {"entries": {}, "blocks": {"structure": "block", "block": (2, 2)}}.items():
        options = OPTIONS | {"include": ["*.weight", "*.in_proj_weight"]} | options

        def build(theta, options=options):
            with torch.device("meta"):
                model = nn.Sequential(
                    nn.Linear(50, 42), nn.Conv2d(4, 18, 3), Truncated(38, 26), Orthogonal(12, 18), OneRow(20, 34),
                    nn.Embedding(30, 34), nn.MultiheadAttention(16, 2), nn.Linear(6, 8), nn.Linear(30, 30),
                    nn.Linear(30, 30), nn.LayerNorm(4), Seeded(12, 18), Assigned(20, 34), Caught(12, 18),
                    Parent(nn.init.normal_), Parent(nn.init.orthogonal_), nn.Linear(30, 34), Head(30, 34),
                    Convolution(4, 18, 4).to(memory_format=torch.channels_last), Scaled(22, 16),
                )  # fmt: skip
                model[8].weight, model[17].weight = model[9].weight, model[16].weight
            torch.manual_seed(3)
            Seeded.generator.manual_seed(4)
            topkast = TopKast(model, **nouns(theta=theta, **options))
            values = [whole(each) for w in topkast.weights.values() for each in (w.theta(), w.alpha(), w.tiers)]
            return values, [p.detach() for p in model.parameters()], torch.rand(2), shares_theta(topkast)

        expected, got = build("replicated"), build("sharded")
        found[f"born, {name}"] = same(got[:-1], expected[:-1]) and not any(each.is_meta for each in got[1])
        found[f"born, {name}: shared"] = got[-1]
    materialize._CHUNK = 1 << 14
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(1024, 768, bias=False), nn.Linear(768, 1024, bias=False))
    with Largest() as mode:
        TopKast(model, **nouns(**(OPTIONS | {"forward_sparsity": 0.95, "backward_sparsity": 0.9})))
    found["born: largest"] = mode.bytes / (4 * 1024 * 768)
    return found


PLANNED = {
    f"{strategy}{name}": options
    for strategy in ("ddp", "fsdp2")
    for name, options in {
        "": {},
        ", blocks": {"structure": "block", "block": (8, 8)},
        ", stopped": {"stop_exploring_at": 0},
        ", experts": {"include": ["weight"]},  # with an uneven number of them
    }.items()
}


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 320, 64))

    def forward(self, x):
        return torch.bmm(x.expand(3, -1, -1), self.weight)


class Sharded(LightningModule):
    """The network with its layers built at first, and sharded where Lightning wants it."""

    def __init__(self, shards: bool) -> None:
        super().__init__()
        self.net, self.shards = Net(False), shards

    def configure_model(self):
        if self.shards and not isinstance(self.net, FSDPModule):
            for module in (*self.net.blocks, self.net):
                fully_shard(module, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.02)


def fit_with_lightning(
    folder: Path, world: int, *others, kind="fsdp2", ckpt_path=None, logger=False, module=None, **options
):
    settings = {key: value for key, value in (OPTIONS | options).items() if value is not None}
    callback = TopKastCallback(**nouns(**settings))
    trainer = make_trainer(
        folder, callback, *others, max_epochs=4, logger=logger, num_sanity_val_steps=1,
        use_distributed_sampler=False, devices=world,
        strategy=ModelParallelStrategy(world, 1, save_distributed_checkpoint=True)
        if kind == "fsdp2"
        else DDPStrategy(),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    data = [(torch.randn(8, 16, generator=generator), torch.randn(8, 4, generator=generator)) for _ in range(4)]
    rank = dist.get_rank()
    share = Batches((x.chunk(world)[rank], y.chunk(world)[rank]) for x, y in data)
    trainer.fit(module or Sharded(kind == "fsdp2"), share, share, ckpt_path=ckpt_path)
    topkast = callback.topkast
    assert topkast is not None
    logged = {key: value.float() for key, value in trainer.callback_metrics.items() if key.startswith("topkast")}
    return everything(topkast, trainer.optimizers[0]), logged


def check_plan(world: int) -> dict:
    """What the plan says of each kind of memory, and what the rank with the largest part has of it."""
    found = {}
    for kind, options in PLANNED.items():
        settings = OPTIONS | {"forward_sparsity": 0.9, "backward_sparsity": 0.8} | options

        def build(kind=kind):
            if "experts" in kind:
                return Experts()
            return nn.Sequential(nn.Linear(320, 384, bias=False), nn.Tanh(), nn.Linear(384, 320, bias=False))

        strategy = kind.split(",")[0]
        with torch.device("meta"):
            planned = make_plan(
                build(), [torch.zeros(1, 320)], Settings(**nouns(**settings)), OptimizerState(torch.optim.Adam),
                Parallel(world, strategy, buckets=False),
            ).bytes  # fmt: skip
        torch.manual_seed(0)
        model = build()
        topkast = TopKast(model, **nouns(**settings))
        if strategy == "fsdp2":
            fully_shard(model, mesh=mesh_of("slices"))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        topkast.attach(optimizer)
        gradients(topkast, 0)
        optimizer.step()
        gradients(topkast, 1)
        weights = list(topkast.weights.values())
        state = [to_local(value).nbytes for entry in optimizer.state.values() for value in entry.values()]
        host = [
            tensor.nbytes
            for weight in weights
            for tensor in (weight._theta, weight._tiers, weight._never_active, weight._scores, weight.layout.units)
            if tensor is not None
        ]
        own = torch.tensor([
            sum(to_local(weight.parameter).nbytes for weight in weights),
            sum(to_local(weight.parameter.grad).nbytes for weight in weights),
            sum(state), sum(weight.layout.nbytes for weight in weights), sum(host),
        ])  # fmt: skip
        with SentBytes(min(weight.structure.grid(weight.shape).numel() for weight in weights)) as sent:
            topkast.refresh()
        own = torch.cat([own, torch.tensor([sent.count])])
        dist.all_reduce(own, op=dist.ReduceOp.MAX)
        expected = [
            planned.weights, planned.gradients, planned.optimizer, planned.indices, planned.host, planned.refresh
        ]  # fmt: skip
        found[f"plan, {kind}"] = list(zip(expected, own.tolist(), strict=True))
    return found


class SentBytes:
    """Counts what this rank sends to others by collectives on tensors; by an all-reduce of few entries: nothing.

    Args:
        least: number of entries of an all-reduce that counts.
    """

    def __init__(self, least: int) -> None:
        self.count, self._least = 0, least

    def __enter__(self) -> "SentBytes":
        self._before = dist.all_to_all_single, dist.all_reduce
        dist.all_to_all_single, dist.all_reduce = self._to_all, self._reduce
        return self

    def __exit__(self, *exception) -> None:
        dist.all_to_all_single, dist.all_reduce = self._before

    def _to_all(self, output, given, into, out, **options) -> None:
        self.count += given.element_size() * (sum(out) - out[dist.get_rank()])
        self._before[0](output, given, into, out, **options)

    def _reduce(self, tensor, *arguments, **options) -> None:
        if tensor.numel() >= self._least:
            self.count += 2 * tensor.nbytes * (dist.get_world_size() - 1) // dist.get_world_size()
        self._before[1](tensor, *arguments, **options)


def check_lightning(folder: Path, world: int, rank: int) -> dict:
    """With Trainers: checkpoints in shards are resumed bit for bit, and once consolidated by masked runs and DDP."""
    os.environ |= {"TORCHELASTIC_RUN_ID": "tests", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    found = {}
    for name, options in {
        "entries": {},
        "blocks": {"structure": "block", "block": (4, 4)},
        "delayed": {"delay": 2, "update_every": 4},
    }.items():
        half, file = folder / f"half-{name}.ckpt", folder / f"half-{name}-file.ckpt"
        logger = TensorBoardLogger(folder) if name == "blocks" else False  # whose pictures every rank takes part in
        whole_run, logged = fit_with_lightning(folder, world, SaveAfter(half, epoch=1), logger=logger, **options)
        resumed, _ = fit_with_lightning(folder, world, ckpt_path=half, **options)
        found[f"lightning, {name}: resumed"] = same(resumed, whole_run)
        logger = TensorBoardLogger(folder / "ddp") if name == "blocks" else False
        ddp, logged_by_ddp = fit_with_lightning(folder, world, kind="ddp", logger=logger, **options)
        if logger and rank == 0:
            images = EventAccumulator(logger.log_dir).Reload().Tags()["images"]
            found[f"lightning, {name}: masks are drawn"] = any("topkast/masks" in image for image in images)
        found[f"lightning, {name}: as DDP"] = close(whole_run["weights"], ddp["weights"])
        found[f"lightning, {name}: logged"] = close(logged, logged_by_ddp)
        if rank == 0:
            consolidate(half, file)
        dist.barrier()
        trained = Sharded(True)
        fit_with_lightning(folder, world, module=trained, **options)
        refused = [
            refusal(partial(fit_with_lightning, folder, world, ckpt_path=file, module=module, **options))
            for module in (None, trained)  # which is packed already
        ]
        found[f"lightning, {name}: file"] = all("resume it with strategy='ddp'" in each for each in refused)
        later, _ = fit_with_lightning(folder, world, kind="ddp", ckpt_path=file, **options)
        found[f"lightning, {name}: consolidated, DDP"] = close(later["weights"], ddp["weights"])
        if name == "entries":
            masked = options | {"storage": "masked", "kernels": None}
            later, _ = fit_with_lightning(folder, world, kind="ddp", ckpt_path=file, **masked)
            alike = [close(later["weights"][key][:2], ddp["weights"][key][:2]) for key in ddp["weights"]]
            found[f"lightning, {name}: consolidated, masked"] = all(alike)
    return found


def check_load_after_forward() -> dict:
    """Weights are loaded where FSDP2 has left the values gathered, since no backward pass followed."""
    model = nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 8))
    topkast = TopKast(model, **nouns(**OPTIONS))
    for module in (model[0], model[2], model):
        fully_shard(module, mesh=mesh_of("slices"), reshard_after_forward=False)
    other = {key: whole(value) + 1.0 * (whole(value) != 0) for key, value in model.state_dict().items()}
    with torch.no_grad():
        model(torch.zeros(2, 16))
    mesh = mesh_of("slices")
    loaded = {key: distribute_tensor(value, mesh, [Shard(0)]) for key, value in other.items()}
    model.load_state_dict(loaded)
    got = {key: whole(value) for key, value in model.state_dict().items()}
    followed = [isinstance(weight.parameter, DTensor) for weight in topkast.weights.values()]
    return {"loaded after a forward pass": same(got, other) and all(followed)}


def check_distributed_checkpoints(folder: Path, world: int, others=()) -> dict:
    """What is saved in shards goes on bit for bit in as many ranks, and with the same sets in others and in one."""
    found = {}
    for name, options in {"entries": {}, "blocks": {"structure": "block", "block": (4, 4)}}.items():
        topkast, optimizer, _ = fit(False, steps=7, **options)
        state = {"topkast": topkast.state_dict(gathered=False)}
        state["model"], state["optimizer"] = get_state_dict(topkast.model, optimizer)
        dcp.save(state, checkpoint_id=folder / f"{name}-{world}")
        end = everything(topkast, optimizer)
        for source in (world, *others):
            resumed, again, _ = fit(False, steps=1, **options)
            new = {"topkast": resumed.state_dict(gathered=False)}
            new["model"], new["optimizer"] = get_state_dict(resumed.model, again)
            dcp.load(new, checkpoint_id=folder / f"{name}-{source}")
            set_state_dict(resumed.model, again, model_state_dict=new["model"], optim_state_dict=new["optimizer"])
            resumed.load_state_dict(new["topkast"])
            got = everything(resumed, again)
            found[f"{name} from {source}"] = close(got, end) if source != world else same(got, end)
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
        states = {
            "whole": torch.load(folder / "whole.pt", weights_only=True),
            "shards": trained.state_dict(gathered=False),
        }
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
            drawn = [
                [name, counts.tolist(), edges.tolist()]
                for weight in topkast.weights.values()
                for name, (counts, edges) in split_histogram(weight).items()
            ]
            average = copy.deepcopy(topkast.model)
            train(topkast, optimizer, 5, first=7)
            averages = packed_weights(average)
            for key, weight in topkast.weights.items():
                weight.sparsify_average(averages[key], weight.active)
            averages = {key: whole(weight.theta()) for key, weight in averages.items()}
            other = Bag(BLOCKS if "block" in RUNS[name] else SHAPES, seed=3)
            topkast.model.load_state_dict(other.state_dict())
            train(topkast, optimizer, 5, first=12)
            ends[theta] = averages, everything(topkast, optimizer), drawn
            topkast.release()
            ends[theta] += ({key: value.detach() for key, value in topkast.model.named_parameters()},)
        found[f"{name}: averages"] = same(ends["sharded"][0], ends["replicated"][0])
        found[f"{name}: loaded"] = same(ends["sharded"][1], ends["replicated"][1])
        found[f"{name}: released"] = same(ends["sharded"][3], ends["replicated"][3])
        found[f"{name}: histograms"] = same(ends["sharded"][2], ends["replicated"][2])
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
    for name, kind in product(("adamw", "blocks", "delayed"), KINDS[:2]):
        topkast, optimizer = run(kind, 4, **RUNS[name])
        before = everything(topkast, optimizer)
        weight = topkast.weights["layer1.weight"]
        if rank == 0:
            to_local(weight.parameter.detach())[0] = torch.nan  # in the first row, which is at home here
        try:
            topkast.refresh()
        except NonFiniteWeightError as error:
            found[f"{name}, {kind}: NaN"] = str(error)
        found[f"{name}, {kind}: sets kept"] = same(
            [whole(each.tiers) for each in topkast.weights.values()], [w[1] for w in before["weights"].values()]
        )
    topkast, _ = run("sharded", 4)
    if rank == world - 1:
        topkast.weights["layer1.weight"].parameter.detach()[3] += 1
    found["drift"] = refusal(topkast.refresh)

    topkast, _ = run("sharded", 4)
    found["one rank would save its part"] = refusal(topkast.state_dict)
    found["pickle"] = refusal(lambda: pickle.dumps(topkast.model))
    sliced, optimizer = run("slices", 4)
    found["release"] = refusal(sliced.release)
    found["exclude"] = refusal(lambda: sliced.exclude(["layer1.weight"]))
    train(sliced, optimizer, 4, first=4)
    found["neither has changed anything"] = same(everything(sliced, optimizer), everything(*run("replicated", 8)))

    early, _ = run("sharded", 4)  # whose optimizer is attached
    fully_shard(early.model, mesh=mesh_of("slices"))
    found["attached before fully_shard"] = refusal(early._attached.optimizers[0].step)

    for key, value in {"tiers": 3, "latent": torch.nan, "never_active": None}.items():
        damaged = topkast.state_dict(gathered=False)
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
            if isinstance(each, torch.Tensor) and not each.is_meta:
                self.bytes = max(self.bytes, to_local(each).untyped_storage().nbytes())
        return made


def check_memory() -> dict:
    """What each rank keeps, and the largest it ever allocates in steps and refreshes; last of all checks.

    Allocations are traced to the end of the process: `tracemalloc.stop` crashes where another thread, as one of gloo's,
    frees memory at that moment.
    """
    tracemalloc.start()
    selection._CHUNK = 1 << 14  # as little beside this weight as it is beside a large one
    found = {}
    kinds = {
        "entries": {},
        "random": {"exploration": "random"},
        "blocks": {"structure": "block", "block": (16, 16)},
    }
    for name, options in kinds.items():
        host, device, largest = {}, {}, {}
        for kind in ("replicated", "sharded", "slices"):
            setting = {"forward_sparsity": 0.95, "backward_sparsity": 0.9, "update_every": 2}
            topkast, optimizer = run(kind, 2, shapes=[(1024, 768)], **setting, **options)
            (weight,) = topkast.weights.values()
            kept = [weight._theta, weight._tiers, weight._never_active, weight._scores]
            host[kind] = sum(each.untyped_storage().nbytes() for each in kept if each is not None)
            gradients(topkast, 2)
            moments = [value for value in optimizer.state[weight.parameter].values() if value.numel() > 1]
            held = [to_local(each.detach()) for each in (weight.parameter, weight.parameter.grad, *moments)]
            device[kind] = sum(each.numel() * each.element_size() for each in held)
            for step in range(2, 6):
                gradients(topkast, step)
                tracemalloc.reset_peak()
                before = tracemalloc.get_traced_memory()[0]
                with Largest() as mode:
                    optimizer.step()
                largest[kind] = max(largest.get(kind, 0), mode.bytes, tracemalloc.get_traced_memory()[1] - before)
        for kind in largest:
            found[f"host, {name}, {kind}"] = host[kind] / host["replicated"]
            found[f"device, {name}, {kind}"] = device[kind] / device["replicated"]
            found[f"largest, {name}, {kind}"] = largest[kind] / (4 * 1024 * 768)
    return found


def train_long(steps: int) -> None:
    """Print how many runs end as one process does: bit for bit, with the same sets, and nearly."""
    for kind in KINDS[: 2 + (dist.get_world_size() == 4)]:
        counts, refreshes = Counter(), set()
        for options in LONG.values():
            topkast, optimizer = run(kind, steps, **options)
            got, expected = everything(topkast, optimizer), everything(*run("replicated", steps, **options))
            counts["bit for bit"] += same(got, expected)
            counts["sets bit for bit"] += all(
                torch.equal(weight[1], expected["weights"][name][1]) for name, weight in got["weights"].items()
            )
            counts["nearly"] += close(got, expected)
            refreshes.add(topkast.refresh_count)
        if dist.get_rank() == 0:
            print(f"{dist.get_world_size()} ranks, {kind}: {len(LONG)} runs, refreshes {refreshes}, {dict(counts)}")


def check_timeouts() -> dict:
    """How long collectives on the host's memory wait for a rank that hangs."""
    group = host_group()
    groups = [group._own, group._background]
    return {"timeouts": [each._get_backend(torch.device("cpu")).options._timeout == TIMEOUT for each in groups]}


def ranks(rank: int, folder: Path, world: int, others: list[int], steps: int | None) -> None:
    faulthandler.enable()  # a rank that crashes says where
    faulthandler.dump_traceback_later(1500, exit=True)  # and one that waits for another
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    store = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=TIMEOUT)
    if steps is not None:
        train_long(steps)
        return
    found = check_exchange(rank, world)
    found |= check_runs(steps=30 if world == 2 else 18)
    found |= check_states(folder, rank)
    found |= check_other_values()
    found |= check_refusals(rank, world)
    found |= check_fsdp2()
    found |= check_distributed_checkpoints(folder.parent, world, others)
    found |= check_load_after_forward()
    found |= check_plan(world)
    found |= check_birth()
    found |= check_timeouts()
    found |= check_lightning(folder, world, rank)
    found |= check_memory()
    torch.save(found, folder / f"found-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("worlds", type=int, nargs="+")
    parser.add_argument("--steps", type=int)
    given = parser.parse_args()
    for number, world in enumerate(given.worlds):
        folder = given.folder / str(world)
        folder.mkdir(parents=True)
        arguments = folder, world, given.worlds[:number], given.steps
        mp.start_processes(ranks, arguments, nprocs=world, start_method="fork")
