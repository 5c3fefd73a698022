"""Layers with a packed weight; the module stays the same object but changes to a class derived from its own."""

import warnings
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_topkast.errors import TopKastError
from lightning_topkast.method.selection import NonFiniteScoresError
from lightning_topkast.weights.packed import PackedWeight


class SparseLayer(nn.Module):
    """Mixin for a layer's class: reading its weight returns α, and its parameter holds the packed values.

    State dicts contain the dense α under the plain name, on CPU; loading one accepts it.
    """

    packed_weights: dict[str, PackedWeight]  # by the layer's own name for the parameter
    plain_class: type[nn.Module]
    kind: "type[SparseLayer]"

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, weight in self.packed_weights.items():
            weight.follow(self._parameters[name])
            destination[prefix + name] = weight.alpha()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        rest = dict(state_dict)
        given = {name: rest.pop(prefix + name, None) for name in self.packed_weights}
        # hide the parameters, which super() would copy into or, with assign=True, replace; their order is kept
        parameters = dict(self._parameters)
        for name in self.packed_weights:
            del self._parameters[name]
        try:
            super()._load_from_state_dict(
                rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
        finally:
            loaded = dict(self._parameters)
            self._parameters.clear()
            self._parameters.update({name: loaded.get(name, value) for name, value in parameters.items()})
        for name in given:  # FSDP2 puts the parameters back meanwhile
            missing_keys[:] = [key for key in missing_keys if key != prefix + name]
        for name, weight in self.packed_weights.items():
            weight.follow(self._parameters[name])
            dense = given[name]
            if dense is None:
                missing_keys.extend([prefix + name] if strict else [])
            elif dense.shape != weight.shape:
                error_msgs.append(
                    f"size mismatch for {prefix + name}: expected {tuple(weight.shape)}, the dense shape of the packed "
                    f"weight, got {tuple(dense.shape)}"
                )
            else:
                try:
                    weight.load_alpha(dense)
                except NonFiniteScoresError:
                    error_msgs.append(f"{prefix + name} holds NaN or infinity")

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Move or convert the layer; its parameters must stay the same objects, as `nn.Module.to` usually leaves them.

        Raises:
            TopKastError: PyTorch has replaced a packed parameter, as it does on the meta device.
        """
        parameters, buffers = dict(self._parameters), dict(self._buffers)
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        if any(self._parameters[name] is not parameters[name] for name in self.packed_weights):
            self._parameters.update(parameters)
            self._buffers.update(buffers)
            raise TopKastError(
                f"{type(self).__name__} holds packed weights, whose parameters PyTorch would replace here, as on the "
                "meta device; move dense_copy(model), which has ordinary layers"
            )
        return self

    def reset_parameters(self) -> None:
        """Raise an error, since this would write into a dense copy of the weight."""
        raise TopKastError(
            f"{type(self).__name__} holds packed weights, for which reset_parameters() is not supported; initialize "
            "them before they are packed, or load others with load_state_dict"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Return a copy; warn while the layer is trained, since an average with copies would mix entries."""
        if not _copying_to_dense and any(weight.is_trained for weight in self.packed_weights.values()):
            warnings.warn(
                f"a {type(self).__name__} was copied while it is trained. The order of its values changes at every "
                "refresh, so an average of parameters or of state dicts would mix entries: average into a "
                "`dense_copy(model)` from the `weight` of each layer, or use Lightning's WeightAveraging",
                stacklevel=2,
            )
        make, arguments, state = self.__reduce_ex__(4)
        copied = memo[id(self)] = make(*arguments)
        copied.__setstate__(deepcopy(state, memo))
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Return the parts of the class, which is created at run time, for copies and pickles."""
        own = getattr(self, "__getstate__", None)  # object's is new in 3.11
        state = self.__dict__ if own is None else own()
        return _empty, (self.plain_class, self.kind, tuple(self.packed_weights)), state


class StackLayer(SparseLayer):
    """A module with a packed stack of matrices, which may read it once per matrix: α is made once per forward pass."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute what the module itself computes."""
        self.__dict__["unpacked"] = {}
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.__dict__.pop("unpacked", None)


def pack_layer(module: nn.Module, name: str, weight: PackedWeight, kind: type[SparseLayer]) -> None:
    """Make `module` hold the packed `weight` as its parameter `name`.

    Args:
        module: any layer.
        name: the layer's own name for the weight.
        weight: the packed weight.
        kind: `SparseLayer`, or a subclass whose forward pass multiplies by the packed weight.
    """
    plain: type[nn.Module] = type(module)
    packed = {name: weight}
    if isinstance(module, SparseLayer):  # another of its weights is already packed
        plain, packed = module.plain_class, module.packed_weights | packed
        kind = module.kind if kind is SparseLayer else kind
    module._parameters[name] = weight.parameter
    module.__dict__["packed_weights"] = packed
    module.__dict__.pop("_flat_weights", None)
    _set_class(module, _class_of(plain, kind, tuple(packed)))


def unpack_layer(module: nn.Module, name: str, dense: nn.Parameter) -> None:
    """Make `module` hold `dense` as its parameter `name`, and make it an ordinary layer if no weight is packed."""
    if not isinstance(module, SparseLayer):
        raise TopKastError(f"expected a layer with packed weights, got the ordinary layer {type(module).__name__}")
    plain, kind, packed = module.plain_class, module.kind, module.packed_weights
    del packed[name]
    module._parameters[name] = dense
    if packed:
        _set_class(module, _class_of(plain, kind, tuple(packed)))
        return
    _set_class(module, plain)
    del module.__dict__["packed_weights"]
    module.__dict__.pop("batch_last", None)
    if isinstance(module, nn.RNNBase):
        module._flat_weights = [getattr(module, each) for each in module._flat_weights_names]


def packed_weights(model: nn.Module) -> Mapping[str, PackedWeight]:
    """Return the packed weights of a model by parameter name, each once under its first name."""
    return {name: weight for name, weight, _, _ in _packed_places(model, remove_duplicate=True)}


def _packed_places(model: nn.Module, remove_duplicate: bool) -> Iterator[tuple[str, PackedWeight, nn.Module, str]]:
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for name, weight in list(module.packed_weights.items()) if isinstance(module, SparseLayer) else ():
            if not remove_duplicate or id(weight) not in seen:
                seen.add(id(weight))
                full = f"{module_name}.{name}" if module_name else name
                yield full.replace("_orig_mod.", ""), weight, module, name


def _set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    module.__class__ = cls


_classes: dict[tuple[type[nn.Module], type[SparseLayer], tuple[str, ...]], type[nn.Module]] = {}


def _class_of(plain: type[nn.Module], kind: type[SparseLayer], names: tuple[str, ...]) -> type[nn.Module]:
    if (plain, kind, names) not in _classes:
        _classes[plain, kind, names] = _make_class(plain, kind, names)
    return _classes[plain, kind, names]


def _make_class(plain: type[nn.Module], kind: type[SparseLayer], names: tuple[str, ...]) -> type[nn.Module]:
    members: dict[str, Any] = {name: _weight_property(name) for name in names}
    members |= {"plain_class": plain, "kind": kind, "__module__": __name__, "__doc__": plain.__doc__}
    if issubclass(plain, nn.RNNBase):
        # it reads its weights from its own list, which would keep the old ones
        members["_flat_weights"] = property(_flat_weights, lambda self, value: None)
        members["flatten_parameters"] = lambda self: None
    prefix = "Compact" if kind in (SparseLayer, StackLayer) else "Packed"
    return type(f"{prefix}{plain.__name__}", (kind, plain), members)


def _weight_property(name: str) -> property:
    def read(self: SparseLayer) -> Tensor:
        values = cast(Tensor, self._parameters[name])
        if isinstance(values, DTensor):
            return values  # FSDP2 looks here for its share
        # what was read without gradients must not be used with them
        made: dict[tuple[str, bool], Tensor] = self.__dict__.get("unpacked", {})
        key = name, torch.is_grad_enabled()
        if key not in made:
            made[key] = self.packed_weights[name].layout_for(values).unpack(values)
        return made[key]

    return property(read, doc="α, dense, computed at each access; its gradient reaches the packed values.")


def _flat_weights(self: nn.RNNBase) -> list[Tensor | None]:
    return [getattr(self, name, None) for name in self._flat_weights_names]


def _empty(plain: type[nn.Module], kind: type[SparseLayer], names: tuple[str, ...]) -> nn.Module:
    cls = _class_of(plain, kind, names)
    return cls.__new__(cls)


_copying_to_dense = False


def dense_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model with ordinary layers instead of packed ones; their weights are α."""
    global _copying_to_dense
    _copying_to_dense = True
    try:
        copied = deepcopy(model)
    finally:
        _copying_to_dense = False
    return to_dense(copied)


def to_dense(model: nn.Module) -> nn.Module:
    """Replace packed layers with ordinary layers, in place; their weights are α, on the parameters' device.

    The engine that packed the model cannot be used again, and an optimizer of the packed model does not fit.

    Returns:
        the model.
    """
    dense: dict[int, nn.Parameter] = {}
    places = list(_packed_places(model, remove_duplicate=False))
    for _, weight, _, _ in places:
        weight.check_release()
    for _, weight, module, name in places:
        if id(weight) not in dense:
            parameter = weight.parameter
            alpha = weight.alpha().to(parameter.device, parameter.dtype)
            dense[id(weight)] = nn.Parameter(alpha, requires_grad=parameter.requires_grad)
        unpack_layer(module, name, dense[id(weight)])
    return model
