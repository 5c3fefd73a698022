"""Runs of several processes: sweeps, SLURM's tasks, and two nodes of which one loses its process."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reliability import multinode

from tests import processes
from tests.helpers import plain_path

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="signals, network namespaces"),
]

OPTIONS = multinode.overrides(epochs=20, timeout=200)
NO_NAMESPACES = multinode.available()


def environment(**more):
    return os.environ | {"PYTHONPATH": os.pathsep.join(plain_path()), "OMP_NUM_THREADS": "1"} | more


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Two jobs of two processes each; their folder, and what they printed."""
    folder = tmp_path_factory.mktemp("sweep")
    command = [sys.executable, "-m", "lightning_topkast.app.commands.train", "-m", "seed=0,1", "trainer=ddp_cpu"]
    options = [option for option in OPTIONS if "timeout" not in option]
    done = processes.run(
        [*command, *options, "hydra.sweep.dir=sweep"], cwd=folder, env=environment(), stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return folder / "sweep", done.stdout


def test_sweep_trains_each_job_once_in_processes_of_its_own(sweep):
    folder, printed = sweep
    assert sorted(entry.name for entry in folder.iterdir()) == ["0", "1", "multirun.yaml"]
    assert not list(folder.parent.glob("multirun")), "a process of a job has begun a sweep"
    assert not list(folder.parent.glob("outputs"))
    assert printed.count("epoch 1/20:") == printed.count("epoch 20/20:") == 2
    for rank in (0, 1):
        assert printed.count(f"GLOBAL_RANK: {rank}, MEMBER: {rank + 1}/2") == 2
    weights = [torch.load(folder / job / "checkpoints" / "last.ckpt", weights_only=True) for job in "01"]
    assert [len(state["optimizer_states"]) for state in weights] == [1, 1]
    name = "net.hidden1.weight"
    assert not torch.equal(*(state["state_dict"][name] for state in weights)), "both jobs had the same seed"


@pytest.mark.skipif(NO_NAMESPACES is not None, reason=str(NO_NAMESPACES))
def test_run_over_two_nodes_survives_the_loss_of_a_process_exactly(sweep, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(plain_path()))
    reference = sweep[0] / "0" / "checkpoints" / "last.ckpt"
    found = multinode.run_case(multinode.worker_killed, tmp_path / "job", OPTIONS, reference)
    assert found["exact"], "the weights differ from those of two processes on one machine"
    assert len(found["resumed_from"]) == 1
    assert 40 <= int(found["resumed_from"][0]) < 200
    assert "rank " in found["error"]
    assert found["detected_after"] < 10
    assert multinode.differences(reference, sweep[0] / "1" / "checkpoints" / "last.ckpt"), "all seeds look the same"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """Where slurm_tasks.py left logs and exit codes."""
    folder = tmp_path_factory.mktemp("slurm")
    script = Path(__file__).with_name("slurm_tasks.py")
    processes.run([sys.executable, script, folder], env=environment(), cwd=folder, check=True)
    return folder


def test_slurm_tasks_save_and_end_together_although_the_signals_reach_only_one(slurm):
    log = (slurm / "asked.log").read_text()
    assert json.loads((slurm / "asked.json").read_text()) == [143, 143], log[-4000:]
    saved = torch.load(slurm / "outputs" / "slurm-4242-0" / "hpc_ckpt_1.ckpt", weights_only=True)
    assert saved["global_step"] >= 30


def test_ranks_that_see_different_folders_are_refused_before_training(slurm):
    log = (slurm / "unshared.log").read_text()
    assert json.loads((slurm / "unshared.json").read_text()) == [2, 2], log[-4000:]
    assert re.search(r"rank 0 resumes from \S+\.ckpt, rank 1 from no checkpoint: all nodes must see the same", log)
    assert "epoch" not in log


def test_scripts_of_the_cluster_guide_are_valid_shell():
    guide = (Path(__file__).parents[2] / "docs" / "cluster.md").read_text()
    scripts = re.findall(r"```bash\n(.*?)```", guide, re.DOTALL)
    assert len(scripts) == 3
    for script in scripts:
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
