"""Which kernels compute convolutions with unstructured sparse weights."""

from pathlib import Path

from lightning_topkast.ops import entries  # noqa: F401  the kernels implement its operators
from lightning_topkast.ops.compiled import Compiled
from lightning_topkast.ops.conv import library  # noqa: F401  and these

CONV_KERNELS = Compiled(
    Path(__file__).with_name("kernels.cpp"),
    "sparse convolutions",
    "computing convolutions with dense copies of weights",
)
