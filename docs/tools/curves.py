"""Draws docs/curves_wrong.png: what curves look like when something is wrong. Run: python docs/tools/curves.py

Trains the default network on digits five times, some 40 s on a core.
"""

import csv
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PICTURE = Path(__file__).parents[1] / "curves_wrong.png"
RUNS = {
    "as it should be": [],
    "learning rate too high": ["optimizer.lr=0.1"],
    "penalty too strong": ["sparsity.penalty.shrinkage=0.1"],
    "sets chosen too rarely": ["sparsity.schedule.update_every=120"],
    "no exploring entries": ["sparsity.backward_sparsity=0.9"],
}
PANELS = ("topkast/mask_change", "topkast/reservoir_activated", "val/acc")


def curves(overrides: list[str], folder: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Panel → steps and values of a run."""
    command = [
        sys.executable,
        "-m",
        "lightning_topkast.app.commands.train",
        "logger=csv",
        f"hydra.run.dir={folder}",
        *overrides,
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=1200)
    found: dict[str, tuple[list[int], list[float]]] = {name: ([], []) for name in PANELS}
    with (folder / "csv" / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            for name, (steps, values) in found.items():
                if row.get(name):
                    steps.append(int(row["step"]))
                    values.append(float(row[name]))
    return found


def main() -> None:
    """Train, and draw."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, overrides) in enumerate(RUNS.items()):
            found = curves(overrides, Path(folder) / str(number))
            for axis, panel in zip(axes, PANELS, strict=True):
                steps, values = found[panel]
                style = "default" if panel == "val/acc" else "steps-post"
                axis.plot(
                    steps, values, drawstyle=style, label=name, linewidth=3 if number == 0 else 1.5, zorder=10 - number
                )
                print(f"{name:26} {panel:28} {[round(value, 3) for value in found[panel][1]]}")
    for axis, panel in zip(axes, PANELS, strict=True):
        axis.set(title=panel, xlabel="optimizer step")
        axis.grid(alpha=0.3)
    axes[0].set_ylim(0, None)
    axes[2].set_ylim(0.6, 1)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.savefig(PICTURE, dpi=100)


if __name__ == "__main__":
    main()
