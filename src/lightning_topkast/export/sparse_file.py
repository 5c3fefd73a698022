"""Safetensors files that store only the non-zero entries of sparse weights."""

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

_HEADER = 256  # approximate size of a sparse weight's metadata in a file's header, in bytes

Structure = Literal["unstructured", "2:4"]


def save_sparse(
    source: Source, path: str | Path, structure: Structure = "unstructured", overwrite: bool = False
) -> dict[str, str]:
    """Write a model's tensors to a safetensors file, with sparse weights in a smaller encoding, bit for bit.

    Floating-point tensors with at least two dimensions count as sparse if at least a tenth of them is zero, and are
    encoded if that is smaller. Tied tensors are stored once. See docs/export.md for the layout.

    Args:
        source: a model, or its state dict.
        path: of the file.
        structure: "2:4" encodes sparse matrices as 2:4, and refuses those that are not.
        overwrite: whether the file may exist already.

    Returns:
        the storage of each tensor: "dense", "tied" or its encoding.

    Raises:
        TopKastError: a weight is not 2:4, an entry is not an ordinary tensor, or the file exists.
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
        else:  # also if another tensor already has one of the two names
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
    """Read a file of `save_sparse` as a state dict of dense tensors; read other safetensors files unchanged.

    Raises:
        TopKastError: the file is damaged, or has a version that this package does not support.
        OSError: the file cannot be read.
    """
    safetensors = optional("safetensors")
    with open(path, "rb"):  # raises the usual error if there is no such file
        pass
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            layout = json.loads((file.metadata() or {}).get(METADATA_KEY, "null"))
            names = list(file.keys())
            if layout is None:
                return {name: file.get_tensor(name) for name in names}
            return _assemble(layout, names, file.get_tensor)
    except (safetensors.SafetensorError, ValueError, TypeError, KeyError, RuntimeError, MemoryError) as error:
        raise TopKastError(f"{path} is damaged, or not a safetensors file: {error}") from error


def _encode(name: str, tensor: Tensor, structure: Structure) -> Encoded | None:
    """Return the encoded tensor, or None if it is smaller unencoded."""
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
        raise TopKastError(f"'{name}' is not 2:4: its rows of {weight.shape[1]} entries are not a multiple of four")
    over, groups = groups_over_two(weight)
    if over:
        raise TopKastError(
            f"'{name}' is not 2:4: {over / groups:.1%} of its groups of four ({over:,} of {groups:,}) hold more than "
            "two non-zero entries; nothing was pruned. Store it as unstructured, or train with structure='2:4'"
        )


def _assemble(layout: Any, names: list[str], read: Callable[[str], Tensor]) -> dict[str, Tensor]:
    if not isinstance(layout, dict) or layout.get("version") != VERSION:
        found = layout.get("version") if isinstance(layout, dict) else layout
        raise TopKastError(f"expected a layout of version {VERSION}, got {found!r:.60}")
    weights, again = layout["weights"], layout["tied"]
    if not (isinstance(weights, dict) and isinstance(again, dict)):
        raise TopKastError("expected a layout with weights and tied tensors by name")
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
        raise TopKastError(f"expected values of {how['dtype']} and places of uint8, got {values.dtype}, {places.dtype}")
    return decode(Encoded(how["encoding"], shape, values, places))
