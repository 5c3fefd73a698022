"""Going on from a checkpoint, and being stopped: what does not fit is said in one line, and nothing is lost."""

import os
import signal
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

from lightning_topkast.app.data import Digits
from lightning_topkast.app.run import train as train_module
from lightning_topkast.app.run.task import ClassificationTask
from tests import processes
from tests.helpers import plain_path, same

pytestmark = [
    # Lightning's own, when a run goes on in a folder of its own, or a second one in the same folder
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]

SHORT = ("trainer.limit_train_batches=2", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1", "logger=none")


def last_line(text):
    return text.strip().splitlines()[-1]


@pytest.fixture
def checkpoint(cli, tmp_path):
    """The last checkpoint of a finished run of one epoch."""
    assert cli(*SHORT, "trainer.max_epochs=1", f"paths.output_dir={tmp_path}/run")[0] == 0
    return tmp_path / "run" / "checkpoints" / "last.ckpt"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["sparsity=dense", "trainer.max_epochs=2"], "belongs to a sparse run, which would become dense"),
        (["sparsity=topkast_80_50", "trainer.max_epochs=2"], "resume with the sparsities and distribution it had"),
        (
            ["model.hidden=[64]", "trainer.max_epochs=2"],
            "another model: its 'net.hidden1.weight' is (256, 64)",
        ),
        (["optimizer=sgd", "trainer.max_epochs=2"], "written with another optimizer than SGD"),
        (["trainer.max_epochs=1"], "nothing is left to train"),
    ],
    ids=["dense", "densities", "model", "optimizer", "finished"],
)
def test_checkpoint_that_does_not_fit_is_refused(cli, checkpoint, changes, expected):
    code, _, err = cli(*SHORT, f"ckpt_path={checkpoint}", *changes)
    assert code == 2
    assert expected in last_line(err)


def test_run_goes_on_from_its_checkpoint(cli, checkpoint):
    code, out, _ = cli(*SHORT, f"ckpt_path={checkpoint}", "trainer.max_epochs=2")
    assert code == 0
    assert "epoch 2/2:" in out
    assert "epoch 1/2:" not in out


@pytest.mark.parametrize("content", [{"a": torch.zeros(2)}, [1, 2], "code"], ids=["state dict", "list", "code"])
def test_file_that_is_no_checkpoint_is_refused(cli, tmp_path, content):
    path = tmp_path / "other.ckpt"
    torch.save(os.system if content == "code" else content, path)
    code, _, err = cli(f"ckpt_path={path}", "logger=none")
    assert code == 2
    assert f"{path} is not a checkpoint" in last_line(err)


@pytest.mark.parametrize("folder", [True, False])
def test_checkpoint_must_be_named_by_its_file(cli, checkpoint, folder):
    code, _, err = cli(f"ckpt_path={checkpoint.parent if folder else 'last'}", "logger=none")
    assert code == 2
    assert "name the file, " in last_line(err)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("trainer.max_epochs=abc", "trainer.max_epochs=abc is not valid: expected an int"),
        ("seed=abc", "seed=abc is not valid: expected an int"),
        ("optimizer.lr=abc", "optimizer.lr=abc is not valid: expected a number"),
        ("trainer.max_epochs=0", "nothing was trained: trainer.max_epochs=0"),
        ("trainer=gpu", "this installation of torch finds no GPU: use trainer=cpu or trainer=ddp_cpu"),
    ],
)
def test_values_that_cannot_train_are_refused(cli, override, expected):
    if override == "trainer=gpu" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code, _, err = cli("logger=none", override)
    assert code == 2
    assert expected in last_line(err)


def test_wandb_that_cannot_log_in_is_answered_in_one_line(cli):
    # not by WANDB_MODE, which W&B reads once in a process: an earlier test may have been the one
    code, _, err = cli("logger=wandb", "logger.wandb.mode=online", *SHORT[:-1])
    assert code == 2
    assert "W&B could not start the run" in last_line(err)
    assert "logger.wandb.mode=offline" in last_line(err)


