"""Initial values for models that were built without memory."""

from collections.abc import Callable, Collection
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_topkast.distributed import HostGroup, RowSharding, to_local
from lightning_topkast.errors import TopKastError

_CHUNK = 1 << 22  # numbers that are drawn at a time; normal ones come in runs of 16
_IN_PLACE = (torch.ops.aten.fill_.Scalar, torch.ops.aten.zero_.default)


def materialize(
    model: nn.Module, by_rows: Collection[nn.Parameter] = (), group: HostGroup | None = None
) -> dict[nn.Parameter, nn.Parameter]:
    """Draw the initial values of all tensors on the meta device, in host memory, module by module.

    The dense weights never reach the device, since they are packed before the model is moved. Tensors that are not on
    the meta device keep their values, and tied weights stay tied.

    Args:
        model: the model.
        by_rows: parameters on the meta device, of which each process keeps some rows; they stay in the model.
        group: the processes.

    Returns:
        for each parameter of `by_rows` its values, a DTensor: with equal seeds those that one process would draw.

    Raises:
        TopKastError: a module has no `reset_parameters`; nothing was drawn then.
    """
    drawn: list[tuple[nn.Module, Callable[[], None]]] = []
    for name, module in model.named_modules():
        own = chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
        lacking = [own_name for own_name, tensor in own if tensor.is_meta]
        if lacking:
            reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
            if not callable(reset):
                raise TopKastError(
                    f"'{name}' ({type(module).__name__}) is on the meta device and has no reset_parameters() to "
                    f"initialize {', '.join(lacking)}; add that method, or build the module on a device"
                )
            drawn.append((module, reset))
    tied: dict[nn.Parameter, nn.Parameter] = {}
    fresh: set[int] = set()
    for module, _ in drawn:
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta and parameter not in tied:
                values = _empty(parameter, group if parameter in by_rows else None)
                tied[parameter] = nn.Parameter(values, requires_grad=parameter.requires_grad)
            module._parameters[name] = tied.get(parameter, parameter)
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
                fresh.add(id(module._buffers[name]))
    fresh |= {id(parameter) for parameter in tied.values()}
    in_rows = {values: parameter for parameter, values in tied.items() if parameter in by_rows}
    try:
        for module, reset in drawn:
            own = chain(module.parameters(recurse=False), module.buffers(recurse=False))
            kept = [(tensor, tensor.detach().clone()) for tensor in own if id(tensor) not in fresh]
            _reset(module, reset)
            for tensor, values in kept:
                tensor.detach().copy_(values)
    finally:
        for module, _ in drawn:
            for name, parameter in module.named_parameters(recurse=False):
                module._parameters[name] = in_rows.get(parameter, parameter)
    return {parameter: values for values, parameter in in_rows.items()}


def _empty(parameter: Tensor, group: HostGroup | None) -> Tensor:
    if group is None:
        return torch.empty_like(parameter, device="cpu")
    sharding = RowSharding(parameter.shape, group)
    return sharding.to_dtensor(torch.empty(sharding.local_shape, dtype=parameter.dtype))


def _reset(module: nn.Module, reset: Callable[[], None]) -> None:
    """Draw a module's values; a weight that its method cannot draw by rows is dense for this moment."""
    parts: dict[str, Any] = {key: each for key, each in module._parameters.items() if isinstance(each, DTensor)}
    if not parts:
        return reset()
    before = torch.get_rng_state()
    try:
        with _ByRows():  # type: ignore[no-untyped-call]
            return reset()
    except _NotByRowsError:
        torch.set_rng_state(before)
    whole = {name: nn.Parameter(torch.empty(part.shape, dtype=part.dtype)) for name, part in parts.items()}
    module._parameters.update(whole)
    reset()
    module._parameters.update(parts)
    for name, part in parts.items():
        to_local(part.detach()).copy_(whole[name].detach()[slice(*_rows(part))])


class _NotByRowsError(Exception):
    """Raised if a module's method does more than to fill its weights with numbers."""


class _ByRows(TorchDispatchMode):
    """Lets methods that fill weights with numbers fill this process' rows of them.

    Anything else that they do to a weight is refused: a write to a view of it might be lost.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        weights = [each for each in chain(args, kwargs.values()) if isinstance(each, DTensor)]
        if not weights or func is torch.ops.aten.detach.default:
            return func(*args, **kwargs)
        weight, others = weights[0], [each for each in chain(args[1:], kwargs.values()) if isinstance(each, Tensor)]
        changes_it = args[0] is weight and func._schema.arguments[0].is_write
        if not changes_it or any(each.dim() for each in others):
            raise _NotByRowsError
        if torch.Tag.nondeterministic_seeded in func.tags:
            _draw(weight, lambda numbers: func(numbers, *args[1:], **kwargs))
        elif torch.Tag.pointwise in func.tags or func in _IN_PLACE:
            func(to_local(weight), *args[1:], **kwargs)
        else:
            raise _NotByRowsError
        return weight


def _draw(weight: DTensor, fill: Callable[[Tensor], Any]) -> None:
    """Fill this process' rows as the whole weight would be filled, with little memory."""
    part, length = to_local(weight).view(-1), weight.shape[1:].numel()
    begin, end = (row * length for row in _rows(weight))
    starts = [*range(0, max(weight.numel() - _CHUNK, 1), _CHUNK), weight.numel()]
    for start, stop in pairwise(starts):
        numbers = part.new_empty(stop - start)
        fill(numbers)
        low, high = max(begin, start), min(end, stop)
        if low < high:
            part[low - begin : high - begin] = numbers[low - start : high - start]


def _rows(weight: DTensor) -> tuple[int, int]:
    """Return the first row of this process' part, and the one after its last."""
    rows = -(-weight.shape[0] // weight.device_mesh.size())
    begin = min(weight.device_mesh.get_local_rank() * rows, weight.shape[0])
    return begin, begin + to_local(weight).shape[0]
