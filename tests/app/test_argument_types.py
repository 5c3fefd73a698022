"""Values of another type than what they are given to takes are told in one line, and all others are let through."""

import sys
import types
from collections.abc import Callable, Sequence
from typing import Any, Literal

import pytest
import torch
from omegaconf import OmegaConf

from lightning_topkast.app.errors import AppError
from lightning_topkast.app.run.argument_types import check_arguments, check_values


def target(
    count: int = 1,
    share: float = 0.5,
    switch: bool = False,
    rate: float | torch.Tensor = 0.1,
    limit: int | None = None,
    sizes: Sequence[int] = (1,),
    pair: tuple[float, float] = (0.9, 0.99),
    either: int | str = 1,
    names: Sequence[str] = (),
    word: Literal["a", "b"] = "a",
    anything: Any = None,
    call: Callable[[int], int] | None = None,
    bare=1,
):
    pass


def check(**arguments):
    """Check arguments of `target` as a configuration names them."""
    module = types.ModuleType("a_module_of_ones_own")
    module.target = target
    sys.modules[module.__name__] = module
    cfg = OmegaConf.create({"model": {"_target_": f"{module.__name__}.target", **arguments}})
    check_arguments(cfg.model, OmegaConf.to_container(cfg.model, resolve=True))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("count", "abc", "an int"),
        ("count", 2.5, "an int"),
        ("count", [1], "an int"),
        ("share", "abc", "a number"),
        ("switch", "maybe", "true or false"),
        ("rate", "x", "a number"),
        ("limit", "x", "an int or null"),
        ("sizes", 3, "a list"),
        ("sizes", "3", "a list"),
        ("sizes", ["a"], "a list, each of it an int"),
        ("pair", [0.9, "x"], "a list, each of it a number"),
    ],
)
def test_value_of_another_type_is_refused_by_its_key(name, value, expected):
    with pytest.raises(AppError) as caught:
        check(**{name: value})
    assert str(caught.value) == f"model.{name}={value} is not valid: expected {expected}"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("count", 2.0), ("count", True), ("count", None), ("share", 1), ("share", 1e-3), ("switch", 1), ("rate", 0.1),
        ("limit", None), ("sizes", [1, 2]), ("sizes", []), ("pair", [1, 0.5]), ("either", "abc"), ("word", "c"),
        ("names", "abc"),
        ("anything", "abc"), ("call", "abc"), ("bare", "abc"), ("unknown", "abc"), ("count", {"_target_": "x"}),
    ],
)  # fmt: skip
def test_value_that_may_fit_is_let_through(name, value):
    check(**{name: value})


def test_arguments_of_targets_within_targets_are_checked():
    inner = {"_target_": "torch.nn.Dropout", "p": "x"}
    with pytest.raises(AppError, match=r"model\.anything\.p=x is not valid: expected a number"):
        check(anything=inner)


def test_variable_of_the_environment_is_not_shown(monkeypatch):
    monkeypatch.setenv("A_SECRET", "xyz")
    with pytest.raises(AppError, match=r"model\.count=\$\{oc\.env:A_SECRET\} is not valid"):
        check(count="${oc.env:A_SECRET}")


def test_target_that_cannot_be_looked_at_is_left_to_whoever_builds_it():
    cfg = OmegaConf.create({"model": {"_target_": "no.such.thing", "count": "abc"}})
    check_arguments(cfg.model, OmegaConf.to_container(cfg.model))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("test", "maybe", "true or false"),
        ("seed", "abc", "an int"),
        ("recipe.max_epochs", "abc", "an int"),
        ("recipe.schedule", "twice", "a number"),
    ],
)
def test_keys_of_the_main_file_have_the_types_of_their_defaults(key, value, expected):
    with pytest.raises(AppError) as caught:
        check_values(OmegaConf.from_dotlist([f"{key}={value}"]))
    assert str(caught.value) == f"{key}={value} is not valid: expected {expected}"


def test_other_keys_than_those_of_the_main_file_are_not_looked_at():
    check_values(OmegaConf.create({"test": True, "recipe": {"schedule": 2, "monitor": "x"}, "more": "abc"}))
