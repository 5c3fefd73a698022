"""Checkpoints: read without running code, and refused before any training if they do not fit the run."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from itertools import chain
from pathlib import Path
from typing import IO, Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile, is_zipfile

import lightning_topkast.app.vision  # noqa: F401  before Lightning

# isort: split

import torch
from lightning import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from lightning_topkast import TopKastCallback
from lightning_topkast.app.errors import AppError
from lightning_topkast.app.run_folder.folder import refuse_missing
from lightning_topkast.loading import check_distributed, load

# Before 2.6 Lightning unpickles every checkpoint; since then, by default, only those that it does not download.
SAFELY: dict[str, Any] = {"weights_only": True} if "weights_only" in signature(Trainer.fit).parameters else {}

_OF_OTHERS = ("hpc", "registry")  # Lightning finds these by itself: after a SLURM requeue, and in its model registry

SHARDED_FILES = (".metadata", "meta.pt")  # in a distributed checkpoint, written in this order after the shards

# Values that parts of a checkpoint stand for in addition to those that it holds, since several others share them. Few
# lists that each hold the next one twice stand for more values than anything that walks over them can visit.
_MOST_SHARED = 1_000_000


class Checkpoint:
    """The contents of a checkpoint file, read without unpickling code and without copying its tensors.

    Args:
        path: The file.

    Raises:
        AppError: The file is missing, truncated, damaged, or not a checkpoint of Lightning.
        OSError: The file cannot be read, which says nothing of its content.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        if path in ("last", "best"):
            raise AppError(
                f"ckpt_path={path} is not supported, since every run has its own folder: name the file, "
                f"{_newest() or 'outputs/<day>/<time>/checkpoints/last.ckpt'}"
            )
        refuse_missing(self.path)
        if not self.path.is_file():
            raise AppError(f"the checkpoint {path} is no regular file; use another one")
        _check_archive(self.path)
        try:
            content = load(self.path, mmap=True)
        except OSError:
            raise
        except Exception as error:
            raise AppError(f"{path} is not a checkpoint that can be read safely ({_first_line(error)})") from error
        needed = {"pytorch-lightning_version", "state_dict", "global_step"}
        if not isinstance(content, dict) or not needed <= content.keys():
            raise AppError(f"{path} is not a checkpoint of a run: it has no training state; use a last.ckpt")
        for key, kind in {"state_dict": dict, "callbacks": dict, "optimizer_states": list, "global_step": int}.items():
            if not isinstance(content.get(key, kind()), kind):
                raise AppError(
                    f"the checkpoint {path} is damaged: expected '{key}' to be a {kind.__name__}, got a "
                    f"{type(content[key]).__name__}"
                )
        if content["global_step"] < 0:
            raise AppError(
                f"the checkpoint {path} is damaged: expected 'global_step' >= 0, got {content['global_step']}"
            )
        _check_sharing(content, self.path)
        self.content: dict[str, Any] = content

    @property
    def step(self) -> int:
        """Optimizer steps taken when the checkpoint was written."""
        return int(self.content["global_step"])

    def check_complete(self) -> None:
        """Refuse a checkpoint that has weights, but not the state that training resumes from."""
        lacking = sorted({"optimizer_states", "loops"} - self.content.keys())
        if lacking:
            raise AppError(
                f"the checkpoint {self.path} holds weights only (no {' and no '.join(lacking)}), so that training "
                "cannot resume from it; use another one"
            )

    def check_model(self, model: LightningModule) -> None:
        """Refuse a model whose weights have other names, shapes, layouts or kinds of values."""
        saved: Mapping[str, torch.Tensor] = self.content["state_dict"]
        own = model.state_dict()
        for name in [*own, *(name for name in saved if name not in own)]:
            if not isinstance(saved.get(name, own.get(name)), torch.Tensor):
                raise AppError(f"the checkpoint {self.path} is damaged: expected '{name}' to be a tensor")
            found, expected = (tuple(s[name].shape) if name in s else None for s in (saved, own))
            if found != expected:
                raise AppError(
                    f"the checkpoint {self.path} belongs to another model: its '{name}' is {found or 'missing'}, this "
                    f"run's is {expected or 'missing'}; resume with the model and data it was trained with"
                )
            kind = "tensor without values" if saved[name].is_meta else _kind(saved[name])
            if kind != _kind(own[name]):
                raise AppError(
                    f"the checkpoint {self.path} does not fit: expected '{name}' to be a {_kind(own[name])}, got a "
                    f"{kind}; use another one"
                )

    def check_callbacks(self, callbacks: list[Callback]) -> None:
        """Refuse to resume a sparse run without its sparsity callback."""
        sparse = any(str(key).startswith(TopKastCallback.__qualname__) for key in self.content.get("callbacks", {}))
        if sparse and not any(isinstance(callback, TopKastCallback) for callback in callbacks):
            raise AppError(
                f"the checkpoint {self.path} belongs to a sparse run, which would become dense: resume with the "
                "sparsity=... it was trained with"
            )

    def check_optimizer(self, part: Any) -> None:
        """Refuse an optimizer of another class, whose state would be missing in its first step."""
        optimizer = part([torch.zeros(1, requires_grad=True)])
        if not isinstance(optimizer, Optimizer):
            return
        for state in self.content.get("optimizer_states", [])[:1]:
            if not _has_groups(state):
                raise AppError(f"the checkpoint {self.path} is damaged: its optimizer has no parameter groups")
            missing = sorted(optimizer.defaults.keys() - state["param_groups"][0].keys())
            if missing:
                raise AppError(
                    f"the checkpoint {self.path} was written with another optimizer than {type(optimizer).__name__}: "
                    f"it has no '{missing[0]}'; resume with the optimizer it was trained with"
                )


