"""Which kernels multiply by unstructured sparse matrices."""

from pathlib import Path

from lightning_topkast.ops import entries  # noqa: F401  the kernels implement its operators
from lightning_topkast.ops.compiled import Compiled
from lightning_topkast.ops.csr import library  # noqa: F401  and these

MATRIX_KERNELS = Compiled(
    Path(__file__).with_name("kernels.cpp"),
    "sparse matrices",
    "using PyTorch's sparse operators, which are slower than dense ones at sparsities of 80/50",
)
