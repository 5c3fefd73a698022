"""The application's checkpoints when they are damaged or hostile: one line, and no code of theirs is run."""

import functools
import os
import random
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_topkast.app.errors import AppError
from lightning_topkast.app.run_folder.checkpoint import Checkpoint, open_checkpoint
from tests.helpers import SaveAfter, fit, make_callback, make_net, make_trainer

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
