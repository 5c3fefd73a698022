"""How long the exact diversified top-k takes, what it gains over a greedy choice, and how alike trained units are.

    OMP_NUM_THREADS=1 python benchmarks/diverse.py [--quick]

Groups: items around random centres, in conflict above a cosine of 0.85, a tenth of them chosen. Random: every pair in
conflict with the same probability, a fifth of the items chosen. The greedy choice takes the heaviest item that is in
conflict with none of those taken. The networks are MLPs 300-100 on FashionMNIST by the recipe of fan_in.py.
"""

import argparse
from time import process_time

import torch
from fan_in import train
from tables import Row, table
from torch import Tensor
from torch.nn.functional import normalize

from lightning_topkast import diverse_top_k
from lightning_topkast.app.data import FashionMNIST


def groups(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(count // 3, 64, generator=generator)
    items = centres[torch.randint(count // 3, (count,), generator=generator)]
    items = normalize(items + 0.3 * torch.randn(count, 64, generator=generator))
    alike = items @ items.T > 0.85
    return alike | alike.T


def at_random(count: int, density: float) -> Tensor:
    edges = (torch.rand(count, count, generator=torch.Generator().manual_seed(0)) < density).triu(1)
    return edges | edges.T


def greedy(weights: Tensor, conflicts: Tensor, k: int) -> Tensor:
    chosen, conflicts = torch.zeros_like(conflicts[0]), conflicts.clone().fill_diagonal_(False)
    for item in weights.argsort(descending=True).tolist():
        if int(chosen.sum()) < k and not (conflicts[item] & chosen).any():
            chosen[item] = True
    return chosen


def searches(quick: bool) -> None:
    cases = [(f"groups, {count:,} items", groups(count), 10) for count in ((90,) if quick else (300, 1000, 3000))]
    sizes = ((40, 0.1),) if quick else ((100, 0.1), (100, 0.3), (200, 0.05), (200, 0.1))
    cases += [(f"random, {count} items, {density:.0%}", at_random(count, density), 5) for count, density in sizes]
    rows: list[Row] = []
    for name, conflicts, share in cases:
        weights = torch.rand(len(conflicts), generator=torch.Generator().manual_seed(1))
        k = len(conflicts) // share
        start = process_time()
        chosen = diverse_top_k(weights, conflicts, k)
        seconds = process_time() - start
        gain = float(weights[chosen].sum() / weights[greedy(weights, conflicts, k)].sum() - 1)
        pairs = int(conflicts.triu(1).sum())
        rows.append({"items": name, "conflicts": pairs, "k": k, "seconds": seconds, "over greedy": f"{gain:.2%}"})
    table("Exact diversified top-k", rows)


def duplicates(quick: bool, folder: str | None) -> None:
    data = FashionMNIST(folder, batch_size=128, val_size=1 / 12)
    data.prepare_data()
    data.setup()
    rows: list[Row] = []
    for name, sparsities in {"dense": None, "Top-KAST 98/95": (0.98, 0.95)}.items():
        right, model, _ = train(data, 0, 1 if quick else 6, sparsities)
        units = [each.detach() for each in model.parameters() if each.dim() == 2 and len(each) > 10]
        cosines = torch.cat([(normalize(each) @ normalize(each).T)[_pairs(len(each))] for each in units])
        row: Row = {"network": name, "test accuracy": f"{right:.2%}", "pairs of units": len(cosines)}
        rows.append(row | {f"above {bound}": int((cosines > bound).sum()) for bound in (0.5, 0.7, 0.9)})
    table("Cosines of the incoming weights of hidden units", rows)


def _pairs(count: int) -> tuple[Tensor, Tensor]:
    first, second = torch.triu_indices(count, count, 1)
    return first, second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small graphs and one epoch, to see that it runs")
    parser.add_argument("--folder", help="of the data, if it is not where the Debian package or torchvision put it")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    searches(arguments.quick)
    duplicates(arguments.quick, arguments.folder)


if __name__ == "__main__":
    main()
