"""What is known about optimizers: which state each entry has, and where it begins.

State of an entry that leaves B is reset, and packed state moves with its entry. So every tensor of an optimizer's state
must be known: one that is not would silently mix the past of different entries.
"""

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_topkast.distributed import to_local
from lightning_topkast.errors import TopKastError
from lightning_topkast.weights import EntryState

Start = float | str  # a value, or the key of the parameter group that holds it


@dataclass(frozen=True)
class KnownOptimizer:
    """What Top-KAST must know of an optimizer.

    Args:
        starts: key of state in the parameter's shape → the value of an entry that was never updated, or the key of the
            parameter group that holds this value.
        shared: keys of state that belongs to no single entry, or that no update uses; it is left alone.
        elementwise: whether the update is the same for a weight in one dimension, as packed weights are.
        obstacle: why it cannot train sparse weights, or "".
    """

    starts: Mapping[str, Start] = field(default_factory=dict)
    shared: Collection[str] = ()
    elementwise: bool = True
    obstacle: str = ""


# State with these keys starts at zero in every optimizer that was looked at.
_ZERO_AT_FIRST = dict.fromkeys(
    (
        "momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_avg_var", "max_exp_avg_var", "exp_avg_diff",
        "exp_inf", "square_avg", "grad_avg", "acc_delta", "prev",
    ),
    0.0,
)  # fmt: skip

_DIFFERENTIATES = "it differentiates the loss again in its step, for which the weights must not have been opened"
_AVERAGES_WEIGHTS = "it keeps a copy of the weights and writes it into the model"

# By the name of the class, or of one of its bases.
_KNOWN: dict[str, KnownOptimizer] = {
    "LBFGS": KnownOptimizer(
        obstacle="it evaluates its closure many times per step, but the weights can be opened for one update only"
    ),
    "Adagrad": KnownOptimizer({"sum": "initial_accumulator_value"}),
    "Rprop": KnownOptimizer({"prev": 0.0, "step_size": "lr"}),
    "ASGD": KnownOptimizer(shared={"ax"}, elementwise=False),  # an average of θ, which no update uses
    "Adafactor": KnownOptimizer({"variance": 0.0}, shared={"row_var", "col_var"}, elementwise=False),
    "Muon": KnownOptimizer(elementwise=False),
    "LARS": KnownOptimizer({"mu": 0.0}, elementwise=False),
    "Lookahead": KnownOptimizer(obstacle=_AVERAGES_WEIGHTS),
    "SAM": KnownOptimizer(shared={"old_p", "e_w", "e"}),  # of one step
    "SOAP": KnownOptimizer(obstacle="its averages lie in another basis than the entries"),
    "AdEMAMix": KnownOptimizer({"exp_avg_slow": 0.0}),
    "Adan": KnownOptimizer({"previous_grad": 0.0, "neg_pre_grad": 0.0, "exp_avg_nest": 0.0}),
    "AdaHessian": KnownOptimizer(obstacle=_DIFFERENTIATES),
    "SophiaH": KnownOptimizer(obstacle=_DIFFERENTIATES),
    "AdamP": KnownOptimizer(elementwise=False),
    "Aida": KnownOptimizer(elementwise=False),
}


def register_optimizer(
    optimizer: type,
    starts: Mapping[str, Start] | None = None,
    *,
    shared: Collection[str] = (),
    elementwise: bool = True,
) -> None:
    """Declare how an optimizer keeps its state, so that it can train sparse weights.

    Args:
        optimizer: the class; it counts for classes derived from it too.
        starts: key of state in the parameter's shape → the value of an entry that was never updated, or the key of the
            parameter group that holds this value. Momenta and averages with the names of PyTorch's need no entry.
        shared: keys of state that belongs to no single entry, or that no update uses; it is left alone.
        elementwise: whether the update is the same for a weight in one dimension; if not, only storage="masked" is
            possible.
    """
    _KNOWN[optimizer.__name__] = KnownOptimizer(dict(starts or {}), tuple(shared), elementwise)


