"""LightningCLI builds the callback from arguments and YAML."""

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI

from lightning_topkast import (
    L1,
    L2,
    Block,
    Magnitude,
    Masked,
    Packed,
    Ramp,
    RigL,
    Schedule,
    Targets,
    TopKastCallback,
    TopKGradients,
    Unstructured,
)
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


def test_cli_needs_the_two_sparsities_only():
    callback = build(*SPARSITIES)
    assert callback.settings == TopKastCallback(0.9, 0.8).settings


@pytest.mark.parametrize(
    ("text", "expected"), [("100", 100), ("0.5", 0.5), ("1.0", 1.0), ("0", 0), ("0.0", 0.0), ("null", None)]
)
def test_step_and_fraction_stay_apart(text, expected):
    """A step of 1 and a fraction of 1.0 are opposite ends of a run."""
    callback = build(*SPARSITIES, f"--trainer.callbacks.schedule={{stop_exploring_at: {text}}}")
    value = callback.settings.schedule.stop_exploring_at
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
        distribution: erk
        overrides:
          layers.2.*: {forward_sparsity: 0.5}
          "layers.4.weight": {forward_sparsity: 0.25, backward_sparsity: 0}
        targets:
          include: ["layers.*.weight"]
          exclude: ["layers.0.*"]
          include_types: [Linear, torch.nn.Bilinear]
          exclude_types: null
          keep_first_dense: false
          keep_last_dense: false
        schedule:
          update_every: 2
          delay: 1
          stop_exploring_at: 0.5
          stop_updating_at: null
        ramp: null
        rule:
          class_path: lightning_topkast.Magnitude
          init_args: {exploration: random}
        structure: unstructured
        penalty:
          class_path: lightning_topkast.L2
          init_args: {shrinkage: 1e-3}
        powerpropagation: 1.0
        storage: {reset_optimizer_state: false}
        seed: 7
