"""Safetensors files whose sparse weights take a place for their non-zero entries only."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_topkast.errors import TopKastError
from lightning_topkast.export.encodings import Encoded, decode, encode, encode_two_of_four, groups_over_two
from lightning_topkast.export.files import new_file, optional
from lightning_topkast.export.state import Source, density, is_sparse, tensors_of, tied

METADATA_KEY = "topkast_sparse"
VERSION = 1

_HEADER = 256  # bytes, about what a sparse weight takes in a file's header

Structure = Literal["unstructured", "2:4"]


def save_sparse(
    source: Source, path: str | Path, structure: Structure = "unstructured", overwrite: bool = False
) -> dict[str, str]:
    """Write a model's tensors to a safetensors file, its sparse weights in a smaller form, all of them bit for bit.

    Sparse are the floating tensors with two dimensions or more of which at least a tenth is zero, and they are stored
    so where that is smaller. Tied tensors are stored once. See docs/export.md for the layout.

    Args:
        source: a model, or its state dict.
        path: of the file.
        structure: "2:4" stores matrices as two of four, and takes only those that are.
        overwrite: whether the file may exist already.

    Returns:
        how each tensor is stored: "dense", "tied" or its encoding.

    Raises:
        TopKastError: a weight is not 2:4, or an entry is no ordinary tensor, or the file exists.
    """
    save_file = optional("safetensors.torch").save_file
    tensors = tensors_of(source)
    again = tied(tensors)
    whole = {name: tensor for name, tensor in tensors.items() if name not in again}
    encoded = {name: found for name, tensor in whole.items() if (found := _encode(name, tensor, structure))}
    content: dict[str, Tensor] = {}
    for name, tensor in whole.items():
        if name in encoded and not {f"{name}.values", f"{name}.places"} & tensors.keys():
            content |= {f"{name}.values": encoded[name].values, f"{name}.places": encoded[name].places}
        else:  # also where another tensor has the name that it would take
            encoded.pop(name, None)
            content[name] = tensor
    layout = {
        "version": VERSION,
        "weights": {
            name: {
                "encoding": each.encoding,
                "shape": list(each.shape),
                "dtype": str(each.values.dtype).removeprefix("torch."),
                "density": round(density(whole[name]), 6),
            }
            for name, each in encoded.items()
        },
        "tied": again,
    }
    with new_file(path, overwrite) as partial:
        save_file(content, partial, metadata={METADATA_KEY: json.dumps(layout)})
    stored = {name: encoded[name].encoding if name in encoded else "dense" for name in whole}
    return {name: stored.get(name, "tied") for name in tensors}


def load_sparse(path: str | Path) -> dict[str, Tensor]:
    """Read what `save_sparse` has written, as a state dict of dense tensors; other safetensors files as they are.

    Raises:
        TopKastError: the file is damaged, or of a version that this package does not know.
        OSError: it can't be read.
    """
    safetensors = optional("safetensors")
    with open(path, "rb"):  # the error that everyone knows, where there is no such file
        pass
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            layout = json.loads((file.metadata() or {}).get(METADATA_KEY, "null"))
            names = list(file.keys())
            if layout is None:
                return {name: file.get_tensor(name) for name in names}
            return _assemble(layout, names, file.get_tensor)
    except (safetensors.SafetensorError, ValueError, TypeError, KeyError, RuntimeError, MemoryError) as error:
        raise TopKastError(f"{path} is damaged, or no such file: {error}") from error


def _encode(name: str, tensor: Tensor, structure: Structure) -> Encoded | None:
    """None where a tensor is better left as it is."""
    if not is_sparse(tensor):
        return None
    if structure == "2:4" and tensor.dim() == 2:
        _check_two_of_four(name, tensor)
        encoded = encode_two_of_four(tensor)
    else:
        encoded = encode(tensor)
    return encoded if encoded.nbytes + _HEADER < tensor.nbytes else None


def _check_two_of_four(name: str, weight: Tensor) -> None:
    if weight.shape[1] % 4:
        raise TopKastError(f"'{name}' is not 2:4: its rows of {weight.shape[1]} entries are no groups of four")
    over, groups = groups_over_two(weight)
    if over:
        raise TopKastError(
            f"'{name}' is not 2:4: {over / groups:.1%} of its groups of four ({over:,} of {groups:,}) hold more than "
            "two entries that are not zero; nothing was pruned. Store it as unstructured, or train with a 2:4 mask"
        )


def _assemble(layout: Any, names: list[str], read: Callable[[str], Tensor]) -> dict[str, Tensor]:
    if not isinstance(layout, dict) or layout.get("version") != VERSION:
        found = layout.get("version") if isinstance(layout, dict) else layout
        raise TopKastError(f"its layout has version {found!r:.60}, this package reads {VERSION}")
    weights, again = layout["weights"], layout["tied"]
    if not (isinstance(weights, dict) and isinstance(again, dict)):
        raise TopKastError("its layout has no weights and tied tensors by name")
    state: dict[str, Tensor] = {}
    parts = {f"{name}.{part}": name for name in weights for part in ("values", "places")}
    for name in names:
        whole = parts.get(name)
        if whole is None:
            state[name] = read(name)
        elif whole not in state:
            state[whole] = _decode(weights[whole], read(f"{whole}.values"), read(f"{whole}.places"))
    if missing := weights.keys() - state.keys():
        raise TopKastError(f"'{min(missing)}' is missing")
    return state | {name: state[original] for name, original in again.items()}


def _decode(how: Mapping[str, Any], values: Tensor, places: Tensor) -> Tensor:
    shape = tuple(how["shape"])
    if (
        not all(isinstance(size, int) and size >= 0 for size in shape)
        or math.prod(shape) > torch.iinfo(torch.int64).max
    ):
        raise TopKastError(f"the shape {shape} is not valid")
    if str(values.dtype) != f"torch.{how['dtype']}" or places.dtype not in (torch.uint8, torch.uint16):
        raise TopKastError(f"values of {values.dtype} and places of {places.dtype}, expected {how['dtype']} and uint8")
    return decode(Encoded(how["encoding"], shape, values, places))