def known(optimizer: Optimizer) -> KnownOptimizer | None:
    """Return what is known of an optimizer or of a class that it is derived from, or None."""
    return next((_KNOWN[cls.__name__] for cls in type(optimizer).__mro__ if cls.__name__ in _KNOWN), None)


def check_optimizer(optimizer: Optimizer, packed: Collection[str]) -> None:
    """Refuse an optimizer that is known not to train sparse weights.

    Args:
        optimizer: to be attached.
        packed: names of the packed weights that it holds.

    Raises:
        TopKastError: it cannot, or cannot with packed weights.
    """
    name, facts = type(optimizer).__name__, known(optimizer)
    if facts is not None and facts.obstacle:
        raise TopKastError(
            f"{name} cannot train sparse weights: {facts.obstacle}; use an optimizer that needs one gradient per step "
            "and updates each entry by itself (SGD, Adam, AdamW, ...)"
        )
    swaps = callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))
    if swaps and not inner_optimizers(optimizer):  # a wrapper only passes them on
        raise TopKastError(
            f"{name} swaps the weights by its train() and eval(), and what it swaps in is not sparse; use an optimizer "
            "without a copy of the weights (SGD, Adam, AdamW, ...)"
        )
    if packed:
        elementwise = _updates_elementwise(optimizer) if facts is None else facts.elementwise
        if not elementwise:
            raise TopKastError(
                f"{name} looks at the shape of a weight, but the packed weights ({', '.join(sorted(packed)[:3])}) are "
                "one-dimensional, so training would differ; use storage='masked', or an optimizer that updates each "
                "entry by itself (SGD, Adam, AdamW, ...)"
            )


def state_of(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    """Return the state that an optimizer keeps for a parameter, by its names."""
    state = optimizer.state.get(parameter, {})
    return state if isinstance(state, dict) else {"state": state}


def entry_states(
    optimizer: Optimizer, parameter: nn.Parameter, name: str, state: Mapping[str, Any]
) -> Iterator[EntryState]:
    """Yield the state that an optimizer keeps for the entries of a parameter.

    Args:
        optimizer: whose step may have made its state.
        parameter: of a sparse weight.
        name: of the weight, for errors.
        state: what `state_of` has returned, or a copy.

    Raises:
        TopKastError: some of the state is not known, or of a kind that cannot be reset entry by entry.
    """
    facts = known(optimizer) or KnownOptimizer()
    for key, value in state.items():
        if key in facts.shared:
            continue
        for tensor in tensors_in(value):
            if tensor.numel() <= 1 and tensor.shape != parameter.shape:
                continue  # a count of steps
            if key not in _starts(facts) or tensor.shape != parameter.shape or not _is_plain(tensor):
                raise TopKastError(_unknown(optimizer, key, tensor, parameter, name))
            yield EntryState(tensor, start_of(optimizer, parameter, key))


def start_of(optimizer: Optimizer, parameter: nn.Parameter, key: str) -> float:
    """Return the value that state of this name has for an entry that was never updated; 0 if the name is not known."""
    start = _starts(known(optimizer) or KnownOptimizer()).get(key, 0.0)
    return float(_group_of(optimizer, parameter)[start] if isinstance(start, str) else start)


def _starts(facts: KnownOptimizer) -> dict[str, float | str]:
    return {**_ZERO_AT_FIRST, **facts.starts}


def check_hidden_state(optimizer: Optimizer, weights: Mapping[str, nn.Parameter]) -> None:
    """Refuse an optimizer that keeps tensors in the shape of sparse weights elsewhere than in its state.

    Args:
        optimizer: any; those that are derived from a known class are trusted.
        weights: name → parameter of the sparse weights that it holds.

    Raises:
        TopKastError: it keeps such a tensor, for example a copy of the weights.
    """
    if known(optimizer) is not None or type(optimizer).__module__.startswith("torch.optim"):
        return
    shapes = {parameter.shape: name for name, parameter in weights.items() if parameter.numel() > 1}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in parameters if p.grad is not None]
    own = {to_local(each.detach()).data_ptr() for each in (*parameters, *gradients)}
    for attribute, value in vars(optimizer).items():
        if attribute in ("state", "param_groups"):
            continue
        for tensor in tensors_in(value, depth=4):
            if tensor.shape in shapes and to_local(tensor.detach()).data_ptr() not in own:
                raise TopKastError(
                    f"{type(optimizer).__name__} keeps a tensor in the shape of '{shapes[tensor.shape]}' in its "
                    f"'{attribute}', outside its state, where it is neither reset nor moved with the sets; use an "
                    "optimizer that keeps its state in `optimizer.state` (SGD, Adam, AdamW, ...)"
                )


