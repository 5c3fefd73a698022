"""Resume a run from the newest complete checkpoint in its folder.

`ckpt_path=auto` does so with the command that started the run, `--resume FOLDER` without it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from lightning_topkast.app.errors import EXIT_CODE, AppError
from lightning_topkast.app.overrides import config_dir, more_than_a_value, quoted, split_options
from lightning_topkast.app.run_folder.folder import RunFolder
from lightning_topkast.app.terminal import say

AUTO = "auto"
RESUME, TRUST = "--resume", "--trust"

_NAMELESS = "torchrun-none"  # trainer=multinode without --rdzv-id


def resumed(arguments: Sequence[str]) -> list[str]:
    """Replace `--resume FOLDER [overrides]` by the overrides of that run; leave any other command line unchanged.

    The run's own overrides come first, so that those beside `--resume` take precedence; options such as `--config-dir`
    are those of the command line. Without `--trust` the run's overrides may only set values.

    Raises:
        AppError: There is no folder, no run in it that can be resumed, or an override of the run does more.
    """
    folder, rest = _split(arguments)
    trusted = TRUST in rest
    rest = [text for text in rest if text != TRUST]
    if folder is None:
        if trusted:
            raise AppError(
                f"{TRUST} is about the overrides in the folder of a run: topkast-train {RESUME} FOLDER {TRUST}"
            )
        return rest
    if not folder or folder.startswith("-"):
        raise AppError(f"{RESUME} needs the folder of a run: topkast-train {RESUME} outputs/<day>/<time>")
    path = Path(folder).resolve()
    if path.is_file():
        raise AppError(f"{RESUME}: {folder} is a file: expected the folder of a run")
    if not path.is_dir():
        raise AppError(f"{RESUME}: there is no folder {folder}")
    own = RunFolder(path).overrides()
    if own is None:
        runs = sorted(file.parents[1] for file in path.glob("*/.hydra/overrides.yaml"))
        hint = f"name one of its runs, such as {runs[0]}" if runs else "it lacks .hydra/overrides.yaml"
        raise AppError(f"{RESUME}: {folder} is not the folder of a run of topkast-train: {hint}")
    kept = _to_repeat(own)
    for text in () if trusted else kept:
        if problem := more_than_a_value(text):
            raise AppError(
                f"{RESUME}: the override '{text:.80}' in {folder} {problem}, where only values of the shipped "
                f"configuration are accepted: if you trust this run, add {TRUST}"
            )
    options, more = split_options(rest)
    return [*options, *kept, f"hydra.run.dir={quoted(path)}", f"ckpt_path={AUTO}", *more]


def resume_options(run: RunFolder) -> list[str]:
    """Return the arguments of `topkast-train` that resume a run of the present command line."""
    beside = config_dir(sys.argv[1:])
    trust = any(more_than_a_value(text) for text in _to_repeat(run.overrides() or []))
    more = [*(["--config-dir", beside] if beside else []), *([TRUST] if trust else [])]
    return [RESUME, str(run.path), *more]


@contextmanager
def kept_if_refused(arguments: Sequence[str]) -> Iterator[None]:
    """Restore the `.hydra` folder of a run if resuming it is refused; otherwise later attempts would be refused, too.

    Hydra writes all overrides there, including those beside `--resume`, before any of them is checked.

    Args:
        arguments: The command line before `resumed`.
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


def newest_checkpoint(folder: RunFolder) -> str | None:
    """Return the checkpoint that a run resumes from, or None if it has no complete one; print the choice.

    Raises:
        AppError: There are checkpoints, but one cannot be read, or training can resume from none; or torchrun was given
            no name for the run, so that all unnamed runs would share a folder.
    """
    if _NAMELESS in folder.path.parts:
        raise AppError(
            "ckpt_path=auto finds the checkpoints of a run by its name: start it with torchrun --rdzv-id=NAME, or name "
            "its folder with hydra.run.dir=..."
        )
    try:
        found = folder.newest_checkpoint(skip=lambda error: _say(f"skipped: {error}"))
    except OSError as error:
        raise AppError(
            f"ckpt_path=auto: {error.filename} cannot be read ({error.strerror}), so that the newest checkpoint is not "
            "known: start the same command once it can be read, or name a checkpoint with ckpt_path=FILE"
        ) from error
    if found is None:
        return None
    _say(f"resuming from {found[0]}, step {found[1]}")
    return str(found[0])


class SameCheckpoint(Callback):
    """Refuse ranks that resume from different checkpoints, which happens if they do not share the run's folder.

    Args:
        path: The checkpoint of this rank.
    """

    def __init__(self, path: str | None) -> None:
        self.path = path

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compare with rank 0, once the processes are connected and before anything is loaded."""
        mine = self.path or "no checkpoint"
        first: str = trainer.strategy.broadcast(mine)
        if not trainer.strategy.reduce_boolean_decision(mine == first, all=True):
            raise AppError(
                f"ckpt_path=auto: rank 0 resumes from {first}, rank {trainer.global_rank} from {mine}: all nodes must "
                "see the same run folder, set hydra.run.dir=... to one on a shared file system"
            )


def _split(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the folder after `--resume`, "" if it is missing and None without `--resume`; and all other arguments."""
    at = next((i for i, text in enumerate(arguments) if text.partition("=")[0] == RESUME), None)
    if at is None:
        return None, list(arguments)
    _, given, folder = arguments[at].partition("=")
    rest = [*arguments[:at], *arguments[at + (1 if given else 2) :]]
    return folder if given else "".join(arguments[at + 1 : at + 2]), rest


def _to_repeat(overrides: Sequence[str]) -> list[str]:
    return [text for text in overrides if text.partition("=")[0].lstrip("+") != "ckpt_path"]


def _written(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.glob("checkpoints/*")}


def _say(text: str) -> None:
    if getattr(rank_zero_only, "rank", 0) == 0:
        say(f"topkast-train: {text}", error=True)
