"""Initial values for models that were built without memory."""

import random
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from itertools import chain, pairwise
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
    replaced: list[tuple[dict[str, Any], str, Tensor]] = []
    for module, _ in drawn:
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                if parameter not in tied:
                    values = _empty(parameter, group if parameter in by_rows else None)
                    tied[parameter] = nn.Parameter(values, requires_grad=parameter.requires_grad)
                    tied[parameter].__dict__.update(parameter.__dict__)  # such as "no weight decay"
                replaced.append((module._parameters, name, parameter))
                module._parameters[name] = tied[parameter]
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                replaced.append((module._buffers, name, buffer))
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
                fresh.add(id(module._buffers[name]))
    fresh |= {id(parameter) for parameter in tied.values()}
    filled: set[int] = set()
    try:
        for module, reset in drawn:
            own = chain(module.parameters(recurse=False), module.buffers(recurse=False))
            kept = [(tensor, tensor.detach().clone()) for tensor in own if id(tensor) not in fresh]
            _reset(module, reset, kept, filled)
            _restore(kept)
    except BaseException:
        for held, name, tensor in replaced:
            held[name] = tensor
        raise
    for held, name, tensor in replaced:
        if tensor in by_rows:
            held[name] = tensor
    return {parameter: values for parameter, values in tied.items() if parameter in by_rows}


def _restore(kept: Iterable[tuple[Tensor, Tensor]]) -> None:
    for tensor, values in kept:
        tensor.detach().copy_(values)


def _empty(parameter: Tensor, group: HostGroup | None) -> Tensor:
    if group is None:
        return torch.empty_like(parameter, device="cpu")
    sharding = RowSharding(parameter.shape, group)
    return sharding.to_dtensor(torch.empty(sharding.local_shape, dtype=parameter.dtype))


def _reset(
    module: nn.Module, reset: Callable[[], None], kept: Iterable[tuple[Tensor, Tensor]], filled: set[int]
) -> None:
    """Draw a module's values; weights that its method cannot draw by rows are dense for this moment.

    Args:
        module: the module; its method may draw the weights of its children, too.
        reset: its method.
        kept: tensors of the module that keep their values, with these.
        filled: the parts that have values; those of this module are added.
    """
    held: list[tuple[dict[str, Any], str, Any]] = [
        (owner._parameters, name, part)
        for owner in module.modules()
        for name, part in owner._parameters.items()
        if isinstance(part, DTensor)
    ]
    if not held:
        return reset()
    earlier = {part: part.detach().clone() for *_, part in held if _memory(part) in filled}
    mode, states = _ByRows(filled), (torch.get_rng_state(), random.getstate(), np.random.get_state())
    with suppress(Exception):  # what is wrong with dense weights, too, is raised below
        with mode:
            reset()
        if not mode.refused and all(_memory(part) in filled for own, name, part in held if own is module._parameters):
            return None
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])
    for generator, state in mode.generators.items():
        generator.set_state(state)
    _restore(kept)
    whole = {
        part: nn.Parameter(
            earlier[part].full_tensor() if part in earlier else torch.empty(part.shape, dtype=part.dtype),
            requires_grad=part.requires_grad,
        )
        for *_, part in held
    }
    for own, name, part in held:
        own[name] = whole[part]
    reset()
    for own, name, part in held:
        to_local(part.detach()).copy_(own[name].detach()[slice(*_rows(part))])
        own[name] = part
        filled.add(_memory(part))


def _memory(weight: DTensor) -> int:
    """Return what identifies a part: views of it share its memory."""
    return to_local(weight.detach()).untyped_storage()._cdata


class _NotByRowsError(Exception):
    """Raised if a module's method does more than to fill its weights with numbers."""


class _ByRows(TorchDispatchMode):
    """Lets methods that fill weights with numbers fill this process' rows of them.

    Anything else that they do to a weight is refused: a write to a view of it might be lost.

    Args:
        filled: to which the parts are added that are given values.
    """

    def __init__(self, filled: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.refused = False  # also if a method goes on after the error
        self.generators: dict[torch.Generator, Tensor] = {}  # with their states before
        self._filled = filled

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (generator := kwargs.get("generator")) is not None:
            self.generators.setdefault(generator, generator.get_state())
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if func is torch.ops.aten.detach.default or not any(isinstance(each, DTensor) for each in tensors):
            return func(*args, **kwargs)
        weight, *others = tensors
        if args[0] is not weight or not func._schema.arguments[0].is_write or any(each.dim() for each in others):
            self._refuse()
        if torch.Tag.nondeterministic_seeded in func.tags:
            _draw(weight, lambda numbers: func(numbers, *args[1:], **kwargs))
        elif torch.Tag.pointwise in func.tags or func in _IN_PLACE:
            func(to_local(weight), *args[1:], **kwargs)
        else:
            self._refuse()
        self._filled.add(_memory(weight))
        return weight

    def _refuse(self) -> NoReturn:
        self.refused = True
        raise _NotByRowsError


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
