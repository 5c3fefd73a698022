"""A stand-in for a CUDA graph, on CPU: it records PyTorch's operators and repeats them on the same memory."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::masked_select", "aten::equal")


class RecordedGraph:
    """Like `CudaGraph`. A capture leaves everything as it was, and fails where the device's values are read."""

    captures, recorders = 0, []

    @staticmethod
    def supports(tensor):
        return True

    @staticmethod
    def is_capturing():
        return bool(RecordedGraph.recorders)

    def warm_up(self, function):
        return function()

    def capture(self, function):
        RecordedGraph.captures += 1
        self.recorder = Recorder()
        RecordedGraph.recorders.append(self.recorder)
        try:
            with self.recorder:
                return function()
        finally:
            self.recorder.undo()
            RecordedGraph.recorders.clear()

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, written, outputs in self.recorder.calls:
            # a graph tells no version counter that it has written
            with torch.autograd._unsafe_preserve_version_counter(tuple(written)):
                result = func(*args, **kwargs)
            for kept, again in zip(outputs, tensors(result) if outputs else [], strict=True):
                kept.copy_(again)


class Recorder(TorchDispatchMode):
    """Records the calls of operators that are no views, and what was in the memory that they write to."""

    def __init__(self):
        super().__init__()
        self.calls, self.saved, self.own = [], {}, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        schema = func._schema
        if schema.name in READS:
            raise RuntimeError(f"{schema.name} reads the device's values")
        given = {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)} | kwargs
        written = [given[each.name] for each in schema.arguments if each.is_write and given.get(each.name) is not None]
        written = tensors(written)
        for tensor in written:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.own and storage.data_ptr() not in self.saved:
                self.saved[storage.data_ptr()] = storage, storage.clone()
        with torch.no_grad():  # autograd has done its part
            result = func(*args, **kwargs)
        outputs = tensors(result)
        is_view = not written and any(each.alias_info is not None for each in schema.returns)
        if not is_view:
            self.calls.append((func, args, kwargs, written, [] if written else outputs))
        if not is_view and not written:
            self.own |= {each.untyped_storage().data_ptr() for each in outputs}
        return result

    def undo(self):
        for storage, before in self.saved.values():
            storage.copy_(before)


def tensors(tree):
    return [each for each in tree_leaves(tree) if isinstance(each, Tensor)]
