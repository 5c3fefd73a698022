"""The paper's ablations: each sweep runs, and each of its values reaches the callback; how masks move is measured."""

import csv
from operator import attrgetter
from pathlib import Path

import lightning_topkast.conf
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger

from lightning_topkast import L1, L2, Magnitude, Norm
from lightning_topkast.app.errors import AppError
from lightning_topkast.app.run.mask_dynamics import MaskDynamics
from tests.helpers import SaveAfter, fit, make_callback, make_net, make_trainer

ABLATIONS = sorted(
    file.stem for file in Path(next(iter(lightning_topkast.conf.__path__))).glob("experiment/ablation_*.yaml")
)
EXPECTED = {
    "ablation_sparsity": {
        "sparsity.forward_sparsity": [0.8, 0.9, 0.95, 0.98],
        "sparsity.backward_sparsity": [0.0, 0.5, 0.8],
    },
    "ablation_exploration": {"sparsity": [Magnitude("magnitude"), Magnitude("random")], "seed": [0, 1, 2]},
    "ablation_stop": {"sparsity.schedule.stop_exploring_at": [0, 0.1, 0.25, 0.5, 1.0]},
    "ablation_refresh": {"sparsity.schedule.update_every": [1, 10, 100, 1000]},
    "ablation_penalty": {
        "sparsity.penalty": [
            *(L2(strength=strength) for strength in (1e-5, 1e-4, 1e-3)),
            *(form(strength) for form in (L1, Norm) for strength in (1e-5, 1e-4, 1e-3)),
        ]
    },
    "ablation_penalty_strength": {"sparsity.penalty.shrinkage": [0.0, 1e-4, 5e-4, 1e-3, 5e-3, 1e-2]},
    "ablation_masks": {"sparsity.penalty.shrinkage": [0.0, 1e-3]},
}
# where the callback's settings have what a key of the configuration is about, unless under its own name
FOUND = {
    "sparsity": "rule",
    "sparsity.forward_sparsity": "allocation.forward_sparsity",
    "sparsity.backward_sparsity": "allocation.backward_sparsity",
}
SHORT = ("trainer.max_epochs=1", "trainer.limit_train_batches=2", "trainer.limit_val_batches=1", "test=false",
         "callbacks.progress=null", "logger=none")  # fmt: skip


def swept(experiment, *overrides):
    with initialize_config_module("lightning_topkast.conf", version_base="1.3"):
        config = compose("train", overrides=[f"experiment={experiment}", *overrides], return_hydra_config=True)
    parser = OverridesParser.create()
    return {
        key: list(parser.parse_override(f"{key}={values}").sweep_string_iterator())
        for key, values in config.hydra.sweeper.params.items()
    }


def test_every_ablation_is_listed_here():
    assert sorted(EXPECTED) == ABLATIONS


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ABLATIONS)
@pytest.mark.parametrize("base", [(), ("data=cifar10", "model=wide_resnet")], ids=["default", "another"])
def test_every_value_of_a_sweep_reaches_the_callback(experiment, base, composed):
    sweep = swept(experiment, *base)
    assert list(sweep) == list(EXPECTED[experiment])
    for key, values in sweep.items():
        settings = set()
        for value, expected in zip(values, EXPECTED[experiment][key], strict=True):
            config = composed(f"experiment={experiment}", *base, f"{key}={value}")
            if key.startswith("sparsity"):
                settings_of = instantiate(config.sparsity, _convert_="all").settings
                found = attrgetter(FOUND.get(key, key.removeprefix("sparsity.")))(settings_of)
            else:
                found = config[key]
            assert (found, type(found)) == (expected, type(expected))
            assert config.model._target_.endswith("WideResNet" if base else "MLP")
            settings.add(config.run_name)
        assert len(settings) == len(values), "runs go by their names in W&B"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_sweep_runs_each_of_its_points(cli, data_dir, tmp_path):
    arguments = ("-m", "experiment=ablation_stop", f"data.folder={data_dir}/fashion", "data.val_size=10", *SHORT)
    code, out, err = cli(*arguments, f"hydra.sweep.dir={tmp_path}/sweep")
    assert code == 0, err
    assert "Launching 5 jobs" in out
    assert len(list((tmp_path / "sweep").glob("*/checkpoints/best.ckpt"))) == 5


class ByHand(Callback):
    """Takes A at each step, and with nothing else works out what a window of 4 steps changes."""

    def __init__(self, callback):
        self.callback, self.active, self.rows = callback, [], []

    def on_train_start(self, trainer, pl_module):
        self.on_train_batch_end(trainer, pl_module, None, None, 0)
        weights = self.callback.topkast.weights.values()
        self.reservoir = [~weight.updated for weight in weights]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.active.append([weight.active for weight in self.callback.topkast.weights.values()])

    def shares(self, step):
        before, now = self.active[step - 4], self.active[step]
        changed = [(a & ~b).sum() / a.sum() for a, b in zip(now, before, strict=True)]
        ever = [torch.stack(masks).any(0) for masks in zip(*self.active[: step + 1], strict=True)]
        activated = [(e & r).sum() / r.sum() for e, r in zip(ever, self.reservoir, strict=True)]
        return {
            f"masks/{name}_{of}": float(getattr(torch.stack(shares), of)())
            for name, shares in (("change", changed), ("activated", activated))
            for of in ("min", "mean", "max")
        }


def logged(folder):
    with next(folder.rglob("metrics.csv")).open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("masks/change_mean")]
    return {int(row["step"]): {name: float(row[name]) for name in row if name.startswith("masks/")} for row in rows}


def test_windows_hold_what_the_masks_themselves_say(tmp_path):
    callback = make_callback(update_every=2, keep_first_dense=False)
    by_hand = ByHand(callback)
    trainer = make_trainer(tmp_path, callback, MaskDynamics(every=4), by_hand, logger=CSVLogger(tmp_path / "log"))
    fit(trainer, make_net(lr=0.5))
    rows = logged(tmp_path)
    assert len(rows) >= 2
    assert max(row["masks/change_max"] for row in rows.values()) > 0
    for step, row in rows.items():
        assert row == pytest.approx(by_hand.shares(step), abs=1e-6)
        assert row["masks/change_min"] < row["masks/change_max"]


def test_run_resumed_within_a_window_logs_the_same(tmp_path):
    def run(folder, net, *more, **options):
        callback = make_callback(update_every=2, keep_first_dense=False)
        log = CSVLogger(tmp_path / folder)
        trainer = make_trainer(tmp_path, callback, MaskDynamics(every=6), *more, logger=log, max_epochs=3)
        fit(trainer, net, **options)
        return logged(tmp_path / folder)

    half = tmp_path / "half.ckpt"  # after 4 steps
    expected = run("whole", make_net(lr=0.5), SaveAfter(half, 0))
    assert list(expected) == [6, 12]
    assert run("resumed", make_net(seed=1, lr=0.5), ckpt_path=half) == expected


def test_dense_run_has_no_masks_to_follow(composed):
    from lightning_topkast.app.run.train import train

    with pytest.raises(AppError, match="callbacks=mask_dynamics needs a sparse run"):
        train(composed("sparsity=dense", "callbacks=mask_dynamics", *SHORT))
