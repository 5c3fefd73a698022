"""A finished comparison in short, as in docs/results.md: a row a method, a column a forward sparsity.

Run: python benchmarks/pivot.py FOLDER, the folder of a `topkast-compare`
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from tables import Row, table


def score(row: dict[str, Any], metric: str, percent: bool) -> str:
    """Mean ± sample deviation, and how many runs diverged."""
    figure, scale, digits = row["figures"].get(metric), 100 if percent else 1, 2 if percent else 3
    said = []
    if figure:
        deviation = "" if figure["std"] is None else f" ± {scale * figure['std']:.{digits}f}"
        said.append(f"{scale * figure['mean']:.{digits}f}{deviation}")
    if row["diverged"]:
        said.append(f"{row['diverged']} diverged")
    return ", ".join(said)


def pivot(comparison: dict[str, Any]) -> list[Row]:
    """One row a method, the best at its lowest sparsity first; dense stands in every column."""
    percent = comparison["validation"].endswith("acc")
    metric = "test" if comparison["test"] else "validation"
    levels = sorted({row["forward_sparsity"] for row in comparison["rows"]} - {0.0})
    rows: dict[str, Row] = {}
    for row in comparison["rows"]:
        method = re.sub(r"(_\d+)+$", "", row["method"])  # topkast_90_80 is topkast
        filled = [row["forward_sparsity"]] if row["forward_sparsity"] else levels
        if f"{filled[0]:.0%}" in rows.get(method, ()):  # the same with another backward sparsity, or other settings
            method = " ".join([method, f"backward {row['backward_sparsity']:.0%}", *row["settings"]])
        mine = rows.setdefault(method, {"method": method})
        for level in filled:
            mine[f"{level:.0%}"] = score(row, metric, percent)
            flops = row["figures"].get("training_flops_ratio")
            mine[f"{level:.0%}: training FLOPs"] = f"{flops['mean']:.3f}" if flops else None
    return list(rows.values())


def main() -> None:
    """Print a table a data set and model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    content = json.loads((parser.parse_args().folder / "comparison.json").read_text(encoding="utf-8"))
    for each in content["comparisons"]:
        rows = pivot(each)
        levels = [f"{level:.0%}" for level in sorted({row["forward_sparsity"] for row in each["rows"]} - {0.0})]
        title = f"{each['data']}, {each['model']}"
        table(f"{title}: {each['test'] or each['validation']}", [_part(row, levels) for row in rows])
        flops = [_part(row, levels, ": training FLOPs") for row in rows]
        table(f"{title}: training FLOPs as a ratio to dense", flops)


def _part(row: Row, levels: list[str], suffix: str = "") -> Row:
    return {"method": row["method"], **{level: row.get(level + suffix) for level in levels}}


if __name__ == "__main__":
    main()
