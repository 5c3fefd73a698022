"""The application's checkpoints when they are damaged or hostile: one line, and no code of theirs is run."""

import functools
import os
import random
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from zipfile import ZIP_BZIP2, ZipFile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_topkast.app.errors import AppError
from lightning_topkast.app.run.task import ClassificationTask
from lightning_topkast.app.run_folder.checkpoint import Checkpoint, open_checkpoint
from tests.app.bombs import doubled
from tests.helpers import SaveAfter, fit, make_callback, make_net, make_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),  # Lightning's own, of a checkpoint of another run
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]
SHORT = ("trainer.limit_train_batches=2", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1", "logger=none")


class Touch:
    """Unpickled with its code run, it leaves a folder behind."""

    def __init__(self, path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The bytes of a real checkpoint of a sparse run."""
    folder = tmp_path_factory.mktemp("saved")
    net = make_net(optimizer="adamw")
    fit(make_trainer(folder, make_callback(), SaveAfter(folder / "half.ckpt", 0), max_epochs=1), net)
    return (folder / "half.ckpt").read_bytes()


def check_opens_or_says_why(path) -> str:
    try:
        checkpoint = Checkpoint(str(path))
        checkpoint.check_model(make_net())
        checkpoint.check_callbacks([make_callback()])
        checkpoint.check_optimizer(functools.partial(torch.optim.AdamW, lr=0.1))
        assert checkpoint.step >= 0
    except AppError as error:
        return str(error)
    return ""


def test_a_real_checkpoint_opens(tmp_path, saved):
    (tmp_path / "a.ckpt").write_bytes(saved)
    assert check_opens_or_says_why(tmp_path / "a.ckpt") == ""


@pytest.mark.slow
@given(seed=st.integers(0, 2**32))
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
def test_damaged_bytes_are_found(tmp_path_factory, saved, seed):
    rng, data = random.Random(seed), bytearray(saved)
    place = rng.randrange(len(data))
    if rng.random() < 0.3:
        del data[place:]
    else:
        data[place] ^= 1 << rng.randrange(8)
    path = tmp_path_factory.getbasetemp() / "damaged.ckpt"
    path.write_bytes(data)
    says = check_opens_or_says_why(path)
    # what stands between the files of a zip, and about them but their contents, may go unnoticed
    if not says:
        original, found = (torch.load(p, weights_only=True) for p in (_original(path, saved), path))
        assert str(original) == str(found)


def _original(path, saved):
    path = path.with_name("original.ckpt")
    path.write_bytes(saved)
    return path


def test_one_flipped_bit_in_a_weight_is_found(tmp_path, saved):
    content = torch.load(_original(tmp_path / "x", saved), weights_only=True)
    weight = content["state_dict"]["layers.2.weight"].numpy().tobytes()
    at = saved.index(weight) + 17
    (tmp_path / "a.ckpt").write_bytes(saved[:at] + bytes([saved[at] ^ 1]) + saved[at + 1 :])
    assert "fails its checksum" in check_opens_or_says_why(tmp_path / "a.ckpt")


@pytest.mark.parametrize("key", ["state_dict", "callbacks", "optimizer_states", "global_step"])
@pytest.mark.parametrize(
    "value", [None, 3.5, "x", {3: 4}, [None], [{"param_groups": 3}], {"layers.2.weight": 3}], ids=repr
)
def test_parts_of_another_kind_are_refused_in_one_line(tmp_path, saved, key, value):
    content = torch.load(_original(tmp_path / "x", saved), weights_only=True)
    content[key] = value
    torch.save(content, tmp_path / "a.ckpt")
    says = check_opens_or_says_why(tmp_path / "a.ckpt")
    assert says or key == "callbacks"  # foreign callbacks may be in it


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", [None, "callbacks", "hyper_parameters", "loops"])
def test_code_is_not_run(tmp_path, saved, place, zipped):
    content = torch.load(_original(tmp_path / "x", saved), weights_only=True)
    evil = Touch(tmp_path / "executed")
    if place is None:
        content = evil
    else:
        content.setdefault(place, {})["more"] = evil
    torch.save(content, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
    assert check_opens_or_says_why(tmp_path / "a.ckpt")
    assert not (tmp_path / "executed").exists()


@pytest.fixture
def server(tmp_path):
    """Serves a folder on the loopback interface."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    (tmp_path / "web").mkdir()
    handler = functools.partial(Quiet, directory=tmp_path / "web")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield tmp_path / "web", f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


@pytest.mark.parametrize("local", [True, False])
def test_the_command_line_runs_no_code_of_a_checkpoint(cli, tmp_path, server, monkeypatch, local, saved):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder, url = server
    content = torch.load(_original(tmp_path / "x", saved), weights_only=True)
    content["hyper_parameters"] = Touch(tmp_path / "executed")
    torch.save(content, folder / "evil.ckpt")
    code, _, err = cli(*SHORT, f"ckpt_path='{folder / 'evil.ckpt' if local else url + '/evil.ckpt'}'")
    assert not (tmp_path / "executed").exists()
    assert code == 2
    assert "safely" in err.strip().splitlines()[-1]


def test_a_lightning_that_would_run_code_is_not_let_to_download(monkeypatch):
    monkeypatch.setattr("lightning_topkast.app.run_folder.checkpoint.SAFELY", {})
    with pytest.raises(AppError, match="name a local file"):
        open_checkpoint("http://127.0.0.1/last.ckpt")


@pytest.mark.parametrize("kind", ["pipe", "/dev/zero"])
@pytest.mark.skipif(os.name != "posix", reason="pipes and devices")
def test_what_is_no_regular_file_is_not_read(tmp_path, kind):
    if kind == "pipe":
        os.mkfifo(tmp_path / "a.ckpt")
    else:
        (tmp_path / "a.ckpt").symlink_to(kind)
    assert "no regular file" in check_opens_or_says_why(tmp_path / "a.ckpt")


def test_compressed_parts_are_not_unpacked(tmp_path):
    with ZipFile(tmp_path / "a.ckpt", "w", ZIP_BZIP2) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 20))
    assert "is compressed" in check_opens_or_says_why(tmp_path / "a.ckpt")


