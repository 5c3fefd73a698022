"""Weight averages beside the callback: what they validate, save and leave behind is exactly sparse, in either order."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from torch import nn

from tests.helpers import (
    MIDDLE,
    Net,
    SaveAfter,
    check_sparse,
    fit,
    make_callback,
    make_net,
    make_trainer,
    parameters_of,
    same,
    zero_outside,
)

pytestmark = pytest.mark.usefixtures("storage")


averaging = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging", reason="came with Lightning 2.6")

AVERAGES = {
    "mean": averaging.WeightAveraging,
    "ema": lambda: averaging.EMAWeightAveraging(decay=0.5),
    "late ema": lambda: averaging.EMAWeightAveraging(decay=0.5, update_starting_at_step=5),
    "rare ema": lambda: averaging.EMAWeightAveraging(decay=0.5, update_every_n_steps=3),
    "swa": lambda: StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2),
}
ORDERS = pytest.mark.parametrize("topkast_first", [True, False], ids=["before", "after"])
EVERY_AVERAGE = pytest.mark.parametrize("average", AVERAGES)


def ordered(callback, average, topkast_first):
    return [callback, average] if topkast_first else [average, callback]


class Look(Callback):
    """Notes, at every validation batch, whether the validated weight is sparse and whether it is the average."""

    def __init__(self, callback) -> None:
        self.callback, self.sparse, self.averaged = callback, [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.current = pl_module.layers[2].weight.detach().clone()

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        weight = pl_module.layers[2].weight
        self.sparse.append(zero_outside(weight, self.callback.topkast.weights[MIDDLE].active))
        self.averaged.append(not torch.equal(weight, self.current))


@ORDERS
@EVERY_AVERAGE
def test_average_is_validated_sparse(tmp_path, average, topkast_first):
    callback = make_callback()
    look = Look(callback)
    callbacks = ordered(callback, AVERAGES[average](), topkast_first)
    fit(
        make_trainer(tmp_path, *callbacks, look, max_epochs=4, val_check_interval=2),
        make_net(optimizer="adamw", lr=0.05),
    )
    assert look.sparse == [True] * 16
    assert any(look.averaged) == (average != "swa"), "SWA averages at the end only"
    assert callback.topkast.refresh_count == 5


@ORDERS
@EVERY_AVERAGE
def test_every_checkpoint_of_an_averaged_run_is_sparse(tmp_path, average, topkast_first):
    callback = make_callback()
    callbacks = ordered(callback, AVERAGES[average](), topkast_first)
    save = ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = make_trainer(tmp_path, *callbacks, save, max_epochs=4, enable_checkpointing=True)
    fit(trainer, make_net(optimizer="adamw", lr=0.05))
    trainer.save_checkpoint(tmp_path / "saved" / "end.ckpt")
    paths = sorted((tmp_path / "saved").iterdir())
    assert len(paths) >= 17
    for path in paths:
        saved = torch.load(path, weights_only=True)
        active = saved["callbacks"][callback.state_key]["weights"][MIDDLE]["tiers"] == 2
        assert int(active.sum()) == 64
        assert zero_outside(saved["state_dict"][MIDDLE], active), path.name
        if "current_model_state" in saved:
            assert zero_outside(saved["current_model_state"][MIDDLE], active), path.name
        swa = saved["callbacks"].get("StochasticWeightAveraging")
        if swa is not None:
            assert zero_outside(swa["average_model_state"][MIDDLE], active), path.name


@ORDERS
@EVERY_AVERAGE
def test_fit_ends_with_a_sparse_average_in_the_model(tmp_path, average, topkast_first):
    callback = make_callback()
    look, model = Look(callback), make_net(optimizer="adamw", lr=0.05)
    fit(make_trainer(tmp_path, *ordered(callback, AVERAGES[average](), topkast_first), look, max_epochs=4), model)
    check_sparse(callback.topkast)
    assert not torch.equal(model.layers[2].weight, look.current), "the average was not copied into the model"


@EVERY_AVERAGE
def test_order_of_the_callbacks_makes_no_difference(tmp_path, average):
    results = []
    for topkast_first in (True, False):
        callback, model = make_callback(), make_net(optimizer="adamw", lr=0.05)
        fit(make_trainer(tmp_path, *ordered(callback, AVERAGES[average](), topkast_first), max_epochs=4), model)
        results.append((parameters_of(model), callback.topkast.state_dict()))
    assert same(*results)


@ORDERS
@pytest.mark.parametrize("average", ["mean", "ema", "rare ema", "swa"])
@pytest.mark.slow
def test_averaged_run_resumes_bit_for_bit(tmp_path, average, topkast_first):
    def start():
        callback = make_callback(strength=1e-2)
        return callback, AVERAGES[average](), make_net(optimizer="adamw", lr=0.05)

    whole, average_of_whole, model = start()
    fit(make_trainer(tmp_path, *ordered(whole, average_of_whole, topkast_first), max_epochs=4), model)

    callback, averaging_callback, halfway = start()
    save = SaveAfter(tmp_path / "half.ckpt", epoch=1)
    fit(make_trainer(tmp_path, *ordered(callback, averaging_callback, topkast_first), save, max_epochs=4), halfway)
    resumed_callback, averaging_callback, resumed = start()
    trainer = make_trainer(tmp_path, *ordered(resumed_callback, averaging_callback, topkast_first), max_epochs=4)
    fit(trainer, resumed, ckpt_path=tmp_path / "half.ckpt")
    assert resumed_callback.topkast.step_count == 16
    check_sparse(resumed_callback.topkast)
    assert same(whole.topkast.state_dict(), resumed_callback.topkast.state_dict())
    assert same(parameters_of(model), parameters_of(resumed))


@ORDERS
@EVERY_AVERAGE
@pytest.mark.parametrize("options", [{}, {"stop_exploring_at": 7}], ids=["explores", "stops"])
@pytest.mark.parametrize("storage", ["packed"], indirect=True)
def test_average_of_packed_blocks_is_that_of_masked_ones(tmp_path, average, topkast_first, options):
    results = []
    for kept in ("masked", "packed"):
        callback = make_callback(structure="block", block=(2, 4), storage=kept, update_every=2, **options)
        model, promoted = make_net(optimizer="adamw", lr=0.05), []
        callbacks = ordered(callback, AVERAGES[average](), topkast_first)
        look = LookAtPromoted(callback, promoted)
        fit(make_trainer(tmp_path, *callbacks, look, max_epochs=4), model)
        assert callback.topkast.weights[MIDDLE].storage == kept
        check_sparse(callback.topkast)
        results.append((parameters_of(model), promoted))
    (expected, _), (found, promoted) = results
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4)
    assert results[0][1] == promoted
    assert any(promoted)


@ORDERS
@EVERY_AVERAGE
@pytest.mark.parametrize("validates", [True, False])
@pytest.mark.parametrize("storage", ["packed"], indirect=True)
def test_average_of_a_packed_weight_leaves_its_exploring_values(tmp_path, average, topkast_first, validates):
    """The average is of the network's weights, so what it does not see goes on from the last step, as if masked."""
    found = []
    for kept in ("masked", "packed"):
        callback = make_callback(storage=kept, update_every=7)
        callbacks = ordered(callback, AVERAGES[average](), topkast_first)
        trainer = make_trainer(tmp_path, *callbacks, max_epochs=4, limit_val_batches=int(validates))
        fit(trainer, make_net(optimizer="adamw", lr=0.05))
        found.append(callback.topkast.weights[MIDDLE])
    masked, packed = found
    assert packed.storage == "packed"
    assert packed.is_exploring
    torch.testing.assert_close(packed.theta(), masked.theta(), atol=1e-5, rtol=1e-4)


