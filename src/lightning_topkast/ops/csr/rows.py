"""Compressed rows of flat indices, and their transpose, with the fastest method."""

import numpy as np
import torch
from torch import Tensor

from lightning_topkast.ops.memory import empty
from lightning_topkast.ops.passes import passes_over


def compressed_rows(entries: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return `Pattern.crow` and `Pattern.col` of flat indices (int64, 1-D) that `check_indices` accepts."""
    if passes := passes_over(entries):
        crow, col = entries.new_empty(rows + 1, dtype=torch.int32), empty(entries.numel(), torch.int32)
        passes("rows", entries, entries.numel(), rows, columns, crow, col)
        return crow, col
    places = entries.numpy()
    starts = np.arange(rows + 1, dtype=np.int64) * columns
    crow = torch.from_numpy(np.searchsorted(places, starts).astype(np.int32))
    return crow, torch.from_numpy(places - starts[_rows_of(crow, entries.numel()).numpy()]).int()


def transposed(crow: Tensor, col: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return `Pattern.t_crow`, `t_col` and `t_order` of compressed rows."""
    if passes := passes_over(crow, col):
        t_crow = crow.new_empty(columns + 1)
        t_col, t_order = empty(col.numel(), torch.int32), empty(col.numel(), torch.int32)
        passes("transpose", crow, col, crow.numel() - 1, columns, t_crow, t_col, t_order)
        return t_crow, t_col, t_order
    # a stable sort by column keeps the rows in order; PyTorch uses a radix sort
    sorted_columns, order = torch.sort(col, stable=True)
    t_crow = torch.searchsorted(sorted_columns, torch.arange(columns + 1, dtype=torch.int32), out_int32=True)
    return t_crow, _rows_of(crow, col.numel())[order], order.int()


def flat_indices(crow: Tensor, col: Tensor, columns: int, out: Tensor) -> None:
    """Write the flat indices (int64) of compressed rows into `out`."""
    if passes := passes_over(crow, col, out):
        passes("flat", crow, col, crow.numel() - 1, columns, out)
    else:
        torch.add(_rows_of(crow, col.numel()).long() * columns, col, out=out)


def _rows_of(crow: Tensor, entries: int) -> Tensor:
    rows = torch.arange(crow.numel() - 1, dtype=torch.int32, device=crow.device)
    # with its size given, a GPU need not be asked for it, nor a graph of torch.compile end here
    return torch.repeat_interleave(rows, crow.diff(), output_size=entries)
