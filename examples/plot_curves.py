"""Plot the sparsity curves of a run from its CSV log. Run: python examples/plot_curves.py RUN_FOLDER OUTPUT.png

They are the curves that W&B shows under `topkast/`. Needs matplotlib:
pip install 'lightning-topkast[examples]'.
"""

import csv
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PANELS = {
    "sparsity": ("topkast/forward_sparsity", "topkast/backward_sparsity", "topkast/model_sparsity"),
    "mask change since the last refresh": ("topkast/mask_change",),
    "share of the first reservoir ever active": ("topkast/reservoir_activated",),
    "exploration penalty": ("topkast/penalty",),
}


def read(folder: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Metric name → steps and values."""
    path = next(folder.rglob("metrics.csv"), None)
    if path is None:
        sys.exit(f"there is no metrics.csv in {folder}: name the folder of a run that logged with logger=csv")
    curves: dict[str, tuple[list[int], list[float]]] = {}
    with path.open() as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if name.startswith("topkast/") and value:
                    steps, values = curves.setdefault(name, ([], []))
                    steps.append(int(row["step"]))
                    values.append(float(value))
    return curves


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    curves = read(Path(sys.argv[1]))
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), constrained_layout=True)
    for axis, (title, names) in zip(axes.flat, PANELS.items(), strict=True):
        for name in names:
            axis.plot(*curves[name], drawstyle="steps-post", label=name)
        if title.startswith("mask change"):
            for name in curves:
                if name.startswith("topkast/mask_change/"):
                    axis.plot(*curves[name], drawstyle="steps-post", alpha=0.5, label=name.removeprefix("topkast/"))
        axis.set(title=title, xlabel="optimizer step", ylim=(0, 1.02 if title == "sparsity" else None))
        axis.legend(fontsize="small")
        axis.grid(alpha=0.3)
    figure.savefig(sys.argv[2], dpi=110)