def open_checkpoint(path: str | None) -> Checkpoint | None:
    """Return the checkpoint to resume from, or None if there is none or only Lightning can read it."""
    if path is None:
        return None
    if not SAFELY and ("://" in path or path in _OF_OTHERS):
        raise AppError(
            f"ckpt_path={path}: this version of Lightning runs the code in a checkpoint that it finds by itself; "
            "name a local file, or install lightning>=2.6"
        )
    if "://" in path or path in _OF_OTHERS:
        return None
    folder = Path(path)
    if folder.is_dir():
        if is_sharded(folder):
            check_sharded(folder)
            return None
        inside = ", ".join(sorted(str(file) for file in folder.rglob("*.ckpt"))[:4])
        raise AppError(f"ckpt_path={path} is a folder: name the file{f', {inside}' if inside else ' in it'}")
    return Checkpoint(path)


class UnfinishedCheckpoint(AppError):
    """A sharded checkpoint whose writer was killed; what was there before it is in other checkpoints."""


def check_sharded(folder: Path) -> int:
    """Return the step of a distributed checkpoint, which Lightning reads itself.

    Raises:
        UnfinishedCheckpoint: Its writer was killed before it had written all files.
        AppError, TopKastError: It is damaged, or reading it would run code.
        OSError: It cannot be read, which says nothing of its content.
    """
    for name in SHARDED_FILES:
        if not (folder / name).exists():
            raise UnfinishedCheckpoint(f"the checkpoint {folder} is not complete: it has no {name}")
    check_distributed(folder)
    try:
        meta = load(folder / SHARDED_FILES[1])
        step = int(meta["global_step"])
    except OSError:
        raise
    except Exception as error:
        raise AppError(f"the checkpoint {folder} is damaged: its meta.pt cannot be read") from error
    _check_sharing(meta, folder)
    return step


def is_sharded(path: Path) -> bool:
    """Return whether a folder is a distributed checkpoint, complete or not."""
    return any((path / name).exists() for name in SHARDED_FILES)


class _File(io.FileIO):
    """A file that keeps the system's error of a failed read, which zipfile takes for damage."""

    failed: OSError | None = None

    def readinto(self, buffer: Any) -> Any:
        with self._watched():
            return super().readinto(buffer)

    def readall(self) -> Any:
        with self._watched():
            return super().readall()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failed = OSError(error.errno, error.strerror, str(self.name))
            raise


