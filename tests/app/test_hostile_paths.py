"""A checkpoint whose callbacks' states name paths: none outside the run's own folder is read, fetched or removed."""

import os

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.app.test_hostile_checkpoint import Touch, server  # noqa: F401  (a fixture)

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]
SHORT = ("trainer.limit_train_batches=2", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1", "logger=none")
PATHS = ("best_model_path", "last_model_path", "kth_best_model_path")


@pytest.fixture
def run(cli, tmp_path):
    """The folder of a run of one epoch."""
    assert cli(*SHORT, "trainer.max_epochs=1", f"hydra.run.dir={tmp_path}/run")[0] == 0
    return tmp_path / "run"


def rename_in(file, path, **changes):
    """Write another path, and more, into all states of checkpoint callbacks."""
    content = torch.load(file, weights_only=True)
    for state in content["callbacks"].values():
        if "best_model_path" in state:
            state.update(dict.fromkeys(PATHS, path), **changes)
            state["best_k_models"] = dict.fromkeys([path], state["kth_value"]) if state["best_k_models"] else {}
    torch.save(content, file)


@pytest.mark.parametrize("where", ["the web", "a file"])
def test_best_checkpoint_that_another_checkpoint_names_is_not_loaded(cli, run, server, tmp_path, monkeypatch, where):  # noqa: F811
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder, url = server
    last = run / "checkpoints" / "last.ckpt"
    content = torch.load(last, weights_only=True)
    content["hyper_parameters"] = Touch(tmp_path / "executed")
    torch.save(content, folder / "evil.ckpt")
    rename_in(last, f"{url}/evil.ckpt" if where == "the web" else str(folder / "evil.ckpt"))
    code, _, err = cli(*SHORT, f"ckpt_path={last}", "trainer.max_epochs=2", "trainer.check_val_every_n_epoch=5")
    assert code == 0 or "metric" in err, err
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "torch").exists()


@pytest.mark.parametrize("form", ["{}", "local://{}", "file://{}", "{}/../../precious", "{}/link"])
@pytest.mark.parametrize("plain", [False, True], ids=["ours", "Lightning's"])
def test_folder_that_a_checkpoint_names_is_not_removed(cli, run, tmp_path, form, plain):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("mine")
    own = run / "checkpoints"
    (own / "link").symlink_to(precious)
    path = form.format(own if form.startswith("{}/") else precious)
    rename_in(own / "last.ckpt", path)
    kind = ["callbacks.last_checkpoint._target_=lightning.pytorch.callbacks.ModelCheckpoint"] if plain else []
    if plain:  # its state has another key
        content = torch.load(own / "last.ckpt", weights_only=True)
        callbacks = content["callbacks"]
        (old,) = [key for key, state in callbacks.items() if "best_model_path" in state and state["monitor"] is None]
        made = ModelCheckpoint(own, filename="last", enable_version_counter=False)
        callbacks[made.state_key] = callbacks.pop(old)
        torch.save(content, own / "last.ckpt")
        kind.append("~callbacks.last_checkpoint.save_on_interrupt")
    os.rename(own / "last.ckpt", tmp_path / "given.ckpt")
    more = ("trainer.max_epochs=2", f"hydra.run.dir={run}", f"ckpt_path={tmp_path}/given.ckpt")
    code, _, err = cli(*SHORT, *more, *kind)
    assert code == 0, err
    assert (precious / "thesis.txt").read_text() == "mine"


def test_own_checkpoints_are_still_known_after_a_resume(cli, run):
    best = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]
    before = next(state for state in best.values() if state.get("monitor"))
    assert cli("--resume", run, "trainer.max_epochs=2")[0] == 0
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]
    after = next(state for state in content.values() if state.get("monitor"))
    assert after["best_model_score"] >= before["best_model_score"]
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
