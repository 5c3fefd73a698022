"""Initial values for models that were built without memory."""

from itertools import chain

import torch
from torch import nn

from lightning_topkast.errors import TopKastError


def materialize(model: nn.Module) -> None:
    """Draw the initial values of everything on the meta device, in host memory, module by module.

    The device then never sees the dense weights: they are packed before the model is moved.

    Raises:
        TopKastError: a module that doesn't say how it begins (`reset_parameters`).
    """
    for name, module in model.named_modules():
        own = list(chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False)))
        lacking = [own_name for own_name, tensor in own if tensor.is_meta]
        if not lacking:
            continue
        reset = getattr(module, "reset_parameters", None)
        if not callable(reset):
            raise TopKastError(
                f"'{name}' ({type(module).__name__}) is on the meta device and has no reset_parameters() to draw its "
                f"{', '.join(lacking)} with; give it one, or build it on a device"
            )
        module.to_empty(device=torch.device("cpu"), recurse=False)
        reset()
