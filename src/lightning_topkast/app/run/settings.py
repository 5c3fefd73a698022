"""Which part of a configuration determines what a run computes."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from lightning_topkast.app.resolvers import environment

# The location of a run, the checkpoint it resumes from and its loggers do not change what it computes.
_PLACES = ("paths", "run_name", "project", "ckpt_path", "logger", "hydra", "report")


def settings_of(cfg: DictConfig) -> dict[str, Any]:
    """Return the configuration without names and places; it is equal for runs that compute the same."""
    cfg = copy.deepcopy(cfg)
    with open_dict(cfg):
        for key in ("hydra", "logger", "ckpt_path"):
            cfg.pop(key, None)
        cfg.run_name, cfg.paths = "", dict.fromkeys(cfg.paths, "")  # other keys refer to them
    own = {key: value for key, value in recorded(cfg).items() if key not in _PLACES}
    # The same types as after reading the result, which holds finite numbers only.
    return json.loads(json.dumps(own, default=str), parse_constant=str)


def recorded(cfg: DictConfig) -> dict[str, Any]:
    """Return a configuration as it is written to files and loggers: resolved, but for `${oc.env:...}`.

    Variables of the environment may be secrets, which belong to no file that is shared.
    """
    with environment(_unresolved):
        settings = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    assert isinstance(settings, dict)
    return {str(key): value for key, value in settings.items()}


def _unresolved(*arguments: Any) -> str:
    return f"${{oc.env:{','.join('null' if each is None else str(each) for each in arguments)}}}"


def overrides_given(part: str = "task") -> list[str]:
    """Return the overrides of the command line as they were given; as a list of Hydra's they would be resolved.

    Args:
        part: "task", or "hydra" for those of Hydra's own settings.
    """
    if not HydraConfig.initialized():
        return []
    given = OmegaConf.to_container(getattr(HydraConfig.get().overrides, part), resolve=False)
    assert isinstance(given, list)
    return [str(override) for override in given]


def without_places(overrides: Iterable[str]) -> list[str]:
    """Return the overrides that affect what a run computes."""
    return [override for override in overrides if re.split(r"[./@=]", override.lstrip("+~"))[0] not in _PLACES]
