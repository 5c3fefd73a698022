"""Fixtures for the Hydra application: a composed config, the command line in this process, and small data on disk."""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# The Makefile keeps a torchvision that doesn't fit the installed torch in a folder of its own.
_VISION = Path(sys.prefix) / "vision"
if importlib.util.find_spec("torchvision") is None and _VISION.is_dir():
    sys.path.append(str(_VISION))

import lightning_topkast.app  # noqa: F401, I001  (before anything imports Lightning: it makes torchvision importable)

import torch
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

from lightning_topkast.app.commands.train import main
from tests.app.data_files import (
    write_cifar10,
    write_fashion_mnist,
    write_imagenet,
    write_speeches,
    write_text,
    write_wikitext,
)

Compose = Callable[..., DictConfig]
Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def clean_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test starts in an empty folder, logged out of W&B, and leaves the process as it was."""
    environment = dict(os.environ)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("WANDB_", "HYDRA_", "SLURM_", "TOPKAST_"))]:
        if name != "WANDB_ERROR_REPORTING":
            del os.environ[name]
    os.environ["NETRC"] = str(tmp_path / "no-netrc")
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()  # its thread, which would talk to itself during later tests
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("highest")
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
def composed(tmp_path: Path) -> Compose:
    """Compose the main config as `topkast-train` would, the run folder being the test's own."""

    def compose_app(*overrides: str) -> DictConfig:
        with initialize_config_module("lightning_topkast.conf", version_base="1.3"):
            config = compose(
                "train",
                overrides=[f"paths.output_dir={tmp_path}/run", *overrides],
                return_hydra_config=True,
            )
        HydraConfig.instance().set_config(config)
        with open_dict(config):
            del config["hydra"]
        return config

    return compose_app


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Cli]:
    """Make of a program's name and `main` what runs it in this process: exit code, standard output, standard error."""

    def make(program: str, main: Callable[[], None]) -> Cli:
        def run(*arguments: object) -> tuple[int, str, str]:
            monkeypatch.setattr(sys, "argv", [program, *map(str, arguments)])
            capfd.readouterr()
            code: Any = 0
            try:
                main()
            except SystemExit as stop:
                code = stop.code or 0
            out, err = capfd.readouterr()
            return int(code), out, err

        return run

    return make


@pytest.fixture
def cli(command_line: Callable[..., Cli], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run `topkast-train`, without reports."""
    monkeypatch.setattr("lightning_topkast.app.commands.train_job.leave_report", lambda folder: None)
    return command_line("topkast-train", main)


@pytest.fixture
def as_nobody() -> Iterator[None]:
    """Run without the rights of root, for which nothing is forbidden."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder with every data set that isn't part of a package."""
    folder = tmp_path_factory.mktemp("data")
    write_cifar10(folder)
    write_imagenet(folder / "imagenet")
    write_fashion_mnist(folder / "fashion")
    write_text(folder / "enwik8")
    write_speeches(folder / "speeches")
    write_wikitext(folder / "wikitext-103")
    write_text(folder / "texts" / "one.txt")
    write_text(folder / "texts" / "more" / "two.txt")
    return folder


@pytest.fixture
def unchecked_cifar10(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torchvision read CIFAR-10 files whose hashes aren't the original's."""
    from lightning_topkast.app.vision import load_torchvision

    cifar10 = load_torchvision("datasets").CIFAR10
    for name in ("train_list", "test_list"):
        monkeypatch.setattr(cifar10, name, [[file, None] for file, _ in getattr(cifar10, name)])
    monkeypatch.setattr(cifar10, "meta", {**cifar10.meta, "md5": None})
