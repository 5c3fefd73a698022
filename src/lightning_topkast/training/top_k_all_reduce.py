"""DDP's all-reduce of gradients that sends only the largest values, and later what it has not sent.

Of a sparse weight's gradient on B, every rank sends the k values that are largest together with what it has not sent
before: top-k SGD with error feedback (Stich et al. 2018, "Sparsified SGD with Memory"). Ranks choose different entries,
so their places are sent too, and gathered rather than reduced: 8 bytes for a float32 value, to each of the other ranks.
"""

from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import GradBucket  # type: ignore[attr-defined]  # no Python file names it
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.futures import Future, collect_all

from lightning_topkast.errors import TopKastError
from lightning_topkast.gradients import TopKGradients
from lightning_topkast.method.selection import NonFiniteScoresError, nested_top_k
from lightning_topkast.ops.flat import check_indices, flat, indices
from lightning_topkast.topkast import TopKast
from lightning_topkast.training.all_reduce import Hook, PackedBucket, reduced_weights
from lightning_topkast.training.residual import Residual
from lightning_topkast.weights import SparseWeight
from lightning_topkast.weights.state import holds_values


class _Share(NamedTuple):
    """What this rank sends of one weight's gradient.

    Args:
        residual: of the weight.
        gradient: of the weight, 1-D, in memory order; it receives what all ranks send.
        chosen: positions of the values among those on B: int64.
        values: as many; zeros fill up.
        before: values of the residual before, if this rank has not used the weight.
    """

    residual: Residual
    gradient: Tensor
    chosen: Tensor
    values: Tensor
    before: Tensor | None


