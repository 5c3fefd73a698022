"""Compare the results of runs: one row per configuration, with the mean and the spread over its seeds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from lightning_topkast.app.errors import AppError
from lightning_topkast.app.limits import LARGEST, LONGEST_NAME
from lightning_topkast.app.run_folder.folder import files_below
from lightning_topkast.app.run_folder.result import (
    FAILED,
    FINISHED,
    RESULT_FILE,
    CompletedResult,
    read_result,
)


@dataclass(frozen=True)
class Figure:
    """Mean, sample standard deviation (None for fewer than two values) and all values of a quantity over the seeds."""

    mean: float
    std: float | None
    values: tuple[float, ...]


@dataclass(frozen=True)
class Row:
    """One configuration.

    Attributes:
        method: Option of the group `sparsity`.
        settings: Other settings that distinguish the row, as `key=value`.
        forward_sparsity: Configured sparsity, or the realised one if there is no such setting; 0 for dense.
        backward_sparsity: Configured sparsity; None if there is no such setting.
        figures: Statistics by column; a column without values is missing.
        seeds: Seeds of the finished runs.
        diverged: Number of runs that diverged.
    """

    method: str
    settings: tuple[str, ...]
    forward_sparsity: float
    backward_sparsity: float | None
    figures: dict[str, Figure]
    seeds: tuple[int, ...]
    diverged: int

    @property
    def name(self) -> str:
        """Method and settings."""
        return " ".join([self.method, *self.settings])


@dataclass(frozen=True)
class Comparison:
    """The rows of one data set and model.

    Attributes:
        test: Name of the test metric; None if nothing was tested.
        validation: Name of the monitored metric.
        lower_is_better: Whether a lower value of these metrics is better.
        dense_row: Whether FLOPs are relative to a dense run in this table, over all of training. Otherwise they are
            relative to a dense run of the same network and length.
        versions: Versions of software that differ between the runs, by name.
    """

    data: str
    model: str
    test: str | None
    validation: str
    lower_is_better: bool
    dense_row: bool
    versions: dict[str, tuple[str, ...]]
    rows: tuple[Row, ...]

    @property
    def score(self) -> str:
        """The column that ranks the rows."""
        return "test" if self.test else "validation"


@dataclass
class Collected:
    """The runs below a folder."""

    comparisons: list[Comparison] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    unfinished: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def collect(folder: Path) -> Collected:
    """Read every result below `folder`.

    Raises:
        OSError: One cannot be read; a table without it would pass for complete.
    """
    collected = Collected()
    done: list[CompletedResult] = []
    for path in files_below(folder, RESULT_FILE):
        name = str(path.parent.relative_to(folder))
        try:
            result = read_result(path.parent)
            if result is None:
                continue
            if isinstance(result, CompletedResult):
                done.append(result)
            elif result.status == FAILED:
                collected.failed[name] = str(result.error)
            else:
                collected.unfinished.append(name)
        except AppError as error:
            collected.broken.append(str(error))
    collected.comparisons = compare(_newest(done))
    return collected


def compare(results: Iterable[CompletedResult]) -> list[Comparison]:
    """Return one comparison per data set and model."""
    tables: dict[tuple[str, str], list[CompletedResult]] = {}
    for result in results:
        choices = result.choices
        tables.setdefault((choices.get("data", ""), choices.get("model", "")), []).append(result)
    return [_comparison(*key, tables[key]) for key in sorted(tables)]


def _newest(results: Iterable[CompletedResult]) -> list[CompletedResult]:
    """Drop runs that were repeated with the same seed, which would count as separate samples."""
    newest: dict[str, CompletedResult] = {}
    for result in sorted(results, key=lambda result: str(result.date)):
        named = [result.choices.get(group) for group in ("data", "model", "sparsity")]
        newest[json.dumps([named, result.config], sort_keys=True)] = result
    return list(newest.values())


def _comparison(data: str, model: str, results: Sequence[CompletedResult]) -> Comparison:
    monitor = results[0].monitor
    lower = monitor.mode == "min"
    validation = monitor.name
    test = f"test/{validation.partition('/')[2]}"
    has_test = any(test in result.metrics for result in results)
    groups = _groups(results)
    dense = _reference(groups)
    columns: dict[str, Callable[[CompletedResult], float | None]] = {}
    columns |= {"test": lambda r: r.metrics.get(test)} if has_test else {}
    columns |= {
        "validation": lambda r: r.monitor.value if r.monitor.name == validation else None,
        "sparsity": lambda r: r.sparsity.weights,
        "model_sparsity": lambda r: r.sparsity.model,
        "nonzero_parameters": lambda r: r.parameters.nonzero,
        "inference_flops_ratio": lambda r: _flops_ratio(r, dense, "forward"),
        "training_flops_ratio": lambda r: _flops_ratio(r, dense, "training"),
        "seconds": lambda r: r.seconds,
    }
    rows = []
    for group, settings in zip(groups, _settings(groups), strict=True):
        finished = [result for result in group if result.status == FINISHED]
        figures = {name: figure for name, read in columns.items() if (figure := _figure([read(r) for r in finished]))}
        forward, backward = _levels(group[0])
        rows.append(
            Row(
                _method(group[0]), settings, forward, backward, figures,
                tuple(sorted(result.seed for result in finished)), len(group) - len(finished),
            )
        )  # fmt: skip
    sign = 1 if lower else -1
    score = "test" if has_test else "validation"

    def order(row: Row) -> tuple[Any, ...]:
        figure = row.figures.get(score)
        return row.forward_sparsity, row.method != "dense", figure is None, sign * figure.mean if figure else 0.0

    return Comparison(
        data, model, test if has_test else None, validation, lower, bool(dense), _versions(results),
        tuple(sorted(rows, key=order)),
    )  # fmt: skip


def _versions(results: Sequence[CompletedResult]) -> dict[str, tuple[str, ...]]:
    found: dict[str, set[str]] = {}
    for result in results:
        for name, version in result.versions.items():
            found.setdefault(name, set()).add(str(version))
    return {name: tuple(sorted(versions)) for name, versions in found.items() if len(versions) > 1}


def _groups(results: Sequence[CompletedResult]) -> list[list[CompletedResult]]:
    """Group runs that differ only in their seeds."""
    groups: dict[str, list[CompletedResult]] = {}
    for result in results:
        key = json.dumps([_method(result), without_seeds(result.config)], sort_keys=True)
        groups.setdefault(key, []).append(result)
    return list(groups.values())


def _settings(groups: Sequence[Sequence[CompletedResult]]) -> list[tuple[str, ...]]:
    """Return the fewest settings that distinguish each group besides method and sparsities, overrides first."""
    flat = [_flat(without_seeds(group[0].config)) for group in groups]
    overridden = {o.lstrip("+~").partition("=")[0] for group in groups for o in group[0].overrides}
    levels = {"sparsity.forward_sparsity", "sparsity.backward_sparsity"}
    alike: dict[Any, list[int]] = {}
    for index, group in enumerate(groups):
        alike.setdefault((_method(group[0]), *_levels(group[0])), []).append(index)
    texts: list[list[str]] = [[] for _ in groups]
    keys = sorted({key for each in flat for key in each} - levels, key=lambda key: (key not in overridden, key))
    for sparsity in (False, True):
        # Methods differ in all of `sparsity`, so its keys only distinguish rows of the same method.
        for members in alike.values() if sparsity else [list(range(len(groups)))]:
            seen = set()
            for key in keys:
                if (key.partition(".")[0] == "sparsity") != sparsity:
                    continue
                values = tuple(json.dumps(flat[index].get(key)) for index in members)
                partition = tuple(values.index(value) for value in values)  # `a=1,2,1` says no more than `b=5,6,5`
                if len(set(values)) > 1 and partition not in seen:
                    seen.add(partition)
                    for index in members:
                        if key in flat[index]:
                            texts[index].append(_short(f"{key}={_text(flat[index][key])}"))
    return [tuple(each) for each in texts]


def _levels(result: CompletedResult) -> tuple[float, float | None]:
    forward, backward = (_sparsity(result).get(f"{part}_sparsity") for part in ("forward", "backward"))
    if not isinstance(forward, int | float):
        forward = round(result.sparsity.weights or 0.0, 3)
    return float(forward), float(backward) if isinstance(backward, int | float) else None


def _reference(groups: Iterable[Sequence[CompletedResult]]) -> list[CompletedResult]:
    """Return the runs of the most expensive dense row, which FLOPs are relative to; empty without a dense row."""
    rows = [
        [result for result in group if result.status == FINISHED and result.flops]
        for group in groups
        if _method(group[0]) == "dense"
    ]
    return max(filter(None, rows), key=lambda row: fmean(_flops(result, "training") for result in row), default=[])


def _flops(result: CompletedResult, part: str) -> float:
    """Return the FLOPs of inference on one example, or of the whole training."""
    flops: float = getattr(result.flops, f"{part}_flops")
    return flops * (result.examples if part == "training" else 1)


def _flops_ratio(result: CompletedResult, dense: Sequence[CompletedResult], part: str) -> float | None:
    if not result.flops:
        return None
    reference = fmean(_flops(other, part) for other in dense) if dense else 0.0
    ratio: float | None = getattr(result.flops, f"{part}_flops_ratio")
    return _flops(result, part) / reference if reference else ratio


def _figure(values: Sequence[float | None]) -> Figure | None:
    # A ratio of numbers within the limits may exceed them.
    known = tuple(float(value) for value in values if value is not None and abs(value) <= LARGEST)
    return Figure(fmean(known), stdev(known) if len(known) > 1 else None, known) if known else None


def _method(result: CompletedResult) -> str:
    return _short(str(result.choices.get("sparsity") or _sparsity(result).get("_target_", "?")))


def _sparsity(result: CompletedResult) -> dict[str, Any]:
    return result.config.get("sparsity") or {}


def without_seeds(config: Any) -> Any:
    """Return a configuration without its seeds."""
    if isinstance(config, dict):
        return {key: without_seeds(value) for key, value in config.items() if key != "seed"}
    return config


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(config, dict) or not config:
        return {prefix: config}
    return {
        name: value
        for key, part in config.items()
        for name, value in _flat(part, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_NAME else f"{text[: LONGEST_NAME - 1]}…"
