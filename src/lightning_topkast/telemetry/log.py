"""Logging of metrics to all loggers of the Trainer, and of media to loggers that support them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger
from torch import Tensor

from lightning_topkast.telemetry.guard import Guard, guard_of
from lightning_topkast.telemetry.media import Media
from lightning_topkast.telemetry.metrics import MaskChange, ReservoirActivation, Sparsity
from lightning_topkast.telemetry.tensorboard import TensorBoardMedia
from lightning_topkast.telemetry.wandb import WandbMedia
from lightning_topkast.topkast import TopKast

PREFIX = "topkast"


class Telemetry:
    """Log the sparsity of one model, over all of its engines.

    Sets change only at a refresh, so metrics of the sets are computed there. The forward sparsity is counted in the
    weights themselves whenever it is logged. A step that logs nothing computes nothing and never waits for the device.
    A logger that fails does not end the training: see `Guard`.

    Args:
        trainer: its loggers receive the values, and so does its `callback_metrics`, for other callbacks to monitor.
        engines: the engines of disjoint weights of one model.
    """

    def __init__(self, trainer: Trainer, engines: Sequence[TopKast]) -> None:
        self._trainer = trainer
        self._engines = engines
        kinds: tuple[Any, ...] = (WandbMedia, TensorBoardMedia)
        self._shows: dict[Logger, tuple[Guard, Any]] = {}
        settings = {PREFIX: [engine.settings.as_dict() for engine in engines]}
        for logger in trainer.loggers if trainer.is_global_zero else ():
            for kind in kinds:
                show = guard_of(logger).call("pictures", kind, logger) if kind.serves(logger) else None
                if show is not None:
                    self._shows[logger] = guard_of(logger), show
                    guard_of(logger).call("settings", show.log_settings, settings)
        # other processes take part in the pictures of weights that are sharded
        draws = any(kind.serves(logger) for logger in trainer.loggers for kind in kinds)
        sharded = any(weight.sharding.is_sharded for each in engines for weight in each.weights.values())
        self._draws = bool(self._shows) or (draws and sharded)
        # weights whose curves are not logged
        self._hidden = {name for each in engines if not each.settings.weight_curves for name in each.weights}
        self._media = Media(self._hidden)
        self._of_sets: dict[str, Tensor] = {}
        self._last: dict[str, Tensor] = {}  # what was logged last
        self._refreshes = -1

    def log(self, force: bool = False) -> None:
        """Log if the trainer logs at this step, or if the sets have changed since the last call."""
        refreshes = sum(engine.refresh_count for engine in self._engines)
        refreshed = refreshes != self._refreshes
        if refreshed:
            self._refreshes = refreshes
            self._of_sets = set_metrics(self._engines)
        if not (refreshed or force or self._due):
            return
        for engine in self._engines:
            engine.check_held()
            engine.accept_writes(closely=True)
        penalty = torch.stack([engine.penalty() for engine in self._engines]).sum()
        metrics = measured_metrics(self._engines) | self._of_sets | {f"{PREFIX}/penalty": penalty}
        self._last = metrics
        self._trainer.callback_metrics.update(metrics)
        if not self._trainer.loggers:
            return
        values = dict(zip(metrics, torch.stack([value.float() for value in metrics.values()]).tolist(), strict=True))
        shown = {name: value for name, value in values.items() if name.split("/", 2)[-1] not in self._hidden}
        for logger in self._trainer.loggers:
            own = self._shows.get(logger)
            log = logger.log_metrics if own is None else own[1].log_metrics
            guard_of(logger).call("metrics", log, shown, step=self._step)
        if refreshed and self._draws:
            self._show(self._media.at_refresh(self._engines, values, self._step))
        if force or not self._is_followed:
            self._end_rows()

    def finish(self) -> None:
        """Log the last values and the media of the whole run."""
        self.log(force=True)
        if self._draws:
            self._show(self._media.at_end(self._engines))
        self._end_rows()

    def hand_over(self) -> None:
        """Give the best checkpoint, or else the last, to loggers that store models, with the densities logged last.

        Only the first process does, so nothing is counted here: that would be a collective for sharded weights.
        """
        callback: Any = self._trainer.checkpoint_callback
        path = Path(getattr(callback, "best_model_path", "") or getattr(callback, "last_model_path", ""))
        if not (path.is_file() and self._trainer.is_global_zero):
            return
        densities = {
            weight.name: {"forward": float(weight.forward_density), "backward": float(weight.backward_density)}
            for engine in self._engines
            for weight in engine.weights.values()
        }
        totals = {name: float(value) for name, value in self._last.items() if name.count("/") == 1}
        metadata = {**totals, "densities": densities, "step": self._trainer.global_step}
        for guard, show in self._shows.values():
            guard.call("checkpoints", show.hand_over, path, metadata)

    def _show(self, media: dict[str, Any]) -> None:
        if media:
            for guard, show in self._shows.values():
                guard.call("pictures", show.show, media, self._step)

    def _end_rows(self) -> None:
        for guard, show in self._shows.values():
            guard.call("metrics", show.end_row)

    @property
    def _is_followed(self) -> bool:
        """Whether Lightning logs metrics of its own after this batch, which end a row that was begun."""
        return self._due and bool(self._trainer._logger_connector.metrics["log"])

    @property
    def _due(self) -> bool:
        """Whether Lightning logs training metrics after this batch, but not while it accumulates gradients."""
        accumulates = self._trainer.fit_loop._should_accumulate()
        return self._trainer._logger_connector.should_update_logs and not accumulates

    @property
    def _step(self) -> int:
        # the step of Lightning's own training metrics, even under accumulation and manual optimization
        return self._trainer.fit_loop.epoch_loop._batches_that_stepped


def measured_metrics(engines: Sequence[TopKast]) -> dict[str, Tensor]:
    """Return the sparsity of the weights that the network computes with: name → scalar tensor on their device.

    The zeros are counted now, whatever the sets say; a collective if a weight is sharded.
    """
    weights = [weight for engine in engines for weight in engine.weights.values()]
    device = weights[0].parameter.device
    forward, model = (Sparsity(sync_on_compute=False).to(device) for _ in range(2))
    metrics: dict[str, Tensor] = {}
    for weight in weights:
        zeros = weight.size - weight.nonzero_entries.to(device)
        forward.count(zeros, weight.size)
        metrics[f"{PREFIX}/forward_sparsity/{weight.name}"] = zeros / weight.size
    everything = sum(parameter.numel() for parameter in engines[0].model.parameters())
    everything += sum(weight.size - weight.parameter.numel() for weight in weights)
    model.count(forward.counted, everything)
    totals = {f"{PREFIX}/forward_sparsity": forward.compute(), f"{PREFIX}/model_sparsity": model.compute()}
    return totals | metrics


def set_metrics(engines: Sequence[TopKast]) -> dict[str, Tensor]:
    """Return the metrics of the sets of all engines' weights: name → scalar tensor on the weights' device."""
    weights = [weight for engine in engines for weight in engine.weights.values()]
    device = weights[0].parameter.device
    # masks agree on every rank (checked at each refresh), so there is nothing to reduce
    backward = Sparsity(sync_on_compute=False).to(device)
    change, activation = (kind(sync_on_compute=False).to(device) for kind in (MaskChange, ReservoirActivation))
    metrics: dict[str, Tensor] = {}
    changes = []
    for weight in weights:
        size, active = weight.size, weight.active_entries.to(device)  # counts of packed weights are on the host
        backward.count(size - weight.updated_entries, size)
        change.count(weight.promoted, active)
        activated = weight.first_reservoir - weight.never_active_entries.to(device)
        activation.count(activated, weight.first_reservoir)
        changes.append(weight.promoted / active.clamp_min(1))
        metrics[f"{PREFIX}/mask_change/{weight.name}"] = changes[-1]
        metrics[f"{PREFIX}/reservoir_activated/{weight.name}"] = activated / max(weight.first_reservoir, 1)
    totals = {
        f"{PREFIX}/backward_sparsity": backward.compute(),
        f"{PREFIX}/mask_change": change.compute(),
        f"{PREFIX}/mask_change_min": torch.stack(changes).min(),
        f"{PREFIX}/mask_change_max": torch.stack(changes).max(),
        f"{PREFIX}/reservoir_activated": activation.compute(),
    }
    return totals | metrics
