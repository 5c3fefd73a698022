"""Our part of Lightning's distributed checkpoints: a folder in which every process saves its own shards.

Lightning writes the model and the optimizers' states with `torch.distributed.checkpoint`, and everything else, the
callbacks' states among it, to a small file of rank 0. What we hold of sharded weights goes the way of the optimizers'
states, as one more of them, and is read back into the shards of whatever number of processes goes on.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load

from lightning_topkast.errors import TopKastError
from lightning_topkast.topkast import TopKast

_MARK = "shards_in"  # in a callback's state: the name under which its tensors were saved


def saves_shards(trainer: Trainer) -> bool:
    """Whether the Trainer saves distributed checkpoints."""
    strategy = trainer.strategy
    return isinstance(strategy, ModelParallelStrategy) and strategy._save_distributed_checkpoint


def move_shards_out(checkpoint: dict[str, Any], state_key: str) -> None:
    """Move the tensors of a callback's state to the optimizers' states, before a distributed checkpoint is written."""
    state, others = checkpoint["callbacks"].get(state_key), checkpoint.get("optimizer_states")
    if not state or others is None:
        return
    tensors = {name: _tensors(weight) for name, weight in state["weights"].items()}
    rest = {
        name: {key: value for key, value in weight.items() if key not in tensors[name]}
        for name, weight in state["weights"].items()
    }
    checkpoint["callbacks"][state_key] = state | {"weights": rest, _MARK: f"optimizer_{len(others)}"}
    others.append(tensors)


def move_shards_back(checkpoint: Mapping[str, Any], state_key: str) -> None:
    """Undo `move_shards_out` in a checkpoint that has since been made one file."""
    state = checkpoint.get("callbacks", {}).get(state_key)
    if not isinstance(state, dict) or _MARK not in state:
        return
    number = str(state[_MARK]).removeprefix("optimizer_")
    others = checkpoint.get("optimizer_states", [])
    if not number.isdecimal():
        raise TopKastError(f"the saved Top-KAST state is damaged: it is said to be in {state[_MARK]!r:.60}")
    tensors = checkpoint.get(state[_MARK]) or (others[int(number)] if int(number) < len(others) else None)
    if tensors is not None:
        del state[_MARK]
        _merge(state, tensors)


def with_shards(state: dict[str, Any], topkast: TopKast, folder: Any) -> dict[str, Any]:
    """A callback's state with its tensors, read from a distributed checkpoint where they are still there.

    Raises:
        TopKastError: it was saved for other weights.
    """
    if not isinstance(state, dict) or _MARK not in state:
        return state
    own, saved = topkast.state_dict()["weights"], state.get("weights")
    if not isinstance(saved, dict) or own.keys() != saved.keys():
        return state  # which is refused, with the names
    tensors = {name: _tensors(weight) for name, weight in own.items()}
    try:
        load({state[_MARK]: tensors}, checkpoint_id=Path(folder))
    except Exception as error:
        raise TopKastError(f"the Top-KAST state in {folder} can't be read: {error}") from error
    state = {key: value for key, value in state.items() if key != _MARK}
    _merge(state, tensors)
    return state


def _tensors(weight: Mapping[str, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in weight.items() if isinstance(value, Tensor)}


def _merge(state: dict[str, Any], tensors: Any) -> None:
    saved: Any = state.get("weights")
    if not (_is_nested(saved) and _is_nested(tensors) and saved.keys() == tensors.keys()):
        raise TopKastError("the saved Top-KAST state is damaged: its shards belong to other weights")
    state["weights"] = {name: weight | dict(tensors[name]) for name, weight in saved.items()}


def _is_nested(found: Any) -> bool:
    return isinstance(found, Mapping) and all(isinstance(weight, Mapping) for weight in found.values())
