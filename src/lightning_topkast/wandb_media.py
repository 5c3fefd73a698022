"""Histograms, a heatmap and a table for Weights & Biases: what plain numbers cannot show."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from lightning.pytorch.loggers import Logger, WandbLogger

from lightning_topkast.topkast import TopKast
from lightning_topkast.weights import SparseWeight, own_part

_BINS = 64
_STEP = "trainer/global_step"  # WandbLogger's own name for the x axis
# dark violet → teal → yellow: readable without colour vision, like viridis
_COLOURS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], dtype=float)


class WandbMedia:
    """Logs media of a run to one `WandbLogger`.

    Args:
        logger: a logger that `serves` accepts.
    """

    def __init__(self, logger: Logger) -> None:
        self._run: Any = cast(WandbLogger, logger).experiment
        self._mask_changes: list[dict[str, float]] = []
        self._run.define_metric(_STEP)
        self._run.define_metric("topkast/*", step_metric=_STEP)
        for name in ("forward_sparsity", "backward_sparsity", "model_sparsity", "reservoir_activated", "mask_change"):
            self._run.define_metric(f"topkast/{name}", step_metric=_STEP, summary="last")

    @staticmethod
    def serves(logger: Logger) -> bool:
        """Whether `logger` can take media."""
        return isinstance(logger, WandbLogger)

    def log_refresh(self, engines: Sequence[TopKast], values: Mapping[str, float], step: int) -> None:
        """Note the mask changes; log the magnitudes at refresh 1, 2, 4, 8, ..., so that a long run stays small."""
        prefix = "topkast/mask_change/"
        self._mask_changes.append(
            {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
        )
        count = len(self._mask_changes)
        if count & (count - 1) == 0:
            self._run.log(magnitude_histograms(engines) | {_STEP: step})

    def log_end(self, engines: Sequence[TopKast], step: int) -> None:
        """The final magnitudes, mask change as a layer × refresh heatmap, and the table of every weight."""
        import wandb

        media: dict[str, Any] = magnitude_histograms(engines)
        if self._mask_changes:
            media["topkast/mask_change_heatmap"] = wandb.Image(
                heatmap(self._mask_changes), caption="share of A replaced: weights × refreshes"
            )
        columns: list[str | int] = [
            "weight",
            "shape",
            "entries",
            "active",
            "updated",
            "forward density",
            "backward density",
            "kept dense",
        ]
        table = wandb.Table(columns=columns)
        sparse = {name for engine in engines for name in engine.weights}
        for engine in engines:
            for row in engine.summary().rows:
                if row.name in engine.weights or (engine is engines[0] and row.name not in sparse):
                    weight = engine.weights.get(row.name)
                    updated = int(weight.updated_entries) if weight else row.updated
                    table.add_data(
                        row.name, str(row.shape), row.size, row.active, updated, row.forward_density,
                        updated / max(row.size, 1), row.reason,
                    )  # fmt: skip
        media["topkast/weights"] = table
        self._run.log(media | {_STEP: step})


def magnitude_histograms(engines: Sequence[TopKast]) -> dict[str, Any]:
    """|θ| of every weight as three histograms on shared bins, which meet at the two selection thresholds."""
    import wandb

    return {
        f"topkast/magnitude/{weight.name}/{group}": wandb.Histogram(np_histogram=histogram)
        for engine in engines
        for weight in engine.weights.values()
        for group, histogram in split_histogram(weight).items()
    }


def split_histogram(weight: SparseWeight) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    r"""Counts and bin edges of |θ| on A, B\A and C; groups without entries are left out.

    Of a sharded weight it is this process' part that is counted.
    """
    magnitudes = own_part(weight.theta()).abs().float().cpu().flatten()
    tiers = own_part(weight.tiers).cpu().flatten()
    groups = {name: magnitudes[tiers == tier] for name, tier in (("active", 2), ("exploring", 1), ("reservoir", 0))}
    groups = {name: group for name, group in groups.items() if group.numel()}
    thresholds = [float(group.min()) for name, group in groups.items() if name != "reservoir"]
    top = float(magnitudes.max()) or 1.0
    edges = np.unique(np.concatenate([np.linspace(0, top, _BINS + 1), thresholds]).astype(np.float32))
    return {name: np.histogram(group.numpy(), bins=edges) for name, group in groups.items()}


def heatmap(columns: Sequence[Mapping[str, float]], cell: int = 14) -> Any:
    """Draw values in [0, top] as an image: a named row a weight, a column a refresh, a colour scale below.

    Args:
        columns: for every refresh, weight name → value.
        cell: height of a row in pixels; more columns than fit 1,000 pixels are averaged.
    """
    from PIL import Image, ImageDraw

    names = sorted({name for column in columns for name in column}, key=list(columns[-1]).index)
    values = np.array([[column.get(name, 0.0) for column in columns] for name in names])
    if values.shape[1] > 1000:
        values = np.stack([part.mean(axis=1) for part in np.array_split(values, 1000, axis=1)], axis=1)
    top = max(float(values.max()), 1e-12)
    width = max(1, min(cell * 2, 1000 // values.shape[1]))
    label_width = 8 + max(7 * len(name) for name in names)
    image = Image.new(
        "RGB", (label_width + max(values.shape[1] * width, 240) + 8, (len(names) + 2) * cell + 8), "white"
    )
    pixels = np.kron(_colour(values / top), np.ones((cell - 1, width, 1), dtype=np.uint8))
    draw = ImageDraw.Draw(image)
    for row, name in enumerate(names):
        strip = pixels[row * (cell - 1) : (row + 1) * (cell - 1)]
        image.paste(Image.fromarray(strip), (label_width, 4 + row * cell))
        draw.text((4, 4 + row * cell), name, fill="black")
    scale = np.broadcast_to(_colour(np.linspace(0, 1, 120)[None]), (cell - 4, 120, 3)).copy()
    base = 8 + (len(names) + 0) * cell + 6
    image.paste(Image.fromarray(scale), (label_width + 20, base))
    draw.text((label_width + 8, base), "0", fill="black")
    draw.text((label_width + 146, base), f"{top:.3g}", fill="black")
    return image


def _colour(shares: np.ndarray) -> np.ndarray:
    stops = np.linspace(0, 1, len(_COLOURS))
    return np.stack([np.interp(shares, stops, _COLOURS[:, channel]) for channel in range(3)], axis=-1).astype(np.uint8)
