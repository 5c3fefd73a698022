"""`topkast-train`: compose a run from Hydra configs, train, test, and say where the results are."""

from __future__ import annotations

import logging
import shlex
import sys
import warnings
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any, NoReturn, cast

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig, OmegaConf

from lightning_topkast.app.build import build_all, build_callbacks, build_model
from lightning_topkast.app.checkpoint import SAFELY, Checkpoint, open_checkpoint
from lightning_topkast.app.errors import (
    CONFIG_MODULE,
    CONFIG_NAME,
    AppError,
    did_you_mean,
    let_errors_through,
    one_line_errors,
    quiet_broken_pipe,
)
from lightning_topkast.app.last_lines import count_weights, print_last_lines
from lightning_topkast.app.loggers import (
    check_all_writable,
    check_writable,
    close_wandb,
    follow,
    log_config,
    log_outcome,
    wandb_folder,
)
from lightning_topkast.app.report import leave_report
from lightning_topkast.app.result import End, RunMeter, all_finite, kept_dense, leave_result
from lightning_topkast.app.resume import (
    AUTO,
    RESUME,
    SameCheckpoint,
    kept_if_refused,
    newest_checkpoint,
    own_overrides,
    resumed,
)
from lightning_topkast.app.small_dense import with_width
from lightning_topkast.app.sweep import one_job
from lightning_topkast.errors import NonFiniteWeightError


def train(cfg: DictConfig) -> float:
    """Train and test what `cfg` describes; return the metric `cfg.recipe.monitor`, for sweepers.

    Raises:
        AppError: for what the user can mend, with the way to do so.
    """
    failed = True
    try:
        with warnings.catch_warnings():
            # The data sets that lie in memory are fastest without loader processes.
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            # Lightning 2.6 asks newer torch's pytrees in the old way.
            warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*", category=FutureWarning)
            score = _train(cfg)
        failed = False
        return score
    finally:
        close_wandb(failed)


def _train(cfg: DictConfig) -> float:
    check_numbers(cfg)
    check_writable(Path(cfg.paths.output_dir))
    seed_everything(cfg.seed, workers=True, verbose=False)
    auto = cfg.ckpt_path == AUTO
    ckpt_path = newest_checkpoint(Path(cfg.paths.output_dir)) if auto else cfg.ckpt_path
    checkpoint = open_checkpoint(ckpt_path)
    data: LightningDataModule = instantiate(cfg.data, _convert_="all")
    model = build_model(cfg)
    loggers: list[Logger] = build_all(cfg.logger)
    check_all_writable(loggers)
    meter = RunMeter()
    callbacks = [*build_callbacks(cfg, has_loggers=bool(loggers)), meter]
    if auto:
        callbacks.append(SameCheckpoint(ckpt_path))
    if checkpoint is not None:
        checkpoint.check_model(model)
        checkpoint.check_callbacks(callbacks)
        checkpoint.check_optimizer(getattr(model, "optimizer", None))
    trainer: Trainer = instantiate(cfg.trainer, logger=loggers or False, callbacks=callbacks, _convert_="all")
    with one_job(trainer):
        log_config(trainer.loggers, cast(dict[str, Any], OmegaConf.to_container(with_width(cfg), resolve=True)))
        follow(trainer.loggers, cfg.recipe.monitor, cfg.recipe.mode)

        try:
            trainer.fit(model, datamodule=data, ckpt_path=ckpt_path, **SAFELY)
        except SystemExit as stop:  # Lightning has handled Ctrl-C or SIGTERM, and has saved what it saves
            _say_how_to_go_on(stop, trainer, Path(cfg.paths.output_dir).resolve())
        except NonFiniteWeightError:
            if trainer.is_global_zero:
                leave_result(cfg, End(True, meter.counts()))
            raise
        if not (auto and ckpt_path):  # started again after its end, a run only says once more what came out
            _refuse_no_training(trainer, checkpoint)
        took = meter.counts()  # before the test, which loads a checkpoint's
        own = {name: value for name, value in trainer.callback_metrics.items() if not name.startswith("topkast/")}
        # max_steps may have come before the first validation
        if cfg.recipe.monitor.startswith("val/") and cfg.recipe.monitor not in own:
            trainer.validate(model, datamodule=data, verbose=False)
            own.update(trainer.callback_metrics)
        score = monitored(trainer, cfg.recipe.monitor)
        best: str = getattr(trainer.checkpoint_callback, "best_model_path", "")
        figures: Mapping[str, float] = {cfg.recipe.monitor: score}
        tested: Mapping[str, float] = {}
        if cfg.test:
            tested = trainer.test(model, datamodule=data, ckpt_path=best or None, verbose=False)[0]
            figures = {name: value for name, value in tested.items() if name.startswith("test/")} or tested
        counts = count_weights(model)
        if trainer.is_global_zero:
            diverged = not all_finite({**own, **figures})
            result = leave_result(cfg, End(diverged, took, score, tested, counts, kept_dense(callbacks)))
            log_outcome(trainer.loggers, result, trainer.global_step)
            wandb_dir = wandb_folder(trainer.loggers)
            close_wandb(failed=False)  # before the last lines, which name its folder
            print_last_lines(counts, figures, Path(cfg.paths.output_dir), wandb_dir, Path(best) if best else None)
        return score


