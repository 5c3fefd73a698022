"""The plan of a run: arithmetic, memory and communication of each parameter, and totals for other storages."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from lightning_topkast.costs.flops import Products, count_products
from lightning_topkast.costs.memory import Bytes, Held, OptimizerState, Parallel, bytes_of
from lightning_topkast.engine.install import choose_storage, refuse_or_warn
from lightning_topkast.method.density import Counts, SetSizes
from lightning_topkast.method.targets import Target, find_targets
from lightning_topkast.settings import Settings
from lightning_topkast.storage import STORAGES, Masked, Packed
from lightning_topkast.weights.home import can_share


@dataclass(frozen=True)
class Layer:
    """One parameter and the products with it, products without a parameter, or the model's buffers.

    FLOPs are those of one example; `dense_*` those of a dense run.

    Attributes:
        name: of the parameter; "MODULE (activations)" for products in a module without a parameter; "buffers".
        shape: the weight's own shape, even if it is packed.
        storage: masked, packed, compact or dense.
        reason: why it is dense, or why its storage is that one; "" if it is as requested.
        size: number of entries.
        active: |A|; all entries of a dense parameter.
        updated: |B| at the start of the run.
    """

    name: str
    shape: tuple[int, ...]
    storage: str
    reason: str
    size: int
    active: int
    updated: int
    forward_flops: float
    dense_forward_flops: float
    training_flops: float
    dense_training_flops: float
    bytes: Bytes

    @property
    def forward_density(self) -> float:
        """|A| / n."""
        return self.active / self.size if self.size else 1.0

    @property
    def backward_density(self) -> float:
        """|B| / n."""
        return self.updated / self.size if self.size else 1.0

    @property
    def executed_flops(self) -> tuple[float, float]:
        """FLOPs executed in the forward pass and in training; only packed products compute less than dense ones."""
        if self.storage == "packed":
            return self.forward_flops, self.training_flops
        return self.dense_forward_flops, self.dense_training_flops

    def to_dict(self) -> dict[str, Any]:
        """Return one flat row of plain data."""
        row = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "bytes"}
        row["shape"] = list(self.shape)
        row["forward_density"], row["backward_density"] = self.forward_density, self.backward_density
        return row | flat_bytes(self.bytes)


@dataclass(frozen=True)
class Plan:
    """The costs of a run.

    Attributes:
        layers: all parameters, in the model's order; then products of activations; then buffers.
        examples: number of examples per batch.
        parallel: the distribution over devices.
        strategies: bytes per device of the same model with other storages and strategies.
        notes: further notes for the reader.
    """

    layers: tuple[Layer, ...]
    examples: int
    parallel: Parallel
    strategies: Mapping[str, Bytes]
    notes: tuple[str, ...]

    @property
    def bytes(self) -> Bytes:
        """Sum over all layers, on the device with the most bytes."""
        return sum((layer.bytes for layer in self.layers), Bytes())

    def totals(self) -> dict[str, Any]:
        """Return sums over the layers; FLOPs per example, and per step of one device (`*_a_step`)."""
        sums = {
            name: sum(getattr(layer, name) for layer in self.layers)
            for name in (
                "size", "active", "updated", "forward_flops", "dense_forward_flops", "training_flops",
                "dense_training_flops",
            )
        }  # fmt: skip
        executed = [sum(layer.executed_flops[k] for layer in self.layers) for k in (0, 1)]
        a_step = self.examples * self.parallel.accumulate
        return {
            **sums,
            "forward_flops_ratio": _ratio(sums["forward_flops"], sums["dense_forward_flops"]),
            "training_flops_ratio": _ratio(sums["training_flops"], sums["dense_training_flops"]),
            "executed_forward_flops": executed[0],
            "executed_training_flops": executed[1],
            "training_flops_a_step": sums["training_flops"] * a_step,
            "executed_training_flops_a_step": executed[1] * a_step,
            **flat_bytes(self.bytes),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data."""
        return {
            "layers": [layer.to_dict() for layer in self.layers],
            "totals": self.totals(),
            "strategies": {name: flat_bytes(taken) for name, taken in self.strategies.items()},
            "run": {"examples": self.examples, **asdict(self.parallel)},
            "notes": list(self.notes),
        }


