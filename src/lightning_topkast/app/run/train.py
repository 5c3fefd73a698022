"""Train and test a configured run, and record the result."""

from __future__ import annotations

import logging
import multiprocessing
import shlex
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

import torch
from lightning import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig

from lightning_topkast.app.errors import (
    AppError,
    did_you_mean,
    let_errors_through,
)
from lightning_topkast.app.interpolations import check_size
from lightning_topkast.app.limits import check_plain
from lightning_topkast.app.overrides import as_override, for_shell
from lightning_topkast.app.run.argument_types import check_values
from lightning_topkast.app.run.build import OF_TASK, build_all, build_callbacks, build_model, keep_environment_out
from lightning_topkast.app.run.describe import Outcome, all_finite, describe_end, kept_dense, unfinished
from lightning_topkast.app.run.guarded import close_wandb, failures_of, guard_loggers
from lightning_topkast.app.run.instantiate import build
from lightning_topkast.app.run.loggers import (
    check_all_writable,
    check_writable,
    log_config,
    log_outcome,
    track_best,
    wandb_folder,
)
from lightning_topkast.app.run.mask_recorder import MaskRecorder
from lightning_topkast.app.run.meter import RunMeter
from lightning_topkast.app.run.multirun import one_job
from lightning_topkast.app.run.resume import FirstStep, SameCheckpoint, checkpoint_places, newest_checkpoint
from lightning_topkast.app.run.settings import overrides_given, recorded, settings_of
from lightning_topkast.app.run.small_dense import with_width
from lightning_topkast.app.run.summary import count_weights, print_summary
from lightning_topkast.app.run.task import ClassificationTask
from lightning_topkast.app.run_folder.beginning import configuration_in, refuse_used
from lightning_topkast.app.run_folder.checkpoint import SAFELY, Checkpoint, open_checkpoint
from lightning_topkast.app.run_folder.folder import RunFolder, only_run_in
from lightning_topkast.app.run_folder.result import write_result
from lightning_topkast.app.run_folder.resume_arguments import AUTO, resume_options
from lightning_topkast.app.terminal import say
from lightning_topkast.errors import NonFiniteWeightError
from lightning_topkast.ops.memory import keep_freed_memory
from lightning_topkast.training.saved_paths import OwnCheckpoints

_PATIENCE = 20.0  # seconds to wait for another run in the same folder to end


def train(cfg: DictConfig) -> float:
    """Train and test the run that `cfg` describes, and return its `cfg.recipe.monitor` for sweepers.

    Raises:
        AppError: The configuration or the data is not valid; the message names the way out.
    """
    failed = True
    try:
        with warnings.catch_warnings():
            # Data sets that are held in memory load fastest without worker processes.
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            # Lightning 2.6 uses a deprecated function of newer torch.
            warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*", category=FutureWarning)
            # The first process writes for all. One that is restarted may find its predecessor still ending.
            first = getattr(rank_zero_only, "rank", 0) == 0
            check_size(cfg)
            check_values(cfg)
            _check_recordable(cfg)
            folder = RunFolder(cfg.paths.output_dir)
            check_writable(folder.path)
            with ExitStack() as held:
                if first:
                    held.enter_context(only_run_in(folder.path, "topkast-train", _PATIENCE))
                    if cfg.ckpt_path is None:
                        refuse_used(folder)
                    held.enter_context(configuration_in(folder, cfg))
                score = _train(cfg)
        failed = False
        return score
    finally:
        close_wandb(failed)


