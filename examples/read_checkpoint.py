"""Read a sparse checkpoint without lightning-topkast. Run: python examples/read_checkpoint.py CKPT"""

import sys

import torch

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    checkpoint = torch.load(sys.argv[1], map_location="cpu", weights_only=True)
    kept = total = 0
    for name, tensor in checkpoint["state_dict"].items():
        used = int(torch.count_nonzero(tensor))
        kept, total = kept + used, total + tensor.numel()
        if tensor.dim() > 1:
            print(f"{name:40} {tuple(tensor.shape)!s:20} {1 - used / tensor.numel():7.2%} zeros")
    print(f"{kept:,} of {total:,} numbers are not zero")
    # Your module's own load_from_checkpoint works too, and gives the sparse network.
