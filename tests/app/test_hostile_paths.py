"""A checkpoint whose callbacks' states name paths: none outside the run's own folder is read, fetched or removed."""

import os

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_topkast.app.errors import AppError
from lightning_topkast.app.run_folder.beginning import configuration_in
from lightning_topkast.app.run_folder.folder import RunFolder
from lightning_topkast.app.run_folder.resume_arguments import resumed
from lightning_topkast.training.saved_paths import own_state
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


def test_moved_run_goes_on_with_its_best_checkpoint(cli, tmp_path):
    """With the least accuracy as the best, the first epoch is, so that nothing is better after the move."""
    worst = ("recipe.mode=min", "optimizer.lr=0.05", "trainer.max_epochs=1")
    assert cli(*SHORT, *worst, f"hydra.run.dir={tmp_path}/run")[0] == 0
    before = torch.load(tmp_path / "run" / "checkpoints" / "best.ckpt", weights_only=True)
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    assert cli("--resume", moved, "trainer.max_epochs=3")[0] == 0
    assert {path.name for path in (moved / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    best, last = (torch.load(moved / "checkpoints" / f"{name}.ckpt", weights_only=True) for name in ("best", "last"))
    assert best["global_step"] == before["global_step"]
    (state,) = (state for state in last["callbacks"].values() if state.get("monitor"))
    assert state["best_model_path"] == str(moved / "checkpoints" / "best.ckpt")


@pytest.mark.parametrize(
    "path", ["{old}/../../precious", "{old}/link", "{old}/missing.ckpt", "/elsewhere/best.ckpt", 3]
)
def test_path_of_a_moved_run_stays_in_its_folder(tmp_path, path):
    own = tmp_path / "new"
    own.mkdir()
    (tmp_path / "precious").mkdir()
    (own / "link").symlink_to(tmp_path / "precious")
    callback = ModelCheckpoint(own, monitor="loss")
    path = path.format(old="/old/a") if isinstance(path, str) else path
    state = callback.state_dict() | {"dirpath": "/old/a", "best_k_models": {path: torch.tensor(1.0)}}
    kept = own_state(callback, state | dict.fromkeys(PATHS, path))
    assert [kept[name] for name in PATHS] == ["", "", ""]
    assert kept["best_k_models"] == {}


@pytest.fixture
def folder(tmp_path):
    """The folder of a run as `--resume` reads it."""
    (tmp_path / "run" / ".hydra").mkdir(parents=True)
    (tmp_path / "run" / ".hydra" / "overrides.yaml").write_text("[]")
    (tmp_path / "run" / "wandb" / "run-1" / "logs").mkdir(parents=True)
    return tmp_path / "run"


@pytest.mark.skipif(os.name != "posix", reason="links and pipes")
@pytest.mark.parametrize(
    "name",
    [
        ".hydra", ".hydra/config.yaml", ".hydra/overrides.yaml", ".topkast-train.lock", "checkpoints", "wandb",
        "tensorboard/hparams.yaml", "report/mask-1.png",
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["link", "chain", "pipe"])
def test_run_is_not_resumed_that_would_write_through_its_folder(folder, tmp_path, name, kind):
    path = folder / name
    if path.is_dir():
        path.rename(tmp_path / "moved")
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(tmp_path / "precious")
    else:
        (tmp_path / "precious").touch()
        (folder / "more").symlink_to(tmp_path / "precious")
        path.symlink_to(folder / "more")
    with pytest.raises(AppError, match=r"(link to another place|no regular file).*--trust"):
        resumed(["--resume", str(folder)])
    if kind == "link" and name == "report/mask-1.png":
        assert resumed(["--resume", str(folder), "--trust"])


@pytest.mark.skipif(os.name != "posix", reason="links")
def test_links_of_an_honest_run_are_no_reason_to_refuse_it(folder, tmp_path):
    logs = folder / "wandb" / "run-1" / "logs"
    (logs / "debug.log").touch()
    (logs / "debug-core.log").symlink_to(tmp_path / "cache.log")  # as W&B leaves them
    (folder / "wandb" / "latest-run").symlink_to("run-1")
    (folder / "wandb" / "debug.log").symlink_to("run-1/logs/debug.log")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "last.ckpt").symlink_to("best.ckpt")  # save_last="link"
    assert resumed(["--resume", str(folder)])


@pytest.mark.skipif(os.name != "posix", reason="pipes and devices")
def test_refused_run_is_put_back_without_reading_what_never_ends(composed, folder):
    (folder / ".hydra" / "hydra.yaml").symlink_to("/dev/zero")
    os.mkfifo(folder / ".hydra" / "config.yaml")
    run, cfg = RunFolder(folder), composed("seed=3")

    def refuse():
        with configuration_in(run, cfg):
            assert "seed=3" in run.overrides()
            raise AppError("refused")

    with pytest.raises(AppError, match="refused"):
        refuse()
    assert run.overrides() == []
