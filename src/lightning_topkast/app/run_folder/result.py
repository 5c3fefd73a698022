"""`result.json`: the record of a run in its folder, which comparisons and reports read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from lightning_topkast.app.errors import AppError
from lightning_topkast.files import atomic_file

RESULT_FILE = "result.json"
FORMAT = 1

Status = Literal["running", "finished", "diverged", "failed"]
RUNNING: Final = "running"
FINISHED: Final = "finished"
DIVERGED: Final = "diverged"
FAILED: Final = "failed"
COMPLETED = (FINISHED, DIVERGED)  # not repeated


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class Monitor(_Part):
    """The metric that the run's checkpoints follow, with its best value."""

    name: str
    mode: str | None = None
    value: float | None = None


class CompletedMonitor(Monitor):
    """The metric that the checkpoints of a completed run followed."""

    mode: str
    value: float | None


class Sparsity(_Part):
    """Fraction of zeros: among the sparse weights, and among all parameters. None where it is not known."""

    weights: float | None
    model: float | None


class Parameters(_Part):
    """Number of parameters, and of those that are not zero."""

    total: int
    nonzero: int


class Weight(_Part):
    """One parameter. `kept_dense` is the reason why it is dense, "" for a sparse one and None if it is not known."""

    name: str
    shape: list[int]
    entries: int
    nonzero: int
    kept_dense: str | None = None


class Flops(_Part):
    """FLOPs of one example, those of the dense network, and their ratio where the latter are known and not zero."""

    forward_flops: float
    training_flops: float
    dense_forward_flops: float | None = None
    dense_training_flops: float | None = None
    forward_flops_ratio: float | None = None
    training_flops_ratio: float | None = None


class Result(_Part):
    """What is known of a run: before it ends, only what identifies it.

    Attributes:
        choices: Chosen option of each config group.
        overrides: Overrides of the command line that affect what the run computes.
        config: Resolved configuration, without places and names.
        error: Why the run failed.
        incomplete_logs: What loggers that failed in mid-run lack, and why; None if none did.
        metrics: All metrics of the test.
        seconds: Time spent in training.
        examples: Training examples seen.
        steps: Optimizer steps.
    """

    format: Literal[1]
    status: Status
    choices: dict[str, str]
    overrides: list[str]
    config: dict[str, Any]
    seed: int | None = None
    date: str | None = None
    versions: dict[str, Any] | None = None
    hardware: dict[str, Any] | None = None
    error: str | None = None
    incomplete_logs: list[str] | None = None
    monitor: Monitor | None = None
    metrics: dict[str, float | None] | None = None
    sparsity: Sparsity | None = None
    parameters: Parameters | None = None
    weights: list[Weight] | None = None
    flops: Flops | None = None
    seconds: float | None = None
    examples: int | None = None
    steps: int | None = None


class CompletedResult(Result):
    """The result of a run that has finished or diverged."""

    status: Literal["finished", "diverged"]
    seed: int
    versions: dict[str, Any]
    monitor: CompletedMonitor
    metrics: dict[str, float | None]
    sparsity: Sparsity
    parameters: Parameters
    seconds: float
    examples: int


def write_result(folder: Path, result: Result) -> None:
    """Write `result.json` atomically."""
    text = json.dumps(result.model_dump(mode="json", exclude_unset=True), indent=1, allow_nan=False)
    with atomic_file(folder / RESULT_FILE) as partial:
        partial.write_text(text, encoding="utf-8")


def read_result(folder: Path) -> Result | None:
    """Return the result in `folder`, or None if there is none.

    Raises:
        AppError: The file is damaged, or not a result of this version.
        OSError: The file cannot be read, which says nothing of its content.
    """
    path = folder / RESULT_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise AppError(f"{path} is damaged ({error}); remove it to repeat the run") from error
    completed = isinstance(content, dict) and content.get("status") in COMPLETED
    try:
        return (CompletedResult if completed else Result).model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        wrong = first["msg"][:1].lower() + first["msg"][1:]
        found = "" if first["type"] == "missing" else f", got {first['input']!r:.60}"
        where = f"{field}: " if field else ""
        raise AppError(f"{path} is not a valid result: {where}{wrong}{found}; remove it to repeat the run") from error