class LookAtPromoted(Callback):
    """Notes how many entries each refresh has promoted."""

    def __init__(self, callback, promoted: list[int]) -> None:
        self.callback, self.promoted = callback, promoted

    def on_train_batch_end(self, *_):
        self.promoted.append(self.callback.topkast.weights[MIDDLE].promoted)


@ORDERS
@pytest.mark.parametrize("average", ["mean", "ema"])
def test_average_of_a_promoted_entry_begins_at_its_value(tmp_path, average, topkast_first):
    """Else it would begin at zero, which the entry never was."""
    callback, averager = make_callback(update_every=3), AVERAGES[average]()
    checked = []

    class Promoted(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            active = callback.topkast.weights[MIDDLE].active
            if callback.topkast.step_count in (3, 6):
                new = active & ~self.before
                average = averager._average_model.module.layers[2].weight.detach()
                checked.append(int(new.sum()))
                torch.testing.assert_close(average[new], pl_module.layers[2].weight.detach()[new])
            self.before = active

    callbacks = ordered(callback, averager, topkast_first)
    fit(make_trainer(tmp_path, *callbacks, Promoted()), make_net(optimizer="adamw", lr=0.05))
    assert len(checked) == 2
    assert all(checked), "nothing was promoted"


@ORDERS
def test_swa_with_batch_norm_recomputes_statistics_of_the_sparse_average(tmp_path, topkast_first):
    class Normed(Net):
        def __init__(self) -> None:
            super().__init__(optimizer="adamw", lr=0.05)
            self.layers.insert(2, nn.BatchNorm1d(16))

    torch.manual_seed(0)
    callback, model = make_callback(), Normed()
    average = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2)
    fit(make_trainer(tmp_path, *ordered(callback, average, topkast_first), max_epochs=4), model)
    assert list(callback.topkast.weights) == ["layers.3.weight"]
    check_sparse(callback.topkast)
