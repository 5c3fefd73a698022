"""The benchmarks run, and print what they promise."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "step_overhead.py"


def test_step_overhead_compares_every_variant_on_every_network(tmp_path):
    run = subprocess.run(
        [sys.executable, SCRIPT, "--quick", "--json", tmp_path / "figures.json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())

    for network in ("MLP", "ResNet-18", "transformer"):
        rows = [row for row in figures["steps"] if row["network"] == network]
        assert {row["variant"] for row in rows} == {
            "dense",
            "dense again",
            "masked",
            "rigl-torch",
            "WeightNormSparsifier",
        }
        for row in rows:
            if row["variant"] in ("dense", "dense again", "masked"):
                assert "failed" not in row
            assert row.get("failed") or min(row["early ratio"], row["late ratio"]) > 0
        (masked,) = (row for row in figures["states"] if row["network"] == network and row["variant"] == "masked")
        assert masked["refresh ms"] > 0
        assert 5 <= masked["extra bytes/entry"] <= 9

    assert {row["weights"].split()[0] for row in figures["refresh"]} == {"1", "4"}
    assert [row["mask"] for row in figures["masks"]] == ["uint8", "float32", "bool"]
    assert {row["met"] for row in figures["aims"]} <= {"met", "not met"}
    for title in ("MLP: a step", "ResNet-18: refresh and memory", "Refresh of large weights", "Aims"):
        assert f"### {title}" in run.stdout