def start(epochs: int) -> AbstractContextManager[subprocess.Popen[str]]:
    """The application in a process of its own, which is training or about to."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(plain_path()), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "lightning_topkast.app.commands.train",
        f"trainer.max_epochs={epochs}",
        "logger=none",
    ]
    return processes.started(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job would ignore it
    )


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_run_says_how_to_go_on_and_exits_as_shells_expect(tmp_path, sent, code):
    with start(epochs=10000) as run:
        assert run.stdout.readline().startswith("epoch 1/10000:")
        time.sleep(0.2)
        run.send_signal(sent)
        _, err = run.communicate()
    assert run.returncode == code, err
    assert "topkast-train: interrupted in epoch " in last_line(err)
    folder = last_line(err).rpartition("--resume ")[2]
    saved = torch.load(Path(folder) / "checkpoints" / "last.ckpt", weights_only=True)
    assert f"step {saved['global_step']};" in last_line(err), "what is said to be saved is"
    if sent == signal.SIGINT and "the last checkpoint is of" in last_line(err):  # it came in a validation
        assert int(last_line(err).partition(", step ")[2].partition(",")[0]) % 19 == 0, "the step it was in is not lost"


@pytest.mark.slow
def test_output_that_nobody_reads_any_more_ends_quietly(tmp_path):
    with start(epochs=200) as run:
        run.stdout.readline()
        run.stdout.close()
        err = run.stderr.read()
        run.stderr.close()
        assert run.wait() == 141
    assert "Traceback" not in err


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.filterwarnings("ignore:.*weights_only")
def test_job_that_slurm_ends_goes_on_by_itself(cli, tmp_path, monkeypatch):
    """Its signal comes in the last step of the first of three epochs; a second start of the same command finds it."""
    for name, value in {"NTASKS": 1, "PROCID": 0, "LOCALID": 0, "NODEID": 0, "JOB_ID": 4217}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "scontrol"
    command.write_text(f'#!/bin/sh\necho "$@" >> "{tmp_path}/calls"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(command.parent), prepend=os.pathsep)
    run = (*SHORT, "trainer.max_epochs=3", f"paths.output_dir={tmp_path}/run")
    step = ClassificationTask.training_step

    def signalled_step(task, batch, batch_idx):
        if task.trainer.global_step == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return step(task, batch, batch_idx)

    with monkeypatch.context() as patched:
        patched.setattr(ClassificationTask, "training_step", signalled_step)
        assert cli(*run)[0] == 0
    assert (tmp_path / "calls").read_text() == "requeue 4217\n"
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    whole = torch.load(last, weights_only=True)

    code, out, _ = cli(*run)
    assert code == 0
    assert "epoch 1/3:" not in out
    resumed = torch.load(last, weights_only=True)
    assert resumed["global_step"] == 6
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert same(whole[part], resumed[part]), part


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_run_resumed_in_the_middle_of_an_epoch_sees_the_batches_that_are_left(cli, tmp_path, workers):
    """Two of three epochs of five batches, saved at every second step; the seventh step is the second of its epoch."""
    run = (
        "logger=none", "trainer.limit_train_batches=5", "trainer.limit_val_batches=1", "test=false",
        "trainer.max_epochs=3", f"data.num_workers={workers}", "recipe.update_every=2",
    )  # fmt: skip
    every = ("+callbacks.last_checkpoint.every_n_train_steps=1", "+callbacks.last_checkpoint.save_top_k=-1")
    name = "callbacks.last_checkpoint.filename='{step}'"
    assert cli(*run, *every, name, f"paths.output_dir={tmp_path}/whole")[0] == 0
    middle = tmp_path / "whole" / "checkpoints" / "step=7.ckpt"
    assert cli(*run, *every, name, f"ckpt_path='{middle}'", f"paths.output_dir={tmp_path}/resumed")[0] == 0
    whole = torch.load(tmp_path / "whole" / "checkpoints" / "step=15.ckpt", weights_only=True)
    resumed = torch.load(tmp_path / "resumed" / "checkpoints" / "step=15.ckpt", weights_only=True)
    assert not (tmp_path / "resumed" / "checkpoints" / "step=7.ckpt").exists()
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert same(whole[part], resumed[part]), part


RUN = ("trainer.limit_train_batches=3", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1", "logger=none")


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_resume_goes_on_with_the_runs_own_overrides_in_its_folder(cli, tmp_path):
    folder = tmp_path / "it's a run"
    quoted = str(folder).replace("'", "\\'")
    own = (*RUN, "optimizer.lr=0.0123", "trainer.max_epochs=1", f"hydra.run.dir='{quoted}'")
    assert cli(*own)[0] == 0
    for epochs, form in ((2, ("--resume", str(folder))), (3, (f"--resume={folder}",))):
        code, out, err = cli(*form, f"trainer.max_epochs={epochs}")
        assert code == 0, err
        assert f"epoch {epochs}/{epochs}:" in out
        assert f"epoch {epochs - 1}/{epochs}:" not in out
        saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
        assert saved["global_step"] == 3 * epochs
        assert saved["optimizer_states"][0]["param_groups"][0]["initial_lr"] == 0.0123
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_refused_resume_does_not_stand_in_the_way_of_the_next(cli, tmp_path):
    folder = tmp_path / "run"
    assert cli(*RUN, "trainer.max_epochs=1", f"hydra.run.dir={folder}")[0] == 0
    written = {path: path.read_text() for path in folder.glob(".hydra/*.yaml")}
    for wrong in ("model.hidden=[64]", "sparsity=topkast_80_50", "optimizer=sgd"):
        code, _, _ = cli("--resume", folder, "trainer.max_epochs=2", wrong)
        assert code == 2, wrong
        assert {path: path.read_text() for path in folder.glob(".hydra/*.yaml")} == written, wrong
    code, out, err = cli("--resume", folder, "trainer.max_epochs=2")
    assert code == 0, err
    assert "epoch 2/2:" in out
    assert (folder / ".hydra" / "overrides.yaml").read_text().endswith("- trainer.max_epochs=2\n"), "it is not kept"


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("where", ["prepare_data", "test_step", "count_weights"])
def test_ctrl_c_outside_of_training_is_answered_in_one_line(cli, monkeypatch, where):
    def interrupt(*_):
        raise KeyboardInterrupt

    owner = {"prepare_data": Digits, "test_step": ClassificationTask, "count_weights": train_module}[where]
    monkeypatch.setattr(owner, where, interrupt)
    before = signal.getsignal(signal.SIGINT)
    try:
        code, _, err = cli(*SHORT, "trainer.max_epochs=1")
    finally:
        signal.signal(signal.SIGINT, before)  # which Lightning has had ignored
    assert code == 130
    assert "Traceback" not in err
    assert last_line(err).startswith("topkast-train: interrupted")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--resume",), "--resume needs the folder of a run"),
        (("--resume", "-m"), "--resume needs the folder of a run"),
        (("--resume", "nowhere"), "there is no folder nowhere"),
        (("--resume", "sweep/0/.hydra/overrides.yaml"), "is a file: expected the folder of a run"),
        (("--resume", "empty"), "it lacks .hydra/overrides.yaml"),
        (("--resume", "sweep"), "name one of its runs, such as"),
    ],
)
def test_resume_of_no_run_is_refused(cli, tmp_path, monkeypatch, arguments, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "sweep" / "0" / ".hydra").mkdir(parents=True)
    (tmp_path / "sweep" / "0" / ".hydra" / "overrides.yaml").write_text("[]")
    code, _, err = cli(*arguments)
    assert code == 2
    assert expected in last_line(err)
