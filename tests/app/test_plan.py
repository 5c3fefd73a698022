"""`topkast-plan` prints the plan of a configured run, in three forms, and writes nothing."""

import csv
import io
import json
import os
import sys
from pathlib import Path

import pytest
import torch

from lightning_topkast.app.commands import plan as plan_module
from lightning_topkast.app.run.build import build_model
from lightning_topkast.app.run.plan import read_parallel
from lightning_topkast.costs import OptimizerState, Parallel
from lightning_topkast.ops import CONV_KERNELS, MATRIX_KERNELS
from tests import processes

GIANT = """
import sys
from pathlib import Path
from lightning_topkast.app.commands.plan import main
main()
status = Path("/proc/self/status").read_text().splitlines()
print(next(line.split()[1] for line in status if line.startswith("VmHWM")), file=sys.stderr)
"""


@pytest.fixture
def cli(command_line):
    """Run `topkast-plan`."""
    for kernels in (MATRIX_KERNELS, CONV_KERNELS):
        kernels.choose("auto", torch.device("cpu"))  # the first use on a machine says that they are compiled
    return command_line("topkast-plan", plan_module.main)


def planned(cli, arguments: str) -> dict:
    code, out, err = cli(*arguments.split(), "format=json")
    assert (code, err) == (0, "")
    return json.loads(out)


def test_json_totals_are_the_sums_of_its_layers(cli):
    plan = planned(cli, "model=cnn data=fashion_mnist sparsity=topkast_95_90 trainer=ddp trainer.devices=4")
    totals = plan["totals"]
    summed = [name for name in totals if name.endswith(("flops", "_bytes")) and not name.startswith("executed")]
    assert {"forward_flops", "dense_training_flops", "latent_bytes", "communication_sent_bytes"} <= set(summed)
    for name in summed:
        assert totals[name] == pytest.approx(sum(layer[name] for layer in plan["layers"])), name
    assert totals["forward_flops_ratio"] == totals["forward_flops"] / totals["dense_forward_flops"]
    assert totals["training_flops_ratio"] == totals["training_flops"] / totals["dense_training_flops"]
    assert 0.05 < totals["forward_flops_ratio"] < totals["training_flops_ratio"] < 1
    storages = ("dense", "masked", "packed")
    assert set(plan["strategies"]) == {f"{storage}_{kind}" for storage in storages for kind in ("ddp", "fsdp2")}
    assert plan["strategies"]["masked_ddp"]["device_bytes"] == totals["device_bytes"]


def test_csv_holds_the_same_figures_a_row_a_layer_and_the_total(cli):
    plan = planned(cli, "")
    *rows, total = csv.DictReader(io.StringIO(cli("format=csv")[1]))
    assert [row["name"] for row in rows] == [layer["name"] for layer in plan["layers"]]
    for row, layer in zip(rows, plan["layers"], strict=True):
        assert float(row["training_flops"]) == layer["training_flops"]
        assert row["shape"] == "x".join(map(str, layer["shape"]))
    assert total["name"] == "total"
    assert int(total["device_bytes"]) == plan["totals"]["device_bytes"]


def test_table_names_every_layer_and_way_in_80_columns(cli):
    code, out, _ = cli("data=text", "trainer=gpu", "trainer.devices=8", "model.depth=3")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    rows = out.partition("── \n")[2].partition("whole model")[0].strip().splitlines()
    assert len(rows) == 8  # one line each: tokens, four in a block, output, attention's own products, the rest
    for text in ("net.blocks.*", "(3×)", "whole model", "this run", "masked,", "fsdp2", "sent per", "not counted"):
        assert text in out, text


def test_default_plan_is_that_of_a_real_training_step(cli, composed):
    plan = planned(cli, "")
    model = build_model(composed())
    assert plan["totals"]["size"] == sum(parameter.numel() for parameter in model.parameters())
    assert plan["totals"]["weights_bytes"] == sum(parameter.nbytes for parameter in model.parameters())
    # 64 images through 64-256-256-10, of which the first two are at 0.1 and 0.2; nobody wants the images' gradient
    first, second, last = 64 * 256, 256 * 256, 256 * 10
    assert plan["totals"]["forward_flops"] == pytest.approx(2 * (0.1 * (first + second) + last), rel=1e-4)
    training = 2 * (0.3 * first + 0.4 * second + 3 * last)
    assert plan["totals"]["training_flops"] == pytest.approx(training, rel=1e-4)
    assert plan["totals"]["training_flops_a_step"] == pytest.approx(64 * training, rel=1e-4)


def test_resnet50_has_its_published_flops(cli):
    plan = planned(cli, "model=resnet50 data=imagenet trainer=ddp trainer.devices=8 optimizer=sgd")
    assert plan["totals"]["dense_forward_flops"] == pytest.approx(2 * 4.09e9, rel=0.002)
    assert plan["totals"]["size"] == 25_557_032
    assert plan["run"]["devices"] == 8