def _train(cfg: DictConfig) -> float:
    folder = RunFolder(cfg.paths.output_dir)
    seed_everything(cfg.seed, workers=True, verbose=False)
    auto = cfg.ckpt_path == AUTO
    ckpt_path = newest_checkpoint(folder, checkpoint_places(cfg)) if auto else cfg.ckpt_path
    checkpoint = open_checkpoint(ckpt_path)
    data: LightningDataModule = build(cfg.data)
    model = build_model(cfg)
    keep_environment_out(model, {model: cfg.model, data: cfg.data})
    loggers: list[Logger] = build_all(cfg.logger)
    check_all_writable(loggers)
    meter, first_step = RunMeter(), FirstStep()
    callbacks = [*build_callbacks(cfg, has_loggers=bool(loggers)), meter, OwnCheckpoints(), first_step]
    callbacks.append(MaskRecorder(folder.path))
    if auto:
        callbacks.append(SameCheckpoint(ckpt_path))
    if checkpoint is not None:
        checkpoint.check_model(model)
        checkpoint.check_callbacks(callbacks)
        if isinstance(model, ClassificationTask):  # another module makes its optimizers in training
            checkpoint.check_optimizer(model.optimizer)
    trainer: Trainer = build(cfg.trainer, logger=loggers or False, callbacks=callbacks)
    if trainer.strategy.root_device.type == "cpu":
        keep_freed_memory()
    with one_job(trainer):
        unused = () if isinstance(model, ClassificationTask) else OF_TASK
        config = recorded(with_width(cfg))
        log_config(trainer.loggers, {key: value for key, value in config.items() if key not in unused})
        track_best(trainer.loggers, cfg.recipe.monitor, cfg.recipe.mode)
        guard_loggers(trainer.loggers)

        try:
            with first_step.explained():
                trainer.fit(model, datamodule=data, ckpt_path=ckpt_path, **SAFELY)
        except SystemExit as stop:  # Lightning has handled Ctrl-C or SIGTERM, and has written its checkpoints
            _say_how_to_resume(stop, trainer, RunFolder(folder.path.resolve()))
        except NonFiniteWeightError:
            if trainer.is_global_zero:
                write_result(folder.path, describe_end(cfg, Outcome(True, meter.progress())))
            raise
        if not (auto and ckpt_path):  # a run that is restarted after its end only repeats its test
            _refuse_no_training(trainer, checkpoint)
        progress, left = meter.progress(), unfinished(callbacks)  # before the test, which loads a checkpoint's counts
        own = {name: value for name, value in trainer.callback_metrics.items() if not name.startswith("topkast/")}
        # max_steps may be reached before the first validation
        if cfg.recipe.monitor.startswith("val/") and cfg.recipe.monitor not in own:
            trainer.validate(model, datamodule=data, verbose=False, **SAFELY)
            own.update(trainer.callback_metrics)
        score = monitored(trainer, cfg.recipe.monitor)
        best: str = getattr(trainer.checkpoint_callback, "best_model_path", "")
        figures: Mapping[str, float] = {cfg.recipe.monitor: score}
        tested: Mapping[str, float] = {}
        can_be_tested = True
        if cfg.test:
            open_checkpoint(best or None)  # it may be older than this process
            try:
                with first_step.explained():
                    tested = trainer.test(model, datamodule=data, ckpt_path=best or None, verbose=False, **SAFELY)[0]
            except NonFiniteWeightError:  # in the best checkpoint: no score was better before they came
                can_be_tested = False
            figures = {name: value for name, value in tested.items() if name.startswith("test/")} or tested
        counts = count_weights(model)
        if trainer.is_global_zero:
            diverged = not (can_be_tested and all_finite({**own, **figures}))
            dense = kept_dense(callbacks)
            result = describe_end(cfg, Outcome(diverged, progress, score, tested, counts, left, dense))
            write_result(folder.path, result)
            log_outcome(trainer.loggers, result, trainer.global_step)
            wandb_dir = wandb_folder(trainer.loggers)
            close_wandb(failed=False)  # before the summary, which names its folder
            if lost := failures_of(trainer.loggers):
                write_result(folder.path, result.model_copy(update={"incomplete_logs": lost}))
            print_summary(counts, figures, folder.path, wandb_dir, Path(best) if best else None, lost)
        return score


