"""CUDA graphs of a function."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class CudaGraph:
    """A CUDA graph of one function, and the stream on which the function is called outside of it."""

    def __init__(self) -> None:
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream = torch.cuda.Stream()

    @staticmethod
    def supports(tensor: Tensor) -> bool:
        """Return whether work on a tensor can be captured."""
        return tensor.is_cuda

    @staticmethod
    def is_capturing() -> bool:
        """Return whether a graph of the device is being captured."""
        return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()

    def warm_up(self, function: Callable[[], Any]) -> Any:
        """Call the function on the graph's stream, as PyTorch demands before a capture, and return its result."""
        own = torch.cuda.current_stream()
        self._stream.wait_stream(own)
        with torch.cuda.stream(self._stream):
            result = function()
        own.wait_stream(self._stream)
        return result

    def capture(self, function: Callable[[], Any]) -> Any:
        """Record what the function does and return its result, whose tensors are computed by `replay`."""
        self._graph = None  # its memory is free for the next one
        graph, failure = torch.cuda.CUDAGraph(), None
        try:
            # other threads may use the device meanwhile, as one that chooses sets in the background does
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                try:
                    result = function()
                except BaseException as error:
                    failure = error
                    raise
        except Exception as error:  # the end of a capture that has failed raises too, and says less
            raise failure or error from None
        self._graph = graph
        return result

    def replay(self) -> None:
        """Do what was recorded."""
        assert self._graph is not None, "nothing was captured"
        self._graph.replay()
