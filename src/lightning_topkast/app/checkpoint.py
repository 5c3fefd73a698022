"""Checkpoints that a run goes on from: what does not fit is refused before any training."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile, is_zipfile

import torch
from lightning import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from lightning_topkast import TopKastCallback
from lightning_topkast.app.errors import AppError

# Before 2.6 Lightning unpickles whatever it loads; since then by default only what it downloads.
SAFELY = {"weights_only": True} if "weights_only" in signature(Trainer.fit).parameters else {}

_OF_OTHERS = ("hpc", "registry")  # Lightning finds these by itself: after a SLURM requeue, and in its model registry


class Checkpoint:
    """The contents of a checkpoint file, read without unpickling code and without copying its tensors.

    Args:
        path: the file.

    Raises:
        AppError: it is missing, cut off, damaged, or no checkpoint of Lightning.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        if path in ("last", "best"):
            raise AppError(
                f"ckpt_path={path} finds nothing, since every run has a folder of its own: name the file, "
                f"{_newest() or 'outputs/<day>/<time>/checkpoints/last.ckpt'}"
            )
        if not self.path.exists():
            siblings = [entry.name for entry in self.path.parent.glob("*.ckpt")] if self.path.parent.is_dir() else []
            hint = f"; that folder has {', '.join(sorted(siblings))}" if siblings else ""
            raise AppError(f"there is no checkpoint {self.path.absolute()}{hint}")
        if not _is_zip(self.path):  # a checkpoint is a zip file, whose directory stands at its end
            raise AppError(
                f"the checkpoint {path} is not complete: it was cut off, or is no checkpoint; take another one"
            )
        if damage := _damage(self.path):
            raise AppError(f"the checkpoint {path} is damaged ({damage}); take another one")
        try:
            content = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:
            raise AppError(f"{path} is no checkpoint that can be read safely ({_first_line(error)})") from error
        needed = {"pytorch-lightning_version", "state_dict", "global_step"}
        if not isinstance(content, dict) or not needed <= content.keys():
            raise AppError(f"{path} is no checkpoint of a run: it lacks the training state; take a last.ckpt")
        for key, kind in {"state_dict": dict, "callbacks": dict, "optimizer_states": list, "global_step": int}.items():
            if not isinstance(content.get(key, kind()), kind):
                raise AppError(f"the checkpoint {path} is damaged: its '{key}' is a {type(content[key]).__name__}")
        self.content: dict[str, Any] = content

    @property
    def step(self) -> int:
        """Optimizer steps taken when it was written."""
        return int(self.content["global_step"])

    def check_complete(self) -> None:
        """Refuse what holds weights, but not the state that training goes on from."""
        lacking = sorted({"optimizer_states", "loops"} - self.content.keys())
        if lacking:
            raise AppError(
                f"the checkpoint {self.path} holds weights only (no {' and no '.join(lacking)}), from which no run "
                "goes on; take another one"
            )

    def check_model(self, model: LightningModule) -> None:
        """Refuse a model with other weights."""
        saved: Mapping[str, torch.Tensor] = self.content["state_dict"]
        own = model.state_dict()
        for name in [*own, *(name for name in saved if name not in own)]:
            if not isinstance(saved.get(name, own.get(name)), torch.Tensor):
                raise AppError(f"the checkpoint {self.path} is damaged: its '{name}' is no tensor")
            found, expected = (tuple(s[name].shape) if name in s else None for s in (saved, own))
            if found != expected:
                raise AppError(
                    f"the checkpoint {self.path} belongs to another model: its '{name}' is {found or 'missing'}, this "
                    f"run's is {expected or 'missing'}; resume with the model and data it was trained with"
                )

    def check_callbacks(self, callbacks: list[Callback]) -> None:
        """Refuse to go on dense with the zeros of a sparse network."""
        sparse = any(str(key).startswith(TopKastCallback.__qualname__) for key in self.content.get("callbacks", {}))
        if sparse and not any(isinstance(callback, TopKastCallback) for callback in callbacks):
            raise AppError(
                f"the checkpoint {self.path} is of a sparse run, which would lose its sparsity here: resume with the "
                "sparsity=... it was trained with"
            )

    def check_optimizer(self, part: Any) -> None:
        """Refuse an optimizer of another kind; its state would be missing in the middle of its first step."""
        optimizer = part([torch.zeros(1, requires_grad=True)])
        if not isinstance(optimizer, Optimizer):
            return
        for state in self.content.get("optimizer_states", [])[:1]:
            if not _has_groups(state):
                raise AppError(f"the checkpoint {self.path} is damaged: its optimizer has no groups of parameters")
            missing = sorted(optimizer.defaults.keys() - state["param_groups"][0].keys())
            if missing:
                raise AppError(
                    f"the checkpoint {self.path} was written with another optimizer than {type(optimizer).__name__}: "
                    f"it has no '{missing[0]}'; resume with the optimizer it was trained with"
                )


def open_checkpoint(path: str | None) -> Checkpoint | None:
    """Return the checkpoint that a run goes on from, None where there is none or only Lightning can read it."""
    if path is None:
        return None
    if not SAFELY and ("://" in path or path in _OF_OTHERS):
        raise AppError(
            f"ckpt_path={path}: this Lightning runs the code in a checkpoint that it finds by itself; "
            "name a local file, or install lightning>=2.6"
        )
    if "://" in path or path in _OF_OTHERS:
        return None
    folder = Path(path)
    if folder.is_dir():
        if (folder / "meta.pt").exists() or (folder / ".metadata").exists():
            return None  # sharded over processes
        inside = ", ".join(sorted(str(file) for file in folder.rglob("*.ckpt"))[:4])
        raise AppError(f"ckpt_path={path} is a folder: name the file{f', {inside}' if inside else ' in it'}")
    return Checkpoint(path)


def _is_zip(path: Path) -> bool:
    try:
        return is_zipfile(path)
    except BadZipFile:  # Python 3.11 raises it where the end says that there are several files
        return False


def _damage(path: Path) -> str | None:
    """What does not agree with its checksum, which torch never looks at: a flipped bit would go on as a weight."""
    try:
        with ZipFile(path) as archive:
            if not any(entry.CRC for entry in archive.infolist()):  # torch.serialization.set_crc32_options(False)
                return None
            part = archive.testzip()
    except Exception as error:  # whatever garbage in its directory leads to
        return _first_line(error)
    return f"its part {part} fails its checksum" if part else None


def _has_groups(state: Any) -> bool:
    groups = state.get("param_groups") if isinstance(state, dict) else None
    return isinstance(groups, list) and bool(groups) and all(isinstance(group, dict) for group in groups)


def _newest() -> Path | None:
    found = sorted(Path("outputs").glob("*/*/checkpoints/last.ckpt"), key=lambda file: file.stat().st_mtime)
    return found[-1] if found else None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
