"""The library of this package's operators, `torch.ops.topkast`."""

import torch

LIBRARY = torch.library.Library("topkast", "DEF")
