"""Export of a trained sparse model: safetensors, PyTorch CSR, plain state dicts and ONNX. See docs/export.md."""

from lightning_topkast.export.onnx_file import OnnxModel, save_onnx
from lightning_topkast.export.sparse_file import load_sparse, save_sparse
from lightning_topkast.export.torch_file import load_csr, save_csr, save_dense

__all__ = ["OnnxModel", "load_csr", "load_sparse", "save_csr", "save_dense", "save_onnx", "save_sparse"]
