"""The rooms of the library: imports point downwards only, and what the application needs is not loaded by it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_topkast

FOLDER = Path(lightning_topkast.__file__).parent
# from the ground up; what stands on one floor does not import each other
FLOORS = [
    {"text"}, {"errors", "reference"}, {"checks", "files", "loading"}, {"distributed", "gradients", "storage", "ops"},
    {"method"}, {"baselines", "top_k", "weights"}, {"settings", "layers"}, {"engine", "export"}, {"topkast"},
    {"costs", "training", "telemetry"}, {"callback"}, {"app"},
]  # fmt: skip
ROOMS = sorted(path.stem for path in FOLDER.iterdir() if not path.name.startswith("__") and path.suffix in ("", ".py"))
APPLICATION = ("hydra", "omegaconf", "wandb", "sklearn", "rich", "jinja2", "filelock", "pydantic", "matplotlib")


def files_of(room):
    folder = FOLDER / room
    return folder.rglob("*.py") if folder.is_dir() else [FOLDER / f"{room}.py"]


def imported(file, lazily):
    """Dotted names of all modules that a file imports; `lazily`: within functions too."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if lazily else tree.body:
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_every_room_has_a_floor():
    assert set().union(*FLOORS) == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_from_lower_floors_only(room):
    floor = next(number for number, rooms in enumerate(FLOORS) if room in rooms)
    lower = set().union(*FLOORS[:floor])
    names = [name.split(".") for file in files_of(room) for name in imported(file, lazily=True)]
    assert {parts[1] for parts in names if parts[0] == "lightning_topkast" and parts[1:]} - {room} <= lower


@pytest.mark.parametrize("room", sorted(set(ROOMS) - {"app"}))
def test_the_library_itself_imports_no_package_of_the_application(room):
    found = {name.split(".")[0] for file in files_of(room) for name in imported(file, lazily=False)}
    assert not found & set(APPLICATION)


def test_the_method_knows_torch_and_not_lightning():
    for room in (
        "topkast",
        "settings",
        "storage",
        "baselines",
        "method",
        "engine",
        "weights",
        "layers",
        "ops",
        "top_k",
    ):
        found = {name.split(".")[0] for file in files_of(room) for name in imported(file, lazily=True)}
        assert "lightning" not in found, room


def test_importing_the_library_loads_neither_hydra_nor_wandb_nor_scikit_learn():
    """rich, jinja2 and matplotlib are loaded by torch and Lightning themselves where they are installed."""
    code = (
        "import sys, lightning_topkast\n"
        "assert 'torch' not in sys.modules, 'names are imported when they are used'\n"
        "[getattr(lightning_topkast, name) for name in lightning_topkast.__all__]\n"
        "print(*({'hydra', 'omegaconf', 'wandb', 'sklearn', 'pydantic'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
