"""State files that `torch.load(path, weights_only=True)` reads, without this package."""

import warnings
from pathlib import Path

import torch
from torch import Tensor

from lightning_topkast.export.files import new_file
from lightning_topkast.export.state import Source, density, is_sparse, tensors_of, tied
from lightning_topkast.ops import Pattern

_CSR_UP_TO = 0.5  # density; beyond, int32 columns and values take more than the dense weight


def save_dense(source: Source, path: str | Path, overwrite: bool = False) -> dict[str, str]:
    """Write a model's tensors as a plain state dict, sparse weights with their zeros.

    Args:
        source: a model, or its state dict.
        path: of the file.
        overwrite: whether the file may exist already.

    Returns:
        how each tensor is stored: "dense" or "tied".

    Raises:
        TopKastError: an entry is no ordinary tensor, or the file exists.
    """
    tensors = tensors_of(source)
    _save(tensors, path, overwrite)
    again = tied(tensors)
    return {name: "tied" if name in again else "dense" for name in tensors}


def save_csr(source: Source, path: str | Path, overwrite: bool = False) -> dict[str, str]:
    """Write a model's tensors as a state dict in which sparse matrices are torch's CSR tensors, with int32 indices.

    Matrices are the weights with two dimensions; of those with more torch has no CSR products, and they stay dense.
    The sign of a zero is lost.

    Args:
        source: a model, or its state dict.
        path: of the file.
        overwrite: whether the file may exist already.

    Returns:
        how each tensor is stored: "dense", "tied" or "csr".

    Raises:
        TopKastError: an entry is no ordinary tensor, or the file exists.
    """
    tensors = tensors_of(source)
    again = tied(tensors)
    made: dict[str, Tensor] = {}
    stored: dict[str, str] = {}
    for name, tensor in tensors.items():
        if name in again:
            made[name], stored[name] = made[again[name]], "tied"
            continue
        made[name], stored[name] = (_csr(tensor), "csr") if _pays(tensor) else (tensor, "dense")
    _save(made, path, overwrite)
    return stored


def load_csr(path: str | Path) -> dict[str, Tensor]:
    """Read a file of `save_csr` or `save_dense`, CSR tensors as such; the same as `torch.load`, but for one check.

    The check is of CSR indices, which torch skips: those of a damaged file would lead outside of the memory.

    Raises:
        RuntimeError: the file is damaged.
        OSError: it can't be read.
    """
    with torch.sparse.check_sparse_tensor_invariants(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _save(state: dict[str, Tensor], path: str | Path, overwrite: bool) -> None:
    # given a path, torch would not say what the system refused
    with new_file(path, overwrite) as partial, open(partial, "wb") as file:
        torch.save(state, file)


def _pays(tensor: Tensor) -> bool:
    matrix = tensor.dim() == 2 and tensor.element_size() > 1  # torch has next to nothing for 8-bit floats
    return matrix and is_sparse(tensor) and density(tensor) <= _CSR_UP_TO


def _csr(matrix: Tensor) -> Tensor:
    rows, columns = matrix.shape
    flat = matrix.reshape(-1)
    places = torch.nonzero(flat).flatten()
    pattern = Pattern.from_flat(places, (rows, columns), transpose=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(pattern.crow, pattern.col, flat[places], (rows, columns), check_invariants=True)