def tensors_in(value: Any, depth: int = 2) -> Iterator[Tensor]:
    """Yield the tensors in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, Mapping):
        for each in value.values():
            yield from tensors_in(each, depth - 1)
    elif depth and isinstance(value, list | tuple | set):
        for each in value:
            yield from tensors_in(each, depth - 1)


def inner_optimizers(optimizer: Any) -> list[Optimizer]:
    """Return the optimizers that a wrapper holds as attributes."""
    found: list[Optimizer] = []
    for value in (getattr(optimizer, "__dict__", None) or {}).values():
        held = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
        found += [each for each in held if isinstance(each, Optimizer) and each is not optimizer]
    return found


def calls_hooks(optimizer: Optimizer) -> bool:
    """Return whether hooks on the steps of this optimizer are called; not so in wrappers without `__init__`."""
    return getattr(type(optimizer).step, "hooked", False) and hasattr(optimizer, "_optimizer_step_pre_hooks")


def _group_of(optimizer: Optimizer, parameter: nn.Parameter) -> Mapping[str, Any]:
    return next(group for group in optimizer.param_groups if any(p is parameter for p in group["params"]))


def _is_plain(tensor: Tensor) -> bool:
    return type(to_local(tensor) if isinstance(tensor, DTensor) else tensor) in (Tensor, nn.Parameter)


def _unknown(optimizer: Optimizer, key: str, tensor: Tensor, parameter: nn.Parameter, name: str) -> str:
    kind = type(optimizer).__name__
    what = f"a tensor of shape {tuple(tensor.shape)}" if tensor.shape != parameter.shape else "a value for every entry"
    if not _is_plain(tensor):
        what = f"a {type(tensor).__name__}"
    return (
        f"{kind} keeps {what} of '{name}' as '{key}', and how entries that enter or leave the updated set should find "
        "it is not known; use an optimizer with momenta and averages (SGD, Adam, AdamW, ...), or declare its state: "
        f"register_optimizer({kind}, {{'{key}': <value of an entry that was never updated>}}) or, if it may be left "
        f"alone, register_optimizer({kind}, shared=['{key}'])"
    )


def _updates_elementwise(optimizer: Optimizer) -> bool:
    """Return whether an optimizer updates the entries of B in one dimension as it does within a matrix with zeros.

    An optimizer that cannot be made from its own defaults, or does not work alone, is believed to.
    """
    cls = type(optimizer)
    accepted = inspect.signature(cls.__init__).parameters
    anything = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in accepted.values())
    defaults = {key: value for key, value in optimizer.defaults.items() if anything or key in accepted}
    generator = torch.Generator().manual_seed(0)
    start, *gradients = torch.randn(7, 12, 8, generator=generator, dtype=torch.float64)
    updated = torch.rand(12, 8, generator=generator) < 0.5
    # some look at shapes only where a gradient is orthogonal to the weight
    along = start * updated / (start * updated).norm()
    gradients[::2] = [gradient - (gradient * along).sum() * along for gradient in gradients[::2]]

    def trained(part: Callable[[Tensor], Tensor]) -> Tensor:
        parameter = nn.Parameter(part(start))
        trial = cls([parameter], **defaults)
        for gradient in gradients:
            parameter.grad = part(gradient)
            trial.step()
        return parameter.detach()

    with torch.random.fork_rng(devices=[]):
        try:
            expected = trained(lambda values: values * updated)[updated]
        except Exception:  # whatever someone else's class raises
            return True
        try:
            return torch.allclose(trained(lambda values: values[updated]), expected, rtol=1e-7, atol=1e-9)
        except Exception:
            return False
