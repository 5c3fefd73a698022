"""Initial values for models that were built without memory."""

from collections.abc import Callable
from itertools import chain

import torch
from torch import nn

from lightning_topkast.errors import TopKastError


def materialize(model: nn.Module) -> None:
    """Draw the initial values of all tensors on the meta device, in host memory, module by module.

    The dense weights never reach the device, since they are packed before the model is moved. Tensors that are not on
    the meta device keep their values, and tied weights stay tied.

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
                values = torch.empty_like(parameter, device="cpu")
                tied[parameter] = nn.Parameter(values, requires_grad=parameter.requires_grad)
            module._parameters[name] = tied.get(parameter, parameter)
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
                fresh.add(id(module._buffers[name]))
    fresh |= {id(parameter) for parameter in tied.values()}
    for module, reset in drawn:
        own = chain(module.parameters(recurse=False), module.buffers(recurse=False))
        kept = [(tensor, tensor.detach().clone()) for tensor in own if id(tensor) not in fresh]
        reset()
        for tensor, values in kept:
            tensor.detach().copy_(values)
