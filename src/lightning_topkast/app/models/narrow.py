"""Narrower networks: fewer channels in every layer, and otherwise the same."""

from __future__ import annotations

from torch import Tensor, nn


def scaled(width: int, factor: float) -> int:
    """Return `factor` times `width`, rounded and at least 1; an invalid width is returned for torch to refuse."""
    if not factor > 0.0:
        raise ValueError(f"width_factor={factor} is not valid: expected a number above 0")
    return max(1, round(factor * width)) if width > 0 else width


def narrow_(net: nn.Module, factor: float) -> nn.Module:
    """Shrink every convolution, batch norm and linear layer of a new network to `factor` of its channels.

    The first of these layers keeps its inputs, the images' channels, and the last one its outputs, the classes. Equal
    numbers of channels shrink to equal ones, so that sums and chains of layers still fit; the network must not lay
    channels and places side by side (`nn.Flatten` before the pooling does). What is left of a weight is scaled as the
    initialisation would have for the new sizes: by the fan-out of convolutions (He et al. 2015, as torchvision has
    it) and the fan-in of linear layers.

    Args:
        net: A network of the layers of torchvision's ResNets.
        factor: Factor in (0, 1].

    Raises:
        ValueError: a factor out of range, or grouped convolutions.
    """
    if not 0.0 < factor <= 1.0:
        raise ValueError(f"width_factor={factor} is not valid for a built network: expected a number in (0, 1]")
    layers = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            if module.groups != 1:
                raise ValueError(f"width_factor={factor} does not support convolutions with groups={module.groups}")
            old = module.out_channels
            module.in_channels = _inputs(module, module.in_channels, layers, factor)
            module.out_channels = _outputs(module, module.out_channels, layers, factor)
            ratio = old / module.out_channels
            module.weight = _cut(module.weight, module.out_channels, module.in_channels, gain=ratio**0.5)
        elif isinstance(module, nn.Linear):
            old = module.in_features
            module.in_features = _inputs(module, module.in_features, layers, factor)
            module.out_features = _outputs(module, module.out_features, layers, factor)
            ratio = old / module.in_features
            module.weight = _cut(module.weight, module.out_features, module.in_features, gain=ratio**0.5)
            module.bias = _cut(module.bias, module.out_features, gain=ratio**0.5)
        elif isinstance(module, nn.BatchNorm2d):
            module.num_features = scaled(module.num_features, factor)
            module.weight, module.bias = (_cut(p, module.num_features) for p in (module.weight, module.bias))
            for name in ("running_mean", "running_var"):
                setattr(module, name, getattr(module, name)[: module.num_features].clone())
    return net


def _inputs(module: nn.Module, width: int, layers: list[nn.Conv2d | nn.Linear], factor: float) -> int:
    return width if module is layers[0] else scaled(width, factor)


def _outputs(module: nn.Module, width: int, layers: list[nn.Conv2d | nn.Linear], factor: float) -> int:
    return width if module is layers[-1] else scaled(width, factor)


def _cut(parameter: Tensor, *sizes: int, gain: float = 1.0) -> nn.Parameter:
    """Return the first entries of each dimension."""
    return nn.Parameter(parameter.detach()[tuple(slice(size) for size in sizes)] * gain)
