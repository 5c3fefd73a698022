"""FSDP2: `configure_model` shards the network over the mesh that the strategy brings."""

import os
import sys

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lightning_topkast.app.models import TransformerLM
from lightning_topkast.app.run.summary import count_weights
from lightning_topkast.app.run.task import ClassificationTask
from tests import processes
from tests.helpers import plain_path


@pytest.fixture
def mesh(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    return init_device_mesh("cpu", (1, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))


def test_every_block_is_sharded_by_itself_once(mesh):
    net = TransformerLM(256, sequence_length=8, width=16, depth=2, heads=2)
    entries = sum(parameter.numel() for parameter in net.parameters())
    task = ClassificationTask(net, torch.optim.SGD, num_classes=256)
    task._device_mesh = mesh
    task.configure_model()
    task.configure_model()
    assert isinstance(net, FSDPModule)
    assert all(isinstance(block, FSDPModule) for block in net.blocks)
    assert all(isinstance(parameter, DTensor) for parameter in net.parameters())
    assert sum(count.entries for count in count_weights(net)) == entries
    assert task(torch.zeros(1, 8, dtype=torch.long)).shape == (1, 8, 256)


def test_without_a_mesh_the_network_stays_whole():
    task = ClassificationTask(TransformerLM(256, 8, width=16, depth=1, heads=2), torch.optim.SGD, num_classes=256)
    task.configure_model()
    assert not any(isinstance(parameter, DTensor) for parameter in task.parameters())


def run_sharded(folder, *overrides, trainer="fsdp2_sharded"):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(plain_path()), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable, "-m", "lightning_topkast.app.commands.train",
        f"trainer={trainer}", "trainer.accelerator=cpu", "trainer.devices=2",
        "trainer.precision=32-true", "+trainer.strategy.process_group_backend=gloo", "logger=csv",
        "recipe.update_every=2", "trainer.limit_train_batches=4", "hydra.run.dir=run", *overrides,
    ]  # fmt: skip
    return processes.run(command, env=environment, cwd=folder)


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["masked", "packed"])
def test_two_processes_train_shards_of_a_sparse_network_and_go_on_from_them(tmp_path, storage):
    storage = f"sparsity.storage={storage}"
    done = run_sharded(tmp_path, "trainer.max_epochs=2", storage)
    assert done.returncode == 0, done.stderr
    assert "90.00 %" in done.stdout
    checkpoints = tmp_path / "run" / "checkpoints"
    (last,) = checkpoints.glob("last*")  # the one of the first epoch is gone
    assert last.name == "last-step=8.ckpt"
    assert {path.name for path in last.iterdir()} == {".metadata", "meta.pt", "__0_0.distcp", "__1_0.distcp"}

    done = run_sharded(tmp_path, "trainer.max_epochs=3", f"ckpt_path='{last}'", "hydra.run.dir=on", storage)
    assert done.returncode == 0, done.stderr
    assert "epoch 3/3:" in done.stdout
    assert "epoch 2/3:" not in done.stdout
    assert "90.00 %" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_two_processes_end_a_run_whose_checkpoints_are_single_files(tmp_path):
    done = run_sharded(tmp_path, "trainer.max_epochs=1", trainer="fsdp2")
    assert done.returncode == 0, done.stderr
    assert "90.00 %" in done.stdout
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.slow
def test_packed_layers_refuse_single_files_before_they_train(tmp_path):
    done = run_sharded(tmp_path, "sparsity.storage=packed", trainer="fsdp2")
    assert done.returncode != 0
    assert "trainer=fsdp2_sharded" in done.stderr
    assert "epoch 1" not in done.stdout