def check_numbers(cfg: DictConfig) -> None:
    """Refuse text where a number is needed, which would fail far from its cause."""
    for key, kind, optional in (
        ("seed", int, False),
        ("trainer.max_epochs", int, True),
        ("trainer.max_steps", int, True),
        ("optimizer.lr", Real, True),
    ):
        value = OmegaConf.select(cfg, key)
        if not (isinstance(value, kind) and not isinstance(value, bool)) and not (optional and value is None):
            raise AppError(f"{key}={value} is not valid: expected {'an int' if kind is int else 'a number'}")


def _say_how_to_go_on(stop: SystemExit, trainer: Trainer, folder: Path) -> NoReturn:
    """Exit as shells expect it of an interrupted program, once the user knows how to go on from the last checkpoint."""
    newest = [
        callback
        for callback in trainer.checkpoint_callbacks
        if isinstance(callback, ModelCheckpoint) and callback.monitor is None
    ]
    last = [str(callback.best_model_path) for callback in newest]  # without a metric to follow, the newest is the best
    if trainer.is_global_zero:
        if not any(last):
            way = "there is no checkpoint of it yet"
        elif Path(last[-1]).parent == folder / "checkpoints" and own_overrides(folder) is not None:
            way = f"go on with topkast-train {RESUME} {shlex.quote(str(folder))}"
        else:
            overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
            kept = (f"'{text}'" for text in overrides if not text.startswith("ckpt_path="))
            way = f"go on with {' '.join(['topkast-train', *kept])} {_override('ckpt_path', last[-1])}"
        at = f"interrupted in epoch {trainer.current_epoch}, step {trainer.global_step}"
        saved = max((callback._last_global_step_saved for callback in newest), default=0)
        if saved and saved != trainer.global_step:  # such as in a validation, whose epoch is not complete
            at += f", the last checkpoint being of step {saved}"
        print(f"\ntopkast-train: {at}; {way}", file=sys.stderr, flush=True)
    raise SystemExit(143 if isinstance(stop, SIGTERMException) else 130)


def _override(key: str, value: str) -> str:
    """Return `key=value` as a shell and Hydra take it, which wants quotes around names such as `epoch=3.ckpt`."""
    return f"{key}={value}" if not set(value) & set("=,:' ()[]{}") else f"\"{key}='{value}'\""


def _refuse_no_training(trainer: Trainer, checkpoint: Checkpoint | None) -> None:
    before = checkpoint.step if checkpoint else 0
    if trainer.global_step > before or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    if checkpoint is not None:
        raise AppError(
            f"nothing was left to train: {checkpoint.path} is at step {checkpoint.step}, the end of "
            f"trainer.max_epochs={trainer.max_epochs}, trainer.max_steps={trainer.max_steps}; raise them"
        )
    raise AppError(
        f"nothing was trained: trainer.max_epochs={trainer.max_epochs}, trainer.max_steps={trainer.max_steps}, "
        f"{trainer.num_training_batches} batches an epoch; each of them must allow a step"
    )


def monitored(trainer: Trainer, name: str) -> float:
    """Return the best value of metric `name` if checkpoints follow it, else the last one."""
    checkpoint = trainer.checkpoint_callback
    best = getattr(checkpoint, "best_model_score", None)
    if best is not None and getattr(checkpoint, "monitor", None) == name:
        return float(best)
    metrics = trainer.callback_metrics
    if name not in metrics:
        raise AppError(f"recipe.monitor: no metric '{name}' was logged: {did_you_mean(name, metrics)}")
    return float(metrics[name])


@hydra.main(version_base="1.3", config_path=f"pkg://{CONFIG_MODULE}", config_name=CONFIG_NAME)
def _run(cfg: DictConfig) -> float:
    with one_line_errors():
        score = train(cfg)
        # Not in train(), which sweeps call: a report takes as long as a small run.
        if cfg.get("report") and not cfg.trainer.get("fast_dev_run"):
            leave_report(Path(cfg.paths.output_dir))
        return score


def set_up_process() -> None:
    """Set what holds for a whole process that trains."""
    torch.set_float32_matmul_precision("high")  # tensor cores, where there are some
    # Lightning's advice to install its own cloud service's logger.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda r: "Tip: For" not in r.getMessage())
    let_errors_through()


def main() -> None:
    """Run the application on the command line's overrides."""
    set_up_process()
    with quiet_broken_pipe(), one_line_errors():
        arguments = sys.argv[1:]
        sys.argv[1:] = resumed(arguments)  # also for the processes that Lightning starts by it
        with kept_if_refused(arguments):
            _run()


if __name__ == "__main__":
    main()