@pytest.mark.parametrize("arguments", ["", "trainer=slurm trainer.devices=4", "experiment=cifar10_resnet18 format=csv"])
def test_nothing_is_written(arguments, cli, tmp_path):
    assert cli(*arguments.split())[0] == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_174_billion_parameters_are_planned_in_little_memory(tmp_path):
    arguments = "data=text model.width=12288 model.depth=96 model.heads=96 trainer=fsdp2 trainer.devices=512"
    result = processes.run(
        [sys.executable, "-c", GIANT, *arguments.split(), "format=json"],
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    totals = json.loads(result.stdout)["totals"]
    assert totals["size"] == pytest.approx(174e9, rel=0.01)
    assert totals["weights_bytes"] == pytest.approx(4 * 174e9 / 512, rel=0.01)  # float32
    assert int(result.stderr.splitlines()[-1]) < 1_500_000  # KiB; the imports are a third of it


@pytest.mark.slow
def test_precision_decides_the_size_of_everything_trained(cli):
    totals = {
        name: planned(cli, f"trainer.precision={name}")["totals"] for name in ("32-true", "bf16-mixed", "bf16-true")
    }
    for kind in ("weights_bytes", "gradients_bytes", "latent_bytes"):
        assert totals["bf16-mixed"][kind] == totals["32-true"][kind] == 2 * totals["bf16-true"][kind]
    assert totals["bf16-true"]["masks_bytes"] == totals["32-true"]["masks_bytes"]


def test_dense_run_has_ratios_of_one_and_no_sparse_strategies(cli):
    plan = planned(cli, "sparsity=dense trainer=ddp trainer.devices=2")
    assert plan["totals"]["forward_flops_ratio"] == plan["totals"]["training_flops_ratio"] == 1
    assert set(plan["strategies"]) == {"dense_ddp", "dense_fsdp2"}


def test_own_lightning_module_is_planned_with_its_own_optimizer(cli):
    plan = planned(
        cli,
        "model=custom model._target_=lightning.pytorch.demos.boring_classes.BoringModel data.input_shape=[32] "
        "recipe.keep_first_dense=false sparsity.targets.keep_last_dense=false",
    )
    assert [layer["name"] for layer in plan["layers"]] == ["layer.weight", "layer.bias"]
    assert plan["totals"]["dense_forward_flops"] == 2 * 32 * 2
    assert plan["totals"]["optimizer_bytes"] == 0  # SGD without momentum


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ("", Parallel()),
        ("trainer.devices=2", Parallel(2, "ddp")),
        ("trainer=ddp trainer.devices=[0,3] trainer.num_nodes=2", Parallel(4, "ddp")),
        ("trainer=gpu trainer.devices=\"'0,1,2'\" trainer.accumulate_grad_batches=4", Parallel(3, "ddp", accumulate=4)),
        ("trainer=fsdp2 trainer.devices=8", Parallel(8, "fsdp2")),
        ("trainer=ddp_cpu +trainer.strategy.gradient_as_bucket_view=true", Parallel(2, "ddp", buckets=False)),
    ],
)
def test_devices_are_read_from_the_configuration(overrides, expected, composed):
    assert read_parallel(composed(*overrides.split())) == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("trainer=ddp", "trainer.devices=-1 depends on this machine: a plan needs a number"),
        ("trainer.devices=auto", "trainer.devices=auto depends on this machine"),
        ("trainer.devices=0", "trainer.devices=0 is not valid: expected a number of at least 1"),
        ("trainer.strategy=deepspeed", "trainer.strategy=deepspeed is not supported"),
        (
            "trainer.precision=bf16-ture",
            "trainer.precision=bf16-ture is not supported by topkast-plan: did you",
        ),
        ("format=yaml", "format=yaml is not valid: valid: csv, json, table"),
        ("fromat=csv", "there is no config key 'fromat': did you mean 'format'?"),
        ("data.batch_size=0", "data.batch_size=0 is not valid"),
        ("model=transformer", "data.sequence_length, which is not set: do the model and the data match?"),
        ("sparsity=dense model=cnn data.input_shape=[8,8]", "model: not enough values to unpack"),
        (
            "sparsity=dense model=custom model._target_=torch.nn.GRU +model._args_=[3,3]",
            "ClassificationTask fails on an input of shape (64, 1, 8, 8)",
        ),
        ("sparsity.targets.include=[conv*]", "include: 'conv*' matches no parameter"),
        ("sparsity.forward_sparsity=0.7", "expected backward_sparsity <= forward_sparsity, since"),
        ("trainer=fsdp2 trainer.devices=2 sparsity.all_reduce=sparse", "add sparsity.all_reduce=dense"),
        (
            "trainer=ddp trainer.devices=4 sparsity.all_reduce={_target_:lightning_topkast.TopKGradients,density:0.3}",
            "expected a density of at most 1 / 4",
        ),
        ("optimizer.lr=-1", "Invalid learning rate: -1"),
        ("sparsity._target_=torch.nn.Identity", "sparsity: Identity is not supported"),
        ("-m seed=0,1", "topkast-plan plans a single run"),
    ],
)
def test_mistake_is_answered_in_one_line(arguments, expected, cli, tmp_path):
    code, out, err = cli(*arguments.split())
    assert code == 2
    assert out == ""
    (line,) = err.strip().splitlines()
    assert line.startswith("topkast-plan: ")
    assert expected in line
    assert list(tmp_path.iterdir()) == []


def test_optimizer_state_is_asked_for_on_the_cpu_whatever_the_default_device():
    with torch.device("meta"):
        assert OptimizerState(torch.optim.Adam).nbytes((10, 20), torch.float32) == 2 * 800 + 4


def test_console_script_is_declared():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert 'topkast-plan = "lightning_topkast.app.commands.plan:main"' in text
