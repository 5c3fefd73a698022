"""Top-KAST with its entries divided among the weights in four ways: an MLP 300-100 on FashionMNIST.

    OMP_NUM_THREADS=1 python benchmarks/distribution.py [--seeds 0 1 2 3 4] [--epochs 6]

The recipe is that of fan_in.py and docs/results.md; test accuracy after the last step, and the forward densities of
the weights then, in %, of the first seed.
"""

import argparse
from statistics import mean, stdev

import torch
from fan_in import train
from tables import Row, table

from lightning_topkast import keep_freed_memory
from lightning_topkast.app.data import FashionMNIST

DISTRIBUTIONS = ("uniform", "erk", "global", "global_normalized")
PAIRS = ((0.9, 0.8), (0.98, 0.95), (0.995, 0.99))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="(default: 0 1 2 3 4)")
    parser.add_argument("--epochs", type=int, default=6, help="(default: %(default)s)")
    parser.add_argument("--pair", type=float, nargs=2, action="append", help="of sparsities (default: all)")
    parser.add_argument("--folder", help="of the data, if it is not where the Debian package or torchvision put it")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    data = FashionMNIST(arguments.folder, batch_size=128, val_size=1 / 12)
    data.prepare_data()
    data.setup()
    rows: list[Row] = []
    for sparsities in arguments.pair or PAIRS:
        for distribution in DISTRIBUTIONS:
            reached, densities = [], ""
            for seed in arguments.seeds:
                right, _, topkast = train(data, seed, arguments.epochs, sparsities, distribution=distribution)
                reached.append(100 * right)
                assert topkast is not None
                each = [100 * int(weight.active_entries) / weight.size for weight in topkast.weights.values()]
                densities = densities or " / ".join(f"{density:.1f}" for density in each)
                print(f"{sparsities} {distribution} seed {seed}: {right:.4f}", flush=True)
            deviation = f" ± {stdev(reached):.2f}" if len(reached) > 1 else ""
            sparsity = "/".join(f"{100 * each:.3g}" for each in sparsities)
            row: Row = {"sparsity": sparsity, "distribution": distribution}
            rows.append(row | {"test accuracy": f"{mean(reached):.2f}{deviation}", "densities": densities})
    print()
    table(f"FashionMNIST, MLP 300-100, {arguments.epochs} epochs, {len(arguments.seeds)} seeds", rows)


if __name__ == "__main__":
    main()