def test_parts_that_share_the_bytes_of_others_are_not_unpacked(tmp_path, saved):
    path = _original(tmp_path / "x", saved)
    with ZipFile(path, "a") as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        archive.filelist += [largest] * 9
        archive.NameToInfo[largest.filename] = largest
        archive._didModify = True
    assert "its parts take more bytes than it has" in check_opens_or_says_why(path)


@pytest.mark.parametrize("place", ["optimizer_states", "loops", "hyper_parameters"])
@pytest.mark.parametrize("value", [doubled(), "itself", "deep"], ids=["doubled", "itself", "deep"])
def test_values_without_end_are_refused_when_a_checkpoint_is_opened(tmp_path, saved, place, value):
    content = torch.load(_original(tmp_path / "x", saved), weights_only=True)
    if value == "itself":
        value = []
        value.append(value)
    elif value == "deep":
        value = []
        for _ in range(1500):
            value = [value]
    content[place] = [value] if place == "optimizer_states" else {"more": value}
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(10 * limit)  # for writing what is too deep
    torch.save(content, tmp_path / "a.ckpt")
    sys.setrecursionlimit(limit)
    assert "made to fill the memory" in check_opens_or_says_why(tmp_path / "a.ckpt")


@pytest.mark.filterwarnings("ignore:.*[Ss]parse .* tensor", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (torch.Tensor.to_sparse, "got a tensor of float32, sparse_coo"),
        (torch.Tensor.to_sparse_csr, "got a tensor of float32, sparse_csr"),
        (lambda weight: weight.to("meta"), "got a tensor without values"),
        (lambda weight: weight.to(torch.complex64), "got a tensor of complex numbers"),
        (torch.Tensor.int, "got a tensor of integer numbers"),
        (torch.Tensor.half, ""),
    ],
    ids=["sparse", "csr", "meta", "complex", "int", "half"],
)
def test_weights_of_another_kind_are_refused(tmp_path, saved, change, expected):
    content = torch.load(_original(tmp_path / "x", saved), weights_only=True)
    content["state_dict"]["layers.2.weight"] = change(content["state_dict"]["layers.2.weight"])
    torch.save(content, tmp_path / "a.ckpt")
    says = check_opens_or_says_why(tmp_path / "a.ckpt")
    assert expected in says
    assert bool(says) == bool(expected)


def _states(content, part):
    return [state for key, state in content["callbacks"].items() if part in key]


