"""FSDP2 and tensor parallelism on 2 and 4 CPU processes: sharded weights choose the sets that whole ones would."""

import shutil
import sys

import pytest
import torch

from lightning_topkast import TopKastError
from lightning_topkast.app.commands.consolidate import main
from lightning_topkast.training.sharded_checkpoint import consolidate, with_shards
from tests.helpers import MIDDLE, fit, make_callback, make_net, make_trainer, parameters_of, run_ranks, same

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where shards.py left what its ranks found."""
    folder = tmp_path_factory.mktemp("shards")
    for arguments in (["2"], ["4"], ["2", "later"]):
        run_ranks("shards.py", folder, *arguments)
    return folder


def found(folder, world, part, later=""):
    """What every rank found."""
    return [torch.load(folder / f"found-{world}-{rank}{later}.pt", weights_only=True)[part] for rank in range(world)]


WORLDS = pytest.mark.parametrize("world", [2, 4])


@WORLDS
def test_sharded_weights_train_as_whole_ones_bit_for_bit(folder, world):
    """θ, A, B and every count, after steps and refreshes, for ties and every rule, ramp and penalty."""
    for each in found(folder, world, "placements"):
        assert len(each) == {2: 55, 4: 60}[world]
        assert [name for name, alike in each.items() if not alike] == []


@WORLDS
def test_norm_penalty_is_of_the_whole_weight(folder, world):
    assert max(found(folder, world, "norm")) < 1e-6


@pytest.mark.parametrize(
    ("world", "model"),
    [
        (2, "layers"),
        (2, "root"),
        (2, "tensor parallel"),
        (4, "layers"),
        (4, "root"),
        (4, "fsdp over tensor parallel"),
        (4, "two copies"),
    ],
)
def test_sharded_models_train_as_one_process_on_the_whole_batch(folder, world, model):
    for each in found(folder, world, "fsdp"):
        assert each[model]["sharded"] >= 2
        assert each[model]["promoted"]
        assert each[model]["θ"]
        assert each[model]["sets"]


@WORLDS
def test_whole_experts_on_every_rank_train_as_all_on_one(folder, world):
    for each in found(folder, world, "experts"):
        refused, broken = each.pop("refused"), each.pop("nan on rank 0")
        assert [name for name, alike in each.items() if not alike] == []
        assert len(each) == 16
        assert "shard only its first dimension" in refused
        assert "'0.weight' holds NaN or infinity" in broken


@WORLDS
def test_what_sharded_weights_cannot_do_is_refused(folder, world):
    for each in found(folder, world, "refusals"):
        assert "make TopKast before fully_shard" in each["{'storage': 'packed'}"]
        assert "delay=0" in each["{'delay': 1}"]


@WORLDS
def test_every_rank_hears_of_what_is_wrong_on_one(folder, world):
    for each in found(folder, world, "refusals"):
        assert "'layer1.weight' holds NaN or infinity" in each["nan on rank 0"]
        assert each["sets kept"]
        assert "does not fit weight 'layer1.weight': its tiers hold" in each["damaged on the last rank"]
        assert "does not fit weight 'layer1.weight': its latent values hold NaN" in each["latent on rank 0"]
        assert "does not fit weight 'layer1.weight': its tiers hold" in each["sets on rank 0"]
        assert "'layer1.weight': the model's weight is not zero outside" in each["model on rank 0"]
    first, *others = found(folder, world, "refusals")
    assert "expected 'strength' to be finite and at least 0, got nan" in first["unlike on rank 0"]
    assert "another process found a problem" in first["whole on rank 0 only"]
    for each in others:
        assert "'layer1.weight': another process found a problem" in each["unlike on rank 0"]
        assert "expected 'tiers' to be torch.uint8 (7, 5)" in each["whole on rank 0 only"]


@WORLDS
def test_what_other_code_writes_on_one_rank_is_zeroed_there(folder, world):
    first, *others = found(folder, world, "writes")
    for each in (first, *others):
        assert all(each[f"sparse after {name}"] for name in ("look", "save", "step"))
        assert each["reservoir kept"]
    computed, written = first["look"]  # each of the two warnings is given once
    assert "has computed with entries outside the active sets" in computed
    assert "other code wrote to sparse weights" in written
    for each in others:
        assert (each["look"], each["save"], each["step"]) == ([], [], [])


@WORLDS
def test_forward_pass_after_a_refresh_sees_the_new_sets_under_fsdp2(folder, world):
    for each in found(folder, world, "fsdp"):
        assert each["stale"] == [0.0, 0.0]


def test_copies_of_shards_that_drift_apart_are_stopped(folder):
    for message in found(folder, 4, "replicas"):
        assert "different active sets for 'layer1.weight'" in message


@WORLDS
def test_ranks_that_nothing_keeps_alike_are_stopped(folder, world):
    """Lightning's default mesh is one of tensor parallelism, over which a model that is only FSDP2's isn't reduced."""
    for each in found(folder, world, "lightning"):
        assert "the ranks chose different active sets" in each["each on its own"]


@WORLDS
def test_state_is_saved_in_shards_or_whole_and_loaded_over_other_shards(folder, world):
    for rank, each in enumerate(found(folder, world, "state")):
        assert [name for name, right in each.items() if not right] == []
        assert len(each) == (6 if rank == 0 else 7)


