"""Every YAML file in conf/ is composed, instantiated and run, found by listing the folder: none can escape."""

import csv
from pathlib import Path

import lightning_topkast.conf
import pytest
import torch

from lightning_topkast.app.run.train import train
from tests.app.data_files import WIKITEXT_WORDS
from tests.app.result_files import read_result
from tests.wandb_files import history, records_of

CONF = Path(next(iter(lightning_topkast.conf.__path__)))
ALL = sorted(
    (file.parent.name, file.stem) for file in CONF.glob("*/*.yaml") if file.parent.name not in ("hydra", "logger")
)
LOGGERS = sorted(file.stem for file in (CONF / "logger").glob("*.yaml"))

IMAGENET = ["data.num_classes=2", "data.batch_size=2", "data.num_workers=0", "data.val_size=2"]
CIFAR10 = ["data.batch_size=4", "data.num_workers=0", "data.val_size=20"]
TEXT = ["data.sequence_length=16", "data.batch_size=2", "model.width=32", "model.depth=2", "model.heads=2"]
ENWIK8 = ["data.split=[18000,1000,1000]", *TEXT]
WIKITEXT = [f"data.num_classes={WIKITEXT_WORDS}", *TEXT]
FASHION = ["data.folder=${paths.data_dir}/fashion", "data.val_size=10", "data.batch_size=4"]
ON_CPU = ["trainer.accelerator=cpu", "trainer.devices=1", "trainer.precision=32-true"]

LAYERS = "[{_target_:torch.nn.Flatten},{_target_:torch.nn.Linear,in_features:64,out_features:32},\
{_target_:torch.nn.Linear,in_features:32,out_features:10}]"

# What an option needs to run here; an option that isn't listed has to run as it is.
NEEDS: dict[tuple[str, str], list[str]] = {
    ("data", "cifar10"): ["model=cnn", *CIFAR10],
    ("data", "imagenet"): ["model=cnn", "data.input_shape=[3,64,64]", *IMAGENET],
    ("data", "text"): ["data.path=${paths.data_dir}/texts", *TEXT],
    ("data", "enwik8"): ENWIK8,
    ("data", "sotu"): ["data.folder=${paths.data_dir}/speeches", *TEXT],
    ("data", "wikitext103"): WIKITEXT,
    ("data", "fashion_mnist"): FASHION,
    ("data", "custom"): [
        "data._target_=lightning_topkast.app.data.Digits",
        "+data.num_classes=10",
        "+data.input_shape=[1,8,8]",
    ],
    ("model", "resnet18"): ["data.batch_size=4"],
    ("model", "resnet50"): ["data.batch_size=4"],
    ("model", "wide_resnet"): ["model.depth=10"],
    ("model", "transformer"): ["data=text", "data.path=${paths.data_dir}/texts", *TEXT],
    ("model", "transformer_tied"): ["data=text", "data.path=${paths.data_dir}/texts", "model=transformer_tied", *TEXT],
    ("model", "custom"): [
        "model._target_=torch.nn.Sequential",
        f"+model._args_={LAYERS}",
        "recipe.keep_first_dense=false",
    ],
    ("trainer", "gpu"): ON_CPU,
    ("trainer", "ddp"): ON_CPU,
    ("trainer", "ddp_cpu"): ON_CPU,
    ("trainer", "slurm"): ON_CPU,
    ("trainer", "multinode"): ON_CPU,
    ("trainer", "fsdp2"): ON_CPU,  # really sharded in test_sharding.py
    ("trainer", "fsdp2_sharded"): ON_CPU,
    ("experiment", "cifar10_resnet18"): CIFAR10,
    ("experiment", "cifar10_wrn22_2"): [*CIFAR10, "recipe.global_batch=4"],
    ("experiment", "imagenet_resnet50"): ["data.input_shape=[3,64,64]", "recipe.global_batch=4", *IMAGENET],
    ("experiment", "enwik8_transformer_xl"): [*ENWIK8, "recipe.global_batch=4"],
    ("experiment", "wikitext103_transformer_xl"): [*WIKITEXT, "recipe.global_batch=4"],
    ("experiment", "sotu_transformer"): ["data.folder=${paths.data_dir}/speeches", *TEXT],
    ("experiment", "fashion_mnist_mlp"): FASHION,
    ("experiment", "fashion_mnist_cnn"): FASHION,
    **{("experiment", option): FASHION for group, option in ALL if option.startswith("ablation_")},
}


@pytest.mark.parametrize(
    ("group", "option"),
    [
        pytest.param(group, option, id=f"{group}={option}", marks=[pytest.mark.slow] * ("resnet50" in option))
        for group, option in ALL
    ],
)
@pytest.mark.usefixtures("unchecked_cifar10")
@pytest.mark.filterwarnings("ignore:Using .DistributedSampler. with the dataloaders:UserWarning")
@pytest.mark.filterwarnings("ignore:.*profiler.*:UserWarning")
@pytest.mark.slow
def test_option_trains(group, option, composed, data_dir):
    overrides = [f"paths.data_dir={data_dir}", f"{group}={option}", *NEEDS.get((group, option), [])]
    score = train(composed(*overrides, "trainer.fast_dev_run=true"))
    assert torch.isfinite(torch.tensor(score))


def test_every_logger_gets_what_runs_are_compared_by(composed, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(composed("logger=many", "trainer.max_epochs=1", "trainer.limit_train_batches=2"))
    run = tmp_path / "run"
    result = read_result(run)
    expected = {
        "run/parameters_nonzero": result["parameters"]["nonzero"],
        "run/training_flops_ratio": result["flops"]["training_flops_ratio"],
        "run/forward_flops_ratio": result["flops"]["forward_flops_ratio"],
        "run/examples": 128,
    }
    with (run / "csv" / "metrics.csv").open() as file:
        (row,) = (row for row in csv.DictReader(file) if row["run/examples"])
    assert {name: float(row[name]) for name in expected} == pytest.approx(expected)
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert {name: events.Scalars(name)[-1].value for name in expected} == pytest.approx(expected)
    (records,) = (records_of(path) for path in run.glob("wandb/offline-run-*"))
    (row,) = (row for row in history(records) if "run/examples" in row)
    assert {name: row[name] for name in expected} == pytest.approx(expected)
    (followed,) = (r["metric"] for r in records if r["type"] == "metric" and r["metric"].get("name") == "val/acc")
    assert followed["summary"] == {"max": True, "last": True}


@pytest.mark.parametrize("option", LOGGERS)
def test_logger_option_writes_what_it_names(option, composed, tmp_path):
    short = ["trainer.max_epochs=1", "trainer.limit_train_batches=2", "trainer.log_every_n_steps=1"]
    train(composed(f"logger={option}", *short))
    run = tmp_path / "run"
    assert (run / "csv" / "metrics.csv").is_file() == (option in ("csv", "default", "many"))
    assert any(run.glob("wandb/offline-run-*/run-*.wandb")) == (option in ("wandb", "default", "many"))
    assert any(run.glob("tensorboard/events*")) == (option in ("tensorboard", "many"))
