"""What the loggers and the other callbacks get to see."""

import csv

import pytest
import torch
import torch.utils._python_dispatch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_topkast.distributed import Sharding
from lightning_topkast.telemetry.log import Telemetry
from lightning_topkast.telemetry.media import Media
from lightning_topkast.weights import writes
from tests.helpers import MIDDLE, Net, SaveAfter, fit, make_callback, make_net, make_trainer, parameters_of

pytestmark = pytest.mark.usefixtures("storage")


LAST = "layers.4.weight"
STRENGTH = 1e-2


class ByHand(Callback):
    """Works every logged value out from masks and θ after each batch, with nothing of the library but those."""

    def __init__(self, callback) -> None:
        self.callback, self.rows, self.metrics = callback, [], []

    def on_train_start(self, trainer, pl_module):
        weights = self.callback.topkast.weights
        self.active = {name: weight.active for name, weight in weights.items()}
        self.reservoir = {name: ~weight.updated for name, weight in weights.items()}
        self.ever = {name: torch.zeros_like(active) for name, active in self.active.items()}
        self.changed = dict.fromkeys(weights, 0)
        self.refreshes = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        topkast = self.callback.topkast
        sizes = {name: weight.size for name, weight in topkast.weights.items()}
        if topkast.refresh_count > self.refreshes:
            self.refreshes = topkast.refresh_count
            for name, weight in topkast.weights.items():
                self.changed[name] = int((weight.active & ~self.active[name]).sum())
                self.active[name] = weight.active
                self.ever[name] |= weight.active
        active = {name: int(weight.active.sum()) for name, weight in topkast.weights.items()}
        updated = {name: int(weight.updated.sum()) for name, weight in topkast.weights.items()}
        total = sum(sizes.values())
        penalty = 0.0
        for weight in topkast.weights.values():
            theta, a, b = weight.theta().double(), weight.active, weight.updated
            density = weight.active_count / theta.numel()
            penalty += STRENGTH / 2 * float(theta[a].square().sum())
            penalty += STRENGTH / density / 2 * float(theta[b & ~a].square().sum())
        row = {
            "topkast/forward_sparsity": 1 - sum(active.values()) / total,
            "topkast/backward_sparsity": 1 - sum(updated.values()) / total,
            "topkast/model_sparsity": (total - sum(active.values()))
            / sum(p.numel() for p in parameters_of(pl_module).values()),
            "topkast/mask_change": sum(self.changed.values()) / sum(active.values()),
            "topkast/reservoir_activated": sum(int((self.ever[n] & r).sum()) for n, r in self.reservoir.items())
            / sum(int(r.sum()) for r in self.reservoir.values()),
            "topkast/penalty": penalty,
        }
        for name in sizes:
            row[f"topkast/forward_sparsity/{name}"] = 1 - active[name] / sizes[name]
            row[f"topkast/mask_change/{name}"] = self.changed[name] / active[name]
            activated = int((self.ever[name] & self.reservoir[name]).sum())
            row[f"topkast/reservoir_activated/{name}"] = activated / int(self.reservoir[name].sum())
        changes = [row[f"topkast/mask_change/{name}"] for name in sizes]
        row |= {"topkast/mask_change_min": min(changes), "topkast/mask_change_max": max(changes)}
        self.rows.append(row)


def make_measured(**changes):
    options = {"keep_last_dense": False, "overrides": {LAST: {"forward_sparsity": 0.5}}, "strength": STRENGTH}
    callback = make_callback(**(options | changes))
    return callback, ByHand(callback), make_net(optimizer="adamw", lr=0.05)


def read_csv(logger: CSVLogger) -> tuple[dict[str, float], dict[int, dict[str, float]]]:
    """What is logged before training, and step → our values afterwards."""
    logger.save()
    with open(logger.experiment.metrics_file_path) as file:
        rows = [row for row in csv.DictReader(file) if row["topkast/penalty"]]  # the others are Lightning's
    table = [(int(row["step"]), {key: float(row[key]) for key in row if key.startswith("topkast/")}) for row in rows]
    (_, first), *others = table
    steps: dict[int, dict[str, float]] = {}
    for step, values in others:
        assert steps.setdefault(step, values) == values, f"two different values for step {step}"
    return first, steps


def test_logged_values_are_those_counted_by_hand(tmp_path):
    callback, by_hand, model = make_measured()
    logger = CSVLogger(tmp_path)
    fit(make_trainer(tmp_path, callback, by_hand, logger=logger, max_epochs=3), model)
    _, logged = read_csv(logger)
    assert len(by_hand.rows) == 12
    for step, expected in enumerate(by_hand.rows):
        assert logged[step].keys() == expected.keys()
        assert logged[step] == pytest.approx(expected, rel=1e-5), step
    changes = [row["topkast/mask_change"] for row in by_hand.rows]
    assert max(changes) > 0
    assert by_hand.rows[-1]["topkast/reservoir_activated"] > 0


