"""Writing ONNX files and running them."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_topkast.errors import TopKastError
from lightning_topkast.export.files import check_target, new_file, optional
from lightning_topkast.export.state import is_sparse, nbytes, tensors_of
from lightning_topkast.layers import dense_copy

_LARGEST = 2**31 - 2**20  # largest size of the weights in a protobuf, in bytes


def save_onnx(
    model: nn.Module,
    example: Tensor | Sequence[Tensor],
    path: str | Path,
    sparse: bool = False,
    overwrite: bool = False,
    any_size: Sequence[int] = (0,),
) -> None:
    """Write a model in evaluation mode as an ONNX file for batches of any size.

    Args:
        model: takes tensors and returns one; it is not changed.
        example: an input (batch, ...) with a batch size of at least 1, or a list of all inputs in their order.
        path: of the file.
        sparse: store sparse weights as the values and places of their non-zero entries, from which standard operators
            make the weights. The file is small; onnxruntime makes the weights dense once, when it loads the file.
        overwrite: whether the file may exist already.
        any_size: dimensions that may have other sizes than in the example, of all inputs that have them: (0, 1) for
            texts of any length. Sizes that are equal in the example stay equal; all but the batch must be at least 2.

    Raises:
        TopKastError: PyTorch cannot export the model for every size; the model does not fit one file of 2 GiB;
            the file exists; the extra `export` is not installed.
    """
    check_target(Path(path), overwrite)
    onnx = optional("onnx")
    optional("onnxscript")
    if (size := nbytes(tensors_of(model))) > _LARGEST:
        raise TopKastError(f"expected at most 2 GiB of weights, the limit of an ONNX file, got {size:,} bytes")
    plain = dense_copy(model).cpu().eval()
    inputs = [each.cpu() for each in ([example] if isinstance(example, Tensor) else example)]
    if all(len(each) == 1 for each in inputs):  # which torch.export treats as a constant
        inputs = [torch.cat([each] * 2) for each in inputs]
    names = ["input"] if len(inputs) == 1 else [f"input{number}" for number in range(1, len(inputs) + 1)]
    sizes = [{at: _dimension(at, each.shape[at]) for at in any_size if at < each.dim()} for each in inputs]
    try:
        with _quiet():
            program = torch.onnx.export(
                plain,
                tuple(inputs),
                dynamo=True,
                verbose=False,
                input_names=names,
                output_names=["output"],
                dynamic_shapes=tuple(sizes) if _takes_each(plain) else (tuple(sizes),),
            )
    except Exception as error:  # many classes, with messages of several pages
        raise TopKastError(f"PyTorch cannot export this {type(model).__name__} to ONNX: {_reason(error)}") from error
    assert program is not None  # the exporter does not write a file itself here
    proto = program.model_proto
    _forget_sources(proto)
    if sparse:
        _make_sparse(proto)
    with new_file(path, overwrite) as partial:
        onnx.save(proto, partial)


class OnnxModel:
    """An ONNX file of `save_onnx`, run by onnxruntime on CPU.

    Args:
        path: of the file.
        threads: number of onnxruntime's threads; 0 uses its default.

    Raises:
        TopKastError: onnxruntime cannot load the file.
    """

    def __init__(self, path: str | Path, threads: int = 0) -> None:
        onnxruntime = optional("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors have no common class
            raise TopKastError(f"onnxruntime cannot load {path}: {_reason(error)}") from error
        self._inputs = [each.name for each in self._session.get_inputs()]

    def __call__(self, *inputs: Tensor) -> Tensor:
        """`inputs` (batch, ...) → output of the model."""
        given = [each.detach().cpu().contiguous().numpy() for each in inputs]
        (output,) = self._session.run(None, dict(zip(self._inputs, given, strict=True)))
        return torch.from_numpy(output)


def _dimension(at: int, size: int) -> Any:
    """Return what stands for a dimension of any size: the same for equal sizes at the same place."""
    return torch.export.Dim("batch" if at == 0 else f"size{at}_{size}")


def _takes_each(model: nn.Module) -> bool:
    """Return whether `forward` names its inputs one by one, and not as `*inputs`."""
    kinds = [each.kind for each in signature(model.forward).parameters.values()]
    return Parameter.VAR_POSITIONAL not in kinds


def _forget_sources(proto: Any) -> None:
    """Remove the origin of each node, since it contains source lines and folders of this machine."""
    graph = proto.graph
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del part.metadata_props[:]


def _make_sparse(proto: Any) -> None:
    """Store sparse weights as their values and places, from which the graph makes them.

    ONNX has sparse initializers, but no operator's type allows them, so that its full check refuses such a file.
    """
    helper, numpy_helper, types = optional("onnx.helper"), optional("onnx.numpy_helper"), optional("onnx").TensorProto
    graph = proto.graph
    dense, nodes = list(graph.initializer), list(graph.node)
    del graph.initializer[:], graph.node[:]
    for initializer in dense:
        known = initializer.data_type in (types.FLOAT, types.DOUBLE, types.FLOAT16)  # NumPy supports no others
        weight = numpy_helper.to_array(initializer) if known else None
        if weight is None or not is_sparse(torch.tensor(weight)):
            graph.initializer.append(initializer)
            continue
        name = initializer.name
        entries = np.flatnonzero(weight)
        kind = types.INT32 if weight.size <= np.iinfo(np.int32).max else types.INT64
        # unless the data are raw, protobuf writes small integers in two or three bytes
        places = helper.make_tensor(f"{name}.places", kind, entries.shape, entries, raw=False)
        values = numpy_helper.from_array(weight.reshape(-1)[entries], f"{name}.values")
        size = numpy_helper.from_array(np.array([weight.size]), f"{name}.size")
        shape = numpy_helper.from_array(np.array(weight.shape), f"{name}.shape")
        zero = numpy_helper.from_array(np.zeros((), weight.dtype), f"{name}.zero")
        graph.initializer.extend([places, values, size, shape, zero])
        graph.node.extend(
            [
                helper.make_node("Expand", [zero.name, size.name], [f"{name}.zeros"]),
                helper.make_node(
                    "ScatterElements", [f"{name}.zeros", places.name, values.name], [f"{name}.flat"], axis=0
                ),
                helper.make_node("Reshape", [f"{name}.flat", shape.name], [name]),
            ]
        )
    graph.node.extend(nodes)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporter's warnings about optional packages, and PyTorch's about its internals."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _reason(error: BaseException) -> str:
    """Return the first line of the first cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
