"""What the commands answer without PyTorch and Lightning, which take seconds to import, and their version."""

import subprocess
import sys

import pytest

import lightning_topkast
from lightning_topkast.app.commands.export import FORMATS
from lightning_topkast.app.export import export_run

COMMANDS = ("train", "plan", "compare", "export", "report", "consolidate")
MODULE = """
import sys, time
from lightning_topkast.app.commands.{command} import main
sys.argv = ["topkast-{command}", *{arguments}]
try:
    main()
except SystemExit as ended:
    code = ended.code or 0
else:
    code = 0
seconds = time.process_time()
watched = ("torch", "lightning", "torchmetrics", "matplotlib", "lightning_topkast.app.vision")
print(code, seconds, *(name for name in sys.modules if name in watched))  # in order
"""


def answer(command, *arguments):
    code = MODULE.format(command=command, arguments=list(arguments))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *lines, last = done.stdout.splitlines()
    code, seconds, *loaded = last.split()
    return int(code), float(seconds), loaded, "\n".join(lines) + done.stderr


@pytest.mark.parametrize(
    ("command", "arguments", "code", "text"),
    [
        *((command, ["--help"], 0, f"topkast-{command}") for command in COMMANDS),
        ("train", ["modle=cnn"], 2, "did you mean 'model'?"),
        ("train", ["model=cn"], 2, "did you mean 'cnn'?"),
        ("train", ["sparsity.forwrd_sparsity=0.9"], 2, "did you mean 'sparsity.forward_sparsity'?"),
        ("plan", ["modle=cnn"], 2, "did you mean 'model'?"),
        ("train", ["--resume", "outputs/nowhere"], 2, "--resume: there is no folder outputs/nowhere"),
        ("train", ["--resume", "."], 2, "--resume: . is not the folder of a run of topkast-train"),
        ("train", ["ckpt_path=nowhere.ckpt"], 2, "there is no checkpoint"),
        ("export", ["nowhere"], 2, "name a checkpoint or the folder of a run"),
        ("train", ["--resume"], 2, "--resume needs the folder of a run"),
        ("compare", ["nowhere"], 2, "there is no folder"),
        ("train", ["--version", "model=mlp"], 0, "topkast-train 0"),
        ("report", ["nowhere"], 2, "there is no folder"),
        ("export", ["x", "--format", "onx"], 2, "invalid choice: 'onx'"),
    ],
)
def test_help_and_typing_errors_are_answered_at_once(command, arguments, code, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found, seconds, loaded, shown = answer(command, *arguments)
    assert (found, loaded) == (code, [])
    assert text in shown
    assert seconds < 3  # 0.2 to 0.9 s of CPU on a quiet machine


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_version(command):
    code, _, loaded, shown = answer(command, "--version")
    assert (code, loaded) == (0, [])
    assert shown.strip() == f"topkast-{command} {lightning_topkast.__version__}"


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("train", ["sparsity.forward_sparsity=2", "logger=none"]),
        ("consolidate", ["nowhere", "x.ckpt"]),
        ("report", ["."]),
    ],
)
def test_torchvision_is_made_importable_before_lightning_imports_it(command, arguments, tmp_path, monkeypatch):
    """Beside a CPU build of torch, the operators of its usual build are missing."""
    monkeypatch.chdir(tmp_path)
    code, _, loaded, _ = answer(command, *arguments)
    assert code == 2
    assert loaded.index("lightning_topkast.app.vision") < loaded.index("lightning")


def test_formats_of_the_command_are_those_of_the_export():
    assert tuple(export_run.FORMATS) == FORMATS
