"""Interpolations of others: they reach only the configuration, and are refused where they would fill the memory."""

import time
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from lightning_topkast.app.errors import AppError
from lightning_topkast.app.export.rebuild import build_network
from lightning_topkast.app.interpolations import check_size, texts_of
from lightning_topkast.app.overrides import reaches_further
from lightning_topkast.app.run.instantiate import MODEL, build
from lightning_topkast.app.run.train import train
from lightning_topkast.app.run_folder.folder import RunFolder

LARGE = "stand for .* values, more than"


def chain(link, first="xxxxxxxx", levels=26):
    """A configuration whose every value refers to the one before by `link`."""
    return {"a0": first} | {f"a{i + 1}": link(f"a{i}") for i in range(levels)}


BOMBS = {
    "text": chain(lambda key: f"${{{key}}}${{{key}}}"),
    "list": chain(lambda key: [f"${{{key}}}", f"${{{key}}}"]),
    "dict": chain(lambda key: {"x": f"${{{key}}}", "y": f"${{{key}}}"}),
    "resolver": chain(lambda key: f"${{oc.select:{key},1}}${{oc.select:{key},1}}"),
    "default": chain(lambda key: f"${{oc.select:missing,${{{key}}}}}${{oc.env:TOPKAST_NONE,${{{key}}}}}"),
    "relative": chain(lambda key: {"x": f"${{..{key}}}", "y": f"${{..{key}}}"}),
    "brackets": chain(lambda key: f"${{[{key}]}}${{[{key}]}}"),
    "through": chain(lambda key: {"x": f"${{{key}.x}}", "y": f"${{{key}.x}}"}, first={"x": "${a26}"}),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_configuration_that_expands_is_refused_at_once(kind, tmp_path):
    config = {"model": BOMBS[kind]} if kind == "relative" else BOMBS[kind] | {"model": {"x": "${a26}"}}
    config = OmegaConf.create({"data": {}, "sparsity": {}} | config)
    (tmp_path / ".hydra").mkdir()
    OmegaConf.save(config, tmp_path / ".hydra" / "config.yaml")
    began = time.process_time()
    for read in (lambda: check_size(config), lambda: build(config.model, MODEL), RunFolder(tmp_path).config):
        with pytest.raises(AppError, match=f"{LARGE}|refers to itself") as error:
            read()
        assert "\n" not in str(error.value)
    assert time.process_time() - began < 5


def test_resumed_overrides_of_a_stranger_do_not_fill_the_memory(tmp_path):
    keys = ["project", *(f"recipe.{key}" for key in ("monitor", "mode", "checkpoint_suffix")), "run_name"]
    overrides = [f"project={'x' * 1000}"]
    overrides += [f"{key}='{f'${{{before}}}' * 20}'" for before, key in pairwise(keys)]
    with initialize_config_module("lightning_topkast.conf", version_base="1.3"):
        config = compose("train", [*overrides, f"paths.output_dir={tmp_path}"])
    with pytest.raises(AppError, match=LARGE):
        train(config)


def test_shipped_configuration_is_far_from_the_bound():
    with initialize_config_module("lightning_topkast.conf", version_base="1.3"):
        for option in ("mlp", "resnet18", "transformer"):
            check_size(compose("train", [f"model={option}"]))


def test_part_reaches_only_what_it_refers_to():
    config = OmegaConf.create({"model": {"x": "${other.y}"}, "other": {"y": "text", "z": "unused"}})
    assert texts_of(config.model) == {"${other.y}", "text"}


def test_part_of_an_alias_is_that_part():
    config = OmegaConf.create({"y": {"k": 1, "m": "${x.k}"}, "x": "${y}", "model": {"z": "${x.m}"}})
    check_size(config)
    assert OmegaConf.to_container(config, resolve=True)["y"]["m"] == 1


def test_long_chain_is_refused():
    with pytest.raises(AppError, match="chain of its interpolations is too long"):
        check_size(OmegaConf.create({f"a{i}": f"${{a{i + 1}}}" for i in range(2000)}))


def test_keys_that_others_name_are_refused_before_anything_is_resolved(tmp_path):
    links = {f"n{i + 1}": f"k{i}" for i in range(40)} | {f"k{i}": f"${{${{n{i}}}}}" * 2 for i in range(1, 40)}
    config = OmegaConf.create({"model": {"_target_": "${k39}"}, "data": {}, "sparsity": {"_target_": "${k39}"}} | links)
    checkpoint = SimpleNamespace(content={"state_dict": {}}, path=tmp_path)
    began = time.process_time()
    with pytest.raises(AppError, match="may read more than itself"):
        build_network(config, checkpoint, trust=False)
    assert time.process_time() - began < 5


@pytest.mark.parametrize("value", ["${oc.decode:x}", "${oc.create:x}", "${a.${b}}", "${oc.select:${b}}", "${oc.env:X}"])
def test_resolvers_that_may_name_any_key_reach_further(value):
    assert reaches_further(value)
    config = OmegaConf.create({"model": {"x": "${hidden}"}, "hidden": value, "a": {"c": 1}, "b": "a.c"})
    with pytest.raises(AppError, match=r"may read more than itself.*--trust"):
        build(config.model, MODEL)


def test_documented_variables_may_be_read():
    assert not reaches_further("${oc.env:TOPKAST_DATA,data}", variables="TOPKAST_")