class TopKAllReduce:
    """A DDP communication hook that sends the largest values of sparse weights' gradients, and the rest later.

        compressed = TopKAllReduce(topkast, gradients=TopKGradients(density=0.1))
        ddp.register_comm_hook(None, compressed.hook)

    Every rank adds its gradient on B to its *residual*, sends the k largest of these sums, and keeps the others as the
    residual for the next step. What all ranks have sent is averaged, and reaches the optimizer of every rank alike.

    - The residual follows B at a refresh; that of entries that leave B is dropped.
    - The residual of a weight that no rank has used stays as it was, since DDP drops what is reduced of it. Ranks tell
      each other by 4 bytes for each weight.
    - NaN and infinity reach every rank as NaN, and leave the rank's residual as it was.
    - Gradients of dense parameters are sent whole, by `hook`. So are those of weights whose engine is attached to no
      optimizer, or whose rule looks at all gradients for the next refresh (RigL).

    For each entry of B it keeps a value, and 8 bytes of index in host memory; those of masked weights are on the
    device too.

    Args:
        engines: the engines of the wrapped model.
        gradients: how many values are sent, and how they are chosen.
        hook: reduces what is sent whole, and gets the state given to `register_comm_hook`, as in `sparse_all_reduce`.
        scaler: the gradient scaler, if there is one: the residual does not depend on its scale, and is put back
            if it skips the step, which takes the memory of the residual once more.

    Raises:
        TopKastError: an all-reduce of all of B would send less, since there are more than 1 / density ranks.
    """

    def __init__(
        self,
        *engines: TopKast,
        gradients: TopKGradients,
        hook: Hook = allreduce_hook,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.engines = engines
        self.gradients = gradients
        self._hook = hook
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._residuals: WeakKeyDictionary[SparseWeight, Residual] = WeakKeyDictionary()
        # as they were before this backward pass, as long as its step may be skipped
        self._before: list[tuple[Residual, Tensor]] = []
        self._overflowed = False
        self._used: set[Tensor] = set()  # parameters that have got a gradient since they were reduced
        gradients.check_ranks(_ranks(None))
        for weight in self._weights.values():
            if weight.parameter.requires_grad:  # DDP reduces no others
                weight.parameter.register_post_accumulate_grad_hook(self._used.add)

    def hook(self, state: Any, bucket: GradBucket) -> Future[Tensor]:
        """Reduce a bucket of gradients; `register_comm_hook` takes it."""
        if bucket.index() == 0:
            self._settle()
        group = state if isinstance(state, dist.ProcessGroup) else None
        scale = 1.0 if self._scaler is None else self._scaler.get_scale()
        sparse = reduced_weights(self.engines)
        weights = [sparse.get(parameter) for parameter in bucket.parameters()]
        shares = [
            self._share(weight, flat(gradient), scale)
            for weight, gradient in zip(weights, bucket.gradients(), strict=True)
            if weight is not None
        ]
        self._used.difference_update(bucket.parameters())
        nothing = torch.empty(0, dtype=torch.int64, device=bucket.buffer().device)
        rest = PackedBucket(bucket, [None if weight is None else nothing for weight in weights])
        futures, chosen, values = [], nothing, nothing
        if shares:
            # every rank has the same B in the same order, so a position in it says which entry is meant
            small = all(len(share.residual) <= torch.iinfo(torch.int32).max for share in shares)
            used = nothing.new_tensor([share.before is None for share in shares])
            at = torch.cat([*(share.chosen for share in shares), used]).to(torch.int32 if small else torch.int64)
            done, chosen = _gather(at, group)
            also_done, values = _gather(torch.cat([share.values for share in shares]), group)
            futures += [done, also_done]
        # last, since it may begin more collectives whenever one of its own is done
        reduced = self._hook(state, rest) if rest.buffer().numel() else None
        futures += [] if reduced is None else [reduced]

        def finish(_: Future[list[Future[Any]]]) -> Tensor:
            # of each by itself: on a GPU its memory is synchronised with the current stream
            for future in futures:
                future.wait()
            buffer = bucket.buffer() if reduced is None else rest.unpack(reduced)
            if shares:
                _write_mean(shares, chosen, values)
            # never back to False: other buckets may be finished at the same time, in other threads
            if self._scaler is not None and not bool(torch.isfinite(buffer).all()):
                self._overflowed = True
            return buffer

        return collect_all(futures).then(finish)

    def _share(self, weight: SparseWeight, gradient: Tensor, scale: float) -> _Share:
        """Return what this rank sends of a weight's scaled gradient; the residual becomes what it does not send."""
        residual = self._residual_of(weight)
        own = residual.entries_of(gradient)
        count = max(1, round(self.gradients.density * own.numel()))
        first = torch.arange(count, device=own.device)
        before = None if weight.parameter in self._used else residual.values
        total = own.to(residual.values.dtype) + residual.values * scale if self.gradients.feedback else own
        try:
            chosen = self._choose(total, count)
        except NonFiniteScoresError:
            return _Share(residual, gradient, first, torch.full_like(own[:count], torch.nan), before)
        values = total[chosen].to(gradient.dtype)
        if self.gradients.feedback:
            if self._scaler is not None:
                self._before.append((residual, residual.values))
            total[chosen] -= values  # zero, or what 16 bits have rounded off
            residual.values = total.div_(scale)
        missing = count - chosen.numel()  # a message always has the same size
        chosen, values = torch.cat([chosen, first[:missing]]), torch.cat([values, values.new_zeros(missing)])
        return _Share(residual, gradient, chosen, values, before)

    def _choose(self, values: Tensor, count: int) -> Tensor:
        """Return the positions of the `count` largest values, or with a Gaussian threshold at most as many.

        Raises:
            NonFiniteScoresError: a value is NaN or infinite.
        """
        magnitudes = values.abs()
        if self.gradients.threshold == "exact":
            return indices(nested_top_k(magnitudes, (count,)).bool())
        if not bool(torch.isfinite(values).all()):
            raise NonFiniteScoresError("gradients must be finite")
        return indices(magnitudes > gaussian_threshold(values, count / values.numel()))[:count]

    def _residual_of(self, weight: SparseWeight) -> Residual:
        residual = self._residuals.get(weight)
        if residual is None or residual.version != weight.version:
            residual = self._residuals[weight] = Residual(weight, residual)
        return residual

    @property
    def _weights(self) -> dict[str, SparseWeight]:
        return {name: weight for engine in self.engines for name, weight in engine.weights.items()}

    def _settle(self) -> None:
        """Put the residuals back if the step after the last backward pass was skipped."""
        if self._overflowed:
            for residual, values in reversed(self._before):
                residual.values = values
        self._before, self._overflowed = [], False

    def follow(self, earlier: "TopKAllReduce") -> None:
        """Continue with the residuals of another hook, for example that of an earlier `fit`."""
        earlier._settle()
        self._residuals = earlier._residuals

    # --- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the residuals of all ranks, on rank 0; every rank must call it. Loadable with `weights_only=True`."""
        self._settle()
        state: dict[str, Any] = {}
        for name, weight in sorted(self._weights.items()):
            if weight in self._residuals:
                residual = self._residuals[weight]
                entries, order = residual.flat_indices.sort()
                values = _of_all_ranks(residual.values[order.to(residual.values.device)])
                state |= {} if values is None else {name: {"entries": entries, "values": values}}
        return state

    def load_state_dict(self, *states: Mapping[str, Any]) -> None:
        """Continue with saved residuals; with another number of ranks each gets the mean of all.

        Args:
            states: what `state_dict` has returned on rank 0; several, if their engines had hooks of their own. Weights
                that they do not name begin without a residual.

        Raises:
            TopKastError: a state is damaged, or names other weights. Nothing was changed then.
        """
        loaded: dict[SparseWeight, Residual] = {}
        for state in states:
            if not isinstance(state, Mapping):
                raise TopKastError(f"expected the saved residuals to be a dict, got {type(state).__name__}")
            for name, saved in state.items():
                weight = self._weights.get(name)
                if weight is None:
                    raise TopKastError(
                        f"the saved residuals name '{name}', which is not a sparse weight of the engines"
                    )
                entries, values = _checked(saved, weight)
                residual = loaded[weight] = Residual(weight)
                residual.load(entries, values[_rank()] if len(values) == _ranks(None) else values.mean(0))
        self._before, self._overflowed = [], False
        self._residuals = WeakKeyDictionary(loaded)


def gaussian_threshold(values: Tensor, density: float) -> float:
    """Return a threshold that about this share of the magnitudes exceeds if the values are normally distributed.

    It is corrected at most three times, until the share is within a third of what was asked (Shi et al. 2019,
    algorithm 1).

    Args:
        values: 1-D, finite.
        density: in (0, 1].
    """
    if density == 1:
        return -1.0
    mean, deviation = float(values.mean()), float(values.std(correction=0))
    threshold = mean + deviation * NormalDist().inv_cdf(1 - density / 2)
    magnitudes, count = values.abs(), density * values.numel()
    for _ in range(3):
        found = int(torch.count_nonzero(magnitudes > threshold))
        if found < 2 / 3 * count:
            threshold *= 0.5
        elif found > 4 / 3 * count:
            threshold *= 1.5
        else:
            break
    return threshold


def _gather(part: Tensor, group: dist.ProcessGroup | None) -> tuple[Future[Any], Tensor]:
    """Begin to gather a tensor; return a future, and ranks × the tensor, which is complete once that is done."""
    received = part.new_empty(_ranks(group), part.numel())
    work = dist.all_gather(list(received), part, group=group, async_op=True)
    assert work is not None
    return work.get_future(), received


def _write_mean(shares: Sequence[_Share], chosen: Tensor, values: Tensor) -> None:
    """Write the mean of what the ranks have sent into the gradients, rank after rank: the same bits on each of them.

    What no rank has used is left as it was before: DDP would drop the mean, but its bucket may hold an earlier gradient
    that is still there, for example that of another loss.

    Args:
        shares: of this rank.
        chosen: ranks × positions of all shares, and for each share whether the rank has used the weight.
        values: ranks × values of all shares.
    """
    lengths = [share.values.numel() for share in shares]
    *places, used = chosen.split([*lengths, len(shares)], 1)
    sent_of_all = values.split(lengths, 1)
    for share, at, sent, is_used in zip(shares, places, sent_of_all, used.any(0).tolist(), strict=True):
        if share.before is not None and not is_used:
            share.residual.values = share.before
            continue
        share.gradient.zero_()
        for rank in range(len(values)):
            share.gradient.index_add_(0, share.residual.places(at[rank].long()), sent[rank] / len(values))


def _of_all_ranks(values: Tensor) -> Tensor | None:
    """Return ranks × values, on CPU, on rank 0, and None on other ranks; a collective."""
    if _ranks(None) == 1:
        return values.cpu().clone()[None]
    gathered = [torch.empty_like(values) for _ in range(_ranks(None))] if _rank() == 0 else None
    dist.gather(values, gathered)
    return None if gathered is None else torch.stack(gathered).cpu()


def _checked(saved: Any, weight: SparseWeight) -> tuple[Tensor, Tensor]:
    """Return the entries of a saved residual, and ranks × values.

    Raises:
        TopKastError: it is damaged.
    """
    state = saved if isinstance(saved, dict) else {}
    entries, values = state.get("entries"), state.get("values")
    try:
        if not (isinstance(entries, Tensor) and isinstance(values, Tensor)):
            raise ValueError("expected the tensors 'entries' and 'values'")
        valid = holds_values(entries) and entries.dtype == torch.int64 and entries.dim() == 1
        valid = valid and holds_values(values) and values.is_floating_point() and values.dim() == 2
        if not valid or not values.numel() or values.shape[1] != entries.numel():
            raise ValueError("expected 'entries' to be int64, and 'values' one number of each rank for each of them")
        check_indices(entries, weight.size)
        if not bool(torch.isfinite(values).all()):
            raise ValueError("expected finite values")
    except ValueError as error:
        raise TopKastError(f"the saved residual of '{weight.name}' is damaged: {error}") from None
    return entries, values


def _ranks(group: dist.ProcessGroup | None) -> int:
    return dist.get_world_size(group) if dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
