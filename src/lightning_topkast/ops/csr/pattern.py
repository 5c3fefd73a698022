"""The places of the entries of a sparse matrix."""

from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from lightning_topkast.ops.csr.rows import compressed_rows, flat_indices, transposed
from lightning_topkast.ops.flat import check_indices

_LARGEST = torch.iinfo(torch.int32).max


@dataclass(frozen=True, eq=False)
class Pattern:
    """The places of a sparse matrix's entries, as compressed rows (CSR), and those of its transpose.

    Attributes:
        shape: rows and columns of the matrix.
        crow: int32 (rows + 1,); row r holds the entries crow[r] to crow[r + 1].
        col: int32 (nnz,); the column of each entry.
        t_crow: int32 (columns + 1,); `crow` of the transpose. Like the next two, empty if it was not requested.
        t_col: int32 (nnz,); `col` of the transpose.
        t_order: int32 (nnz,); entry k of the transpose is entry t_order[k] of the matrix.
    """

    shape: tuple[int, int]
    crow: Tensor
    col: Tensor
    t_crow: Tensor
    t_col: Tensor
    t_order: Tensor

    @classmethod
    def from_flat(cls, indices: Tensor, shape: tuple[int, int], transpose: bool = True) -> "Pattern":
        """Make the pattern of entries with these flat row-major indices.

        Args:
            indices: int64 (nnz,) on CPU, strictly increasing.
            shape: rows and columns.
            transpose: also make the transpose, which the gradient of a product's input needs.

        Raises:
            ValueError: the indices are out of range or not strictly increasing, or too many for int32.
        """
        rows, columns = shape
        if not cls.fits(shape, indices.numel()):
            raise ValueError(f"{indices.numel()} entries in {rows} × {columns} exceed the int32 limit of {_LARGEST}")
        check_indices(indices, rows * columns)
        crow, col = compressed_rows(indices, rows, columns)
        nothing = torch.empty(0, dtype=torch.int32)
        of_transpose = transposed(crow, col, columns) if transpose else (nothing, nothing, nothing)
        return cls((rows, columns), crow, col, *of_transpose)

    @staticmethod
    def fits(shape: tuple[int, int], entries: int) -> bool:
        """Return whether int32 can hold the indices of this many entries of a matrix."""
        return max(*shape, entries) <= _LARGEST

    def check(self) -> None:
        """Refuse what are no compressed rows of this shape, on CPU; `from_flat` makes only such that are.

        Raises:
            ValueError: they are not.
        """
        rows, columns = self.shape
        count = int(self.crow[-1])
        if int(self.crow[0]) or count != self.nnz or not bool((self.crow.diff() >= 0).all()):
            raise ValueError(f"expected {count} columns in {rows} rows, got {self.nnz}")
        if self.nnz and not (int(self.col.min()) >= 0 and int(self.col.max()) < columns):
            raise ValueError(f"expected columns below {columns}, got {int(self.col.min())} to {int(self.col.max())}")
        entries = torch.empty(self.nnz, dtype=torch.int64, device="cpu")
        self.write_indices(entries)
        check_indices(entries, rows * columns)

    def to(self, device: torch.device | str) -> "Pattern":
        """Return the same pattern on another device."""
        return Pattern(self.shape, *(tensor.to(device) for tensor in self._tensors()))

    def write_indices(self, out: Tensor) -> None:
        """Write the flat indices of the entries, the inverse of `from_flat`, into `out`: int64 (nnz,)."""
        flat_indices(self.crow, self.col, self.shape[1], out)

    @property
    def nnz(self) -> int:
        """Number of entries of the matrix."""
        return self.col.numel()

    @property
    def nbytes(self) -> int:
        """Size of the indices in bytes."""
        return sum(tensor.nbytes for tensor in self._tensors())

    def _tensors(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)[1:]]


@dataclass(frozen=True, eq=False)
class CsrPattern:
    r"""The places of a weight's entries for PyTorch's operators, on any device.

    The values lie as in `Structure.order`: those of A by flat index, then those of B\A.

    Attributes:
        places: of A's entries in (out, in), or `transposed` in (in, out). Without a transpose, there is no gradient.
        exploring: those of B\A, whose transpose is not used.
        transposed: whether the inputs come first.
    """

    kernels: ClassVar[str] = "torch"

    places: Pattern
    exploring: Pattern
    transposed: bool = False

    @classmethod
    def from_flat(
        cls, active: Tensor, exploring: Tensor, shape: tuple[int, int], transposed: bool = False
    ) -> "CsrPattern":
        r"""Make the pattern of a weight from the flat indices of A and of B\A; see `Pattern.from_flat`."""
        return cls(Pattern.from_flat(active, shape), Pattern.from_flat(exploring, shape, transpose=False), transposed)

    def to(self, device: torch.device | str) -> "CsrPattern":
        """Return the same pattern on another device."""
        return CsrPattern(self.places.to(device), self.exploring.to(device), self.transposed)

    def flat_indices(self) -> Tensor:
        """Return the flat indices of the values, int64."""
        both = torch.empty(self.updated, dtype=torch.int64, device=self.device)
        self.places.write_indices(both[: self.places.nnz])
        self.exploring.write_indices(both[self.places.nnz :])
        return both

    @property
    def rows(self) -> int:
        """Number of outputs."""
        return self.places.shape[1 if self.transposed else 0]

    @property
    def channels(self) -> int:
        """Number of inputs."""
        return self.places.shape[0 if self.transposed else 1]

    @property
    def updated(self) -> int:
        """|B|."""
        return self.places.nnz + self.exploring.nnz

    @property
    def device(self) -> torch.device:
        """The device of the indices."""
        return self.places.col.device

    @property
    def index(self) -> list[Tensor]:
        """The tensors of the indices, as the operators take them."""
        a, m = self.places, self.exploring
        return [a.crow, a.col, a.t_crow, a.t_col, a.t_order, m.crow, m.col]

    @property
    def sizes(self) -> list[int]:
        """The numbers that describe the matrix, as the operators take them."""
        return [self.rows, self.channels, int(self.transposed)]

    @property
    def nbytes(self) -> int:
        """Size of the indices in bytes."""
        return self.places.nbytes + self.exploring.nbytes
