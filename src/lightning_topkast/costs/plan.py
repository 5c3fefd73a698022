"""The plan of a run: every parameter's arithmetic, memory and communication, and what other ways of keeping it take."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, cast

from torch import nn

from lightning_topkast.costs.flops import Products, count_products
from lightning_topkast.costs.memory import Bytes, Held, OptimizerState, Parallel, bytes_of
from lightning_topkast.engine.storage import kept_as
from lightning_topkast.errors import TopKastError
from lightning_topkast.method.course import Course
from lightning_topkast.method.density import allocate
from lightning_topkast.method.targets import Target, find_targets
from lightning_topkast.settings import Execution, Settings


@dataclass(frozen=True)
class Layer:
    """One parameter and the products with it, products without a parameter, or the model's buffers.

    FLOPs are those of one example; `dense_*` what a dense run takes for the same.

    Attributes:
        name: the parameter's; "MODULE (activations)" for products in a module without a parameter; "buffers".
        shape: the weight's own, also where it is packed.
        execution: masked, packed, compact or dense.
        reason: why it is dense, or why it is masked although another execution was asked for.
        size: entries.
        active: |A|, all entries of a dense parameter.
        updated: |B| as the run begins.
    """

    name: str
    shape: tuple[int, ...]
    execution: str
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
        """What is computed forward and in training: only packed products leave anything out."""
        if self.execution == "packed":
            return self.forward_flops, self.training_flops
        return self.dense_forward_flops, self.dense_training_flops

    def to_dict(self) -> dict[str, Any]:
        """One flat row of plain data."""
        row = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "bytes"}
        row["shape"] = list(self.shape)
        row["forward_density"], row["backward_density"] = self.forward_density, self.backward_density
        return row | flat_bytes(self.bytes)


@dataclass(frozen=True)
class Plan:
    """What a run takes.

    Attributes:
        layers: every parameter, in the model's order; then products of activations; then buffers.
        examples: a batch's.
        parallel: how the run is spread.
        strategies: what the same model takes of a device under other ways of keeping and spreading it.
        notes: what the reader must know besides.
    """

    layers: tuple[Layer, ...]
    examples: int
    parallel: Parallel
    strategies: Mapping[str, Bytes]
    notes: tuple[str, ...]

    @property
    def bytes(self) -> Bytes:
        """Of all layers, on the device that has most."""
        return sum((layer.bytes for layer in self.layers), Bytes())

    def totals(self) -> dict[str, Any]:
        """Sums over the layers; FLOPs of one example, and of a step of one device (`*_a_step`)."""
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
        """Plain data."""
        return {
            "layers": [layer.to_dict() for layer in self.layers],
            "totals": self.totals(),
            "strategies": {name: flat_bytes(taken) for name, taken in self.strategies.items()},
            "run": {"examples": self.examples, **asdict(self.parallel)},
            "notes": list(self.notes),
        }


def flat_bytes(taken: Bytes) -> dict[str, int]:
    """Bytes by kind, under the names that rows and totals have them: the device's together, and its traffic."""
    kinds = asdict(taken)
    traffic = {f"communication_{name}_bytes": kinds.pop(name) for name in ("payload", "sent")}
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
        model: as it is before it is made sparse, in the dtype it trains in; on the meta device it costs nothing.
        inputs: positional arguments of one forward pass, on the same device; their first dimension is the batch.
        settings: of Top-KAST; None for a dense run.
        optimizer: what it keeps.
        parallel: over which devices, and how.
        total_steps: of the run, over which densities that change are averaged for the FLOPs of its training; None if
            unknown.

    Raises:
        TopKastError: what `TopKast` would refuse, a model that fails on the inputs, or an optimizer on a small tensor.
    """
    targets, counts, means = _sets(model, settings, total_steps)
    execution = "dense" if settings is None else settings.execution
    if parallel.strategy == "fsdp2" and execution not in ("dense", "masked"):
        raise TopKastError(
            f"execution='{execution}' can't be sharded by fsdp2, which cuts dense parameters; train with "
            "execution='masked', or with ddp"
        )
    products, of_activations = count_products(model, inputs, {t.name: t.parameter for t in targets})
    examples, buffers = len(inputs[0]), Bytes(weights=sum(buffer.nbytes for buffer in model.buffers()))
    layers, obstacles = [], []
    for target in targets:
        held, obstacle = _held(target, counts, settings, execution)
        flops = products.get(target.name, Products())
        mean = means.get(target.name, (1.0, 1.0))
        layers.append(_layer(target, held, obstacle, flops, mean, examples, bytes_of(held, optimizer, parallel)))
        obstacles += [f"'{target.name}' ({obstacle})"] if obstacle else []
    if settings is not None and settings.strict and obstacles:
        raise TopKastError(
            f"execution='{execution}' leaves {', '.join(obstacles)} masked, which strict=True refuses; exclude them, "
            "or set strict=False"
        )
    layers += [_dense(f"{name} (activations)", flops, examples) for name, flops in of_activations.items()]
    layers += [_dense("buffers", Products(), examples, buffers)] if buffers.weights else []
    strategies = {}
    for other, spread in _alternatives(settings, parallel):
        kept = (_held(target, counts, settings, other)[0] for target in targets)
        strategies[f"{other}_{spread.strategy}"] = sum((bytes_of(each, optimizer, spread) for each in kept), buffers)
    unused = [target.name for target in targets if target.sparse and target.name not in products]
    notes = (*_notes_on_course(settings, total_steps), *_notes(layers, parallel, execution, obstacles, unused))
    return Plan(tuple(layers), examples, parallel, strategies, notes)


def _sets(
    model: nn.Module, settings: Settings | None, total_steps: int | None
) -> tuple[list[Target], dict[str, tuple[int, int]], dict[str, tuple[float, float]]]:
    """Every parameter; of the sparse ones the sizes of A and B, and their mean densities in training."""
    if settings is None:
        return [Target(name, p, p.shape, "the run is dense") for name, p in model.named_parameters()], {}, {}
    targets = find_targets(
        model, settings.include, settings.exclude, settings.include_types, settings.exclude_types,
        settings.keep_first_dense, settings.keep_last_dense,
    )  # fmt: skip
    shapes = {target.name: target.shape for target in targets if target.sparse}
    return targets, allocate(shapes, settings), Course(settings, shapes).mean_densities(total_steps)


def _held(
    target: Target, counts: Mapping[str, tuple[int, int]], settings: Settings | None, execution: str
) -> tuple[Held, str]:
    """How a parameter is kept under `execution`, and what leaves it masked against that."""
    shape, dtype, trains = tuple(target.shape), target.parameter.dtype, target.parameter.requires_grad
    if settings is None or execution == "dense" or not target.sparse:
        size = target.shape.numel()
        return Held(shape, dtype, "dense", size, size, size, trains), ""
    active, updated = counts[target.name]
    kept, obstacle = kept_as(target, active, updated, cast(Execution, execution), settings)
    present = active if settings.stop_exploration_at == 0 else updated  # nothing explores from the first step on
    return Held(shape, dtype, kept, active, updated, present, trains, settings.chosen_granularity), obstacle


def _layer(
    target: Target, held: Held, obstacle: str, dense: Products, mean: tuple[float, float], examples: int, taken: Bytes
) -> Layer:
    size = target.shape.numel()
    final = dense if held.execution == "dense" else dense.scaled(held.active / size, held.present / size)
    training = dense if held.execution == "dense" else dense.scaled(*mean)
    return Layer(
        target.name, held.shape, held.execution, target.reason or obstacle, size, held.active, held.present,
        final.forward / examples, dense.forward / examples, training.training / examples, dense.training / examples,
        taken,
    )  # fmt: skip


def _dense(name: str, flops: Products, examples: int, taken: Bytes = Bytes()) -> Layer:  # noqa: B008  frozen
    forward, training = flops.forward / examples, flops.training / examples
    return Layer(name, (), "dense", "no parameter", 0, 0, 0, forward, forward, training, training, taken)


def _alternatives(settings: Settings | None, parallel: Parallel) -> Iterator[tuple[str, Parallel]]:
    """What a user may weigh against each other, on as many devices."""
    alone = parallel.devices == 1
    replicated = replace(parallel, strategy="single" if alone else "ddp")
    yield "dense", replace(replicated, all_reduce="dense")
    if settings is not None:
        yield "masked", replicated
        yield "packed", replace(replicated, all_reduce="dense")
    if not alone:
        for execution in ("dense",) if settings is None else ("dense", "masked"):
            yield execution, replace(parallel, strategy="fsdp2")


def _notes_on_course(settings: Settings | None, total_steps: int | None) -> Iterator[str]:
    if settings is None:
        return
    if settings.distribution == "global":
        yield "planned as if uniform: with distribution='global' training decides which weights are denser"
    if settings.chosen_ramp or settings.stop_exploration_at or settings.chosen_rule.needs_gradient:
        if total_steps is None and not Course(settings, {}).is_mean_known:
            yield (
                "training FLOPs are those of the run's first step: its sets change at certain steps, and its length is "
                "not known (trainer.max_steps)"
            )
        else:
            yield "training FLOPs are averages over the run, in which the sets' sizes change"


def _notes(
    layers: Sequence[Layer], parallel: Parallel, execution: str, obstacles: Sequence[str], unused: Sequence[str]
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
    if obstacles:
        yield f"execution='{execution}' leaves {len(obstacles)} weights masked: {', '.join(obstacles[:5])}"
    if unused:
        yield f"no product was counted for {len(unused)} sparse weights: {', '.join(unused[:5])}"
    if parallel.devices > 1:
        yield (
            "sent: by ring algorithms, (w-1)/w of what is gathered or scattered over w devices and twice that of an "
            "all-reduce; ddp reduces the gradients of a step, fsdp2 gathers the parameters forward and backward and "
            "scatters the gradients of every batch"
        )
    yield (
        "not counted: activations, elementwise operations, refreshes, and what lives for a moment (layers gathered by "
        "fsdp2, the dense weight of a compact layer, autocast's copies)"
    )


def _ratio(sparse: float, dense: float) -> float:
    return sparse / dense if dense else 1.0
