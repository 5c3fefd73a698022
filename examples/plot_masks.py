"""Plot how a run's masks moved, from its CSV log. Run: python examples/plot_masks.py RUN_FOLDER OUTPUT.png

The run is one with callbacks=mask_dynamics logger=csv, as experiment=ablation_masks has it. Lines are the mean over
the sparse layers, bands reach from the least to the greatest. Needs matplotlib:
pip install 'lightning-topkast[examples]'.
"""

import csv
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PANELS = {
    "masks/change": "share of the active entries that changed in a window",
    "masks/activated": "share of the first reservoir that was ever active",
}


def read(folder: Path) -> dict[str, list[float]]:
    """Name → values, one a window; and the step at which each ended."""
    paths = sorted(folder.rglob("metrics.csv"), key=lambda path: path.stat().st_mtime_ns)
    if not paths:
        sys.exit(f"there is no metrics.csv in {folder}: name the folder of a run that logged with logger=csv")
    if runs := {path.parents[1] for path in paths[1:]} - {paths[0].parents[1]}:
        sys.exit(f"there are {len(runs) + 1} runs in {folder}: name the folder of one, such as {paths[0].parents[1]}")
    windows = {}  # by the step at which each ended: a run that was resumed has a log for each part
    for path in paths:
        with path.open() as file:
            windows |= {float(row["step"]): row for row in csv.DictReader(file) if row.get("masks/change_mean")}
    rows = [windows[step] for step in sorted(windows)]
    if not rows:
        sys.exit(f"{folder} has no masks/change_mean: train with callbacks=mask_dynamics, for longer than a window")
    names = ["step", *(f"{panel}_{of_layers}" for panel in PANELS for of_layers in ("min", "mean", "max"))]
    return {name: [float(row[name]) for row in rows] for name in names}


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    curves = read(Path(sys.argv[1]))
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.5), constrained_layout=True)
    for axis, (name, title) in zip(axes, PANELS.items(), strict=True):
        (line,) = axis.plot(curves["step"], curves[f"{name}_mean"], marker=".", label="mean of the layers")
        least, most = curves[f"{name}_min"], curves[f"{name}_max"]
        axis.fill_between(curves["step"], least, most, color=line.get_color(), alpha=0.2, label="min to max")
        axis.set(title=title, xlabel="optimizer step", ylim=(0, None))
        axis.legend(fontsize="small")
        axis.grid(alpha=0.3)
    figure.savefig(sys.argv[2], dpi=110)
