"""The command line of a run that is resumed: `--resume FOLDER` becomes the overrides of the run in that folder.

Imports neither PyTorch nor Lightning, which take seconds, so that a mistyped folder is answered at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_topkast.app.errors import AppError
from lightning_topkast.app.overrides import config_dir, more_than_a_value, quoted, split_options
from lightning_topkast.app.run_folder.folder import RunFolder

AUTO = "auto"
RESUME, TRUST = "--resume", "--trust"


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
    if not trusted and (problem := _leads_out(path)):
        raise AppError(f"{RESUME}: {problem}, and the run might write to it: remove it, or add {TRUST} if it is yours")
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
    trust = any(more_than_a_value(text) for text in _to_repeat(run.overrides() or [])) or _leads_out(run.path)
    more = [*(["--config-dir", beside] if beside else []), *([TRUST] if trust else [])]
    return [RESUME, str(run.path), *more]


def _leads_out(folder: Path) -> str | None:
    """Return what in a folder a run could write through to another place, or wait for forever; None if nothing.

    Links to places within the folder are in the folders of many runs. What is in the folders of W&B's earlier runs is
    not written to again, and has links to its log elsewhere.
    """
    for where, folders, files in os.walk(folder):
        if Path(where).parent == folder / "wandb":
            folders.clear()
            continue
        for path in (Path(where, name) for name in (*folders, *files)):
            if path.is_symlink():
                if not Path(os.path.realpath(path)).is_relative_to(folder):
                    return f"{path} is a link to another place"
            elif not (path.is_file() or path.is_dir()):
                return f"{path} is no regular file"
    return None


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
