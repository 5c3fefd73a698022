"""The Top-KAST state in Lightning's distributed checkpoints, which are folders in which each process saves its shards.

Lightning writes the model and the optimizers' states with `torch.distributed.checkpoint`, and everything else,
including the callbacks' states, to a small file of rank 0. The tensors of sharded weights are saved as an additional
optimizer state, and any number of processes can load their shards from it.
"""

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeGuard

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.checkpoint._nested_dict import unflatten_state_dict
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_shards

from lightning_topkast.errors import TopKastError
from lightning_topkast.files import atomic_file
from lightning_topkast.loading import check_distributed, load
from lightning_topkast.topkast import TopKast

_MARK = "shards_in"  # key in a callback's state; its value is the name under which the tensors were saved


def saves_shards(trainer: Trainer) -> bool:
    """Return whether the Trainer saves distributed checkpoints."""
    strategy = trainer.strategy
    return isinstance(strategy, ModelParallelStrategy) and strategy._save_distributed_checkpoint


def need_shards(trainer: Trainer) -> None:
    """Refuse single files for packed layers under FSDP2: ModelParallelStrategy loads them around state dicts.

    From now on its `load_checkpoint` refuses them, since no hook is called before it.

    Raises:
        TopKastError: the Trainer saves single files.
    """
    if not saves_shards(trainer):
        raise TopKastError(
            "packed layers under FSDP2 cannot be loaded from the single files that this strategy saves: use "
            "ModelParallelStrategy(save_distributed_checkpoint=True) (trainer=fsdp2_sharded), or storage='masked'"
        )
    load = trainer.strategy.load_checkpoint

    def load_checkpoint(checkpoint_path: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
        if Path(checkpoint_path).is_file():
            raise TopKastError(
                f"{checkpoint_path} is a single file, which ModelParallelStrategy cannot load into packed layers: "
                "resume it with strategy='ddp', on one device or with storage='masked', or resume from a distributed "
                "checkpoint"
            )
        return load(checkpoint_path, *arguments, **options)

    trainer.strategy.load_checkpoint = load_checkpoint  # type: ignore[method-assign]


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
    for tiers, name, key in _next_sets(state):
        tensors[name][key] = tiers[name]
    named = [selection | {"tiers": dict.fromkeys(selection["tiers"])} for selection in state["selections"]]
    moved = {"weights": rest, "selections": named, _MARK: f"optimizer_{len(others)}"}
    checkpoint["callbacks"][state_key] = state | moved
    others.append(tensors)


def move_shards_back(checkpoint: dict[str, Any], state_key: str) -> None:
    """Undo `move_shards_out` in a checkpoint that was loaded completely."""
    state = checkpoint.get("callbacks", {}).get(state_key)
    if not isinstance(state, dict) or _MARK not in state:
        return
    place = state[_MARK]
    if not isinstance(place, str) or not place.startswith("optimizer_"):
        raise TopKastError(f"the saved Top-KAST state is damaged: its place is {place!r:.60}, not an optimizer state")
    tensors = checkpoint.pop(place, None)
    if tensors is not None:
        del state[_MARK]
        _merge(state, tensors)


def with_shards(state: dict[str, Any], topkast: TopKast, folder: Any) -> dict[str, Any]:
    """Return a callback's state with its tensors, which are loaded from a distributed checkpoint if necessary.

    Raises:
        TopKastError: the tensors cannot be loaded, or belong to other weights.
    """
    if not isinstance(state, dict) or _MARK not in state:
        return state
    own, saved = topkast.state_dict()["weights"], state.get("weights")
    if not isinstance(saved, dict) or own.keys() != saved.keys():
        return state  # it is refused later, with the names
    tensors = {name: _tensors(weight) for name, weight in own.items()}
    for _, name, key in _next_sets(state):
        if name in tensors:
            tensors[name][key] = tensors[name]["tiers"].clone()
    try:
        check_distributed(Path(folder))
        load_shards({state[_MARK]: tensors}, checkpoint_id=Path(folder))
    except Exception as error:
        raise TopKastError(f"the Top-KAST state in {folder} cannot be read: {error}") from error
    state = {key: value for key, value in state.items() if key != _MARK}
    _merge(state, tensors)
    return state


def consolidate(folder: str | Path, file: str | Path) -> None:
    """Convert a distributed checkpoint to an ordinary one, from which a single process or DDP can resume.

    Lightning's own tool does not support checkpoints of `ModelParallelStrategy`. Memory holds one shard of a tensor at
    a time; the disk needs room for the file twice. A folder from which `torch.distributed.checkpoint` would run code is
    refused.

    Args:
        folder: of a distributed checkpoint.
        file: the file to write; it appears once it is complete.

    Raises:
        TopKastError: the folder is not a complete distributed checkpoint, or is damaged; or the file's folder does not
            exist.
    """
    folder, file = Path(folder), Path(file)
    if not file.absolute().parent.is_dir():
        raise TopKastError(f"there is no folder {file.absolute().parent} for {file.name}; create it first")
    lacking = [name for name in (".metadata", "meta.pt") if not (folder / name).is_file()]
    if lacking:
        raise TopKastError(f"{folder} is not a complete distributed checkpoint: it has no {' and no '.join(lacking)}")
    try:
        check_distributed(folder)
        with atomic_file(file) as partial, TemporaryDirectory(dir=file.absolute().parent, prefix=".") as scratch:
            checkpoint = load(folder / "meta.pt") | _content(folder, Path(scratch))
            for key in checkpoint.get("callbacks", {}):
                move_shards_back(checkpoint, key)
            states = sorted((key for key in checkpoint if key.startswith("optimizer_")), key=lambda key: int(key[10:]))
            checkpoint["optimizer_states"] = [checkpoint.pop(key) for key in states]
            torch.save(checkpoint, partial)
    except (TopKastError, OSError):
        raise
    except Exception as error:  # damaged files cause many kinds of errors
        raise TopKastError(f"{folder} cannot be read: {type(error).__name__}: {error}") from error


def _content(folder: Path, scratch: Path) -> dict[str, Any]:
    """Return what a distributed checkpoint holds; its tensors are in files of the folder `scratch`, not in memory."""
    reader = FileSystemReader(folder)
    index = reader.read_metadata()
    flat: dict[str, Any] = {}
    for number, (name, entry) in enumerate(index.state_dict_metadata.items()):
        flat[name] = None
        if isinstance(entry, TensorStorageMetadata):
            size, dtype = entry.size.numel(), entry.properties.dtype
            values = torch.from_file(str(scratch / str(number)), shared=True, size=size, dtype=dtype) if size else None
            flat[name] = torch.empty(entry.size, dtype=dtype) if values is None else values.view(entry.size)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it should be
        load_shards(flat, storage_reader=reader, no_dist=True)
    return unflatten_state_dict(flat, {name: (index.planner_data or {}).get(name, (name,)) for name in flat})


def _tensors(weight: Mapping[str, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in weight.items() if isinstance(value, Tensor)}


def _merge(state: dict[str, Any], tensors: Any) -> None:
    weights = state.get("weights")
    if not (_nested(weights) and _nested(tensors) and weights.keys() == tensors.keys()):
        raise TopKastError("the saved Top-KAST state is damaged: its shards belong to other weights")
    for tiers, name, key in _next_sets(state):
        tiers[name] = tensors.get(name, {}).pop(key, None)
    state["weights"] = {name: weight | dict(tensors[name]) for name, weight in weights.items()}


def _next_sets(state: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], str, str]]:
    """Yield the names of weights whose next sets are chosen already: with the dict of these, and the tensor's key."""
    selections = state.get("selections")
    for number, selection in enumerate(selections if isinstance(selections, list) else []):
        tiers = selection.get("tiers") if isinstance(selection, dict) else None
        if isinstance(tiers, dict):
            for name in tiers:
                yield tiers, name, f"next_{number}"


def _nested(value: Any) -> TypeGuard[dict[str, dict[str, Any]]]:
    return isinstance(value, dict) and all(isinstance(each, dict) for each in value.values())
