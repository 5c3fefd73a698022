"""FSDP2: `configure_model` shards the network over the mesh that the strategy brings."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lightning_topkast.app.models import TransformerLM
from lightning_topkast.app.report import count_weights
from lightning_topkast.app.task import ClassificationTask


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
