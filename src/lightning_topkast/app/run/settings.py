"""Which part of a configuration determines what a run computes."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

# The location of a run, the checkpoint it resumes from and its loggers do not change what it computes.
_PLACES = ("paths", "run_name", "project", "ckpt_path", "logger", "hydra", "report")


def settings_of(cfg: DictConfig) -> dict[str, Any]:
    """Return the resolved configuration without names and places; it is equal for runs that compute the same."""
    cfg = copy.deepcopy(cfg)
    with open_dict(cfg):
        for key in ("hydra", "logger", "ckpt_path"):
            cfg.pop(key, None)
        cfg.run_name, cfg.paths = "", dict.fromkeys(cfg.paths, "")  # other keys refer to them
    settings = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    assert isinstance(settings, dict)
    own = {key: value for key, value in settings.items() if key not in _PLACES}
    return json.loads(json.dumps(own, default=str))  # the same types as after reading the result


def without_places(overrides: Iterable[str]) -> list[str]:
    """Return the overrides that affect what a run computes."""
    return [override for override in overrides if re.split(r"[./@=]", override.lstrip("+~"))[0] not in _PLACES]
