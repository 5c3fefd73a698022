"""The published recipes: batches, schedules and networks are what the papers have, on any number of processes."""

import json
import sys

import pytest
import torch
from lightning import Trainer
from torch import nn

from lightning_topkast.app.commands import plan as plan_module
from lightning_topkast.app.data import Digits
from lightning_topkast.app.errors import AppError
from lightning_topkast.app.models import CNN, WideResNet
from lightning_topkast.app.run.build import build_callbacks, build_model
from lightning_topkast.app.run.global_batch import GlobalBatch, accumulation
from lightning_topkast.app.run.task import ClassificationTask
from lightning_topkast.app.run.train import train

IMAGENET_EPOCH = 1_281_167 / 4096  # steps


def rates(config):
    """Learning rate of every optimizer step of a run."""
    from hydra.utils import instantiate

    optimizer = instantiate(config.optimizer, _convert_="all")([nn.Parameter(torch.zeros(1))])
    steps = config.trainer.max_steps
    scheduler = instantiate(config.scheduler, _convert_="all")(optimizer, total_steps=steps)
    (rate,) = scheduler.lr_lambdas
    return [optimizer.defaults["lr"] * rate(step) for step in range(steps)]


@pytest.mark.parametrize("schedule", [1, 2, 5])
def test_imagenet_rate_follows_the_paper_at_every_length(schedule, composed):
    config = composed("experiment=imagenet_resnet50", f"recipe.schedule={schedule}")
    assert config.trainer.max_steps == 32_000 * schedule
    rate = rates(config)
    # (epoch of the paper, just before, just after)
    for epoch, before, after in ((30, 1.6, 0.16), (70, 0.16, 0.016), (90, 0.016, 0.0016)):
        step = round(epoch * IMAGENET_EPOCH * schedule)
        assert rate[step - 10 * schedule] == pytest.approx(before)
        assert rate[step + 10 * schedule] == pytest.approx(after)
    warm = round(5 * IMAGENET_EPOCH * schedule)
    assert rate[warm // 2] == pytest.approx(0.8, rel=0.01)
    assert rate[warm + 10 * schedule] == 1.6


def test_cifar10_rate_falls_to_a_fifth_every_30_000_steps(composed):
    rate = rates(composed("experiment=cifar10_wrn22_2"))
    assert len(rate) == 97_656
    assert [round(rate[step], 6) for step in (0, 29_900, 30_100, 59_900, 60_100, 89_900, 90_100)] == [
        0.1, 0.1, 0.02, 0.02, 0.004, 0.004, 0.0008,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("experiment", "examples", "processes"),  # examples that are left to train on
    [
        ("cifar10_wrn22_2", 45_000, [(1, 128), (2, 64)]),
        ("imagenet_resnet50", 1_268_356, [(1, 256), (8, 256), (16, 256), (32, 128)]),
        ("enwik8_transformer_xl", 175_781, [(1, 22), (2, 11)]),
        ("wikitext103_transformer_xl", 688_000, [(1, 15), (4, 15)]),
    ],
)
@pytest.mark.parametrize("schedule", [1, 2, 5])
def test_steps_and_not_epochs_end_a_published_recipe(experiment, examples, processes, schedule, composed):
    config = composed(f"experiment={experiment}", f"recipe.schedule={schedule}")
    for count, batch_size in processes:
        batches = examples // count // batch_size  # of an epoch, whose last step may see fewer of them
        steps = -(-batches // accumulation(config.recipe.global_batch, batch_size, count))
        assert config.trainer.max_epochs * steps >= config.trainer.max_steps


@pytest.mark.parametrize(
    ("length", "schedule", "expected"),
    [("max_epochs", 5, 100), ("max_epochs", 0.5, 10), ("max_steps", 5, -1)],
    ids=["longer", "shorter", "no limit"],
)
def test_schedule_stretches_the_run(length, schedule, expected, composed):
    assert composed(f"recipe.schedule={schedule}").trainer[length] == expected


def test_schedule_that_is_no_length_is_refused(cli):
    code, _, err = cli("recipe.schedule=0")
    assert code == 2
    assert "recipe.schedule=0 is not valid: expected a number above 0" in err.strip().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "batch_size", "accumulate"), [(1, 256, 16), (8, 256, 2), (16, 256, 1), (32, 128, 1)]
)
def test_imagenet_step_sees_4096_images_on_any_number_of_gpus(devices, batch_size, accumulate, monkeypatch, capfd):
    nodes = max(1, devices // 8)
    overrides = [
        "experiment=imagenet_resnet50", "trainer=ddp", f"trainer.num_nodes={nodes}",
        f"trainer.devices={devices // nodes}", f"data.batch_size={batch_size}", "format=json",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["topkast-plan", *overrides])
    plan_module.main()
    run = json.loads(capfd.readouterr().out)["run"]
    assert (run["examples"], run["accumulate"]) == (batch_size, accumulate)
    assert run["examples"] * run["accumulate"] * run["devices"] == 4096


@pytest.mark.parametrize(
    ("size", "batch_size", "processes", "way"),
    [
        (4096, 256, 32, "data.batch_size=128 would be"),
        (96, 64, 1, "data.batch_size=48 would be"),
        (10, 4, 3, "another number of processes"),
    ],
)
def test_global_batch_that_does_not_come_out_even_is_refused(size, batch_size, processes, way):
    with pytest.raises(AppError, match=f"recipe.global_batch={size} is not a multiple .*: {way}"):
        accumulation(size, batch_size, processes)


def test_two_batches_of_half_the_size_make_the_same_step(composed):
    """A step's gradient, and the number of steps that the schedule counts, do not depend on the batch size."""
    results = {}
    for batch_size in (64, 32):
        config = composed(
            "recipe.global_batch=64", f"data.batch_size={batch_size}", "sparsity=dense", "callbacks=none", "logger=none"
        )
        torch.manual_seed(0)
        task = build_model(config)
        trainer = Trainer(
            max_epochs=2, limit_train_batches=4 * 64 // batch_size, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=build_callbacks(config, has_loggers=False),
        )  # fmt: skip
        trainer.fit(task, datamodule=Digits(batch_size=batch_size))
        assert trainer.global_step == 8
        results[batch_size] = [parameter.detach() for parameter in task.parameters()]
    for one, two in zip(*results.values(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


def test_two_ways_to_accumulate_are_refused():
    trainer = Trainer(accumulate_grad_batches=3, logger=False, enable_checkpointing=False)
    trainer.fit_loop._data_source.instance = None
    trainer.datamodule = Digits(batch_size=64)
    with pytest.raises(AppError, match="accumulate_grad_batches=3: set one of them only"):
        GlobalBatch(128).setup(trainer, None, "fit")


@pytest.mark.parametrize(("depth", "widen", "millions"), [(40, 2, 2.2), (16, 8, 11.0), (28, 10, 36.5)])
def test_wide_resnets_are_as_large_as_their_paper_says(depth, widen, millions):
    with torch.device("meta"):
        net = WideResNet((3, 32, 32), 10, depth, widen)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == depth  # the first, two of each block, and the projections of the groups' first blocks


def test_wide_resnet_learns_and_its_depth_is_checked():
    torch.manual_seed(0)
    net = WideResNet((1, 8, 8), 4, depth=10, widen=1)
    images, targets = torch.randn(16, 1, 8, 8), torch.arange(16) % 4
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(images), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    with pytest.raises(ValueError, match="depth=20 is not valid: expected 6n"):
        WideResNet((3, 32, 32), 10, depth=20)


def test_channels_last_changes_the_memory_and_not_the_result(composed):
    images = torch.randn(4, 1, 8, 8)
    logits = {}
    for channels_last in (True, False):
        torch.manual_seed(0)
        task = build_model(composed("model=cnn", f"task.channels_last={str(channels_last).lower()}")).eval()
        assert task.net.conv2.weight.is_contiguous(memory_format=torch.channels_last) == channels_last
        logits[channels_last] = task(images)
    torch.testing.assert_close(logits[True], logits[False])


def test_channels_last_is_left_out_where_nothing_is_convolved(composed):
    assert not build_model(composed()).channels_last
    assert ClassificationTask(CNN((3, 8, 8), 2), torch.optim.SGD, num_classes=2, channels_last=True).channels_last


@pytest.mark.slow
def test_imagenet_recipe_trains_its_steps_with_accumulation(composed, data_dir):
    """The experiment file itself on generated images: 4 of them a step, of which a process takes 2 at once."""
    score = train(
        composed(
            "experiment=imagenet_resnet50", f"paths.data_dir={data_dir}", "data.num_classes=2", "data.batch_size=2",
            "data.num_workers=0", "data.val_size=2", "data.input_shape=[3,32,32]", "recipe.global_batch=4",
            "recipe.max_steps=3", "model.depth=18", "logger=none", "callbacks=none", "recipe.monitor=train/acc",
        )
    )  # fmt: skip
    assert 0 <= score <= 1