def flat_bytes(taken: Bytes) -> dict[str, int]:
    """Return bytes by kind, with the names in rows and totals; also the device's total and its traffic."""
    kinds = asdict(taken)
    traffic = {f"communication_{name}_bytes": kinds.pop(name) for name in ("payload", "sent", "refresh")}
    return {f"{kind}_bytes": n for kind, n in kinds.items()} | {"device_bytes": taken.device} | traffic


def make_plan(
    model: nn.Module,
    inputs: Sequence[Any],
    settings: Settings | None,
    optimizer: OptimizerState,
    parallel: Parallel,
    total_steps: int | None = None,
) -> Plan:
    """Plan the training of `model`.

    Args:
        model: the dense model, in the dtype of its training; on the meta device it takes no memory.
        inputs: positional arguments of one forward pass, on the same device; their first dimension is the batch.
        settings: of Top-KAST; None for a dense run.
        optimizer: the sizes of its state.
        parallel: the distribution over devices.
        total_steps: length of the run, over which changing densities are averaged for the FLOPs of training; None if it
            is not known.

    Raises:
        TopKastError: `TopKast` would refuse the settings, the model fails on the inputs, or the optimizer fails on a
            small tensor.
    """
    targets, counts, means = _sets(model, settings, total_steps)
    storage = None if settings is None else settings.storage
    products, of_activations = count_products(model, inputs, {t.name: t.parameter for t in targets})
    examples, buffers = len(inputs[0]), Bytes(weights=sum(buffer.nbytes for buffer in model.buffers()))
    layers, obstacles = [], []
    for target in targets:
        held, reason = _held(target, counts, settings, storage)
        flops = products.get(target.name, Products())
        mean = means.get(target.name, (1.0, 1.0))
        layers.append(_layer(target, held, reason, flops, mean, examples, bytes_of(held, optimizer, parallel)))
        obstacles += [f"'{target.name}' ({reason})"] if reason and held.storage == "masked" else []
    if isinstance(storage, Packed) and storage.unsupported == "error" and obstacles:
        refuse_or_warn(storage, obstacles)
    layers += [_dense(f"{name} (activations)", flops, examples) for name, flops in of_activations.items()]
    layers += [_dense("buffers", Products(), examples, buffers)] if buffers.weights else []
    strategies = {}
    for other, spread in _alternatives(settings, parallel):
        held_so = (_held(target, counts, settings, STORAGES.get(other))[0] for target in targets)
        strategies[f"{other}_{spread.strategy}"] = sum((bytes_of(each, optimizer, spread) for each in held_so), buffers)
    unused = [target.name for target in targets if target.sparse and target.name not in products]
    notes = (*_notes_on_sizes(settings, total_steps), *_notes(layers, parallel, storage, obstacles, unused))
    return Plan(tuple(layers), examples, parallel, strategies, notes)


def _sets(
    model: nn.Module, settings: Settings | None, total_steps: int | None
) -> tuple[list[Target], Counts, dict[str, tuple[float, float]]]:
    """Return all parameters, and for sparse ones the sizes of A and B and their mean densities in training."""
    if settings is None:
        return [Target(name, p, p.shape, "the run is dense") for name, p in model.named_parameters()], {}, {}
    targets = find_targets(model, settings.targets)
    sparse = [target for target in targets if target.sparse]
    stacks = frozenset(target.name for target in sparse if target.is_stack)
    sizes = _sizes(settings, {target.name: target.shape for target in sparse}, stacks)
    means = sizes.mean_densities(total_steps, settings.rule.needs_gradient)
    return targets, sizes.final, means


def _sizes(settings: Settings, shapes: Mapping[str, torch.Size], stacks: Collection[str] = ()) -> SetSizes:
    return SetSizes(settings.allocation, settings.schedule, settings.ramp, shapes, stacks)


