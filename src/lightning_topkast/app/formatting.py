"""Numbers and cells as text, in the same form in every table, page and message."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning_topkast.text import printable

_DECIMAL = (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))
_BINARY = (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10))
_TIMES = (("h", 3600.0), ("min", 60.0))


def percent(fraction: float, digits: int = 2) -> str:
    """Return `0.9` as `90.00 %`."""
    return f"{100 * fraction:.{digits}f} %"


def level(sparsity: float) -> str:
    """Return a configured sparsity such as `0.985` as `98.5`, in per cent."""
    return f"{100 * sparsity:.4g}"


def count(number: float) -> str:
    """Return `65536` as `65.5 k`."""
    for unit, size in _DECIMAL:
        if abs(number) >= size:
            return f"{number / size:.3g} {unit}" if abs(number) < 999.5 * size else f"{number / size:.0f} {unit}"
    return f"{number:.3g}" if number else "0"


def n_bytes(number: float) -> str:
    """Return `2048` as `2.0 KiB`."""
    for unit, power in _BINARY:
        if abs(number) >= 1 << power:
            return f"{number / (1 << power):,.1f} {unit}"
    return f"{number:.0f} B"


def duration(seconds: float, spread: float | None = None) -> str:
    """Return `150` as `2.5 min`, with a spread as `2.5 ± 0.1 min`."""
    unit, size = next(((unit, size) for unit, size in _TIMES if seconds >= 2 * size), ("s", 1.0))
    return f"{seconds / size:.1f}{'' if spread is None else f' ± {spread / size:.1f}'} {unit}"


def shape(sizes: Iterable[int]) -> str:
    """Return `(64, 256)` as `64×256`, and the shape of a scalar as an empty text."""
    return "×".join(map(str, sizes))


def metrics(values: Mapping[str, float | None]) -> str:
    """Return metrics sorted by name, such as `test/acc 0.9712  test/loss 0.0921`."""
    return "  ".join(f"{name} {value:.4f}" for name, value in sorted(values.items()) if value is not None)


def csv_cell(value: Any) -> Any:
    """Return a cell for a CSV table; an apostrophe before text that a spreadsheet would take for a formula."""
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t")) and not _is_number(text) else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