def test_logged_values_of_blocks_are_counted_in_entries(tmp_path):
    callback, by_hand, model = make_measured(structure="block", block=(1, 2), exploration="random")
    logger = CSVLogger(tmp_path)
    fit(make_trainer(tmp_path, callback, by_hand, logger=logger, max_epochs=4), model)
    _, logged = read_csv(logger)
    for step, expected in enumerate(by_hand.rows):
        assert logged[step] == pytest.approx(expected, rel=1e-5), step
    for name, weight in callback.topkast.weights.items():
        assert weight.first_reservoir == int(by_hand.reservoir[name].sum())
        assert int(weight.never_active_entries) == int((by_hand.reservoir[name] & ~by_hand.ever[name]).sum())
    assert max(row["topkast/mask_change"] for row in by_hand.rows) > 0
    assert 0 < by_hand.rows[-1]["topkast/reservoir_activated"] < 1


def test_first_sparsity_is_logged_before_the_first_step(tmp_path):
    callback, _, model = make_measured()
    logger = CSVLogger(tmp_path)
    fit(make_trainer(tmp_path, callback, logger=logger, max_steps=1, log_every_n_steps=50), model)
    first, _ = read_csv(logger)
    assert first["topkast/forward_sparsity"] == pytest.approx(1 - (64 + 16) / (256 + 32))
    assert first["topkast/mask_change"] == 0


def test_sparse_logging_still_shows_every_refresh(tmp_path):
    """Nothing between two refreshes is logged, nothing of a refresh is missed."""
    callback, by_hand, model = make_measured(update_every=5)
    logger = CSVLogger(tmp_path)
    fit(make_trainer(tmp_path, callback, by_hand, logger=logger, max_epochs=4, log_every_n_steps=1000), model)
    _, logged = read_csv(logger)
    assert sorted(logged) == [4, 9, 14, 16]
    for step in (4, 9, 14):
        assert logged[step] == pytest.approx(by_hand.rows[step], rel=1e-5)


def test_values_share_the_steps_of_lightnings_own_metrics_under_accumulation(tmp_path):
    class Logs(Net):
        def training_step(self, batch, batch_idx):
            loss = self.loss(batch)
            self.log("train_loss", loss)
            return loss

    torch.manual_seed(0)
    logger = CSVLogger(tmp_path)
    callback = make_callback(update_every=1)
    fit(make_trainer(tmp_path, callback, logger=logger, accumulate_grad_batches=2, max_epochs=3), Logs())
    _, logged = read_csv(logger)
    with open(logger.experiment.metrics_file_path) as file:
        others = {int(row["step"]) for row in csv.DictReader(file) if row["train_loss"]}
    assert others == {0, 1, 2, 3, 4, 5}
    assert others <= set(logged) <= others | {6}


def test_values_reach_callback_metrics(tmp_path):
    callback, by_hand, model = make_measured()
    trainer = fit(make_trainer(tmp_path, callback, by_hand), model)
    metrics = {key: value.item() for key, value in trainer.callback_metrics.items() if key.startswith("topkast/")}
    assert metrics == pytest.approx(by_hand.rows[-1], rel=1e-5)
    assert "val_loss" in trainer.callback_metrics


def test_every_logger_gets_the_values(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    callback, by_hand, model = make_measured()
    loggers = [CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "tb")]
    fit(make_trainer(tmp_path, callback, by_hand, logger=loggers), model)
    assert read_csv(loggers[0])[1][7] == pytest.approx(by_hand.rows[7], rel=1e-5)
    events = EventAccumulator(loggers[1].log_dir).Reload()
    for key in by_hand.rows[7]:
        values = {event.step: event.value for event in events.Scalars(key)}
        assert values[7] == pytest.approx(by_hand.rows[7][key], rel=1e-5), key
    # and what is no number, where it can show it
    active = callback.topkast.weights[MIDDLE].active_entries
    assert events.Histograms(f"topkast/magnitude/{MIDDLE}/active")[-1].histogram_value.num == int(active)
    assert {f"topkast/masks/{MIDDLE}", "topkast/mask_change_heatmap"} <= set(events.Tags()["images"])
    (table,) = events.Tensors("topkast/weights/text_summary")
    assert f"| {MIDDLE} |".encode() in table.tensor_proto.string_val[0]


class Operations(TorchDispatchMode):
    """Records every tensor operation of its block, `item`, `bool` and a copy to the CPU included."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "tolist", "numpy"}


@pytest.fixture
def host_reads_recorded(monkeypatch):
    """Lets `Operations` see what reads a CPU tensor's memory without any operation; on a GPU it would wait."""

    def record(name):
        read = getattr(torch.Tensor, name)

        def recorded(tensor, *args, **kwargs):
            mode = torch.utils._python_dispatch._get_current_dispatch_mode()
            if isinstance(mode, Operations):
                mode.names.append(name)
            return read(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, recorded)

    record("tolist")
    record("numpy")