def _check_recordable(cfg: DictConfig) -> None:
    """Refuse a configuration that a result could not hold, before anything is trained."""
    settings = settings_of(cfg)
    try:
        check_plain(settings)
    except ValueError as error:
        raise AppError(f"the configuration cannot be recorded: {error}") from error


def _say_how_to_resume(stop: SystemExit, trainer: Trainer, folder: RunFolder) -> NoReturn:
    """Tell the user how to resume, and exit with the code that shells expect of an interrupted program."""
    newest = [
        callback
        for callback in trainer.checkpoint_callbacks
        if isinstance(callback, ModelCheckpoint) and callback.monitor is None
    ]
    last = [str(callback.best_model_path) for callback in newest]  # without a metric, the newest is the best
    if trainer.is_global_zero:
        if not any(last):
            way = "there is no checkpoint yet"
        elif Path(last[-1]).parent == folder.path / "checkpoints" and folder.overrides() is not None:
            way = f"resume with topkast-train {shlex.join(resume_options(folder))}"
        else:
            kept = [text for text in overrides_given() if not text.startswith("ckpt_path=")]
            again = map(for_shell, [*kept, as_override("ckpt_path", last[-1])])
            way = f"resume with {' '.join(['topkast-train', *again])}"
        at = f"interrupted in epoch {trainer.current_epoch}, step {trainer.global_step}"
        saved = max((callback._last_global_step_saved for callback in newest), default=0)
        if saved and saved != trainer.global_step:  # for example during validation, before the epoch is complete
            at += f", the last checkpoint is of step {saved}"
        say(f"\ntopkast-train: {at}; {way}", error=True)
    raise SystemExit(143 if isinstance(stop, SIGTERMException) else 130)


def _refuse_no_training(trainer: Trainer, checkpoint: Checkpoint | None) -> None:
    before = checkpoint.step if checkpoint else 0
    if trainer.global_step > before or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    if checkpoint is not None:
        raise AppError(
            f"nothing is left to train: {checkpoint.path} is at step {checkpoint.step}, the end of "
            f"trainer.max_epochs={trainer.max_epochs}, trainer.max_steps={trainer.max_steps}; raise them"
        )
    raise AppError(
        f"nothing was trained: trainer.max_epochs={trainer.max_epochs}, trainer.max_steps={trainer.max_steps}, "
        f"{trainer.num_training_batches} batches per epoch; each of them must allow at least one step"
    )


def monitored(trainer: Trainer, name: str) -> float:
    """Return the best value of a metric if checkpoints follow it, and otherwise its last value."""
    checkpoint = trainer.checkpoint_callback
    best = getattr(checkpoint, "best_model_score", None)
    if best is not None and getattr(checkpoint, "monitor", None) == name:
        return float(best)
    metrics = trainer.callback_metrics
    if name not in metrics:
        raise AppError(f"recipe.monitor: no metric '{name}' was logged: {did_you_mean(name, metrics)}")
    return float(metrics[name])


def _is_no_tip(record: logging.LogRecord) -> bool:
    return "Tip: For" not in record.getMessage()


def set_up_process() -> None:
    """Apply the settings of a process that trains."""
    torch.set_float32_matmul_precision("high")  # use tensor cores where there are any
    # Jobs of Hydra's joblib launcher start processes in joblib's own way, in which data loaders cannot.
    methods = multiprocessing.get_all_start_methods()  # the system's default first
    if multiprocessing.get_start_method() not in methods:
        multiprocessing.set_start_method(methods[0], force=True)
    # Lightning leaves its messages to the root logger if that has handlers when it is imported, as Hydra's has here.
    for name in ("lightning.pytorch", "lightning.fabric"):
        logger = logging.getLogger(name)
        logger.propagate = False
        if not logger.handlers:
            logger.addHandler(logging.StreamHandler())
    # Suppress Lightning's advertisement of its cloud service.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_tip)
    let_errors_through()