@WORLDS
@pytest.mark.parametrize("saved", ["shards", "one file"])
def test_lightning_run_resumes_bit_for_bit(folder, world, saved):
    for each in found(folder, world, "lightning"):
        assert each["saved otherwise"]
        assert each[f"resumed from {saved}"]
        assert each["steps"] == 16


@WORLDS
def test_distributed_checkpoint_keeps_our_tensors_in_shards(folder, world):
    for each in found(folder, world, "lightning"):
        assert each["no tensor in the small file"]


def test_run_goes_on_with_more_or_fewer_ranks(folder):
    assert all(found(folder, 4, "other ranks"))
    assert all(found(folder, 2, "other ranks", "-later"))


@WORLDS
def test_checkpoint_that_makes_the_optimizers_state_counts_no_step(folder, world):
    for each in found(folder, world, "lightning"):
        assert each["steps after saving at the start"] == 16


@WORLDS
def test_logged_sparsity_is_that_of_the_whole_model(folder, world):
    for each in found(folder, world, "lightning"):
        assert each["logged"]["topkast/forward_sparsity"] == 0.75
        assert each["logged"]["topkast/backward_sparsity"] == 0.5
        assert each["logged"]["topkast/model_sparsity"] == pytest.approx(192 / 418)
        assert each["logged"]["topkast/mask_change"] > 0


@WORLDS
def test_two_ranks_and_four_end_as_one_process_does(folder, tmp_path, world):
    sharded = torch.load(folder / f"state-{world}.pt", weights_only=True)["state"][MIDDLE]
    callback, model = make_callback(strength=1e-2), make_net(optimizer="adamw", lr=0.02)
    fit(make_trainer(tmp_path, callback, max_epochs=4, gradient_clip_val=0.05), model)
    torch.testing.assert_close(sharded[0], callback.topkast.weights[MIDDLE].theta(), rtol=1e-3, atol=1e-5)
    assert torch.equal(sharded[1], callback.topkast.weights[MIDDLE].tiers)


@WORLDS
def test_one_process_goes_on_from_the_file_of_several(folder, tmp_path, world):
    sharded = torch.load(folder / f"state-{world}.pt", weights_only=True)["state"][MIDDLE]
    callback, model = make_callback(strength=1e-2), make_net(seed=7, optimizer="adamw", lr=0.02)
    trainer = make_trainer(tmp_path, callback, max_epochs=4, gradient_clip_val=0.05)
    fit(trainer, model, ckpt_path=folder / f"file-{world}.ckpt")
    torch.testing.assert_close(parameters_of(model)[MIDDLE], sharded[2], rtol=1e-3, atol=1e-5)
    assert torch.equal(callback.topkast.weights[MIDDLE].tiers, sharded[1])


@WORLDS
def test_one_process_goes_on_from_a_distributed_checkpoint_made_one_file(folder, tmp_path, world):
    consolidate(folder / f"half-{world}.ckpt", tmp_path / "one.ckpt")
    one = torch.load(tmp_path / "one.ckpt", weights_only=True)
    reference = torch.load(folder / f"file-{world}.ckpt", weights_only=True)
    assert same(one["callbacks"], reference["callbacks"])
    assert same(dict(one["state_dict"]), dict(reference["state_dict"]))
    assert len(one["optimizer_states"]) == 1

    sharded = torch.load(folder / f"state-{world}.pt", weights_only=True)["state"][MIDDLE]
    callback, model = make_callback(strength=1e-2), make_net(seed=7, optimizer="adamw", lr=0.02)
    trainer = make_trainer(tmp_path, callback, max_epochs=4, gradient_clip_val=0.05)
    fit(trainer, model, ckpt_path=tmp_path / "one.ckpt")
    torch.testing.assert_close(parameters_of(model)[MIDDLE], sharded[2], rtol=1e-3, atol=1e-5)
    assert torch.equal(callback.topkast.weights[MIDDLE].tiers, sharded[1])


@pytest.mark.parametrize("missing", [".metadata", "meta.pt"])
def test_folder_that_is_not_complete_is_refused_and_leaves_nothing(folder, tmp_path, missing, monkeypatch, capsys):
    shutil.copytree(folder / "half-2.ckpt", tmp_path / "half.ckpt")
    (tmp_path / "half.ckpt" / missing).unlink()
    monkeypatch.setattr(sys, "argv", ["topkast-consolidate", str(tmp_path / "half.ckpt"), str(tmp_path / "one.ckpt")])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert f"is not a complete distributed checkpoint: it has no {missing}" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["half.ckpt"]


def test_command_makes_one_file_and_overwrites_none(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["topkast-consolidate", str(folder / "half-2.ckpt"), str(tmp_path / "one.ckpt")])
    main()
    assert "wrote" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["one.ckpt"]
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "exists already" in capsys.readouterr().err


@WORLDS
def test_plan_of_shards_is_what_the_first_rank_holds(folder, world):
    """It has the most; the exploring entries, which fall where they may, are about as many."""
    for kind, (planned, held) in found(folder, world, "bytes")[0].items():
        assert planned == held if kind != "indices" else planned == pytest.approx(held, rel=0.05), kind


def test_state_without_its_shards_is_refused(tmp_path):
    """As of a small file that was taken out of its folder."""
    callback = make_callback()
    fit(make_trainer(tmp_path, callback), make_net())
    state = callback.topkast.state_dict() | {"shards_in": "optimizer_1"}
    with pytest.raises(TopKastError, match="cannot be read"):
        with_shards(state, callback.topkast, tmp_path)
