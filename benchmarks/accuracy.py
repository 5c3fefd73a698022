"""Accuracy of Top-KAST and its ablations: one command, one table.

    python benchmarks/accuracy.py                                   # everything: about an hour on one core
    python benchmarks/accuracy.py --data digits --seeds 0 1         # part of it
    python benchmarks/accuracy.py --table                           # only print what was measured already
    python benchmarks/accuracy.py --results try.csv --override trainer.max_epochs=1 model.channels=[32,64,128]

Every method has the same network, recipe and seeds; nothing is tuned per method. Test accuracy is taken after the last
step, not at the best epoch. Finished runs are kept in benchmarks/results/accuracy.csv and not repeated.
"""

import argparse
import contextlib
import csv
import logging
import math
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from lightning import seed_everything

from lightning_topkast import NonFiniteWeightError
from lightning_topkast.app.train import build_callbacks, build_model

RESULTS = Path(__file__).parent / "results" / "accuracy.csv"
FIELDS = ("data", "model", "method", "seed", "accuracy", "model_sparsity", "seconds")

METHODS = {
    "dense": ["sparsity=dense"],
    "80/50": ["sparsity=topkast_80_50"],
    "90/80": ["sparsity=topkast_90_80"],
    "95/90": ["sparsity=topkast_95_90"],
    "90/80, no penalty": ["sparsity=topkast_90_80", "sparsity.penalty_shrinkage=0"],
    "straight-through 90/0": ["sparsity=straight_through", "sparsity.forward_sparsity=0.9"],
    "90/80, random exploration": ["sparsity=topkast_90_80", "sparsity.exploration=random"],
    "90/80, exploration stopped at 0": ["sparsity=topkast_90_80", "sparsity.stop_exploration_at=0"],
    "90/80, exploration stopped at half": ["sparsity=topkast_90_80", "sparsity.stop_exploration_at=0.5"],
}
NETWORKS = {
    "mlp": ["model=mlp", "model.hidden=[300,100]", "optimizer.weight_decay=0"],
    "cnn": ["model=cnn", "model.channels=[16,32,64]", "optimizer.weight_decay=5e-4"],
}
RECIPES = {
    "digits": ["data=digits", "recipe.update_every=20", "data.split=[0.8,0.0,0.2]"],
    "fashion_mnist": ["data=fashion_mnist", "recipe.update_every=50"],
}
EPOCHS = {
    ("digits", "mlp"): 40, ("digits", "cnn"): 40,
    ("fashion_mnist", "mlp"): 6, ("fashion_mnist", "cnn"): 4,  # of 15 s each
}  # fmt: skip
COMMON = [
    "optimizer=sgd", "optimizer.lr=0.1", "optimizer.momentum=0.9", "scheduler=cosine",
    "logger=none", "callbacks=none", "trainer.accelerator=cpu", "++trainer.enable_progress_bar=false",
    "++trainer.enable_checkpointing=false", "++trainer.limit_val_batches=0", "++trainer.num_sanity_val_steps=0",
]  # fmt: skip


def measure(data: str, model: str, method: str, seed: int, overrides: Sequence[str] = ()) -> dict[str, object]:
    """Train one network and test it; `overrides` come after those of the recipe."""
    with (
        initialize_config_module("lightning_topkast.conf", version_base="1.3"),
        tempfile.TemporaryDirectory() as folder,
    ):
        recipe = [*RECIPES[data], *NETWORKS[model], *COMMON, f"trainer.max_epochs={EPOCHS[data, model]}"]
        run = [*METHODS[method], f"seed={seed}", f"paths.output_dir={folder}"]
        cfg = compose("train", overrides=[*recipe, *run, *overrides])
        seed_everything(seed, verbose=False)
        source = instantiate(cfg.data, _convert_="all")
        task = build_model(cfg).to(memory_format=torch.channels_last)  # half the time of a convolution on CPU
        trainer = instantiate(
            cfg.trainer, logger=False, callbacks=build_callbacks(cfg, has_loggers=False), _convert_="all"
        )
        start = time.perf_counter()
        accuracy = math.nan
        with contextlib.suppress(NonFiniteWeightError):
            trainer.fit(task, datamodule=source)
            accuracy = trainer.test(task, datamodule=source, verbose=False)[0]["test/acc"]
        seconds = time.perf_counter() - start
        zeros = sum(int((p == 0).sum()) for p in task.parameters() if p.dim() > 1)
        return {
            "data": data, "model": model, "method": method, "seed": seed, "accuracy": accuracy,
            "model_sparsity": zeros / sum(p.numel() for p in task.parameters()), "seconds": round(seconds, 1),
        }  # fmt: skip


def finished(results: Path) -> list[dict[str, str]]:
    """Rows measured so far."""
    if not results.exists():
        return []
    with results.open() as file:
        return list(csv.DictReader(file))


def table(rows: list[dict[str, str]]) -> str:
    """Mean ± standard deviation over seeds, in percent, as Markdown."""
    columns = [(d, m) for d, m in product(RECIPES, NETWORKS) if any((r["data"], r["model"]) == (d, m) for r in rows)]
    lines = [
        "| method | " + " | ".join(f"{d.replace('_', ' ')}, {m.upper()}" for d, m in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for method in METHODS:
        cells = []
        for data, model in columns:
            scores = [
                100 * float(row["accuracy"])
                for row in rows
                if (row["data"], row["model"], row["method"]) == (data, model, method)
            ]
            cells.append(cell(scores))
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "Test accuracy in %, mean ± standard deviation (number of seeds)."])


def cell(scores: list[float]) -> str:
    """One field of the table."""
    trained = [score for score in scores if not math.isnan(score)]
    lost = len(scores) - len(trained)
    spread = f" ± {statistics.stdev(trained):.2f}" if len(trained) > 1 else ""
    figure = f"{statistics.mean(trained):.2f}{spread} ({len(trained)})" if trained else ""
    return ", ".join(filter(None, [figure, f"{lost} diverged" if lost else ""]))


def main() -> None:
    """Run what is not in the results yet, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--model", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--table", action="store_true", help="print the table of what was measured already")
    parser.add_argument("--override", nargs="+", default=[], help="of the configuration, for runs kept elsewhere")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where runs are kept (default: %(default)s)")
    arguments = parser.parse_args()
    results = arguments.results
    if arguments.override and results == RESULTS:
        parser.error("runs with --override belong into a file of their own: --results FILE")
    if not arguments.table:
        torch.set_num_threads(1)
        warnings.filterwarnings("ignore")
        logging.disable(logging.WARNING)
        done = {(r["data"], r["model"], r["method"], int(r["seed"])) for r in finished(results)}
        # seed by seed, so that a run broken off has compared all methods on fewer seeds
        jobs = product(arguments.seeds, arguments.data, arguments.model, arguments.method)
        todo = [(*rest, seed) for seed, *rest in jobs if (*rest, seed) not in done]
        results.parent.mkdir(parents=True, exist_ok=True)
        new = not results.exists()
        with results.open("a", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            if new:
                writer.writeheader()
            for number, job in enumerate(todo, start=1):
                row = measure(*job, arguments.override)
                writer.writerow(row)
                file.flush()
                print(f"{number}/{len(todo)}", *row.values(), file=sys.stderr, flush=True)
    print(table(finished(results)))


if __name__ == "__main__":
    main()
