"""Our part of Lightning's distributed checkpoints: a folder in which every process saves its own shards.

Lightning writes the model and the optimizers' states with `torch.distributed.checkpoint`, and everything else, the
callbacks' states among it, to a small file of rank 0. What we hold of sharded weights goes the way of the optimizers'
states, as one more of them, and is read back into the shards of whatever number of processes goes on.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
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


def move_shards_back(checkpoint: dict[str, Any], state_key: str) -> None:
    """Undo `move_shards_out` in a checkpoint that is read as a whole."""
    state = checkpoint.get("callbacks", {}).get(state_key)
    if not isinstance(state, dict) or _MARK not in state:
        return
    place = state[_MARK]
    if not isinstance(place, str) or not place.startswith("optimizer_"):
        raise TopKastError(f"the saved Top-KAST state is damaged: it is said to be in {place!r:.60}")
    tensors = checkpoint.pop(place, None)
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


def consolidate(folder: str | Path, file: str | Path) -> None:
    """Make one ordinary checkpoint of a distributed one, that a single process or DDP can load and go on from.

    Lightning's own tool for this does not know the checkpoints of `ModelParallelStrategy`. The whole model must fit in
    host memory, twice. Reading a folder unpickles its `.metadata`, as `torch.distributed.checkpoint` always does: only
    read what you trust.

    Args:
        folder: of a distributed checkpoint.
        file: to write; it appears once it is complete.

    Raises:
        TopKastError: the folder is no complete distributed checkpoint, or is damaged; there is no folder for the file.
    """
    folder, file = Path(folder), Path(file)
    if not file.absolute().parent.is_dir():
        raise TopKastError(f"there is no folder {file.absolute().parent} to write {file.name} into")
    lacking = [name for name in (".metadata", "meta.pt") if not (folder / name).is_file()]
    if lacking:
        raise TopKastError(f"{folder} is no complete distributed checkpoint: it has no {' and no '.join(lacking)}")
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        dcp_to_torch_save(folder, partial)
        tensors = torch.load(partial, weights_only=True)
        checkpoint = torch.load(folder / "meta.pt", map_location="cpu", weights_only=True) | tensors
        for key in checkpoint.get("callbacks", {}):
            move_shards_back(checkpoint, key)
        states = sorted((key for key in checkpoint if key.startswith("optimizer_")), key=lambda key: int(key[10:]))
        checkpoint["optimizer_states"] = [checkpoint.pop(key) for key in states]
        torch.save(checkpoint, partial)
        os.replace(partial, file)
    except (TopKastError, OSError):
        raise
    except Exception as error:  # whatever damaged files lead to
        raise TopKastError(f"{folder} can't be read: {type(error).__name__}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def _tensors(weight: Mapping[str, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in weight.items() if isinstance(value, Tensor)}


def _merge(state: dict[str, Any], tensors: Any) -> None:
    weights = state.get("weights")
    if not (_nested(weights) and _nested(tensors) and weights.keys() == tensors.keys()):
        raise TopKastError("the saved Top-KAST state is damaged: its shards belong to other weights")
    state["weights"] = {name: weight | dict(tensors[name]) for name, weight in weights.items()}


def _nested(value: Any) -> TypeGuard[dict[str, dict[str, Any]]]:
    return isinstance(value, dict) and all(isinstance(each, dict) for each in value.values())
