"""A resumed run ends as an uninterrupted one, bit for bit: masked and packed, one process and two, and killed ones."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from tests import processes
from tests.helpers import plain_path, same
from tests.resumes import WAYS

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")]


def run_alone(script: Path, folder: Path, *arguments) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(plain_path()), "OMP_NUM_THREADS": "1"}
    done = processes.run(
        [sys.executable, script, *map(str, arguments)], env=environment,
        cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where resumes.py left what its runs ended with."""
    folder = tmp_path_factory.mktemp("resumes")
    run_alone(Path(__file__).with_name("resumes.py"), folder, folder)
    return folder


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way)))
@pytest.mark.parametrize("resumed", ["from the middle", "from its end"])
def test_resumed_run_equals_the_whole_run_bit_for_bit(folder, way, resumed):
    runs = folder / "-".join(map(str, way))
    for rank in range(way[1]):
        whole, other = (torch.load(runs / run / f"trained-{rank}.pt", weights_only=True) for run in ("whole", resumed))
        assert whole["steps"] == 15
        for part in whole:
            assert same(whole[part], other[part]), f"rank {rank}: {part}"


def test_ranks_are_requeued_together_where_only_one_was_signalled(folder):
    requeue = folder / "requeue"
    assert (requeue / "calls").read_text() == "requeue 4217\n"
    assert [path.name for path in (requeue / "run").glob("hpc*")] == ["hpc_ckpt_1.ckpt"]
    assert torch.load(requeue / "run" / "hpc_ckpt_1.ckpt", weights_only=True)["global_step"] == 7
    for rank in (0, 1):
        whole = torch.load(folder / "masked-2-1" / "whole" / f"trained-{rank}.pt", weights_only=True)
        for run in ("signalled", "requeued"):
            assert same(torch.load(requeue / f"{run}-{rank}.pt", weights_only=True), whole)


def test_killed_trainings_end_as_uninterrupted_ones(tmp_path):
    """A slice of what reliability/kills.py does at length."""
    script = Path(__file__).parents[1] / "reliability" / "kills.py"
    run_alone(script, tmp_path, "--kills", 2, "--json", tmp_path / "kills.json")
    rows = json.loads((tmp_path / "kills.json").read_text())["rows"]
    assert [row["kills"] for row in rows] == [2] * 8
    assert all(row["trainings"] > 0 for row in rows)
    assert not list(tmp_path.glob("kills-*"))
