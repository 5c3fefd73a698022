"""What a shell's user sees: help, the whole configuration, completion, and colours only where they are welcome."""

from pathlib import Path

import pytest
import yaml

from lightning_topkast.app.sweep.progress import _ProgressDisplay

CONF = Path(__file__).parents[2] / "conf"


def test_help_names_every_option_of_every_group(cli):
    code, out, err = cli("--help")
    assert (code, err) == (0, "")
    groups = dict(line.split(": ", 1) for line in out.splitlines() if line.partition(": ")[0].isidentifier())
    options: dict[str, list[str]] = {}
    for path in sorted(CONF.glob("*/*.yaml")):
        options.setdefault(path.parent.name, []).append(path.stem)
    assert len(options.pop("hydra")) > 0  # Hydra's own, which is no choice
    assert len(options) > 8
    for group, names in options.items():
        assert groups[group].split(", ") == names
    assert "--resume" in out


def test_whole_configuration_is_yaml_that_says_what_would_run(cli):
    code, out, err = cli("--cfg", "job", "model=cnn", "seed=7")
    assert (code, err) == (0, "")
    config = yaml.safe_load(out)
    assert config["seed"] == 7
    assert config["model"]["_target_"].endswith(".CNN")
    assert "hydra" not in config


@pytest.mark.parametrize(
    ("begun", "offered"),
    [
        ("sparsity=topkast_9", {"sparsity=topkast_90_80", "sparsity=topkast_95_90", "sparsity=topkast_98_95"}),
        ("optimizer.l", {"optimizer.lr="}),
    ],
)
def test_shell_completion_offers_options_and_keys(begun, offered, cli, monkeypatch):
    monkeypatch.setenv("COMP_LINE", f"topkast-train {begun}")
    monkeypatch.setenv("COMP_POINT", "1")
    code, out, _ = cli("--shell-completion", "query=bash")
    assert code == 0
    assert set(out.split()) == offered


@pytest.mark.parametrize("welcome", [True, False])
def test_bar_over_a_sweep_has_colours_unless_they_are_not_welcome(welcome, tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    monkeypatch.delenv("NO_COLOR", raising=False)
    if not welcome:
        monkeypatch.setenv("NO_COLOR", "1")
    watcher = _ProgressDisplay(tmp_path, [], 1)
    with watcher.console.capture() as captured:
        watcher.console.print(watcher)
    assert ("\x1b[38;5;" in captured.get()) is welcome
