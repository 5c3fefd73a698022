"""`TopKastCallback`, which maps Lightning's hooks to the engine."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.call import _call_configure_model
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_topkast.distributed import to_local
from lightning_topkast.errors import TopKastError
from lightning_topkast.settings import Settings, takes_settings
from lightning_topkast.telemetry.log import Telemetry
from lightning_topkast.topkast import TopKast
from lightning_topkast.training.all_reduce import Hook, sparse_all_reduce_of
from lightning_topkast.training.averages import SparseAverages, callbacks_of, copy_again
from lightning_topkast.training.hooks import register
from lightning_topkast.training.kept import Handover, keep, kept_engine
from lightning_topkast.training.module import after_setup, undo_after_setup, warn_of_packed_in_loss
from lightning_topkast.training.run_length import RunLength, estimated_steps, warn_if_too_short, warn_if_unfinished
from lightning_topkast.training.sharded_checkpoint import move_shards_out, need_shards, saves_shards, with_shards
from lightning_topkast.training.top_k_all_reduce import TopKAllReduce


class TopKastCallback(Callback):
    """Train a network that is always sparse (Top-KAST, Jayakumar et al. 2020, arXiv 2106.03517).

    Add it to the Trainer; the LightningModule needs no change. Between optimizer steps the module's own weights are the
    sparse network, so that checkpoints and exports do not depend on this package; packed layers do, until `to_dense`.

    Args:
        settings: given as the arguments of `Settings`; `TopKast` takes the same.

    Raises:
        TopKastError: a setting, model or strategy is not supported; raised here, in `setup` or when training starts.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[TopKastCallback(forward_sparsity=0.9, backward_sparsity=0.8)])
    """

    @takes_settings
    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        self.topkast: TopKast | None = None
        self._telemetry: Telemetry | None = None
        # of a checkpoint that the model has loaded, as long as no engine has taken it over
        self._saved_state: dict[str, Any] | None = None
        self._averages: SparseAverages | None = None
        self._run_length: RunLength | None = None  # where only the run shows it
        self._new: TopKast | None = None  # an engine whose training has not started
        self._fits = self._saves_shards = False
        self._is_loaded = False  # whether `_new` has loaded `_saved_state`
        self._is_own_model = False  # whether a checkpoint is loaded into the model of `topkast`
        self._steps_seen = 0, 0  # the Trainer's and ours, at the last batch
        self._looked_at_graph = False
        self._was_short = False  # whether it is known that the run ends before its first refresh
        self._handover = Handover()
        self._compressed: TopKAllReduce | None = None  # of all callbacks of the Trainer, with the first of them
        self._residuals: dict[str, Any] | None = None  # of a loaded state, for the former

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint; callbacks with disjoint targets have different keys."""
        return self._generate_state_key(**self.settings.targets.patterns)

    # --- start ----------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what is not supported before anything is built, and see to it that packed layers are built in time."""
        self._fits = stage == "fit"
        self._saved_state = self._handover.fetch(begins=self._fits) or self._saved_state
        if stage == "fit" and isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy):
            raise TopKastError(
                f"{type(trainer.strategy).__name__} is not supported: it flattens weights into shards in which single "
                "weights cannot be found; use FSDP2 (ModelParallelStrategy), strategy='ddp' or a single device"
            )
        self._saves_shards = saves_shards(trainer)

        if stage == "fit" and self.settings.storage.name != "masked":
            if isinstance(trainer.strategy, ModelParallelStrategy):
                need_shards(trainer)
            # Layers are replaced before the checkpoint is loaded and the optimizers are made, but after the module has
            # written what it wants into them.
            after_setup(pl_module, lambda: self._pack(trainer, pl_module))

    def _pack(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._kept_engine(trainer, pl_module) is not None:
            return
        if self._new is not None and self._new.model is pl_module:
            return
        shards = isinstance(trainer.strategy, ModelParallelStrategy)
        if not shards:  # in `configure_model`, where there are packed layers to shard then
            # it may be called twice, as Lightning itself calls it for every stage
            _call_configure_model(trainer)
        if next(pl_module.parameters(), None) is None:
            where = "setup, and shard them in configure_model" if shards else "setup or configure_model"
            raise TopKastError(
                f"storage='{self.settings.storage.name}' replaces layers after LightningModule.setup, but the module "
                f"has no layers yet; build them in __init__, {where}"
            )
        self._new, self._is_loaded = self._build(trainer, pl_module), False
        copy_again(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Build the engine here: parameters are final (moved, wrapped, restored) and optimizers exist."""
        topkast = self._kept_engine(trainer, pl_module)
        if topkast is None:
            topkast = self._new = self._new or self._build(trainer, pl_module)
        if self.settings.needs_length:
            topkast.plan(self._steps_of_run(trainer, pl_module, topkast))
        saved = self._saved_state
        self._attach(topkast, trainer)  # which refuses a state that is damaged
        corrects = self.settings.needs_length and not pl_module.automatic_optimization
        self._run_length = RunLength(topkast, saved and saved.get("run_length")) if corrects else None
        self.topkast, self._new, self._is_loaded = topkast, None, False
        self._steps_seen = trainer.global_step, topkast.hooked_steps
        keep(pl_module, topkast)
        if SparseAverages.exist_in(trainer):
            self._averages = SparseAverages(trainer, topkast)
            topkast.on_refresh(self._averages.update)  # before this step updates the average
        rank_zero_info(f"Top-KAST: sparse and dense weights\n{topkast.summary()}")
        self._was_short = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        if pl_module.automatic_optimization and not self._was_short:
            self._was_short = warn_if_too_short(topkast, estimated_steps(trainer, pl_module))

        started = self._started_engines(trainer, pl_module)
        engines = [engine for engine in started if engine is not None]
        if len(engines) == len(started):  # the last of several callbacks to start
            self._reduce_gradients(trainer, engines)
            leader = _all_of(trainer)[0]
            leader._telemetry = Telemetry(trainer, engines)
            leader._telemetry.log(force=True)

    def _reduce_gradients(self, trainer: Trainer, engines: Sequence[TopKast]) -> None:
        all_reduce = self.settings.all_reduce
        wishes = {callback.settings.all_reduce for callback in _all_of(trainer)}
        if len(wishes) > 1:
            raise TopKastError(
                "expected all TopKastCallbacks of a Trainer to have the same all_reduce, since their gradients are "
                f"reduced together, got {', '.join(sorted(map(str, wishes)))}"
            )
        if isinstance(trainer.strategy.model, DistributedDataParallel):
            leader, loaded = _all_of(trainer)[0], [each._residuals for each in _all_of(trainer)]
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            compressed = register(trainer.strategy.model, engines, all_reduce, scaler)
            if compressed is not None and any(each is not None for each in loaded):
                compressed.load_state_dict(*(each for each in loaded if each is not None))
            elif compressed is not None and leader._compressed is not None:
                compressed.follow(leader._compressed)
            leader._compressed = compressed
            for callback in _all_of(trainer):
                callback._residuals = None  # those of all ranks need much memory
        elif trainer.world_size > 1 and all_reduce != "dense":
            raise TopKastError(
                f"all_reduce={all_reduce!r} needs DDP, in which a hook can reduce the gradients; "
                f"{type(trainer.strategy).__name__} reduces its own, so use all_reduce='dense'"
            )

    def _attach(self, topkast: TopKast, trainer: Trainer) -> None:
        if topkast is self._new:
            # another callback may have frozen weights after we packed them; those of an earlier fit stay sparse
            topkast.exclude(topkast.frozen)
            if not topkast.weights:
                raise TopKastError("all weights chosen to be sparse are frozen; unfreeze some, or include others")
        state, self._saved_state = self._saved_state, None
        if state and not self._is_loaded:
            try:
                topkast.load_state_dict(with_shards(state, topkast, trainer.ckpt_path))
            except TopKastError:
                if trainer.ckpt_path is not None:
                    raise
                state = None  # of a checkpoint that was only tested, and the model is no longer that checkpoint's
        self._residuals = state.get("all_reduce", {}) if state else None
        sparse = {id(weight.parameter) for weight in topkast.weights.values()}
        optimizers = [optimizer for optimizer in trainer.optimizers if sparse & _parameters_of(optimizer)]
        if optimizers:
            topkast.attach(*optimizers)
        if topkast.unattached:
            raise TopKastError(
                f"no optimizer holds the sparse weights {', '.join(topkast.unattached[:5])}: give them to one, freeze "
                "them (requires_grad_(False)) or exclude them; unless storage='masked', "
                "configure_optimizers must use the layers that __init__ or configure_model built"
            )
        if trainer.global_step == 0:
            topkast.restart()

    def _kept_engine(self, trainer: Trainer, pl_module: LightningModule) -> TopKast | None:
        others = [other.settings for other in _all_of(trainer) if other is not self]
        return kept_engine(pl_module, self.settings, others)

    def _build(self, trainer: Trainer, pl_module: LightningModule) -> TopKast:
        others = [other for other in _all_of(trainer) if other is not self]
        engines = [other._new or (other.topkast if other._works_on(pl_module) else None) for other in others]
        taken = {name for engine in engines if engine is not None for name in engine.weights}
        return TopKast.of(pl_module, self.settings, taken)

    def _steps_of_run(self, trainer: Trainer, pl_module: LightningModule, topkast: TopKast) -> int | float:
        total_steps = estimated_steps(trainer, pl_module)
        if topkast is self._new and self._saved_state is None:
            total_steps -= trainer.global_step  # a dense checkpoint continues as sparse: we count from here
        return total_steps

    def _works_on(self, pl_module: LightningModule) -> bool:
        return self.topkast is not None and self.topkast.model is pl_module and self.topkast.is_attached

    @staticmethod
    def _started_engines(trainer: Trainer, pl_module: LightningModule) -> list[TopKast | None]:
        return [callback.topkast if callback._works_on(pl_module) else None for callback in _all_of(trainer)]

    def all_reduce_hook(self, hook: Hook) -> Hook:
        """Return a DDP communication hook that acts as `hook`, but sends only the updated set of masked weights.

        Use it for hooks that `all_reduce` does not offer, and leave `all_reduce="dense"`:

            DDPStrategy(ddp_comm_state=state, ddp_comm_hook=callback.all_reduce_hook(powerSGD_hook))

        The hooks of two callbacks can be nested. Lightning registers such hooks on GPUs only.
        """
        return sparse_all_reduce_of(lambda: [] if self.topkast is None else [self.topkast], hook)

    # --- every step -----------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Restore sparsity, since other callbacks may have written to the weights after our hooks; plan again."""
        if self._averages is not None:
            self._averages.update()
        if self.topkast is not None:
            self.topkast.accept_writes(averaged=self._averages is not None)
        if self._run_length is not None:
            self._run_length.correct(trainer)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Warn if the forward pass was not sparse, or if the loss depends on packed parameters themselves."""
        if self.topkast is not None:
            self.topkast.warn_if_dense()
            if not self._looked_at_graph:
                self._looked_at_graph = True
                warn_of_packed_in_loss(loss, self.topkast.weights)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mask the gradients under manual optimization, so that `clip_gradients` sees what the optimizer uses."""
        if self.topkast is not None and not pl_module.automatic_optimization and not self.topkast.needs_gradients:
            self.topkast.mask_gradients()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Mask the gradients, which are unscaled here, not yet clipped, and complete even under accumulation."""
        if self.topkast is not None:
            self.topkast.prepare_step(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Refuse a step that the hooks have not seen, and log the metrics."""
        if self.topkast is not None:
            steps, self._steps_seen = self._steps_seen, (trainer.global_step, self.topkast.hooked_steps)
            stepped, hooked = (now != before for now, before in zip(self._steps_seen, steps, strict=True))
            if stepped and not hooked:
                self.topkast.check_held()
            if stepped and not hooked and self.topkast.was_written:
                kinds = ", ".join(type(getattr(each, "optimizer", each)).__name__ for each in trainer.optimizers)
                raise TopKastError(
                    f"the Trainer has taken an optimizer step ({kinds}) that changed sparse weights without calling "
                    "the optimizer's hooks, so it was no step of Top-KAST; use an optimizer whose step() is that of a "
                    "torch.optim.Optimizer"
                )
        if self._telemetry is not None:
            self._telemetry.log()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give packed averages θ of the last step outside A, since they are copied into the model as a whole."""
        if self._averages is not None:
            self._averages.update()

    # --- validation, checkpoints and the end of a run -------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the average sparse before its callback swaps it in at `on_validation_epoch_start`."""
        if self._averages is not None:
            self._averages.update()

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Warn if other code has swapped in weights that are not sparse."""
        if self.topkast is not None and batch_idx == 0 and self._averages is None:
            self.topkast.warn_if_dense()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save α even from a signal handler in the middle of a step or refresh, and make saved averages sparse.

        An averaging callback saves a view of its average, so the order of the callbacks does not matter.
        """
        if self._averages is not None:
            self._averages.update()
        if self.topkast is not None:
            changing = {to_local(w.parameter).data_ptr(): w for w in self.topkast.weights.values() if not w.is_settled}
            state = checkpoint["state_dict"]
            for name, value in state.items() if changing else ():
                if to_local(value).data_ptr() in changing:
                    state[name] = changing[to_local(value).data_ptr()].alpha()
            if self._saves_shards:
                move_shards_out(checkpoint, self.state_key)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore sparsity, since an averaging callback copies its average into the model here; log the last values."""
        if self._averages is not None and self.topkast is not None:
            self._averages.update()
            self.topkast.restore_sparsity()
        if self._telemetry is not None:
            self._telemetry.finish()
        if self.topkast is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            warn_if_unfinished(self.topkast)
            if not self._was_short:
                warn_if_too_short(self.topkast, self.topkast.step_count)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the checkpoint to the loggers; the last one is written by now."""
        if self._telemetry is not None:
            self._telemetry.hand_over()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End an interrupted step, since other callbacks may save a checkpoint and no teardown follows."""
        undo_after_setup(pl_module)
        if self._new is not None:  # training was refused, so the model becomes what it was
            with suppress(TopKastError):  # it stays packed if FSDP2 has sharded it already
                self._new.release()
            self._new = None
        if self.topkast is not None:
            self.topkast.detach()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Detach from the optimizers; the engine stays readable, and a second `fit` continues with it."""
        self._telemetry = None
        self._averages = None
        if self.topkast is not None and stage == "fit":
            self.topkast.detach()
            self.topkast.on_refresh(None)
            self._handover.leave(trainer, self.state_dict)

    # --- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the engine's state: tensors and primitives only."""
        self._saved_state = self._handover.fetch() or self._saved_state
        engine = self._new or self.topkast
        if engine is None or (self._saved_state is not None and not engine.is_attached):
            return self._saved_state or {}
        state = engine.state_dict(gathered=not self._saves_shards)
        if self._run_length is not None:
            state["run_length"] = self._run_length.state_dict()
        if self._compressed is not None:
            state["all_reduce"] = self._compressed.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state into an engine whose model has loaded its part; else keep it until training starts.

        The engine exists already if its layers are packed, if the weights are restored in the middle of a run (by the
        learning rate finder), and if a checkpoint is tested after the run.
        """
        self._saved_state, self._is_loaded = state_dict, False
        engine = self._new or (self.topkast if self._is_own_model else None)
        if engine is None or not state_dict:
            return
        if self._saves_shards:
            if engine.is_attached:
                raise TopKastError("a sharded checkpoint cannot be restored in the middle of a run; start a new fit")
            return
        try:
            engine.load_state_dict(state_dict)
        except TopKastError:
            # another model's, which is only tested; or weights are still to be frozen, and training refuses it if not
            if self._fits and engine is not self._new:
                raise
            return
        if engine is self._new:
            self._is_loaded = True
            return
        self._saved_state = None
        if self._run_length is not None:
            self._run_length = RunLength(engine, state_dict.get("run_length"))
        if self._compressed is not None:
            self._compressed.load_state_dict(state_dict.get("all_reduce", {}))

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: Mapping[str, Any]) -> None:
        """Refuse to resume from a sparse checkpoint whose sets would be silently lost."""
        self._is_own_model = self.topkast is not None and self.topkast.model is pl_module
        # Lightning before 1.5 saved states by the type of their callback
        keys = [key for key in checkpoint.get("callbacks", {}) if isinstance(key, str)]
        saved = [key for key in keys if key.startswith(type(self).__qualname__)]
        if trainer.state.fn == TrainerFn.FITTING and saved and self.state_key not in saved:
            raise TopKastError(
                f"expected a checkpoint with the Top-KAST state {self.state_key}, got {'; '.join(saved)}; resume with "
                "the include and exclude it was saved with"
            )


def _all_of(trainer: Trainer) -> list[TopKastCallback]:
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, TopKastCallback)]


def _parameters_of(optimizer: Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
