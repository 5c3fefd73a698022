"""DART beside other ways to find which layers stay dense, by as many trained networks.

    OMP_NUM_THREADS=1 python benchmarks/dart.py [--seeds 4] [--steps 60]

The problem is that of examples/dense_layers.py: all 56 sets of three of eight layers are trained with several seeds,
and each search is then played 300 times with rewards drawn from these. What is shown is the mean accuracy of the set
that a search ends with.

random search: sets drawn at random, of which that with the best mean reward is taken.
random sets: drawn likewise, and the three layers with the best mean rewards are taken.
halving: all sets that the budget allows in a first round, of which the better half goes on, and so on.
"""

import argparse
import itertools
import random
import runpy
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from tables import Row, table

from lightning_topkast import Dart

Set = tuple[int, ...]
EXAMPLE = Path(__file__).parents[1] / "examples" / "dense_layers.py"
LAYERS, DENSE = 8, 3
SETS = list(itertools.combinations(range(LAYERS), DENSE))


def dart(reward: Callable[[Set], float], budget: int, chance: random.Random) -> Set:
    search = Dart(LAYERS, DENSE, budget, chance.randrange(2**31))
    for _ in range(budget):
        search.tell(reward(search.ask()))
    return search.best()


def random_search(reward: Callable[[Set], float], budget: int, chance: random.Random) -> Set:
    seen: dict[Set, list[float]] = {}
    for _ in range(budget):
        tried = chance.choice(SETS)
        seen.setdefault(tried, []).append(reward(tried))
    return max(seen, key=lambda tried: statistics.mean(seen[tried]))


def random_sets(reward: Callable[[Set], float], budget: int, chance: random.Random) -> Set:
    seen: list[list[float]] = [[0.0] for _ in range(LAYERS)]
    for _ in range(budget):
        tried = chance.choice(SETS)
        gained = reward(tried)
        for layer in tried:
            seen[layer].append(gained)
    ranked = sorted(range(LAYERS), key=lambda layer: -statistics.mean(seen[layer][1:] or seen[layer]))
    return tuple(sorted(ranked[:DENSE]))


def halving(reward: Callable[[Set], float], budget: int, chance: random.Random) -> Set:
    alive = chance.sample(SETS, min(len(SETS), budget // 2))
    seen: dict[Set, list[float]] = {tried: [] for tried in alive}
    while budget and len(alive) > 1:
        for tried in alive[:budget]:
            seen[tried].append(reward(tried))
        budget -= min(budget, len(alive))
        alive = sorted(alive, key=lambda tried: -statistics.mean(seen[tried] or [0.0]))[: (len(alive) + 1) // 2]
    return alive[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4, help="networks for each set (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="of each network (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    trained = runpy.run_path(str(EXAMPLE))["reward"]
    seeds = range(arguments.seeds)
    rewards = {tried: [trained(tried, seed, arguments.steps) for seed in seeds] for tried in SETS}
    means = {tried: statistics.mean(values) for tried, values in rewards.items()}
    ranked = sorted(SETS, key=lambda tried: -means[tried])
    print(f"best {ranked[0]} {means[ranked[0]]:.3f}, second {ranked[1]} {means[ranked[1]]:.3f}, ", end="")
    print(f"mean {statistics.mean(means.values()):.3f}, worst {ranked[-1]} {means[ranked[-1]]:.3f}\n")
    rows: list[Row] = []
    for search in (dart, random_sets, random_search, halving):
        row: Row = {"search": search.__name__.replace("_", " ")}
        for budget in (20, 40, 80, 160, 640):
            chance = random.Random(0)
            found = [
                means[search(lambda tried: chance.choice(rewards[tried]), budget, chance)]  # noqa: B023
                for _ in range(300)
            ]
            row[f"{budget} networks"] = statistics.mean(found)
        rows.append(row)
    table(f"Three of eight layers dense, {arguments.steps} steps", rows)


if __name__ == "__main__":
    main()
