"""LightningCLI builds the callback from arguments and YAML."""

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI

from lightning_topkast import TopKastCallback
from tests.helpers import Net, batches

pytest.importorskip("jsonargparse")


def build(*args: str) -> TopKastCallback:
    quiet = ["--trainer.logger=false", "--trainer.accelerator=cpu", "--trainer.enable_checkpointing=false"]
    cli = LightningCLI(
        Net, run=False, save_config_callback=None, args=[*quiet, "--trainer.callbacks+=TopKastCallback", *args]
    )
    assert isinstance(cli.trainer, Trainer)
    (callback,) = (callback for callback in cli.trainer.callbacks if isinstance(callback, TopKastCallback))
    return callback


SPARSITIES = ["--trainer.callbacks.forward_sparsity=0.9", "--trainer.callbacks.backward_sparsity=0.8"]


def option(callback: TopKastCallback, name: str):
    return callback._options[name]


def test_cli_needs_the_two_sparsities_only():
    callback = build(*SPARSITIES)
    assert (option(callback, "forward_sparsity"), option(callback, "backward_sparsity")) == (0.9, 0.8)
    assert callback._options == TopKastCallback(0.9, 0.8)._options


@pytest.mark.parametrize(
    ("text", "expected"), [("100", 100), ("0.5", 0.5), ("1.0", 1.0), ("0", 0), ("0.0", 0.0), ("null", None)]
)
def test_step_and_fraction_stay_apart(text, expected):
    """A step of 1 and a fraction of 1.0 are opposite ends of a run."""
    value = option(build(*SPARSITIES, f"--trainer.callbacks.stop_exploration_at={text}"), "stop_exploration_at")
    assert value == expected
    assert type(value) is type(expected)


YAML = """
model:
  optimizer: adamw
  lr: 0.02
trainer:
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  max_epochs: 1
  callbacks:
    - class_path: lightning_topkast.TopKastCallback
      init_args:
        forward_sparsity: 0.75
        backward_sparsity: 0.5
        update_every: 2
        refresh_delay: 1
        distribution: erk
        overrides:
          layers.2.*: {forward_sparsity: 0.5}
          "layers.4.weight": {forward_sparsity: 0.25, backward_sparsity: 0}
        exploration: random
        stop_exploration_at: 0.5
        penalty: l2
        penalty_shrinkage: 1e-3
        include: ["layers.*.weight"]
        exclude: ["layers.0.*"]
        include_types: [Linear, torch.nn.Bilinear]
        exclude_types: null
        keep_first_dense: false
        keep_last_dense: false
        reset_optimizer_state: false
        execution: masked
        operators: auto
        strict: false
        seed: 7
"""


def test_yaml_with_every_argument_builds_a_callback(tmp_path):
    (tmp_path / "config.yaml").write_text(YAML.replace("[Linear, torch.nn.Bilinear]", "[Linear]"))
    cli = LightningCLI(Net, run=False, save_config_callback=None, args=[f"--config={tmp_path}/config.yaml"])
    (callback,) = (callback for callback in cli.trainer.callbacks if isinstance(callback, TopKastCallback))
    expected = TopKastCallback(
        0.75, 0.5, update_every=2, refresh_delay=1, distribution="erk",
        overrides={
            "layers.2.*": {"forward_sparsity": 0.5},
            "layers.4.weight": {"forward_sparsity": 0.25, "backward_sparsity": 0},
        },
        exploration="random", stop_exploration_at=0.5, penalty="l2", penalty_shrinkage=1e-3,
        include=["layers.*.weight"], exclude=["layers.0.*"], include_types=["Linear"],
        keep_first_dense=False, keep_last_dense=False,
        reset_optimizer_state=False, seed=7,
    )  # fmt: skip
    assert callback._options == expected._options
    cli.trainer.fit(cli.model, batches(), batches(1))
    assert {name: weight.active_count for name, weight in callback.topkast.weights.items()} == {
        "layers.2.weight": 128,
        "layers.4.weight": 24,
    }


@pytest.mark.parametrize(
    "wrong",
    ["distribution=even", "exploration=greedy", "penalty=l3", "execution=folded", "update_every=often", "include=3"],
)
def test_cli_refuses_what_is_no_choice(wrong, capsys):
    with pytest.raises(SystemExit):
        build(*SPARSITIES, f"--trainer.callbacks.{wrong}")
    assert wrong.split("=")[0] in capsys.readouterr().err


def test_cli_says_why_a_value_is_out_of_range(capsys):
    with pytest.raises((SystemExit, ValueError)) as raised:
        build("--trainer.callbacks.forward_sparsity=0.5", "--trainer.callbacks.backward_sparsity=0.8")
    assert "exceeds forward_sparsity" in capsys.readouterr().err + str(raised.value)
