"""`TopKastCallback`: Lightning's hooks → the engine, and nothing more."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.trainer.call import _call_configure_model
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_topkast.distributed import own_part
from lightning_topkast.errors import TopKastError
from lightning_topkast.method.penalty import Penalty
from lightning_topkast.method.rule import Exploration, Rule
from lightning_topkast.method.schedule import Moment, SparsityRamp
from lightning_topkast.ops import BlockOperators, Operators
from lightning_topkast.settings import AllReduce, Distribution, Execution, Settings, check_all_reduce
from lightning_topkast.telemetry.log import Telemetry
from lightning_topkast.topkast import TopKast
from lightning_topkast.training.all_reduce import Hook, register, sparse_all_reduce_of
from lightning_topkast.training.averages import SparseAverages, callbacks_of, copy_again
from lightning_topkast.training.sharded_checkpoint import move_shards_out, saves_shards, with_shards


class TopKastCallback(Callback):
    """Trains a sparse network that stays sparse (Top-KAST, Jayakumar et al. 2020, arXiv 2106.03517).

    Add it to the Trainer; the LightningModule needs no change. Between optimizer steps the module's own weights are the
    sparse network, so validation, checkpoints and exports need nothing of this package.

    Args:
        forward_sparsity: share of each weight's entries that are zero in the forward pass, in [0, 1).
        backward_sparsity: share of entries without a gradient, in [0, forward_sparsity]; 0 is the straight-through
            baseline if the penalty is off.
        update_every: optimizer steps between two refreshes, the choices of the active and the updated set (N of the
            paper, which saw no loss at 100).
        refresh_delay: steps between choosing the sets, in a background thread, and their taking effect; 0 waits for
            them. A run is the same whatever the timing. Below `update_every`.
        distribution: "uniform" gives every weight the same density, "erk" in proportion to the sum over the product of
            its sizes (Erdős-Rényi-Kernel). With "global" the weights compete for as many places as "uniform" has.
        overrides: glob pattern of parameter names → {"forward_sparsity": ..., "backward_sparsity": ...}; later patterns
            win.
        exploration: how the exploring entries are chosen: the next largest ("magnitude") or at "random" (an ablation).
        stop_exploration_at: from there on B = A; a step (int), a fraction of the run (float in [0, 1]), or None.
        stop_refreshing_at: from there on the sets stand still; likewise.
        rule: how the sets are chosen, if not Top-KAST's way: a baseline from `lightning_topkast.baselines`
            (`Static()`, `SET()`, `RigL()`, `GradualPruning()`), which takes no penalty, or a `Rule` of your own.
        granularity: what the sets are made of: single entries ("entry"); blocks of outputs × inputs, chosen by their
            norm ("block"); or so many of each few neighbours in a row for A, and entries for B ("2:4").
        block_shape: outputs and inputs of a block; what is left over at a weight's edges is a smaller one.
        ramp: a `SparsityRamp`, along which the run gets from denser sets to its own sparsities.
        powerpropagation: exponent a of θ = φ|φ|^(a-1), with which the optimizer updates φ (Schwarz et al. 2021); 1 is
            off. Gradients are clipped as those of θ, the penalty shrinks θ, weight decay acts on φ.
        penalty: form of the exploration penalty: "l2", "l1" or "norm" (un-squared L2 norm).
        penalty_strength: λ, applied decoupled from the optimizer with its current learning rate: λ on active entries,
            λ / forward density on exploring ones. 0 turns the penalty off. The paper's 1e-4 belongs to SGD's learning
            rates; Adam's want about 1e-2 (the start-up table says what it amounts to).
        penalty_shrinkage: instead of `penalty_strength`, the share an exploring entry loses per step at the peak
            learning rate, in [0, 1); 1e-3 works for SGD and Adam alike. Only with penalty="l2".
        include: glob patterns of the only parameters to be sparse, of any module type; a full name also overrides the
            default to keep biases, norms, embeddings and the model's first and last weight dense.
        exclude: glob patterns of parameters kept dense.
        include_types: names of the only module types whose weights are sparse, bare ("Linear") or dotted.
        exclude_types: names of module types kept dense.
        keep_first_dense: keep the model's first weight dense.
        keep_last_dense: keep the model's last weight dense.
        reset_optimizer_state: zero the optimizer's state of entries that leave the updated set.
        execution: how sparse weights are kept. "masked" simulates sparsity with dense tensors that hold zeros: it saves
            no time and no memory. "packed" keeps the values of the updated set only, so that gradient and optimizer
            state are as small, and multiplies by them in compressed form (Linear, 1×1 Conv2d, GPT-2's Conv1D); other
            layers are kept "compact": the same, but for a dense weight that is made for every forward pass. "auto"
            packs where that is expected to be faster than dense.
        operators: which products packed layers use: "compiled" (C++ on CPU, built on first use), or for blocks "triton"
            (on a GPU), PyTorch's own ("torch"), or the former where they can be had ("auto").
        strict: refuse weights that `execution` would have to leave masked, instead of warning.
        seed: decides random exploration.
        all_reduce: what DDP sends of a masked weight's gradient: all of it ("dense"), or only the values of the updated
            set ("sparse"), as 16-bit numbers together with everything else ("sparse_bf16", "sparse_fp16"). What is
            not sent is not seen either: the gradient is zero outside the updated set, also for a gradient scaler.

    Raises:
        TopKastError: here, in `setup` or at training start, for what cannot be honoured, with the way out.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[TopKastCallback(forward_sparsity=0.9, backward_sparsity=0.8)])
    """

    def __init__(
        self,
        forward_sparsity: float,
        backward_sparsity: float,
        *,
        update_every: int = 100,
        refresh_delay: int = 0,
        distribution: Distribution = "uniform",
        overrides: dict[str, dict[str, float]] | None = None,
        exploration: Exploration = "magnitude",
        stop_exploration_at: Moment | None = None,
        stop_refreshing_at: Moment | None = None,
        rule: Rule | None = None,
        granularity: str = "entry",
        block_shape: Sequence[int] = (32, 32),
        ramp: SparsityRamp | None = None,
        powerpropagation: float = 1.0,
        penalty: Penalty = "l2",
        penalty_strength: float = 1e-4,
        penalty_shrinkage: float | None = None,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        include_types: list[str] | None = None,
        exclude_types: list[str] | None = None,
        keep_first_dense: bool = True,
        keep_last_dense: bool = True,
        reset_optimizer_state: bool = True,
        execution: Execution = "masked",
        operators: Operators | BlockOperators = "auto",
        strict: bool = False,
        seed: int = 0,
        all_reduce: AllReduce = "dense",
    ) -> None:
        super().__init__()
        self._options: dict[str, Any] = {
            "forward_sparsity": forward_sparsity,
            "backward_sparsity": backward_sparsity,
            "update_every": update_every,
            "refresh_delay": refresh_delay,
            "distribution": distribution,
            "overrides": _plain(overrides),
            "exploration": exploration,
            "stop_exploration_at": stop_exploration_at,
            "stop_refreshing_at": stop_refreshing_at,
            "rule": rule,
            "granularity": granularity,
            "block_shape": _plain(block_shape),
            "ramp": ramp,
            "powerpropagation": powerpropagation,
            "penalty": penalty,
            "penalty_strength": penalty_strength,
            "penalty_shrinkage": penalty_shrinkage,
            "include": _plain(include),
            "exclude": _plain(exclude),
            "include_types": _plain(include_types),
            "exclude_types": _plain(exclude_types),
            "keep_first_dense": keep_first_dense,
            "keep_last_dense": keep_last_dense,
            "reset_optimizer_state": reset_optimizer_state,
            "execution": execution,
            "operators": operators,
            "strict": strict,
            "seed": seed,
        }
        Settings(**self._options)  # refuse a bad value where it is given, not when training starts
        check_all_reduce(all_reduce)
        self._all_reduce = all_reduce
        self.topkast: TopKast | None = None
        self._telemetry: Telemetry | None = None
        self._saved_state: dict[str, Any] | None = None
        self._averages: SparseAverages | None = None
        self._new: TopKast | None = None  # an engine whose training has not begun
        self._saves_shards = False

    @property
    def state_key(self) -> str:
        """Tells several callbacks with disjoint targets apart in a checkpoint."""
        targets = ("include", "exclude", "include_types", "exclude_types")
        return self._generate_state_key(**{name: self._options[name] for name in targets})

    @property
    def settings(self) -> Settings:
        """The arguments it was made with."""
        return Settings(**self._options)

    # --- start ----------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be honoured before anything is built."""
        self._saved_state = None  # of a checkpoint whose training never began
        if stage == "fit" and isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy):
            raise TopKastError(
                f"{type(trainer.strategy).__name__} flattens weights into shards whose entries cannot be told "
                "apart; use FSDP2 (ModelParallelStrategy), strategy='ddp' or a single device"
            )
        self._saves_shards = saves_shards(trainer)

        packs = stage == "fit" and self._options["execution"] != "masked"
        if packs and self._kept_engine(pl_module) is None and (self._new is None or self._new.model is not pl_module):
            # Layers change: before the checkpoint is loaded and the optimizers are made. `configure_model` may be
            # called twice, as Lightning itself does for every stage.
            _call_configure_model(trainer)
            if next(pl_module.parameters(), None) is None:
                raise TopKastError(
                    f"execution='{self._options['execution']}' changes the layers before LightningModule.setup, and "
                    "there are none yet; build them in __init__ or configure_model"
                )
            self._new = self._build(trainer, pl_module)
            copy_again(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Build the engine here: parameters are final (moved, wrapped, restored) and optimizers exist."""
        topkast = self._kept_engine(pl_module)
        if topkast is None:
            topkast = self._new = self._new or self._build(trainer, pl_module)
        if self.settings.needs_length:
            topkast.plan(self._steps_of_run(trainer, topkast))
        self._attach(topkast, trainer)
        self.topkast, self._new = topkast, None
        if SparseAverages.exist_in(trainer):
            self._averages = SparseAverages(trainer, topkast)
            topkast.follow(self._averages.update)  # before the average is updated in this step
        rank_zero_info(f"Top-KAST: what is sparse, and why the rest is not\n{topkast.summary()}")

        started = self._started_engines(trainer, pl_module)
        engines = [engine for engine in started if engine is not None]
        if len(engines) == len(started):  # the last of several callbacks to start
            self._reduce_gradients(trainer, engines)
            leader = next(callback for callback in callbacks_of(trainer) if isinstance(callback, TopKastCallback))
            leader._telemetry = Telemetry(trainer, engines)
            leader._telemetry.log(force=True)

    def _reduce_gradients(self, trainer: Trainer, engines: Sequence[TopKast]) -> None:
        wishes = {callback._all_reduce for callback in callbacks_of(trainer) if isinstance(callback, TopKastCallback)}
        if len(wishes) > 1:
            raise TopKastError(
                f"the TopKastCallbacks of this Trainer differ in all_reduce ({', '.join(sorted(wishes))}), but the "
                "gradients of all are reduced together; give them the same"
            )
        if isinstance(trainer.strategy.model, DistributedDataParallel):
            register(trainer.strategy.model, engines, self._all_reduce)
        elif trainer.world_size > 1 and self._all_reduce != "dense":
            raise TopKastError(
                f"all_reduce='{self._all_reduce}' needs DDP, whose gradients a hook can reduce; "
                f"{type(trainer.strategy).__name__} reduces its own: leave all_reduce='dense'"
            )

    def _attach(self, topkast: TopKast, trainer: Trainer) -> None:
        if topkast is self._new:
            # another callback may have frozen weights after ours had packed them; those of an earlier fit stay sparse
            topkast.leave_out([name for name, weight in topkast.weights.items() if not weight.parameter.requires_grad])
            if not topkast.weights:
                raise TopKastError("every weight that was to be sparse is frozen; unfreeze some, or include others")
        sparse = {id(weight.parameter) for weight in topkast.weights.values()}
        optimizers = [optimizer for optimizer in trainer.optimizers if sparse & _parameters_of(optimizer)]
        if optimizers:
            topkast.attach(*optimizers)
        if topkast.unattached:
            raise TopKastError(
                f"no optimizer holds the sparse weights {', '.join(topkast.unattached[:5])}: give them to one, freeze "
                "them (requires_grad_(False)) or exclude them; unless execution='masked', their layers must stay "
                "those that __init__ or configure_model has built"
            )
        if trainer.global_step == 0:
            topkast.restart()
        if self._saved_state is not None:
            topkast.load_state_dict(with_shards(self._saved_state, topkast, trainer.ckpt_path))
            self._saved_state = None

    def _kept_engine(self, pl_module: LightningModule) -> TopKast | None:
        """The engine of an earlier `fit`, if the model is still as it left it."""
        if self.topkast is not None and self.topkast.model is pl_module and self.topkast.is_intact:
            return self.topkast
        return None

    def _build(self, trainer: Trainer, pl_module: LightningModule) -> TopKast:
        others = [c for c in callbacks_of(trainer) if isinstance(c, TopKastCallback) and c is not self]
        engines = [other._new or (other.topkast if other._works_on(pl_module) else None) for other in others]
        taken = {name for engine in engines if engine is not None for name in engine.weights}
        return TopKast(pl_module, taken=taken, **self._options)

    def _steps_of_run(self, trainer: Trainer, topkast: TopKast) -> int | float:
        total_steps = trainer.estimated_stepping_batches
        if topkast is self._new and self._saved_state is None:
            total_steps -= trainer.global_step  # a dense checkpoint goes on sparse: we count from here
        return total_steps

    def _works_on(self, pl_module: LightningModule) -> bool:
        return self.topkast is not None and self.topkast.model is pl_module and self.topkast.is_attached

    @staticmethod
    def _started_engines(trainer: Trainer, pl_module: LightningModule) -> list[TopKast | None]:
        return [
            callback.topkast if callback._works_on(pl_module) else None
            for callback in callbacks_of(trainer)
            if isinstance(callback, TopKastCallback)
        ]

    def all_reduce_hook(self, hook: Hook) -> Hook:
        """A DDP communication hook that sends what `hook` would, but of masked weights the updated set only.

        For a model that is to have another hook than `all_reduce` offers, which then stays "dense":

            DDPStrategy(ddp_comm_state=state, ddp_comm_hook=callback.all_reduce_hook(powerSGD_hook))

        Two callbacks' hooks go into each other. Lightning registers such hooks on GPUs only.
        """
        return sparse_all_reduce_of(lambda: [] if self.topkast is None else [self.topkast], hook)

    # --- every step -----------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """An average was updated since the last batch, perhaps after our own `on_train_batch_end`."""
        self._restore_sparsity()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Mask the gradients: they are unscaled here, not yet clipped, and complete also under accumulation."""
        if self.topkast is not None:
            self.topkast.prepare_step(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log; the step itself and the refresh were done in the optimizer's own hooks."""
        if self._telemetry is not None:
            self._telemetry.log()

    # --- what others see ------------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An averaging callback swaps its average in at `on_validation_epoch_start`: make it sparse before."""
        if self._averages is not None:
            self._averages.update()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save α also from a signal handler in the middle of a step or refresh, and averages that are sparse.

        An averaging callback saves a view of its average, so that our order does not matter.
        """
        if self._averages is not None:
            self._averages.update()
        if self.topkast is not None:
            changing = {own_part(w.parameter).data_ptr(): w for w in self.topkast.weights.values() if not w.is_settled}
            state = checkpoint["state_dict"]
            for name, value in state.items() if changing else ():
                if own_part(value).data_ptr() in changing:
                    state[name] = changing[own_part(value).data_ptr()].alpha()
            if self._saves_shards:
                move_shards_out(checkpoint, self.state_key)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An averaging callback copies its average into the model here, before or after us."""
        self._restore_sparsity()
        if self._telemetry is not None:
            self._telemetry.finish()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last checkpoint is written by now."""
        if self._telemetry is not None:
            self._telemetry.hand_over()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """A step may have been broken off: end it, as other callbacks may save a checkpoint; there is no teardown."""
        if self._new is not None:  # refused: the model shall be what it was
            self._new.release()
            self._new = None
        if self.topkast is not None:
            self.topkast.detach()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the optimizers; the engine stays, to be read and to be taken up by a second `fit`."""
        self._telemetry = None
        self._averages = None
        self._saved_state = None  # of a checkpoint that was only validated or tested
        if self.topkast is not None and stage == "fit":
            self.topkast.detach()
            self.topkast.follow(None)

    def _restore_sparsity(self) -> None:
        if self._averages is not None and self.topkast is not None:
            self._averages.update()
            self.topkast.restore_sparsity()

    # --- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The engine's state: tensors and primitives only."""
        engine = self._new or self.topkast
        if engine is None:
            return self._saved_state or {}
        return engine.state_dict(gathered=not self._saves_shards)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts: the weights it belongs to may not be in place yet, nor optimizers."""
        self._saved_state = state_dict
        if self._new is not None and state_dict:  # packed layers are, and have just been given α only
            self._new.load_state_dict(state_dict)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: Mapping[str, Any]) -> None:
        """Refuse to go on with a sparse checkpoint whose sets we would silently lose."""
        saved = [key for key in checkpoint.get("callbacks", {}) if key.startswith(type(self).__qualname__)]
        if trainer.state.fn == TrainerFn.FITTING and saved and self.state_key not in saved:
            raise TopKastError(
                f"the checkpoint holds Top-KAST states for other targets ({'; '.join(saved)}), none for "
                f"{self.state_key}; resume with the include and exclude it was saved with"
            )


def _plain(value: Any) -> Any:
    """Plain dicts and lists, also where a config library hands over its own."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value


def _parameters_of(optimizer: Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
