"""The optimizers that an engine is attached to."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import chain, repeat

from torch import Tensor
from torch.optim import Optimizer

from lightning_topkast.engine.step_hooks import StepHooks
from lightning_topkast.engine.watch import unwatch_steps, watch_steps
from lightning_topkast.errors import TopKastError
from lightning_topkast.weights import EntryState, SparseWeight


class Attached:
    """The hooks on the steps of an engine's optimizers, and how many steps were taken with each.

    Args:
        after_step: as for `StepHooks`.
        looks_at_gradients: likewise.
        before_step: likewise.
    """

    def __init__(
        self,
        after_step: Callable[[StepHooks], None],
        looks_at_gradients: Callable[[Sequence[SparseWeight], int], bool],
        before_step: Callable[[Sequence[SparseWeight]], None],
    ) -> None:
        self.hooks: list[StepHooks] = []
        # of the optimizers that were detached last, whose state is saved as it fits the sets
        self._past: list[StepHooks] = []
        self.orders: dict[str, int] = {}  # of the state of optimizers that were copied, as in `StepHooks.orders`
        # Steps taken with optimizers that were detached, or of a state loaded before any optimizer was attached.
        self.steps_before: list[int] = []
        self._loaded = 0  # number of optimizers of a state that was loaded before any was attached
        self._calls = after_step, looks_at_gradients, before_step

    def __iter__(self) -> Iterator[StepHooks]:
        return iter(self.hooks)

    def __len__(self) -> int:
        return len(self.hooks)

    @property
    def steps(self) -> list[int]:
        """Number of steps taken with each optimizer."""
        return [hooks.steps for hooks in self.hooks] or self.steps_before

    @property
    def optimizers(self) -> list[Optimizer]:
        """The optimizers that were attached, or those made anew in their place."""
        return [optimizer for hooks in self.hooks for optimizer in hooks.optimizers[:1]]

    @property
    def awaits_optimizers(self) -> bool:
        """Whether a state was loaded before its optimizers were attached."""
        return self._loaded > 0

    def left_out(self, weights: Mapping[str, SparseWeight]) -> list[str]:
        """Return the names of the weights that no optimizer holds."""
        held = {id(weight) for hooks in self.hooks for weight in hooks.weights}
        return [name for name, weight in weights.items() if id(weight) not in held]

    def add(self, optimizers: Sequence[Optimizer], weights: Mapping[Tensor, SparseWeight]) -> list[StepHooks]:
        """Add optimizers, which take up the steps of those that were detached; `begin` lets their hooks act.

        Returns:
            the hooks of the optimizers before, for `take_back`.

        Raises:
            TopKastError: see `TopKast.attach`. Nothing was added then.
        """
        before = self.hooks
        if self._loaded not in (0, len(optimizers)):
            raise TopKastError(
                f"expected {self._loaded} optimizers, as in the Top-KAST state that was loaded, got {len(optimizers)}; "
                "attach as many, or make a new TopKast without that state"
            )
        try:
            for optimizer, steps in zip(optimizers, chain(self.steps_before, repeat(0)), strict=False):
                if self._acts_on(optimizer):
                    raise TopKastError(f"this {type(optimizer).__name__} is already attached; attach it only once")
                self.hooks = [*self.hooks, StepHooks(optimizer, weights, *self._calls, steps)]
        except TopKastError:
            self.hooks = before
            raise
        return before

    def take_back(self, before: list[StepHooks]) -> None:
        """Undo `add`."""
        self.hooks = before

    def begin(self, before: Collection[StepHooks]) -> None:
        """Act on the steps of the optimizers that were added, and of others that are made in their place."""
        self.end_watching()
        for hooks in self.hooks:
            if hooks not in before:
                hooks.begin(self.orders)
        self.steps_before, self._loaded, self.orders = [], 0, {}
        watch_steps(self)

    def end(self) -> None:
        """Remove the hooks on steps; the step counts are kept."""
        self.steps_before = self.steps
        for hooks in self.hooks:
            hooks.end()
        if self.hooks:
            self._past, self.hooks = self.hooks, []
        unwatch_steps(self)

    def end_watching(self) -> None:
        """Remove the hooks on the state of optimizers that were detached."""
        for hooks in self._past:
            hooks.end_watching()
        self._past = []

    def fit_state(self) -> None:
        """Make the optimizers' state fit the sets before these are used or changed."""
        for hooks in self.hooks or self._past:
            hooks.fit_state()

    def leave_state(self) -> None:
        """Leave the state of optimizers that are detached to code that does not know of us."""
        for hooks in self._past:
            hooks.leave_state()

    def load(self, steps: Sequence[int]) -> None:
        """Continue with the step counts of a saved state, one for each optimizer."""
        self.steps_before = [] if self.hooks else list(steps)
        self._loaded = len(self.steps_before)
        for hooks, count in zip(self.hooks, steps, strict=False):
            hooks.steps = count

    def restart(self) -> None:
        """Count the steps from 0."""
        self.steps_before = [0 for _ in self.steps_before]
        for hooks in self.hooks:
            hooks.steps = 0

    def recover(self) -> None:
        """Forget a step that was interrupted."""
        for hooks in self.hooks:
            hooks.recover()

    def state_of(self, weight: SparseWeight) -> list[EntryState]:
        """Return the state that the optimizers keep for the entries of a weight, which then fits its sets."""
        return [state for hooks in self.hooks or self._past for state in hooks.state_of(weight)]

    def meet(self, optimizer: Optimizer) -> None:
        """Act on the steps of an optimizer if it holds weights of an attached one: inside a wrapper, or made anew.

        This is called before every step of any optimizer of the process.
        """
        if self._acts_on(optimizer):
            return
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for hooks in self.hooks:
            if any(id(weight.parameter) in held for weight in hooks.weights):
                hooks.join(optimizer)

    def prepare_step(self, optimizer: Optimizer) -> None:
        """Mask the gradients of the next step of `optimizer`, so that the step itself need not mask them."""
        self.meet(optimizer)
        for hooks in self.hooks:
            if optimizer in hooks.optimizers:
                hooks.prepare_step()

    def _acts_on(self, optimizer: Optimizer) -> bool:
        return any(optimizer in hooks.optimizers for hooks in self.hooks)
