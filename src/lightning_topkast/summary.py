"""The table of every weight: sparse or dense, and why."""

from dataclasses import asdict, dataclass
from typing import Any

_KEPT = {"masked": "sparse", "packed": "sparse, packed", "compact": "sparse, compact"}


@dataclass(frozen=True)
class WeightSummary:
    """One parameter: its sets' exact sizes and how it is kept, or the reason why it is dense."""

    name: str
    shape: tuple[int, ...]
    size: int
    active: int
    updated: int
    reason: str = ""
    execution: str = ""

    @property
    def forward_density(self) -> float:
        """|A| / n."""
        return self.active / self.size if self.size else 1.0

    @property
    def backward_density(self) -> float:
        """|B| / n."""
        return self.updated / self.size if self.size else 1.0


@dataclass(frozen=True)
class Summary:
    """Every parameter of a model; `str()` is a table, `to_dict()` plain data."""

    rows: tuple[WeightSummary, ...]
    notes: tuple[str, ...] = ()

    @property
    def model_density(self) -> float:
        """Share of all parameters, dense ones counted, that are not held at zero."""
        return sum(row.active for row in self.rows) / max(sum(row.size for row in self.rows), 1)

    def to_dict(self) -> dict[str, Any]:
        """Rows and notes as plain data."""
        return {"rows": [asdict(row) for row in self.rows], "notes": list(self.notes)}

    def __str__(self) -> str:
        header = ("weight", "shape", "entries", "|A| forward", "|B| backward", "density A", "density B", "")
        lines = [header]
        for row in self.rows:
            sets = (f"{row.active:,}", f"{row.updated:,}", f"{row.forward_density:.4f}", f"{row.backward_density:.4f}")
            kept = f"dense: {row.reason}" if row.reason else _KEPT[row.execution]
            lines.append((
                row.name, "×".join(map(str, row.shape)) or "scalar", f"{row.size:,}",
                *(("", "", "", "") if row.reason else sets), kept,
            ))  # fmt: skip
        sparse = [row for row in self.rows if not row.reason]
        entries = sum(row.size for row in sparse)
        active, updated = sum(row.active for row in sparse), sum(row.updated for row in sparse)
        lines.append((
            f"{len(sparse)} sparse weights", "", f"{entries:,}", f"{active:,}", f"{updated:,}",
            f"{active / max(entries, 1):.4f}", f"{updated / max(entries, 1):.4f}", "",
        ))  # fmt: skip
        total = sum(row.size for row in self.rows)
        used = sum(row.active for row in self.rows)
        lines.append(("whole model", "", f"{total:,}", f"{used:,}", "", f"{used / max(total, 1):.4f}", "", ""))
        widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
        text = [
            "  ".join(
                cell.ljust(width) if column in (0, 1, 7) else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        rule = "─" * max(map(len, text))
        return "\n".join([text[0], rule, *text[1:-2], rule, *text[-2:], *self.notes])
