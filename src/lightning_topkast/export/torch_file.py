"""State dict files that `torch.load(path, weights_only=True)` reads without this package."""

import warnings
from pathlib import Path

import torch
from torch import Tensor

from lightning_topkast.export.files import new_file
from lightning_topkast.export.state import Source, density, is_sparse, tensors_of, tied
from lightning_topkast.loading import load
from lightning_topkast.ops import Pattern

_CSR_UP_TO = 0.5  # density above which int32 columns and values take more space than the dense weight


def save_dense(source: Source, path: str | Path, overwrite: bool = False) -> dict[str, str]:
    """Write a model's tensors as a plain state dict; sparse weights include their zeros.

    Args:
        source: a model, or its state dict.
        path: of the file.
        overwrite: whether the file may exist already.

    Returns:
        the storage of each tensor: "dense" or "tied".

    Raises:
        TopKastError: an entry is not an ordinary tensor, or the file exists.
    """
    tensors = tensors_of(source)
    _save(tensors, path, overwrite)
    again = tied(tensors)
    return {name: "tied" if name in again else "dense" for name in tensors}


def save_csr(source: Source, path: str | Path, overwrite: bool = False) -> dict[str, str]:
    """Write a model's tensors as a state dict in which sparse matrices are PyTorch CSR tensors with int32 indices.

    Weights with more than two dimensions stay dense, since PyTorch has no CSR products for them. The sign of a zero is
    lost.

    Args:
        source: a model, or its state dict.
        path: of the file.
        overwrite: whether the file may exist already.

    Returns:
        the storage of each tensor: "dense", "tied" or "csr".

    Raises:
        TopKastError: an entry is not an ordinary tensor, or the file exists.
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
    """Read a file of `save_csr` or `save_dense` as `torch.load` does, with a check of CSR indices.

    PyTorch skips this check, but indices of a damaged file could access memory out of bounds.

    Raises:
        RuntimeError: the file is damaged.
        OSError: the file cannot be read.
    """
    with torch.sparse.check_sparse_tensor_invariants(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        state: dict[str, Tensor] = load(Path(path))
    return state


def _save(state: dict[str, Tensor], path: str | Path, overwrite: bool) -> None:
    # with a path, PyTorch would not report the system's error
    with new_file(path, overwrite) as partial, open(partial, "wb") as file:
        torch.save(state, file)


def _pays(tensor: Tensor) -> bool:
    matrix = tensor.dim() == 2 and tensor.element_size() > 1  # PyTorch supports few operations on 8-bit floats
    return matrix and is_sparse(tensor) and density(tensor) <= _CSR_UP_TO


def _csr(matrix: Tensor) -> Tensor:
    rows, columns = matrix.shape
    flat = matrix.reshape(-1)
    places = torch.nonzero(flat).flatten()
    pattern = Pattern.from_flat(places, (rows, columns), transpose=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(pattern.crow, pattern.col, flat[places], (rows, columns), check_invariants=True)
