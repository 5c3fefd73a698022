"""A run that is started again goes on from the newest complete checkpoint in its own folder.

`ckpt_path=auto` does so with the same command, `--resume FOLDER` without it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import torch
import yaml
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from lightning_topkast.app.checkpoint import Checkpoint
from lightning_topkast.app.errors import EXIT_CODE, AppError
from lightning_topkast.app.overrides import quoted

AUTO = "auto"
RESUME = "--resume"

_NAMELESS = "torchrun-none"  # trainer=multinode without --rdzv-id


def resumed(arguments: Sequence[str]) -> list[str]:
    """Return the command line that `--resume FOLDER [overrides]` stands for; any other as it is.

    The run's own overrides come first, so that those beside `--resume` win.

    Raises:
        AppError: no folder is named, or it holds no run that could go on.
    """
    folder, rest = _split(arguments)
    if folder is None:
        return rest
    if not folder or folder.startswith("-"):
        raise AppError(f"{RESUME} needs the folder of a run: topkast-train {RESUME} outputs/<day>/<time>")
    path = Path(folder).resolve()
    if path.is_file():
        raise AppError(f"{RESUME}: {folder} is a file, name the folder of its run")
    if not path.is_dir():
        raise AppError(f"{RESUME}: there is no folder {folder}")
    own = own_overrides(path)
    if own is None:
        runs = sorted(file.parents[1] for file in path.glob("*/.hydra/overrides.yaml"))
        hint = f"name one of its runs, such as {runs[0]}" if runs else "it lacks .hydra/overrides.yaml"
        raise AppError(f"{RESUME}: {folder} is not the folder of a run of topkast-train: {hint}")
    kept = [text for text in own if text.partition("=")[0].lstrip("+") != "ckpt_path"]
    return [*kept, f"hydra.run.dir={quoted(path)}", f"ckpt_path={AUTO}", *rest]


@contextmanager
def kept_if_refused(arguments: Sequence[str]) -> Iterator[None]:
    """Leave a run's `.hydra` as it was where going on from it is refused, or each later `--resume` would be, too.

    Hydra writes the overrides there, with those beside `--resume`, before anything looks at what they say.

    Args:
        arguments: the command line, before `resumed`.
    """
    named, _ = _split(arguments)
    if not named:
        yield
        return
    folder = Path(named).resolve()
    before = {path: path.read_bytes() for path in folder.glob(".hydra/*.yaml")}
    trained = _written(folder)
    try:
        yield
    except (Exception, SystemExit) as error:
        refused = not isinstance(error, SystemExit) or error.code == EXIT_CODE
        if refused and _written(folder) == trained:
            for path, content in before.items():
                path.write_bytes(content)
        raise


def own_overrides(folder: Path) -> list[str] | None:
    """Return the overrides that the run in `folder` was started with; None where no run has left any."""
    try:
        read = yaml.safe_load((folder / ".hydra" / "overrides.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return [str(text) for text in read] if isinstance(read, list) else None


def newest_checkpoint(folder: Path) -> str | None:
    """Return the checkpoint of most steps in a run's folder, None where no complete one is; says what it passes over.

    Of two at the same step the later written one knows more. A checkpoint is a file or, sharded, a folder.

    Args:
        folder: Of the run: its own checkpoints lie in `checkpoints`, those that SLURM's signal asks for in itself.

    Raises:
        AppError: torchrun was given no name for the run, so that all nameless ones would share a folder.
    """
    if _NAMELESS in folder.parts:
        raise AppError(
            "ckpt_path=auto finds a run's checkpoints again by the run's name: start it with torchrun --rdzv-id=NAME, "
            "or name its folder with hydra.run.dir=..."
        )
    complete: list[tuple[int, int, str]] = []
    for path in sorted([*folder.glob("checkpoints/*.ckpt"), *folder.glob("hpc_ckpt_*.ckpt")]):
        try:
            step = _sharded_step(path) if path.is_dir() else _step(path)
            complete.append((step, path.stat().st_mtime_ns, str(path)))
        except (AppError, OSError) as error:
            _say(f"passed over: {error}")
    found = max(complete, default=None)
    if found is not None:
        _say(f"goes on from {found[2]}, step {found[0]}")
    return found[2] if found else None


class SameCheckpoint(Callback):
    """Refuses ranks that go on from different checkpoints, which a folder that they don't share leads to.

    Args:
        path: What this rank goes on from.
    """

    def __init__(self, path: str | None) -> None:
        self.path = path

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compare with rank 0: the processes are connected by now, and nothing has been loaded."""
        mine = self.path or "no checkpoint"
        first: str = trainer.strategy.broadcast(mine)
        if not trainer.strategy.reduce_boolean_decision(mine == first, all=True):
            raise AppError(
                f"ckpt_path=auto: rank 0 goes on from {first}, rank {trainer.global_rank} from {mine}: all nodes must "
                "see the same run folder, by hydra.run.dir=... on a shared file system"
            )


def _split(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The folder beside `--resume`, "" where none is, None where there is no `--resume`; and all other arguments."""
    at = next((i for i, text in enumerate(arguments) if text.partition("=")[0] == RESUME), None)
    if at is None:
        return None, list(arguments)
    _, given, folder = arguments[at].partition("=")
    rest = [*arguments[:at], *arguments[at + (1 if given else 2) :]]
    return folder if given else "".join(arguments[at + 1 : at + 2]), rest


def _written(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.glob("checkpoints/*")}


def _step(file: Path) -> int:
    checkpoint = Checkpoint(str(file))
    checkpoint.check_complete()
    return checkpoint.step


def _sharded_step(folder: Path) -> int:
    # Written in this order, when the shards are whole.
    for name in (".metadata", "meta.pt"):
        if not (folder / name).is_file():
            raise AppError(f"the checkpoint {folder} is not complete: it has no {name}")
    try:
        return int(torch.load(folder / "meta.pt", map_location="cpu", weights_only=True)["global_step"])
    except (RuntimeError, UnpicklingError, EOFError, KeyError) as error:
        raise AppError(f"the checkpoint {folder} is not complete: its meta.pt can't be read") from error


def _say(text: str) -> None:
    if getattr(rank_zero_only, "rank", 0) == 0:
        print(f"topkast-train: {text}", file=sys.stderr, flush=True)
