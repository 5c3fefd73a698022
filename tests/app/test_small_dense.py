"""`sparsity=small_dense`: the widest dense network with no more parameters than Top-KAST would leave non-zero."""

import json
import sys

import pytest
import torch
from torch import nn

from lightning_topkast import TopKast
from lightning_topkast.app.commands import plan as plan_module
from lightning_topkast.app.errors import AppError
from lightning_topkast.app.models import MLP, resnet
from lightning_topkast.app.models.narrow import narrow_
from lightning_topkast.app.run.build import build_callbacks, build_model
from lightning_topkast.app.run.small_dense import with_width
from lightning_topkast.app.run.summary import count_weights
from lightning_topkast.app.run.train import train

SHORT = ["trainer.max_epochs=1", "trainer.limit_train_batches=4", "callbacks=none", "logger=none"]
RESNET = ["data=cifar10", "model=resnet18"]


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def on_meta(config):
    with torch.device("meta"):
        return build_model(config)


def test_mlp_is_as_wide_as_the_budget_allows_and_no_wider(composed):
    # hidden1 64×256 and hidden2 256×256 at density 0.1; the output layer and the biases are dense
    budget = 1638 + 6554 + 10 * 256 + 256 + 256 + 10
    net = build_model(composed("sparsity=small_dense", "sparsity.forward_sparsity=0.9")).net
    width = net.hidden1.out_features
    sizes = {w: parameters(MLP([64], 10, hidden=[w, w])) for w in (width, width + 1)}
    assert parameters(net) == sizes[width] <= budget < sizes[width + 1]


@pytest.mark.slow
@pytest.mark.parametrize("forward_sparsity", [0.8, 0.95])
@pytest.mark.parametrize("model", [[], ["data=fashion_mnist", "model=cnn"], RESNET], ids=["mlp", "cnn", "resnet18"])
def test_budget_is_what_topkast_leaves_in_a_real_run(model, forward_sparsity, composed):
    given = [f"sparsity.forward_sparsity={forward_sparsity}", *model]
    sparse = build_model(composed(*given))
    with torch.no_grad():
        for parameter in sparse.parameters():
            parameter.fill_(1.0)  # also what starts at zero counts
    (callback,) = build_callbacks(composed(*given, "callbacks=none"), has_loggers=False)
    TopKast.of(sparse, callback.settings).attach(torch.optim.SGD(sparse.parameters(), lr=0.1))
    budget = sum(count.nonzero for count in count_weights(sparse))
    dense = parameters(on_meta(composed(*given, "sparsity=small_dense")))
    assert 0.96 * budget < dense <= budget


@pytest.mark.slow
def test_layers_that_are_kept_dense_raise_the_budget(composed):
    plain, kept = (
        parameters(on_meta(composed("sparsity=small_dense", *more)))
        for more in ((), ("sparsity.targets.exclude=[net.hidden1.weight]",))
    )
    assert plain + 0.9 * 64 * 256 == pytest.approx(kept, rel=0.03)


@pytest.mark.slow
def test_narrowing_starts_from_the_width_that_the_model_is_given(composed):
    half = on_meta(composed("sparsity=small_dense", "model.hidden=[128,128]")).net
    factor = on_meta(composed("sparsity=small_dense", "model.width_factor=0.5")).net
    assert [p.shape for p in half.parameters()] == [p.shape for p in factor.parameters()]


@pytest.mark.slow
def test_choice_of_the_width_is_recorded_and_leaves_the_seed_alone(composed):
    config = composed("sparsity=small_dense")
    torch.manual_seed(0)
    chosen = build_model(config)
    factor = with_width(config).sparsity.width_factor
    assert 0.25 < factor < 0.35
    assert config.sparsity.width_factor is None, "the run's own configuration, by which a sweep knows it again"
    torch.manual_seed(0)
    given = build_model(composed("sparsity=dense", f"model.width_factor={factor}"))
    torch.manual_seed(0)
    again = build_model(config)
    for one, two, three in zip(chosen.parameters(), given.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


def test_small_dense_run_trains_and_stays_dense(composed, capsys):
    assert train(composed("sparsity=small_dense", *SHORT)) > 0.1
    assert "net.hidden2.weight │ 74×74" in capsys.readouterr().out


def test_plan_is_of_the_narrow_network(monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["topkast-plan", "sparsity=small_dense", "format=json"])
    plan_module.main()
    totals = json.loads(capfd.readouterr().out)["totals"]
    assert totals["size"] == totals["active"] == parameters(MLP([64], 10, hidden=[74, 74]))


def test_model_without_a_width_is_refused(composed):
    config = composed("model=custom", "model._target_=torchvision.models.vgg11", "sparsity=small_dense")
    with pytest.raises(AppError, match=r"model\.width_factor, which torchvision\.models\.vgg11 does not have"):
        build_model(config)


def test_model_that_can_not_be_small_enough_is_refused(composed):
    config = composed("sparsity=small_dense", "model.hidden=[5,5]", "sparsity.targets.keep_last_dense=false")
    with pytest.raises(AppError, match="even the narrowest network has 87 parameters, more than the 59"):
        build_model(config)


@pytest.mark.parametrize("depth", [18, 50])
def test_narrow_resnet_computes_and_starts_like_one_built_so(depth):
    torch.manual_seed(0)
    net = resnet(depth, (3, 32, 32), 7, width_factor=0.25, zero_init_residual=True)
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    full = resnet(depth, (3, 32, 32), 7, zero_init_residual=True)
    for (name, narrow), wide in zip(net.named_modules(), full.modules(), strict=True):
        if isinstance(narrow, nn.Conv2d):
            assert narrow.out_channels == wide.out_channels / 4
            assert narrow.weight.shape == (narrow.out_channels, narrow.in_channels, *narrow.kernel_size)
            fan_out = narrow.out_channels * narrow.kernel_size[0] ** 2
            assert narrow.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.15), name
        if isinstance(narrow, nn.BatchNorm2d):
            assert torch.equal(narrow.weight, wide.weight[: narrow.num_features])
    assert net.fc.weight.abs().max().item() == pytest.approx(net.fc.in_features**-0.5, rel=0.02)


def test_grouped_convolutions_are_not_narrowed():
    with pytest.raises(ValueError, match="groups=4"):
        narrow_(nn.Sequential(nn.Conv2d(4, 4, 3, groups=4)), 0.5)
    with pytest.raises(ValueError, match=r"width_factor=2\.0 is not valid"):
        resnet(18, (3, 32, 32), 7, width_factor=2.0)
