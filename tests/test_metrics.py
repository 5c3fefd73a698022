"""The metric classes on masks that can be counted by eye."""

import pytest
import torch

from lightning_topkast import MaskChange, ReservoirActivation, Sparsity


def mask(bits: str) -> torch.Tensor:
    return torch.tensor([bit == "1" for bit in bits])


def test_sparsity_counts_zeros_over_all_updates():
    metric = Sparsity()
    metric.update(torch.tensor([[0.0, 1.0], [0.0, -2.0]]))
    assert metric.compute().item() == 0.5
    metric.update(mask("000000000001"))
    assert metric.compute().item() == pytest.approx((2 + 11) / 16)


def test_sparsity_of_a_batch_is_its_own():
    metric = Sparsity()
    assert metric(mask("0001")).item() == 0.75
    assert metric(mask("1111")).item() == 0
    assert metric.compute().item() == pytest.approx(3 / 8)


def test_mask_change_is_the_share_of_active_entries_that_are_new():
    metric = MaskChange()
    metric.update(mask("110000"), mask("011000"))
    assert metric.compute().item() == 0.5
    metric.update(mask("110000"), mask("110000"))
    assert metric.compute().item() == 0.25


def test_reservoir_activation_ignores_entries_outside_the_reservoir():
    metric = ReservoirActivation()
    metric.update(mask("001111"), mask("111000"))
    assert metric.compute().item() == 0.25


@pytest.mark.parametrize("kind", [Sparsity, MaskChange, ReservoirActivation])
def test_nothing_counted_is_zero_and_reset_forgets(kind):
    metric = kind()
    metric.count(3, 4)
    assert metric.compute().item() == 0.75
    metric.reset()
    metric.count(0, 0)
    assert metric.compute().item() == 0


def test_counts_are_exact_beyond_the_precision_of_a_float():
    """2^24 + 1 entries one by one: a float32 sum would stop counting at 2^24."""
    metric = Sparsity()
    for _ in range(3):
        metric.count(2**24 + 1, 2**26)
    assert int(metric.counted) == 3 * (2**24 + 1)


def test_metrics_follow_pickling_and_devices():
    import pickle

    metric = pickle.loads(pickle.dumps(Sparsity())).to("cpu")
    metric.update(mask("01"))
    assert metric.compute().item() == 0.5
