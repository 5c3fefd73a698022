"""Networks and learning-rate schedules of the application."""

import pytest
import torch
from torch import nn

from lightning_topkast.app.errors import AppError
from lightning_topkast.app.models import CNN, MLP, TransformerLM, resnet
from lightning_topkast.app.run import schedulers


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
@pytest.mark.parametrize("build", [MLP, CNN, lambda s, n: resnet(18, s, n)], ids=["mlp", "cnn", "resnet18"])
def test_image_networks_return_one_logit_a_class(build, shape):
    assert build(shape, 7)(torch.randn(2, *shape)).shape == (2, 7)


def test_resnet_keeps_small_images_large_and_takes_any_number_of_channels():
    small, large = resnet(18, (1, 32, 32), 10), resnet(18, (3, 224, 224), 10)
    assert small.conv1.stride == (1, 1)
    assert small.conv1.in_channels == 1
    assert isinstance(small.maxpool, nn.Identity)
    assert large.conv1.stride == (2, 2)
    with pytest.raises(ValueError, match="depth=20"):
        resnet(20, (3, 32, 32), 10)


def test_transformer_never_sees_the_future():
    torch.manual_seed(0)
    net = TransformerLM(256, sequence_length=12, width=32, depth=2, heads=2).eval()
    tokens = torch.randint(0, 256, (2, 12))
    changed = tokens.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % 256
    before, after = net(tokens), net(changed)
    assert before.shape == (2, 12, 256)
    torch.testing.assert_close(before[:, :8], after[:, :8])
    assert not torch.allclose(before[:, 8:], after[:, 8:])


def rates(schedule, total, **options):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = schedule(optimizer, total_steps=total, **options)
    values = []
    for _ in range(total):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return values


def test_schedules_are_given_in_fractions_of_the_run():
    assert rates(schedulers.constant, 4) == [1.0] * 4
    assert rates(schedulers.constant, 10, warmup=0.3)[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates(schedulers.linear, 4, warmup=0.0) == [1.0, 0.75, 0.5, 0.25]
    assert rates(schedulers.cosine, 2, warmup=0.0, final=0.5) == pytest.approx([1.0, 0.75])
    assert rates(schedulers.multistep, 10, warmup=0.0, milestones=[0.5], gamma=0.1) == [1.0] * 5 + [0.1] * 5


def test_longer_run_stretches_the_schedule():
    short, long = rates(schedulers.cosine, 100), rates(schedulers.cosine, 1000)
    assert short[50] == pytest.approx(long[500], abs=0.02)
    assert max(short) == pytest.approx(1.0)


@pytest.mark.parametrize("milestones", [[0.7, 0.3], [30, 70]])
def test_milestones_must_be_rising_fractions(milestones):
    with pytest.raises(AppError, match="increasing fractions"):
        rates(schedulers.multistep, 10, milestones=milestones)