def _check_archive(path: Path) -> None:
    """Refuse a checkpoint that is truncated or damaged."""
    problem = None
    with _File(path) as opened:
        file = io.BufferedReader(opened)
        if not _is_zip(file):  # a checkpoint is a zip file, with its directory at the end
            problem = f"the checkpoint {path} is not complete: it is truncated or not a checkpoint; use another one"
        elif damage := _damage(file):
            problem = f"the checkpoint {path} is damaged ({damage}); use another one"
        if opened.failed is not None:
            raise opened.failed
    if problem is not None:
        raise AppError(problem)


def _is_zip(file: IO[bytes]) -> bool:
    try:
        return is_zipfile(file)
    except BadZipFile:  # raised by Python 3.11 if the directory claims that there are several disks
        return False


def _damage(file: IO[bytes]) -> str | None:
    """Return what fails its checksum, if anything. torch does not check it, so a flipped bit would become a weight."""
    try:
        with ZipFile(file) as archive:
            entries = archive.infolist()
            packed = [entry.filename for entry in entries if entry.compress_type != ZIP_STORED]
            if packed:  # a few bytes may stand for any number
                return f"its part {packed[0]} is compressed, and torch stores all parts as they are"
            if sum(entry.file_size for entry in entries) > file.seek(0, io.SEEK_END):
                return "its parts take more bytes than it has"
            if not any(entry.CRC for entry in entries):  # torch.serialization.set_crc32_options(False)
                return None
            part = archive.testzip()
    except Exception as error:  # garbage in the directory can raise anything
        return _first_line(error)
    return f"its part {part} fails its checksum" if part else None


def _check_sharing(content: Any, path: Path) -> None:
    """Refuse a checkpoint that is endless, or far larger than it seems, to whatever walks over it.

    Raises:
        AppError: Values of it that several others share stand for too many, contain themselves or are too deep.
    """
    walk = _Walk()
    try:
        shared = walk.size(content) - walk.values
    except RecursionError:
        problem = "it holds a value that contains itself, or is nested too deeply"
    else:
        if shared <= _MOST_SHARED:
            return
        problem = f"parts that it repeats stand for {shared:,} values, more than {_MOST_SHARED:,}"
    raise AppError(f"the checkpoint {path} is damaged, or made to fill the memory: {problem}; use another one")


class _Walk:
    """Counts values without walking over any of them twice."""

    def __init__(self) -> None:
        self.values = 0  # so far, each container once
        self._sizes: dict[int, int] = {}

    def size(self, value: Any) -> int:
        """Return the number of values in a value, with itself, each as often as containers repeat it."""
        if id(value) in self._sizes:
            return self._sizes[id(value)]
        self.values += 1
        if isinstance(value, Mapping):
            parts: Iterable[Any] = chain(value, value.values())
        elif isinstance(value, list | tuple | set | frozenset):
            parts = value
        else:
            return 1
        self._sizes[id(value)] = size = 1 + sum(self.size(part) for part in parts)
        return size


def _kind(tensor: torch.Tensor) -> str:
    """Return what must be the same in a weight and in the one that is loaded into it."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.is_quantized or tensor.layout is not torch.strided:
        return f"tensor of {dtype}, {str(tensor.layout).removeprefix('torch.')}"
    kinds = {"floating-point": tensor.is_floating_point(), "complex": tensor.is_complex(), "bool": dtype == "bool"}
    return f"tensor of {next((kind for kind, fits in kinds.items() if fits), 'integer')} numbers"


def _has_groups(state: Any) -> bool:
    groups = state.get("param_groups") if isinstance(state, dict) else None
    return isinstance(groups, list) and bool(groups) and all(isinstance(group, dict) for group in groups)


def _newest() -> Path | None:
    found = sorted(Path("outputs").glob("*/*/checkpoints/last.ckpt"), key=lambda file: file.stat().st_mtime)
    return found[-1] if found else None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
