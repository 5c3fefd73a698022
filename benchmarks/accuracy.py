"""Accuracy of Top-KAST and its ablations: one command, one table.

    python benchmarks/accuracy.py                                   # everything: about an hour on one core
    python benchmarks/accuracy.py --data digits --seeds 0 1         # part of it
    python benchmarks/accuracy.py --table                           # only print what was measured already

Every method has the same network, recipe and seeds; nothing is tuned per method. Test accuracy is taken after the last
step, not at the best epoch. Finished runs are kept in benchmarks/results/accuracy.csv and not repeated.
"""

import argparse
import csv
import logging
import statistics
import sys
import tempfile
import time
import warnings
from itertools import product
from pathlib import Path

import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from lightning import seed_everything

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
    "mlp": ["model=mlp", "model.hidden=[300,100]"],
    "cnn": ["model=cnn", "model.channels=[8,16,32]"],
}
RECIPES = {
    "digits": ["data=digits", "trainer.max_epochs=40", "recipe.update_every=20", "data.split=[0.8,0.0,0.2]"],
    "fashion_mnist": ["data=fashion_mnist", "trainer.max_epochs=4", "recipe.update_every=50"],
}
COMMON = [
    "optimizer=sgd", "optimizer.lr=0.1", "optimizer.momentum=0.9", "optimizer.weight_decay=5e-4", "scheduler=cosine",
    "logger=none", "callbacks=none", "trainer.accelerator=cpu", "+trainer.enable_progress_bar=false",
    "+trainer.enable_checkpointing=false", "+trainer.limit_val_batches=0", "+trainer.num_sanity_val_steps=0",
]  # fmt: skip


def measure(data: str, model: str, method: str, seed: int) -> dict[str, object]:
    """Train one network and test it."""
    with (
        initialize_config_module("lightning_topkast.conf", version_base="1.3"),
        tempfile.TemporaryDirectory() as folder,
    ):
        overrides = [*RECIPES[data], *NETWORKS[model], *COMMON, *METHODS[method], f"seed={seed}"]
        cfg = compose("train", overrides=[*overrides, f"paths.output_dir={folder}"])
        seed_everything(seed, verbose=False)
        source = instantiate(cfg.data, _convert_="all")
        task = build_model(cfg)
        trainer = instantiate(
            cfg.trainer, logger=False, callbacks=build_callbacks(cfg, has_loggers=False), _convert_="all"
        )
        start = time.perf_counter()
        trainer.fit(task, datamodule=source)
        seconds = time.perf_counter() - start
        (figures,) = trainer.test(task, datamodule=source, verbose=False)
        zeros = sum(int((p == 0).sum()) for p in task.parameters() if p.dim() > 1)
        return {
            "data": data, "model": model, "method": method, "seed": seed, "accuracy": figures["test/acc"],
            "model_sparsity": zeros / sum(p.numel() for p in task.parameters()), "seconds": round(seconds, 1),
        }  # fmt: skip


def finished() -> list[dict[str, str]]:
    """Rows measured so far."""
    if not RESULTS.exists():
        return []
    with RESULTS.open() as file:
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
            spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
            cells.append(f"{statistics.mean(scores):.2f}{spread} ({len(scores)})" if scores else "")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "Test accuracy in %, mean ± standard deviation (number of seeds)."])


def main() -> None:
    """Run what is not in the results yet, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--model", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--table", action="store_true", help="print the table of what was measured already")
    arguments = parser.parse_args()
    if not arguments.table:
        torch.set_num_threads(1)
        warnings.filterwarnings("ignore")
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        done = {(r["data"], r["model"], r["method"], int(r["seed"])) for r in finished()}
        # seed by seed, so that a run broken off has compared all methods on fewer seeds
        jobs = product(arguments.seeds, arguments.data, arguments.model, arguments.method)
        todo = [(*rest, seed) for seed, *rest in jobs if (*rest, seed) not in done]
        RESULTS.parent.mkdir(exist_ok=True)
        new = not RESULTS.exists()
        with RESULTS.open("a", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            if new:
                writer.writeheader()
            for number, job in enumerate(todo, start=1):
                row = measure(*job)
                writer.writerow(row)
                file.flush()
                print(f"{number}/{len(todo)}", *row.values(), file=sys.stderr, flush=True)
    print(table(finished()))


if __name__ == "__main__":
    main()
