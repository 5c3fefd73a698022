"""Plan the memory, FLOPs and communication of a configured run without allocating it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from lightning import Callback, LightningModule
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_topkast import TopKastCallback
from lightning_topkast.app.errors import AppError, did_you_mean
from lightning_topkast.app.run.build import build_model
from lightning_topkast.app.run.global_batch import accumulation
from lightning_topkast.app.run.instantiate import build
from lightning_topkast.app.run.small_dense import SmallDense
from lightning_topkast.app.run.task import ClassificationTask
from lightning_topkast.costs import OptimizerState, Parallel, Plan, make_plan
from lightning_topkast.costs.memory import Strategy
from lightning_topkast.gradients import TopKGradients
from lightning_topkast.settings import Settings

_PRECISIONS = {
    "16-true": torch.float16,
    "bf16-true": torch.bfloat16,
    "64-true": torch.float64,
    # autocast does not change the dtype of weights, gradients and optimizer state
    **dict.fromkeys(("32-true", "16-mixed", "bf16-mixed"), torch.float32),
}
_ALIASES = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"}


def plan(cfg: DictConfig) -> Plan:
    """Plan the run that `cfg` describes.

    Raises:
        AppError: The configuration is not valid, or its plan is not supported.
        TopKastError: Training would refuse the configuration.
    """
    parallel, precision, settings = read_parallel(cfg), read_precision(cfg), read_settings(cfg)
    if settings is not None:
        parallel = replace(parallel, all_reduce=settings.all_reduce)
        if parallel.strategy == "ddp" and isinstance(settings.all_reduce, TopKGradients):
            settings.all_reduce.check_ranks(parallel.devices)
        if parallel.strategy == "fsdp2" and settings.all_reduce != "dense":
            raise AppError(
                f"all_reduce={settings.all_reduce!r} needs DDP, in which a hook can reduce the gradients; FSDP2 "
                "reduces its own: add sparsity.all_reduce=dense"
            )
    with torch.device("meta"):
        model = build_model(cfg)
        model.configure_model()
        model.to(precision)
        inputs = _inputs(cfg, model, precision)
        steps = cfg.trainer.get("max_steps")
        total_steps = steps if isinstance(steps, int) and steps > 0 else None
        return make_plan(model, inputs, settings, OptimizerState(_optimizer_of(model)), parallel, total_steps)


def read_parallel(cfg: DictConfig) -> Parallel:
    """Return the number of devices and the strategy, without looking at the devices of this machine."""
    devices = _count(cfg, "trainer.devices") * _count(cfg, "trainer.num_nodes")
    if cfg.trainer.get("tpu_cores") or str(cfg.trainer.accelerator) == "tpu":
        raise AppError("trainer.accelerator=tpu is not supported by topkast-plan: use cpu or gpu")
    configured = cfg.trainer.get("strategy", "auto")
    name = str(configured.get("_target_", "") if isinstance(configured, DictConfig) else configured).rpartition(".")[2]
    strategy: Strategy
    if name in ("auto", "SingleDeviceStrategy"):
        strategy = "single" if devices == 1 else "ddp"
    elif name.startswith("ddp") or name == "DDPStrategy":
        strategy = "ddp"
    elif name == "ModelParallelStrategy":
        strategy = "fsdp2"
        if configured.get("tensor_parallel_size", "auto") != 1:
            raise AppError(
                "expected trainer.strategy.tensor_parallel_size=1: topkast-plan does not support tensor parallelism"
            )
    else:
        raise AppError(
            f"trainer.strategy={name} is not supported by topkast-plan: use a single device, trainer=ddp or "
            "trainer=fsdp2 (ModelParallelStrategy)"
        )
    own_buckets = not (isinstance(configured, DictConfig) and configured.get("gradient_as_bucket_view", False))
    accumulate = _count(cfg, "trainer.accumulate_grad_batches")
    if size := OmegaConf.select(cfg, "recipe.global_batch"):
        accumulate = accumulation(size, cfg.data.batch_size, devices)
    return Parallel(devices, strategy, buckets=own_buckets, accumulate=accumulate)


def _count(cfg: DictConfig, key: str) -> int:
    """Return a number of devices or similar, in any form that Lightning accepts."""
    value = OmegaConf.select(cfg, key, default=1)
    if isinstance(value, ListConfig):
        return len(value)
    text = str(value)
    if "," in text:
        return len([part for part in text.split(",") if part.strip()])
    if text in ("-1", "auto"):
        raise AppError(f"{key}={value} depends on this machine: a plan needs a number, such as {key}=8")
    if not text.isdigit() or int(text) < 1:
        raise AppError(f"{key}={value} is not valid: expected a number of at least 1")
    return int(text)


def read_precision(cfg: DictConfig) -> torch.dtype:
    """Return the dtype of weights, gradients and optimizer state."""
    name = str(cfg.trainer.get("precision") or "32-true")
    name = _ALIASES.get(name, name)
    if name not in _PRECISIONS:
        raise AppError(f"trainer.precision={name} is not supported by topkast-plan: {did_you_mean(name, _PRECISIONS)}")
    return _PRECISIONS[name]


def read_settings(cfg: DictConfig) -> Settings | None:
    """Return the settings of Top-KAST, or None for a dense run."""
    callback = build(cfg.sparsity)
    if isinstance(callback, TopKastCallback):
        return callback.settings
    if type(callback) in (Callback, SmallDense):
        return None
    raise AppError(
        f"sparsity: {type(callback).__name__} is not supported by topkast-plan: use Top-KAST or sparsity=dense"
    )


def _inputs(cfg: DictConfig, model: LightningModule, precision: torch.dtype) -> list[Any]:
    """Return one batch on the meta device: the model's `example_input_array` if it has one."""
    example = model.example_input_array
    if example is not None:
        given = list(example) if isinstance(example, tuple | list) else [example]
        return [value.to("meta") if isinstance(value, Tensor) else value for value in given]
    batch = OmegaConf.select(cfg, "data.batch_size", default=1)
    if not isinstance(batch, int) or batch < 1:
        raise AppError(f"data.batch_size={batch} is not valid: expected an int of at least 1")
    length = OmegaConf.select(cfg, "data.sequence_length")
    if length is not None:
        return [torch.zeros(batch, length, dtype=torch.int64)]
    shape = OmegaConf.select(cfg, "data.input_shape")
    if shape is None:
        raise AppError(
            "the input of the model is not known, since data has neither input_shape nor sequence_length: set one, "
            "such as +data.input_shape=[3,224,224], or give the model an example_input_array"
        )
    return [torch.zeros(batch, *shape, dtype=precision)]


def _optimizer_of(model: LightningModule) -> Callable[[list[nn.Parameter]], Optimizer]:
    """Return a function that builds the configured optimizer for other parameters."""
    if isinstance(model, ClassificationTask):
        return model.optimizer
    try:
        configured: Any = model.configure_optimizers()
        while not isinstance(configured, Optimizer):  # Lightning allows lists, tuples and dicts of them
            configured = configured["optimizer"] if isinstance(configured, dict) else configured[0]
    except Exception as error:
        raise AppError(
            f"{type(model).__name__}.configure_optimizers() returns no optimizer before training "
            f"({type(error).__name__}: {error})"
        ) from error
    return lambda parameters: type(configured)(parameters, **configured.defaults)
