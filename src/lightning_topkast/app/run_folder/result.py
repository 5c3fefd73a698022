"""`result.json`: the record of a run in its folder, which comparisons and reports read."""

from __future__ import annotations

import json
from pathlib import Path
from reprlib import Repr
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from lightning_topkast.app.errors import AppError
from lightning_topkast.app.limits import LARGEST, LONGEST_NAME, LONGEST_TEXT, check_plain
from lightning_topkast.errors import TopKastError
from lightning_topkast.files import atomic_file, read_file

RESULT_FILE = "result.json"
FORMAT = 1

_MOST_BYTES = 1 << 24  # a hundred thousand weights

Status = Literal["running", "finished", "diverged", "failed"]
RUNNING: Final = "running"
FINISHED: Final = "finished"
DIVERGED: Final = "diverged"
FAILED: Final = "failed"
COMPLETED = (FINISHED, DIVERGED)  # not repeated


def _plain(content: dict[str, Any]) -> dict[str, Any]:
    check_plain(content)
    return content


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(config.get("sparsity"), dict | None):
        raise ValueError("expected its sparsity to be a mapping")
    return _plain(config)


Number = Annotated[float, Field(ge=-LARGEST, le=LARGEST, allow_inf_nan=False)]
Integer = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]
Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Name = Annotated[str, Field(max_length=LONGEST_NAME)]
Text = Annotated[str, Field(max_length=LONGEST_TEXT)]
Plain = Annotated[dict[str, Any], AfterValidator(_plain)]
Settings = Annotated[dict[str, Any], AfterValidator(_settings)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class Monitor(_Part):
    """The metric that the run's checkpoints follow, with its best value."""

    name: Annotated[Name, Field(min_length=1)]
    mode: Name | None = None
    value: Number | None = None


class CompletedMonitor(Monitor):
    """The metric that the checkpoints of a completed run followed."""

    mode: Name
    value: Number | None


class Sparsity(_Part):
    """Fraction of zeros: among the sparse weights, and among all parameters. None where it is not known."""

    weights: Number | None
    model: Number | None


class Parameters(_Part):
    """Number of parameters, and of those that are not zero."""

    total: Count
    nonzero: Count


class Weight(_Part):
    """One parameter. `kept_dense` is the reason why it is dense, "" for a sparse one and None if it is not known."""

    name: Name
    shape: list[Count]
    entries: Count
    nonzero: Count
    kept_dense: Text | None = None


class Flops(_Part):
    """FLOPs of one example, those of the dense network, and their ratio where the latter are known and not zero."""

    forward_flops: Number
    training_flops: Number
    dense_forward_flops: Number | None = None
    dense_training_flops: Number | None = None
    forward_flops_ratio: Number | None = None
    training_flops_ratio: Number | None = None


class Result(_Part):
    """What is known of a run: before it ends, only what identifies it.

    Attributes:
        choices: Chosen option of each config group.
        overrides: Overrides of the command line that affect what the run computes.
        config: Resolved configuration, without places and names.
        error: Why the run failed.
        incomplete_logs: What loggers that failed in mid-run lack, and why; None if none did.
        unfinished: What the schedule of the sets asked for and the run has not reached; None if nothing.
        metrics: All metrics of the test.
        seconds: Time spent in training.
        examples: Training examples seen.
        steps: Optimizer steps.
    """

    format: Literal[1]
    status: Status
    choices: dict[Name, Name]
    overrides: list[Text]
    config: Settings
    seed: Integer | None = None
    date: Name | None = None
    versions: Plain | None = None
    hardware: Plain | None = None
    error: Text | None = None
    incomplete_logs: list[Text] | None = None
    unfinished: list[Text] | None = None
    monitor: Monitor | None = None
    metrics: dict[Name, Number | None] | None = None
    sparsity: Sparsity | None = None
    parameters: Parameters | None = None
    weights: list[Weight] | None = None
    flops: Flops | None = None
    seconds: Number | None = None
    examples: Count | None = None
    steps: Count | None = None


class CompletedResult(Result):
    """The result of a run that has finished or diverged."""

    status: Literal["finished", "diverged"]
    seed: Integer
    versions: Plain
    monitor: CompletedMonitor
    metrics: dict[Name, Number | None]
    sparsity: Sparsity
    parameters: Parameters
    seconds: Number
    examples: Count


def write_result(folder: Path, result: Result) -> None:
    """Write `result.json` atomically."""
    text = json.dumps(result.model_dump(mode="json", exclude_unset=True), indent=1, allow_nan=False)
    with atomic_file(folder / RESULT_FILE) as partial:
        partial.write_text(text, encoding="utf-8")


def read_result(folder: Path) -> Result | None:
    """Return the result in `folder`, or None if there is none.

    Raises:
        AppError: The file is damaged, not a result of this version, or no file.
        OSError: The file cannot be read, which says nothing of its content.
    """
    path = folder / RESULT_FILE
    try:
        content = json.loads(read_file(path, _MOST_BYTES).decode("utf-8"))
    except FileNotFoundError:
        return None
    except TopKastError as error:
        raise AppError(f"{error}; remove it to repeat the run") from error
    except (ValueError, RecursionError) as error:
        raise AppError(f"{path} is damaged ({error}); remove it to repeat the run") from error
    completed = isinstance(content, dict) and content.get("status") in COMPLETED
    try:
        return (CompletedResult if completed else Result).model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        wrong = first["msg"].removeprefix("Value error, ")
        wrong = wrong[:1].lower() + wrong[1:]
        found = "" if first["type"] == "missing" else f", got {_shown(first['input'])}"
        where = f"{field}: " if field else ""
        raise AppError(f"{path} is not a valid result: {where}{wrong}{found}; remove it to repeat the run") from error


def _shown(value: Any) -> str:
    """Return the beginning of what `value` looks like, without writing out all of it."""
    short = Repr()
    short.maxstring = short.maxother = 60
    return f"{short.repr(value):.60}"
