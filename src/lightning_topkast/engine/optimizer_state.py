"""The optimizers' state of sparse weights, which belongs to certain sets."""

import copy
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary, WeakMethod

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_topkast.engine.optimizers import entry_states, start_of, state_of
from lightning_topkast.weights import SparseWeight
from lightning_topkast.weights.orders import Sets, fingerprint

# Key in an optimizer's state of a packed weight: the fingerprint of the sets in whose order the state is. It is there
# in what `state_dict` returns and while we do not act on the optimizer's steps, and goes wherever the state goes.
SETS = "topkast_sets"
_UNKNOWN = 0  # the fingerprint of no sets


class OptimizerState:
    """Knows to which sets the state of some optimizers belongs, and moves it to the present ones before it is used.

    State outside B is reset, and packed state is in the order of its sets. Other code may put back an earlier state, or
    other weights, in any order and without telling us, so this is known for each optimizer and weight: by the weight's
    `orders`, or by the fingerprint that was saved with the state.

    Args:
        weights_of: returns the sparse weights that an optimizer holds.
    """

    def __init__(self, weights_of: Callable[[Optimizer], Iterable[SparseWeight]]) -> None:
        self._weights_of = weights_of
        self._orders: WeakKeyDictionary[Optimizer, dict[SparseWeight, int]] = WeakKeyDictionary()

    def watch(self, optimizer: Optimizer) -> list[RemovableHandle]:
        """Notice state that is loaded, and give fitting state to be saved, as long as this object exists."""
        if not hasattr(optimizer, "_optimizer_state_dict_post_hooks"):  # a wrapper without its base's __init__
            return []
        return [
            optimizer.register_load_state_dict_post_hook(_weakly(self._after_loading)),
            optimizer.register_state_dict_post_hook(_weakly(self._after_saving)),
        ]

    def orders(self, optimizer: Optimizer) -> dict[str, int]:
        """Return weight name → the order in which the state was used last, where it is known."""
        return {weight.name: order for weight, order in self._orders.get(optimizer, {}).items()}

    def begin(self, optimizer: Optimizer, orders: Mapping[str, int]) -> None:
        """Take the state for that of these orders, as `orders` has returned them for the optimizer that was copied."""
        known = {weight: orders[weight.name] for weight in self._weights_of(optimizer) if weight.name in orders}
        self._orders[optimizer] = known

    @torch.no_grad()
    def fit(self, optimizer: Optimizer, weights: Iterable[SparseWeight]) -> list[str]:
        """Make the state fit the present sets of these weights.

        Returns:
            names of the weights whose state begins anew, since the sets that it belongs to are not known.
        """
        orders = self._orders.setdefault(optimizer, {})
        anew = []
        for weight in weights:
            state = state_of(optimizer, weight.parameter)
            if SETS in state or orders.get(weight) != weight.orders.present:
                sets = self._sets_of(optimizer, weight, state, weight.sets)
                if not _move(optimizer, weight, state, sets):
                    anew.append(weight.name)
                orders[weight] = weight.orders.present
        return anew

    @torch.no_grad()
    def leave(self, optimizer: Optimizer) -> None:
        """Make the state fit, if its sets are known, and leave their fingerprint with it."""
        for weight in self._weights_of(optimizer):
            state = state_of(optimizer, weight.parameter)
            if state and SETS not in state and self._orders.get(optimizer, {}).get(weight) is not None:
                known = self._sets_of(optimizer, weight, state, weight.sets) is not None
                if known:
                    self.fit(optimizer, [weight])
                if weight.is_packed:
                    state[SETS] = fingerprint(weight.sets) if known else _UNKNOWN

    def _sets_of(self, optimizer: Optimizer, weight: SparseWeight, state: dict[str, Any], sets: Sets) -> Sets | None:
        if SETS in state:
            return weight.orders.sets_with(state[SETS], sets)
        order = self._orders.get(optimizer, {}).get(weight)
        # masked state is in no order
        return weight.orders.sets_of(order if weight.is_packed else None, sets)

    def _after_loading(self, optimizer: Optimizer) -> None:
        self._orders.pop(optimizer, None)

    @torch.no_grad()
    def _after_saving(self, optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        """Return what `state_dict` is to return: state that fits the present sets, without changing the optimizer's."""
        parameters, keys = (
            chain.from_iterable(group["params"] for group in groups)
            for groups in (optimizer.param_groups, saved["param_groups"])
        )
        key_of = {id(parameter): key for parameter, key in zip(parameters, keys, strict=True)}
        states = dict(saved["state"])
        for weight in self._weights_of(optimizer):
            key = key_of[id(weight.parameter)]
            state = states.get(key)
            if not state or not isinstance(state, dict) or weight.was_loaded:  # its sets are not chosen yet
                continue
            sets = weight.sets
            known = self._sets_of(optimizer, weight, state, sets)
            if known is None:  # it may be later, if a fingerprint is with it
                states[key] = {SETS: _UNKNOWN} | state
                continue
            order = self._orders.get(optimizer, {}).get(weight)
            if known is not sets or (SETS not in state and order != weight.orders.present):
                state = copy.deepcopy(state)
                _move(optimizer, weight, state, known)
            states[key] = state | {SETS: fingerprint(sets)} if weight.is_packed else state
        return {**saved, "state": states}


def _move(optimizer: Optimizer, weight: SparseWeight, state: dict[str, Any], sets: Sets | None) -> bool:
    """Move state to the present sets, or let it begin anew; return whether it was moved.

    Args:
        optimizer: whose state it is, or a copy.
        weight: to which it belongs.
        state: by the optimizer's names.
        sets: those to which it belongs, or None if they are not known.
    """
    state.pop(SETS, None)
    for key, value in state.items():
        if isinstance(value, Tensor):
            state[key] = weight.adopt(value, sets, start_of(optimizer, weight.parameter, key))
    entries = list(entry_states(optimizer, weight.parameter, weight.name, state))
    if sets is not None:
        weight.realign(entries, sets)
    else:
        for values, start in entries:
            values.fill_(start)
    return sets is not None or not entries


def _weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls a method as long as its object exists."""
    weak = WeakMethod(method)

    def call(*arguments: Any) -> Any:
        found = weak()
        return None if found is None else found(*arguments)

    return call