"""


def test_yaml_with_every_argument_builds_a_callback(tmp_path):
    (tmp_path / "config.yaml").write_text(YAML.replace("[Linear, torch.nn.Bilinear]", "[Linear]"))
    cli = LightningCLI(Net, run=False, save_config_callback=None, args=[f"--config={tmp_path}/config.yaml"])
    (callback,) = (callback for callback in cli.trainer.callbacks if isinstance(callback, TopKastCallback))
    expected = TopKastCallback(
        0.75,
        0.5,
        distribution="erk",
        overrides={
            "layers.2.*": {"forward_sparsity": 0.5},
            "layers.4.weight": {"forward_sparsity": 0.25, "backward_sparsity": 0},
        },
        targets=Targets(["layers.*.weight"], ["layers.0.*"], ["Linear"], None, False, False),
        schedule=Schedule(2, delay=1, stop_exploring_at=0.5),
        rule=Magnitude("random"),
        penalty=L2(shrinkage=1e-3),
        storage=Masked(reset_optimizer_state=False),
        seed=7,
    )
    assert callback.settings == expected.settings
    cli.trainer.fit(cli.model, batches(), batches(1))
    assert {name: weight.active_count for name, weight in callback.topkast.weights.items()} == {
        "layers.2.weight": 128,
        "layers.4.weight": 24,
    }


@pytest.mark.parametrize(
    "wrong",
    ["distribution=even", "rule=greedy", "penalty=l3", "storage=folded", "update_every=often", "include=3"],
)
def test_cli_refuses_what_is_no_choice(wrong, capsys):
    with pytest.raises(SystemExit):
        build(*SPARSITIES, f"--trainer.callbacks.{wrong}")
    assert wrong.split("=")[0] in capsys.readouterr().err


def test_cli_takes_strings_for_nouns_and_fields_of_them():
    arguments = ["rule=rigl", "storage=masked", "penalty=null", "structure=2:4", "backward_sparsity=0.5"]
    callback = build(
        "--trainer.callbacks.forward_sparsity=0.5",
        *(f"--trainer.callbacks.{each}" for each in arguments if each not in ("structure=2:4",)),
    )
    assert callback.settings == TopKastCallback(0.5, 0.5, rule="rigl", penalty=None).settings
    callback = build(*SPARSITIES, "--trainer.callbacks.storage.kernels=torch", "--trainer.callbacks.update_every=7")
    assert callback.settings == TopKastCallback(0.9, 0.8, storage=Packed(kernels="torch"), update_every=7).settings


def test_cli_says_why_a_value_is_out_of_range(capsys):
    with pytest.raises((SystemExit, ValueError)) as raised:
        build("--trainer.callbacks.forward_sparsity=0.5", "--trainer.callbacks.backward_sparsity=0.8")
    assert "expected backward_sparsity <= forward_sparsity" in capsys.readouterr().err + str(raised.value)


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("rule", "RigL", RigL()),
        ("structure", "Block", Block()),
        ("penalty", "L2", L2()),
        ("storage", "Packed", Packed()),
        ("schedule", "Schedule", Schedule()),
    ],
)
def test_cli_takes_every_noun_by_its_class(name, given, expected):
    sparsities = [f"--trainer.callbacks.{each}_sparsity=0.5" for each in ("forward", "backward")]
    settings = build(*sparsities, f"--trainer.callbacks.{name}=lightning_topkast.{given}").settings
    assert getattr(settings, name) == expected


@pytest.mark.parametrize(
    ("name", "given", "fields", "expected"),
    [
        ("rule", "RigL", {"drop_fraction": 0.2}, RigL(0.2)),
        ("structure", "Block", {"outputs": 4, "inputs": 2}, Block(4, 2)),
        ("structure", "Block", {"fan_in": "[0, 2]"}, Block(fan_in=(0, 2))),
        ("structure", "Unstructured", {"fan_in": "[0.25, 2]"}, Unstructured(fan_in=(0.25, 2))),
        ("penalty", "L1", {"strength": 0.002}, L1(0.002)),
        ("storage", "Packed", {"kernels": "torch"}, Packed("torch")),
        ("storage", "Masked", {"reset_optimizer_state": "false"}, Masked(False)),
        ("all_reduce", "TopKGradients", {"density": 0.1}, TopKGradients(0.1)),
        ("schedule", "Schedule", {"update_every": 7}, Schedule(7)),
        ("ramp", "Ramp", {"end": 0.5}, Ramp(end=0.5)),
        ("targets", "Targets", {"keep_first_dense": "false"}, Targets(keep_first_dense=False)),
    ],
)
@pytest.mark.parametrize("as_yaml", [False, True])
def test_cli_takes_the_fields_of_a_class_from_the_shell_and_from_yaml(name, given, fields, expected, as_yaml, tmp_path):
    sparsities = [f"--trainer.callbacks.{each}_sparsity=0.5" for each in ("forward", "backward")]
    if as_yaml:
        arguments = "".join(f"            {field}: {value}\n" for field, value in fields.items())
        (tmp_path / "config.yaml").write_text(
            "trainer:\n  callbacks:\n    - class_path: lightning_topkast.TopKastCallback\n      init_args:\n"
            "        forward_sparsity: 0.5\n        backward_sparsity: 0.5\n"
            f"        {name}:\n          class_path: lightning_topkast.{given}\n          init_args:\n{arguments}"
        )
        quiet = ["--trainer.logger=false", "--trainer.accelerator=cpu", "--trainer.enable_checkpointing=false"]
        cli = LightningCLI(Net, run=False, save_config_callback=None, args=[f"--config={tmp_path}/config.yaml", *quiet])
        (callback,) = (callback for callback in cli.trainer.callbacks if isinstance(callback, TopKastCallback))
    else:
        noun = f"--trainer.callbacks.{name}"
        own = [f"{noun}.{field}={value}" for field, value in fields.items()]
        callback = build(*sparsities, f"{noun}=lightning_topkast.{given}", *own)
    assert getattr(callback.settings, name) == expected