def _held(
    target: Target, counts: Counts, settings: Settings | None, storage: Masked | Packed | None
) -> tuple[Held, str]:
    """Return the storage of a parameter, and the reason for it."""
    shape, dtype, trains = tuple(target.shape), target.parameter.dtype, target.parameter.requires_grad
    if settings is None or storage is None or not target.sparse:
        size = target.shape.numel()
        return Held(shape, dtype, "dense", size, size, size, trains), target.reason
    active, updated = counts[target.name]
    structure = target.structure(settings.structure)
    choice = choose_storage(target, active, updated, storage, structure)
    present = active if settings.schedule.stop_exploring_at == 0 else updated  # no exploration from the first step on
    shares = isinstance(storage, Packed) and storage.theta == "sharded" and can_share(target.shape)
    held = Held(shape, dtype, choice.name, active, updated, present, trains, structure, choice.product, shares)
    return held, choice.reason


def _layer(
    target: Target, held: Held, reason: str, dense: Products, mean: tuple[float, float], examples: int, taken: Bytes
) -> Layer:
    size = target.shape.numel()
    final = dense if held.storage == "dense" else dense.scaled(held.active / size, held.present / size)
    training = dense if held.storage == "dense" else dense.scaled(*mean)
    return Layer(
        target.name, held.shape, held.storage, reason, size, held.active, held.present,
        final.forward / examples, dense.forward / examples, training.training / examples, dense.training / examples,
        taken,
    )  # fmt: skip


def _dense(name: str, flops: Products, examples: int, taken: Bytes = Bytes()) -> Layer:  # noqa: B008  frozen
    forward, training = flops.forward / examples, flops.training / examples
    return Layer(name, (), "dense", "no parameter", 0, 0, 0, forward, forward, training, training, taken)


def _alternatives(settings: Settings | None, parallel: Parallel) -> Iterator[tuple[str, Parallel]]:
    """Yield the storages and strategies to compare, for the same number of devices."""
    alone = parallel.devices == 1
    replicated = replace(parallel, strategy="single" if alone else "ddp")
    yield "dense", replace(replicated, all_reduce="dense")
    if settings is not None:
        yield "masked", replicated
        yield "packed", replicated
    if not alone:
        for storage in ("dense",) if settings is None else ("dense", "masked", "packed"):
            yield storage, replace(parallel, strategy="fsdp2")


def _notes_on_sizes(settings: Settings | None, total_steps: int | None) -> Iterator[str]:
    if settings is None:
        return
    distribution = settings.allocation.distribution
    if settings.allocation.competes:
        yield f"planned as if uniform: with distribution='{distribution}' training decides which weights are denser"
    if settings.ramp or settings.schedule.stop_exploring_at or settings.rule.needs_gradient:
        if total_steps is None and not _sizes(settings, {}).is_mean_known:
            yield (
                "training FLOPs are those of the run's first step: its sets change at certain steps, and its length is "
                "not known (trainer.max_steps)"
            )
        else:
            yield "training FLOPs are averages over the run, in which the sets' sizes change"


def _notes(
    layers: Sequence[Layer],
    parallel: Parallel,
    storage: Masked | Packed | None,
    obstacles: Sequence[str],
    unused: Sequence[str],
) -> Iterator[str]:
    executed, allowed, dense = (
        sum(figures)
        for figures in zip(
            *((each.executed_flops[1], each.training_flops, each.dense_training_flops) for each in layers), strict=True
        )
    )
    if executed > allowed:
        yield (
            "FLOPs are the arithmetic that the sparsity allows. Products with masked and compact weights are computed "
            f"dense, so that this run's training executes {_ratio(executed, dense):.1%} of a dense run's"
        )
    if obstacles and storage is not None:
        yield f"storage='{storage.name}' leaves {len(obstacles)} weights masked: {', '.join(obstacles[:5])}"
    if unused:
        yield f"no product was counted for {len(unused)} sparse weights: {', '.join(unused[:5])}"
    if parallel.devices > 1:
        yield (
            "sent: by ring algorithms, (w-1)/w of what is gathered or scattered over w devices and twice that of an "
            "all-reduce; ddp reduces the gradients of a step, fsdp2 gathers the parameters forward and backward and "
            "scatters the gradients of every batch"
        )
    yield (
        "not counted: activations, elementwise operations, the work of refreshes, and what lives for a moment (layers "
        "gathered by fsdp2, the dense weight of a compact layer, autocast's copies)"
    )


def _ratio(sparse: float, dense: float) -> float:
    return sparse / dense if dense else 1.0
