"""Which parameters the layers hold at present: FSDP2 and other code may have replaced those of sparse weights."""

from collections.abc import Collection, Mapping, Sequence

from torch import nn
from torch.distributed.fsdp import FSDPModule

from lightning_topkast.errors import TopKastError
from lightning_topkast.method.targets import Target
from lightning_topkast.weights import PackedWeight, SparseWeight


def reshard(model: nn.Module) -> None:
    """Reshard a model under FSDP2, which stays unsharded after a forward pass without a backward pass.

    The next forward pass would not see what is written into the shards either.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def follow(targets: Sequence[Target], weights: Mapping[str, SparseWeight]) -> None:
    """Go on with the parameters that FSDP2 has made of packed ones; the model is resharded."""
    for target in targets:
        weight = weights.get(target.name)
        if isinstance(weight, PackedWeight):
            module, name = target.owners[0]
            weight.follow(module._parameters.get(name))
            target.parameter = weight.parameter


def without_parameter(model: nn.Module, weights: Mapping[str, SparseWeight]) -> list[str]:
    """Return names of the sparse weights whose parameters the model no longer holds."""
    held = {id(parameter) for parameter in model.parameters()}
    return [name for name, weight in weights.items() if id(weight.parameter) not in held]


def check_trained(model: nn.Module, targets: Sequence[Target], weights: Collection[SparseWeight]) -> None:
    """Refuse a step on parameters that their layers have lost, since nothing would be trained.

    FSDP2's own parameters are not looked for: a layer may hold gathered values.

    Args:
        model: the model.
        targets: its parameters.
        weights: those that an optimizer is about to step on.

    Raises:
        TopKastError: the model no longer holds the parameter of one of them.
    """
    trained = {weight.name: weight.parameter for weight in weights if not weight.is_dtensor}
    for target in targets:
        (module, name), parameter = target.owners[0], trained.get(target.name)
        if parameter is None or module._parameters.get(name) is parameter:
            continue
        # a module that parametrizes or prunes it may hold it now
        if all(each is not parameter for each in model.parameters()):
            raise TopKastError(
                f"the layer of '{target.name}' no longer holds the parameter that this optimizer steps on, since "
                "fully_shard or other code has replaced it: call fully_shard before the optimizer is made and attached"
            )
