"""One thread in every test: the machine is shared, by the other test process at least."""

import torch

torch.set_num_threads(1)
