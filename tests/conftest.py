"""One thread in every test: the machine is shared, by the other test process at least."""

import pytest
import torch

from tests import helpers

torch.set_num_threads(1)


@pytest.fixture(params=["masked", "packed"])
def execution(request, monkeypatch):
    """Every `make_callback()` of the test makes a callback of this execution."""
    monkeypatch.setitem(helpers.DEFAULTS, "execution", request.param)
    return request.param
