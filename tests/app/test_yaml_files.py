"""YAML files of others: refused in a line where they would fill the memory, and otherwise read as they are."""

import time

import pytest

from lightning_topkast.app.errors import AppError
from lightning_topkast.app.report.write import write_reports
from lightning_topkast.app.run_folder.folder import RunFolder
from lightning_topkast.app.sweep.expand import read_sweep
from lightning_topkast.app.yaml_files import read_yaml

LEVELS = "\n".join(f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]" for i in range(7))
BOMB = f"a: &a [x, x, x, x, x, x, x, x, x]\n{LEVELS}\n"
MERGED = "a: &a {x: 1}\n" + "\n".join(
    f"{chr(98 + i)}: &{chr(98 + i)}\n  <<: [{', '.join([f'*{chr(97 + i)}'] * 9)}]" for i in range(9)
)
LIST = "- &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"- &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(7)
)


LARGE = "a: [" + "1," * 200_000 + "1]"
BASE_60 = "a: " + "1:" * 100_000 + "1"
LONG = "a: 0x" + "f" * 100_000
DEEP = "a: " + "[" * 120 + "]" * 120


@pytest.mark.parametrize(
    "text",
    [BOMB, MERGED, LIST, LARGE, 8 * LARGE, BASE_60, f"{BASE_60}.5", LONG, DEEP, "&a [*a]", "[" * 5000, "{", "\x00"],
    ids=range(13),
)
def test_files_that_expand_or_are_damaged_are_refused_in_one_line(tmp_path, text):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    began = time.process_time()
    with pytest.raises(AppError, match="cannot be read") as error:
        read_yaml(path)
    assert "\n" not in str(error.value)
    assert time.process_time() - began < 10


def test_every_reader_of_yaml_refuses_them(tmp_path):
    (tmp_path / "run" / ".hydra").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "run" / ".hydra" / "config.yaml").write_text(f"{BOMB}model: *h\ndata: *h\nsparsity: *h\n")
    (tmp_path / "run" / ".hydra" / "overrides.yaml").write_text(LIST)
    run = RunFolder(tmp_path / "run")
    began = time.process_time()
    with pytest.raises(AppError, match="its aliases stand for"):
        run.config()
    assert run.plain_config() is None
    assert run.overrides() is None
    write_reports(run.path)
    (tmp_path / "sweep.yaml").write_text(f"{BOMB}grids: *h\n")
    with pytest.raises(AppError, match="its aliases stand for"):
        read_sweep(str(tmp_path / "sweep.yaml"))
    assert time.process_time() - began < 5


def test_aliases_of_a_users_own_are_read(tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text("common: &c [seed=1]\ngrids: [*c, [seed=2]]\n")
    assert read_sweep(str(path)).grids == [["seed=1"], ["seed=2"]]


def test_numbers_are_read_as_hydra_reads_them(tmp_path):
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "config.yaml").write_text("model: {lr: 1e-3}\ndata: {}\nsparsity: {}\n")
    assert RunFolder(tmp_path).config().model.lr == 0.001