ODD_PARTS = {
    "version": lambda content: content.update({"pytorch-lightning_version": "banana"}),
    "loops": lambda content: content.update(loops={}),
    "progress": lambda content: content["loops"]["fit_loop"].update({"epoch_loop.batch_progress": {"total": 3}}),
    "optimizer": lambda content: content["optimizer_states"][0]["state"][0].update(exp_avg="x"),
    "learning rate": lambda content: content["optimizer_states"][0]["param_groups"][0].update(lr="fast"),
    "scheduler": lambda content: content["lr_schedulers"][0].update(last_epoch="x"),
    "meter": lambda content: _states(content, "RunMeter")[0].update(seconds=float("nan")),
    "data": lambda content: content["Digits"].update(batches="%d"),
    "best score": lambda content: _states(content, "'val/acc'")[0].update(best_model_score="great"),
    "checkpoints": lambda content: content["callbacks"].update(
        {key: 3 for key in content["callbacks"] if "'val/acc'" in key}
    ),
}


@pytest.fixture(scope="module")
def last(tmp_path_factory):
    """The bytes of the last checkpoint of a run of the application."""
    from lightning_topkast.app.commands import train

    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patched:
        arguments = [*SHORT, "trainer.max_epochs=1", "report=false", f"hydra.run.dir={folder}"]
        patched.setattr("sys.argv", ["topkast-train", *arguments])
        train.main()
    return (folder / "checkpoints" / "last.ckpt").read_bytes()


@pytest.mark.filterwarnings("ignore:.*[Ss]parse .* tensor")
@pytest.mark.parametrize("part", ODD_PARTS)
def test_odd_parts_are_answered_in_one_line_that_names_the_checkpoint(cli, tmp_path, last, part):
    content = torch.load(_original(tmp_path / "x", last), weights_only=True)
    ODD_PARTS[part](content)
    torch.save(content, tmp_path / "a.ckpt")
    run = (*SHORT, f"hydra.run.dir={tmp_path}/run", "trainer.max_epochs=2", f"ckpt_path={tmp_path}/a.ckpt")
    code, _, err = cli(*run)
    assert code == 2
    line = err.strip().splitlines()[-1]
    assert line.startswith(f"topkast-train: the run cannot go on from the checkpoint {tmp_path}/a.ckpt (")
    assert line.endswith("use another one, unless your own code is at fault; HYDRA_FULL_ERROR=1 shows the traceback")
    assert "Warning: " not in line, "an error of its own, not a warning of the tests"
    assert "Traceback" not in err


@pytest.mark.parametrize("states", [0, 2])
def test_checkpoint_without_the_state_of_every_optimizer_is_refused_before_training(cli, tmp_path, last, states):
    content = torch.load(_original(tmp_path / "x", last), weights_only=True)
    content["optimizer_states"] *= states
    torch.save(content, tmp_path / "a.ckpt")
    run = (*SHORT, f"hydra.run.dir={tmp_path}/run", "trainer.max_epochs=2", f"ckpt_path={tmp_path}/a.ckpt")
    code, _, err = cli(*run)
    assert code == 2
    assert f"a.ckpt has the state of {states} optimizers, and this run has 1" in err.strip().splitlines()[-1]
    assert not list((tmp_path / "run").rglob("*.ckpt"))


def test_negative_step_is_refused(tmp_path, saved):
    content = torch.load(_original(tmp_path / "x", saved), weights_only=True)
    torch.save(content | {"global_step": -3}, tmp_path / "a.ckpt")
    assert "expected 'global_step' >= 0, got -3" in check_opens_or_says_why(tmp_path / "a.ckpt")


@pytest.mark.parametrize("step", [0, 2, 3])
def test_errors_of_other_code_keep_their_traceback(cli, tmp_path, last, monkeypatch, step):
    """At the start of a run and after the first step of one that resumes; in that step it may be the checkpoint."""
    given = _original(tmp_path / "x", last)
    own = ClassificationTask.training_step

    def training_step(task, batch, batch_idx):
        if task.trainer.global_step == step:
            raise RuntimeError("a bug")
        return own(task, batch, batch_idx)

    monkeypatch.setattr(ClassificationTask, "training_step", training_step)
    run = (*SHORT, f"hydra.run.dir={tmp_path}/run", "trainer.max_epochs=2")
    if step == 2:
        code, _, err = cli(*run, f"ckpt_path={given}")
        assert code == 2
        assert "(RuntimeError: a bug)" in err.strip().splitlines()[-1]
    else:
        with pytest.raises(RuntimeError, match="a bug"):
            cli(*run, *([f"ckpt_path={given}"] if step else []))
