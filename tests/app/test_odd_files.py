"""What lies in the place of a run's file and is no file, or has no end: neither waited for nor read to the end."""

import os
import signal
import socket

import pytest

from lightning_topkast.app.errors import AppError
from lightning_topkast.app.report.page import PAGE, write_page
from lightning_topkast.app.run_folder.logs import read_curves
from lightning_topkast.app.run_folder.result import read_result
from lightning_topkast.app.sweep.collect import collect
from lightning_topkast.app.yaml_files import read_yaml
from lightning_topkast.errors import TopKastError
from lightning_topkast.files import read_file
from tests.app.result_files import write_result
from tests.app.test_report_damage import RESULT


def _socket(path):
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))


MAKE = {
    "named pipe": os.mkfifo,
    "socket": _socket,
    "device": lambda path: path.symlink_to("/dev/null"),
    "folder": lambda path: path.mkdir(),
    "link that leads back to itself": lambda path: path.symlink_to(path),
}


@pytest.fixture(autouse=True)
def no_waiting():
    """A reader that waits for a writer would wait forever."""

    def stop(number, frame):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(params=MAKE)
def odd(request, tmp_path, monkeypatch):
    """A name of what is no file, and a function that makes it."""
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    return request.param, MAKE[request.param]


def test_result_that_is_no_file_is_damaged_and_the_other_runs_are_compared(odd, tmp_path):
    kind, make = odd
    write_result(tmp_path / "good", RESULT)
    (tmp_path / "bad").mkdir()
    make(tmp_path / "bad" / "result.json")
    with pytest.raises(AppError, match=f"result.json is a {kind}, where a file is expected; remove it"):
        read_result(tmp_path / "bad")
    collected = collect(tmp_path)
    assert len(collected.comparisons) == 1
    assert len(collected.broken) == (kind != "folder")  # which lists no file of that name


def test_configuration_that_is_no_file_is_refused_in_one_line(odd, tmp_path):
    kind, make = odd
    make(tmp_path / "config.yaml")
    with pytest.raises(AppError, match=f"cannot be read: .*config.yaml is a {kind}"):
        read_yaml(tmp_path / "config.yaml")


@pytest.mark.parametrize("name", ["csv/metrics.csv", "tensorboard/events.out.tfevents.1"])
def test_log_that_is_no_file_is_left_out(name, odd, tmp_path):
    if name.startswith("tensorboard"):
        pytest.importorskip("tensorboard")
    kind, make = odd
    (tmp_path / name).parent.mkdir()
    make(tmp_path / name)
    notes = []
    assert read_curves(tmp_path, notes.append) == {}
    if not kind.startswith("link"):  # which may not be there for a glob
        assert f"is a {kind}" in "".join(notes)


def test_earlier_page_that_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / PAGE)
    assert write_page(tmp_path, "page", {}).read_text() == "page"


def test_links_to_files_are_read_and_files_up_to_their_size(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("file")
    assert read_file(tmp_path / "link", 5) == b"12345"
    with pytest.raises(TopKastError, match="link is larger than"):
        read_file(tmp_path / "link", 4)


def test_files_that_are_far_too_large_are_not_read(tmp_path):
    for name in ("result.json", "config.yaml", "metrics.csv"):
        with open(tmp_path / name, "wb") as file:
            file.truncate(1 << 40)  # of zeros, which take no space
    with pytest.raises(AppError, match="is larger than 16 MiB"):
        read_result(tmp_path)
    with pytest.raises(AppError, match="is larger than 1 MiB"):
        read_yaml(tmp_path / "config.yaml")
    notes = []
    assert read_curves(tmp_path, notes.append) == {}
    assert "a line has more than" in notes[0]
