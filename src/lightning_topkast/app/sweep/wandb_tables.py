"""Log comparisons as a W&B run: one table each, and the means of all rows as the summary."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_topkast.app import formatting
from lightning_topkast.app.run.guarded import close_wandb, guard_of_run
from lightning_topkast.app.run.loggers import log_config, wandb_folder, wandb_logger
from lightning_topkast.app.sweep.collect import Comparison, Row


def log_to_wandb(comparisons: Sequence[Comparison], folder: Path, project: str, picture: Path | None) -> Path | None:
    """Log a new run, offline unless the user is logged in, and return the folder for `wandb sync`, if there is one.

    Raises:
        AppError: W&B cannot start the run.
    """
    logger = wandb_logger(str(folder), project=project, name=f"comparison-{folder.name}", job_type="comparison")
    failed = True
    try:
        log_config([logger], {"folder": str(folder)})
        guard_of_run(logger).call("tables", _log, logger.experiment, comparisons, picture)
        failed = False
        return wandb_folder([logger])
    finally:
        close_wandb(failed)


def _log(run: Any, comparisons: Sequence[Comparison], picture: Path | None) -> None:
    import wandb

    for comparison in comparisons:
        place = f"{comparison.data}-{comparison.model}"
        columns = _columns(comparison)
        rows = [_cells(row, columns) for row in comparison.rows]
        run.log({f"comparison/{place}": wandb.Table(columns=[*columns], data=rows)})
        for row in comparison.rows:
            for name, figure in row.figures.items():
                run.summary[f"{place}/{_name(row)}/{name}"] = figure.mean
    if picture is not None:
        run.log({"comparison/picture": wandb.Image(str(picture))})


def _columns(comparison: Comparison) -> list[str]:
    names = list(dict.fromkeys(name for row in comparison.rows for name in row.figures))
    figures = [f"{name}_{part}" for name in names for part in ("mean", "std")]
    return ["method", "settings", "forward_sparsity", "backward_sparsity", *figures, "runs", "diverged"]


def _cells(row: Row, columns: Sequence[str]) -> list[Any]:
    cells: dict[str, Any] = {
        "method": row.method, "settings": " ".join(row.settings), "forward_sparsity": row.forward_sparsity,
        "backward_sparsity": row.backward_sparsity, "runs": len(row.seeds), "diverged": row.diverged,
    }  # fmt: skip
    for name, figure in row.figures.items():
        cells |= {f"{name}_mean": figure.mean, f"{name}_std": figure.std}
    return [cells.get(column) for column in columns]


def _name(row: Row) -> str:
    sparsities = (row.forward_sparsity, row.backward_sparsity)
    levels = [formatting.level(sparsity) for sparsity in sparsities if sparsity is not None]
    return "-".join([row.method, *levels, *row.settings])
