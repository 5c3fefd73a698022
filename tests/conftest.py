"""One thread in every test: the machine is shared, by the other test process at least."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests import helpers

torch.set_num_threads(1)
# W&B would send reports about itself, from threads that outlive its runs
os.environ["WANDB_ERROR_REPORTING"] = "false"
# a busy machine is no reason to fail
settings.register_profile("shared", suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")


def pytest_collection_modifyitems(items):
    """Slow tests take up to three minutes on a free machine."""
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(3000))


@pytest.fixture(params=["masked", "packed"])
def storage(request, monkeypatch):
    """Every `make_callback()` of the test makes a callback of this storage."""
    monkeypatch.setitem(helpers.DEFAULTS, "storage", request.param)
    return request.param
