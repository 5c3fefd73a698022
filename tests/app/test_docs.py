"""The commands that the documentation shows are ones that the application takes, and print what it says."""

import logging
import re
import shlex
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from docs.tools.outputs import Block, NotPrinted, blocks, renewed
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf.errors import OmegaConfBaseException

from lightning_topkast.app.commands import compare, export, plan, report, train
from lightning_topkast.app.errors import AppError
from lightning_topkast.app.sweep.expand import Sweep, expand, read_sweep
from lightning_topkast.app.sweep.launch import Launcher, hydra_configs

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAMS = {"topkast-train": train.main, "topkast-plan": plan.main, "topkast-compare": compare.main}
_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(r"(?:^|\s)(topkast-(?:train|plan|compare)(?:\s.*)?)$")
_OPTIONS_WITH_VALUE = {"--sweep", "--jobs", "--wandb", "--resume", "--cfg", "--rdzv-id", "--config-dir"}


def commands(page):
    """The lines of a page that start one of the programs, as words; `...` and <placeholders> are left out."""
    for language, block in _FENCE.findall(page.read_text(encoding="utf-8")):
        if language not in ("", "bash", "console"):
            continue
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            line = line.removeprefix("$ ")
            if not line.startswith("pip ") and (found := _COMMAND.search(line)):
                words = shlex.split(found[1], comments=True)
                yield [word for word in words if not word.endswith("...") and word not in ("$@", "[overrides]")]


COMMANDS = {page: list(commands(page)) for page in PAGES if any(commands(page))}


def overrides_of(words):
    """The overrides among a command's words, the folder and the options left out."""
    program, *rest = words
    positional, rest = [], iter(rest)
    for word in rest:
        if word in _OPTIONS_WITH_VALUE:
            next(rest)
        elif not word.startswith("-") and not word.endswith("=mine"):  # an option of the reader's own --config-dir
            positional.append(word)
    return positional[1:] if program == "topkast-compare" else positional


def sweep_of(words):
    """The shipped sweep that a command names; a file that would be the reader's own has no runs here."""
    name = words[words.index("--sweep") + 1] if "--sweep" in words else ".yaml"
    return Sweep([[]]) if name.endswith(".yaml") else read_sweep(name)


def compose(words, launcher):
    """Compose what a command would run, so many of a sweep's points that each value of its own occurs."""
    overrides = overrides_of(words)
    if words[0] == "topkast-plan":
        launcher.loader.load_configuration("plan", overrides, RunMode.RUN)
        return
    # of Hydra's own, launchers of clusters need not be installed
    overrides = [override for override in overrides if not override.startswith(("hydra.launcher", "hydra/launcher"))]
    sweep, seen = sweep_of(words), set()
    for run in expand(sweep, overrides, launcher.loader):
        if (new := {*run.overrides} - seen) and (not seen or "--sweep" not in words):
            seen |= new
            launcher.settings(run)


def test_the_pages_show_commands():
    assert len(COMMANDS) >= 5
    assert sum(map(len, COMMANDS.values())) > 40


@pytest.mark.slow
@pytest.mark.parametrize("page", COMMANDS, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_a_page_compose(page):
    wrong = {}
    with hydra_configs():
        launcher = Launcher(Path("runs"), [], None)
        for words in COMMANDS[page]:
            try:
                compose(words, launcher)
            except (AppError, HydraException, OmegaConfBaseException) as error:
                wrong[shlex.join(words)] = str(error)
    assert not wrong


@pytest.mark.parametrize(
    ("command", "culprit"),
    [
        ("topkast-train sparsity=topkast_91_80", "topkast_91_80"),
        ("topkast-train -m seed=0,1 sparsity=topkast_90_80,topkast_91_80", "topkast_91_80"),
        ("topkast-compare runs sparsity.no_such_key=1", "no_such_key"),
        ("topkast-compare runs --sweep no_such_sweep", "no_such_sweep"),
        ("topkast-plan model=no_such_model", "no_such_model"),
    ],
)
def test_an_option_that_is_gone_does_not_compose(command, culprit):
    with hydra_configs():
        launcher = Launcher(Path("runs"), [], None)
        with pytest.raises((AppError, HydraException, OmegaConfBaseException), match=culprit):
            compose(shlex.split(command), launcher)


@pytest.mark.parametrize(
    ("program", "read"), [("topkast-report", report._arguments), ("topkast-export", export._arguments)]
)
def test_commands_of_the_programs_without_a_configuration_are_read(program, read, monkeypatch):
    shown = [
        line.removeprefix("$ ")
        for page in PAGES
        for _, block in _FENCE.findall(page.read_text(encoding="utf-8"))
        for line in block.splitlines()
        if line.removeprefix("$ ").startswith(program)
    ]
    assert len(shown) >= 2
    for line in shown:
        monkeypatch.setattr(sys, "argv", shlex.split(line, comments=True))
        read()  # exits where it does not know an option


@pytest.mark.slow
def test_the_tutorial_shows_what_its_commands_print(tmp_path, monkeypatch, capfd):
    for handler in logging.getLogger("lightning.pytorch").handlers:
        if type(handler) is logging.StreamHandler:  # Lightning's, made before this test had a stderr of its own
            monkeypatch.setattr(handler, "stream", sys.stderr)
    shown = list(blocks((ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")))
    assert [shlex.split(block.command)[0] for block in shown] == ["topkast-train", "topkast-compare", "topkast-plan"]
    for block in shown:
        words = shlex.split(block.command)
        monkeypatch.setattr(sys, "argv", words)
        capfd.readouterr()
        with suppress(SystemExit):  # of a command that fails the output differs
            PROGRAMS[words[0]]()
        out, err = capfd.readouterr()
        renewed(block, (err + out).replace(f"{tmp_path.resolve()}/", ""))


def test_the_rule_of_the_guide_trains_in_the_application(cli, tmp_path, monkeypatch):
    guide = (ROOT / "docs" / "guides" / "researcher.md").read_text(encoding="utf-8")
    (rule,) = (block for _, block in _FENCE.findall(guide) if "class Noisy" in block)
    (tmp_path / "my_module.py").write_text(rule, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    (words,) = (words for words in COMMANDS[ROOT / "docs" / "guides" / "researcher.md"] if "my_module" in str(words))
    code, out, err = cli(*words[1:], "trainer.max_epochs=2", "logger=none", "callbacks.progress=null")
    assert code == 0, err
    assert "test/acc" in out


def test_a_page_that_shows_something_else_is_found():
    block = Block("command", ["accuracy 0.97 of 1,638", "...", "done"], 0, 0)
    assert renewed(block, "x\naccuracy 0.96 of 1,638\ny\ndone")[0] == "accuracy 0.96 of 1,638"
    for output in ("accuracy 0.5 of 1,638\ndone", "accuracy 0.97 of 1,639\ndone", "done\naccuracy 0.97 of 1,638"):
        with pytest.raises(NotPrinted):
            renewed(block, output)
