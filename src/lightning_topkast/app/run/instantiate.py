"""Build what a configuration names: anything of the user's own, and of a stranger's only what is known to be harmless.

Hydra calls whatever a `_target_` names, even `os.system`. So what is checked must be what is built: plain data, in
which nothing is left that a later change or another look could resolve in another way.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from typing import Any

from hydra.utils import instantiate
from lightning import Callback, LightningDataModule
from omegaconf import DictConfig, OmegaConf
from torch import nn

from lightning_topkast.app.data.cache import user_cache
from lightning_topkast.app.errors import AppError
from lightning_topkast.app.interpolations import texts_of
from lightning_topkast.app.overrides import children, reaches_further
from lightning_topkast.app.run.argument_types import check_arguments
from lightning_topkast.method.targets import Targets

_NETWORKS = ("lightning_topkast.app.models", "torch.nn", "torchvision.models")
# Arguments that fetch something, and those that start processes or write somewhere; and what is given instead.
_DOWNLOADS = {
    "weights": None,
    "weights_backbone": None,
    "download": False,
    "pretrained": False,
    "pretrained_backbone": False,
}
_INSTEAD = _DOWNLOADS | {"num_workers": 0, "cache": str(user_cache())}
_OWN_VARIABLES = "TOPKAST_"  # documented by this package; any other may be a secret of the user's


@dataclass(frozen=True)
class Kind:
    """What may be built of a part of a stranger's configuration.

    Attributes:
        part: Name of the part.
        bases: Classes, of one of which a target must be a subclass.
        modules: Modules, in one of which a target must be defined.
        functions: Modules whose functions are targets, too.
    """

    part: str
    bases: tuple[type, ...]
    modules: tuple[str, ...]
    functions: tuple[str, ...] = ()


MODEL = Kind("model", (nn.Module,), _NETWORKS, ("lightning_topkast.app.models", "torchvision.models"))
DATA = Kind("data", (LightningDataModule,), ("lightning_topkast.app.data",))
SPARSITY = Kind("sparsity", (Callback, Targets), ("lightning_topkast",))


def build(config: DictConfig | None, kind: Kind | None = None, **more: Any) -> Any:
    """Instantiate a part of a configuration.

    Args:
        config: The part.
        kind: What it may name, if it comes from a stranger; None for a user's own.
        more: Further arguments of what is built.

    Raises:
        AppError: It names something else, reads the environment, or would download something.
    """
    if config is None:
        return None
    if kind is None:
        check_arguments(config, OmegaConf.to_container(config, resolve=True))
        return instantiate(config, _convert_="all", **more)
    check_reach(config)
    plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    _check(plain, kind.part, kind)
    check_arguments(config, plain)
    built = instantiate(plain, _convert_="all", **more)
    if not isinstance(built, kind.bases):
        raise AppError(
            f"the run's configuration of {kind.part} stands for a {type(built).__name__}: expected a "
            f"{kind.bases[0].__name__}"
        )
    return built


def check_reach(config: DictConfig) -> None:
    """Refuse a part of a stranger's configuration that refers to more than what the configuration names.

    Raises:
        AppError: It does, or is too large.
    """
    for text in texts_of(config):
        if reaches_further(text, _OWN_VARIABLES):
            raise AppError(
                f"the run's configuration has an interpolation that may read more than itself, such as a variable of "
                f"the environment: {text:.80}; if you trust this run, add --trust"
            )


def check_target(key: str, target: Any, kind: Kind) -> None:
    """Refuse a target that is not of a kind.

    A prefix alone is not enough, since a module leads to all that it imports: `torch.nn.functional.os.system`.

    Raises:
        AppError: Likewise.
    """
    if not _is_harmless(target, kind):
        raise AppError(
            f"the run's configuration has the untrusted target {key}={target!s:.80}: expected a "
            f"{kind.bases[0].__name__} of {', '.join(kind.modules)}; if you trust this run, add --trust"
        )


def _check(node: Any, key: str, kind: Kind) -> None:
    if isinstance(node, str) and "${" in node:  # instantiate would resolve it once more
        raise AppError(f"the run's configuration has text that is not allowed, {key}={node!s:.80}")
    if isinstance(node, dict) and "_target_" in node:
        check_target(f"{key}._target_", node["_target_"], kind)
        _keep_to_itself(node, key)
    for name, child in children(node):
        _check(name, f"{key}.{name}", kind)
        _check(child, f"{key}.{name}", kind)


def _keep_to_itself(node: dict[Any, Any], key: str) -> None:
    """Refuse what downloads something, and let no target do so by default, start processes or write where it likes."""
    asked = [name for name in _DOWNLOADS if node.get(name)]
    if asked or (node.get("_args_") and str(node["_target_"]).startswith("torchvision.")):
        raise AppError(
            f"the run's configuration downloads something, {key}.{(asked or ['_args_'])[0]}: if you trust this run, "
            "add --trust"
        )
    module, _, name = str(node["_target_"]).rpartition(".")
    arguments = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    node |= {argument: given for argument, given in _INSTEAD.items() if argument in arguments}


def _is_harmless(target: Any, kind: Kind) -> bool:
    if not isinstance(target, str) or not _lies_in(target, kind.modules):
        return False
    module_name, _, name = target.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ImportError:
        return False
    found = getattr(module, name, None)
    home = f"{getattr(found, '__module__', '')}."
    if "._" in home and not isinstance(found, type):  # such as torchvision's get_model, which calls another function
        return False
    if isinstance(found, type):
        return issubclass(found, kind.bases) and _lies_in(home, kind.modules)
    return callable(found) and _lies_in(home, kind.functions)


def _lies_in(name: str, modules: tuple[str, ...]) -> bool:
    return name.startswith(tuple(f"{module}." for module in modules))
