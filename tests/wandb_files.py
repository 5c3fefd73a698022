"""Reads back what an offline W&B run holds, by W&B's own reader."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import processes


def records_of(run: Path) -> list[dict[str, Any]]:
    """Every record of the run's log file."""
    command = Path(sys.executable).with_name("wandb")
    wandb = [str(command)] if command.exists() else [sys.executable, "-m", "wandb"]
    done = processes.run([*wandb, "leet", "inspect", "--json", run])
    if done.returncode and "No such command" in done.stderr:
        pytest.skip("this wandb cannot read its own runs")
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def history(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was logged, a row a call."""
    return [record["history"]["item"] for record in records if record["type"] == "history"]