@pytest.mark.usefixtures("host_reads_recorded")
def test_a_step_that_logs_nothing_computes_nothing_for_the_log(tmp_path, monkeypatch):
    operations = []

    def recorded(self, *args, log=Telemetry.log, **kwargs):
        with Operations() as mode:
            log(self, *args, **kwargs)
        operations.append(mode.names)

    monkeypatch.setattr(Telemetry, "log", recorded)
    logger = CSVLogger(tmp_path)
    callback = make_callback(update_every=5)
    fit(make_trainer(tmp_path, callback, logger=logger, max_epochs=2, log_every_n_steps=7), make_net())
    steps = operations[1:-1]  # the first and the last are forced, before and after training
    assert len(steps) == 8
    busy = [index + 1 for index, names in enumerate(steps) if names]
    assert busy == [5, 7], "refresh after step 5, log at step 7"
    assert all("tolist" in steps[step - 1] for step in busy), "the recorder sees what waits"


# told by the operations that the masked mode uses
@pytest.mark.parametrize("storage", ["masked"], indirect=True)
@pytest.mark.usefixtures("host_reads_recorded")
def test_a_step_between_refreshes_never_waits_for_the_device(tmp_path, monkeypatch):
    """No operation of a whole training step brings a value or a size to the host."""
    monkeypatch.setattr(writes, "has_bits", lambda tensor, places: False)  # looks at weights on the CPU only
    steps = []

    class Record(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.mode = Operations()
            self.mode.__enter__()

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.mode.__exit__(None, None, None)
            steps.append(self.mode.names)

    callback = make_callback(update_every=4, strength=1e-2)
    trainer = make_trainer(
        tmp_path, callback, Record(), logger=CSVLogger(tmp_path), log_every_n_steps=1000, max_epochs=2
    )
    fit(trainer, make_net(optimizer="momentum"))
    waiting = [index + 1 for index, names in enumerate(steps) if WAITS & set(names)]
    assert waiting == [4, 8], "refreshes wait, and the recorder sees it"
    assert all("index_copy_" in names for names in steps)


def test_run_without_logger_logs_nothing_and_trains(tmp_path):
    callback, by_hand, model = make_measured()
    trainer = fit(make_trainer(tmp_path, callback, by_hand, logger=False), model)
    assert trainer.callback_metrics["topkast/forward_sparsity"].item() == pytest.approx(1 - 80 / 288)
    assert list(tmp_path.iterdir()) == []


def test_logging_changes_no_weight(tmp_path):
    results = []
    for logger in (False, CSVLogger(tmp_path)):
        callback, _, model = make_measured()
        fit(make_trainer(tmp_path, callback, logger=logger), model)
        results.append(callback.topkast.weights[MIDDLE].theta())
    assert torch.equal(*results)


def test_stopped_exploration_shows_in_the_backward_sparsity(tmp_path):
    callback, _, model = make_measured(stop_exploring_at=6, overrides=None, keep_last_dense=True)
    logger = CSVLogger(tmp_path)
    fit(make_trainer(tmp_path, callback, logger=logger), model)
    _, logged = read_csv(logger)
    assert [round(logged[step]["topkast/backward_sparsity"], 6) for step in (1, 4, 5, 7)] == [0.5, 0.5, 0.75, 0.75]


def test_resumed_run_logs_what_the_whole_run_logs(tmp_path):
    logged = []
    for path, others in ((None, [SaveAfter(tmp_path / "half.ckpt", 1)]), (tmp_path / "half.ckpt", [])):
        callback, _, model = make_measured(update_every=3)
        logger = CSVLogger(tmp_path, version=str(len(logged)))
        fit(make_trainer(tmp_path, callback, *others, logger=logger, max_epochs=4), model, ckpt_path=path)
        logged.append({step: values for step, values in read_csv(logger)[1].items() if step > 7})
    assert sorted(logged[1]) == list(range(8, 17))
    assert logged[0] == logged[1]


def test_what_only_the_first_process_does_waits_for_no_other(tmp_path, monkeypatch):
    """A collective there would wait forever for processes that are elsewhere."""
    alone, seen = [], set()

    def guarded(owner, name):
        work = getattr(owner, name)

        def run(*arguments):
            seen.add(name)
            alone.append(name)
            try:
                return work(*arguments)
            finally:
                alone.pop()

        monkeypatch.setattr(owner, name, run)

    def refuse_if_alone(sharding, value):
        assert not alone, f"{alone[-1]} sums over the shards"
        return value

    for owner, name in ((Telemetry, "hand_over"), (Telemetry, "_show"), (Media, "at_refresh"), (Media, "at_end")):
        guarded(owner, name)
    monkeypatch.setattr(Sharding, "sum", refuse_if_alone)
    logger = TensorBoardLogger(tmp_path)
    fit(make_trainer(tmp_path, make_callback(), logger=logger, enable_checkpointing=True), make_net())
    assert seen == {"hand_over", "_show", "at_refresh", "at_end"}
