"""Errors of the application: a mistake of the user is one clear line with the nearest valid names."""

from __future__ import annotations

import difflib
import errno
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import (
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, MissingMandatoryValue, OmegaConfBaseException

from lightning_topkast.app.overrides import corrected
from lightning_topkast.app.terminal import say
from lightning_topkast.errors import TopKastError
from lightning_topkast.text import printable

CONFIG_MODULE = "lightning_topkast.conf"
CONFIG_NAME = "train"
EXIT_CODE = 2
INTERRUPTED = 130  # what shells expect after Ctrl-C

# Errors of Gloo have no class of their own, but most name their place in its sources.
_GLOO_ERRORS = r"gloo/transport|caused pair closure|Connection closed by peer"

_OURS = "TOPKAST_ONE_LINE_ERRORS"


class AppError(Exception):
    """A mistake of the user; the message says what is wrong, what was expected, and the way out."""

    def __str__(self) -> str:
        return printable(super().__str__())


@contextmanager
def one_line_errors(program: str, config_name: str = CONFIG_NAME) -> Iterator[None]:
    """Print a mistake of the user as one line and exit with code 2; any other error keeps its traceback.

    With `HYDRA_FULL_ERROR=1` every error keeps its traceback.

    Args:
        program: Name of the console script.
        config_name: Main configuration of the console script.
    """
    if not _may_shorten():
        yield
        return
    try:
        yield
    except BaseException as error:
        if _is_interrupt(error):
            say(f"\n{program}: interrupted", error=True)
            sys.exit(INTERRUPTED)
        if not isinstance(error, Exception):
            raise
        message = explain(error, config_name)
        _tell_torchrun(AppError(_one_line(message)) if message else error)
        if message is None:
            raise
        # The cursor may be in the line of a progress bar.
        say(f"\n{program}: {_one_line(message)}", error=True)
        sys.exit(1 if _is_lost_connection(error) else EXIT_CODE)


def _is_interrupt(error: BaseException) -> bool:
    """Return whether Ctrl-C ended something other than training, which handles it itself.

    After Ctrl-C in a test Lightning exits with code 1, unless its own cleanup fails.
    """
    if isinstance(error, SystemExit) and error.code != 1:
        return False
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, KeyboardInterrupt):
        cause = cause.__context__
    return cause is not None


def let_errors_through() -> None:
    """Keep Hydra from printing errors itself, unless the user already asked for full tracebacks."""
    if "HYDRA_FULL_ERROR" not in os.environ:
        os.environ["HYDRA_FULL_ERROR"] = "1"
        os.environ[_OURS] = "1"  # tells the processes that Lightning starts that this module has set it


def _may_shorten() -> bool:
    return os.environ.get("HYDRA_FULL_ERROR") != "1" or os.environ.get(_OURS) == "1"


@contextmanager
def quiet_broken_pipe() -> Iterator[None]:
    """Exit silently if the reader of the output, such as `head`, has closed it, and discard the rest."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """Return `did you mean 'x' or 'y'?`, or all valid names if none is similar."""
    names = sorted(set(valid))
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if near:
        return f"did you mean {' or '.join(repr(match) for match in near)}?"
    return f"valid: {', '.join(names)}" if names else "there are no valid names"


def explain(error: BaseException, config_name: str = CONFIG_NAME) -> str | None:
    """Return a one-line message for `error`, or None if it is not known to be a mistake of the user."""
    if isinstance(error, _misconfiguration()) and "No supported gpu" in str(error):
        return "this installation of torch finds no GPU: use trainer=cpu or trainer=ddp_cpu"
    if isinstance(error, (AppError, TopKastError, *_misconfiguration())):
        return str(error)
    if _is_lost_connection(error):
        return _explain_lost_connection(error)
    if isinstance(error, UnpicklingError):
        return f"the checkpoint cannot be read safely ({str(error).partition(chr(10))[0]}); use another one"
    if isinstance(error, InstantiationException):
        text = _explain_instantiation(error)
        return text and text + _where_to_find(text)
    if isinstance(error, HydraException | OmegaConfBaseException):
        return _explain_config(error, config_name)
    if isinstance(error, ValueError) and str(error).startswith("Config group override must be"):  # Hydra's own
        return "expected the name of an option for a group, not null: logger=none, scheduler=none, callbacks=none"
    if isinstance(error, OSError) and (error.filename is not None or is_full_disk(error)):
        return f"{error.filename or 'not written'}: {error.strerror}{_way_out(error)}"
    return None


def _misconfiguration() -> tuple[type[Exception], ...]:
    """Return Lightning's class of errors; none if it is not loaded, since the command line is answered without it."""
    module = sys.modules.get("lightning.fabric.utilities.exceptions")
    return () if module is None else (module.MisconfigurationException,)


def is_full_disk(error: BaseException) -> bool:
    """Return whether the system has refused a write since the disk or the user's share of it is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _way_out(error: OSError) -> str:
    if not is_full_disk(error):
        return ""
    if error.filename is None:  # the system names no file where a write fails
        return "; free space on the disk, and start the same command again"
    places = Path(error.filename).absolute().parents
    disk = next((place for place in places if place.is_mount()), places[-1])
    return f"; free space on the disk mounted at {disk}, and start the same command again"


def _is_lost_connection(error: BaseException) -> bool:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and re.search(_GLOO_ERRORS, str(error)) is not None


def _explain_lost_connection(error: BaseException) -> str:
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID"))
    reason = re.sub(r"^\[\S*\] *", "", str(error).splitlines()[0] if str(error) else type(error).__name__)
    return (
        f"{f'rank {rank}: ' if rank else ''}the connection to another process is lost ({reason}): a process, a node or "
        "the network between them failed; restart with ckpt_path=auto to resume from the newest checkpoint"
    )


def _tell_torchrun(error: BaseException) -> None:
    """Write the error to the file that torchrun's summary reads, if torchrun has started this process."""
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    try:
        raise error from error.__cause__  # the exception being handled is written, with its traceback
    except type(error):
        get_error_handler().record_exception(error)


def _explain_instantiation(error: InstantiationException) -> str | None:
    where = re.search(r"full_key: (\S+)", str(error))
    prefix = f"{where.group(1)}: " if where else ""
    cause = error.__cause__
    if cause is None or isinstance(cause, InstantiationException):
        return prefix + str(error).replace(where.group(0), "") if where else str(error)
    # Errors of a constructor about its arguments; torch raises RuntimeError for sizes.
    known = (ValueError, TypeError, RuntimeError, OSError, ImportError, AppError)
    if isinstance(cause, (*known, *_misconfiguration())):
        return prefix + (explain(cause) or str(cause))
    return None


def _where_to_find(text: str) -> str:
    """Say how to import a module that is in the present folder, where the message says that there is none."""
    missing = re.search(r"No module named '(\w+)", text)
    if missing is None or not (Path(missing[1]).is_dir() or Path(f"{missing[1]}.py").is_file()):
        return ""
    return f" It is in this folder: begin the command with PYTHONPATH=. so that Python finds '{missing[1]}'"


def _explain_config(error: HydraException | OmegaConfBaseException, config_name: str) -> str:
    if isinstance(error, OverrideParseException):
        reason = [line for line in str(error).splitlines() if line and not line.startswith("See http")][-1]
        way = corrected(error.override) or "key=value"
        return f"the override '{error.override}' is not valid ({reason}): write it as {way}"
    if isinstance(error, MissingConfigException):
        return _explain_missing_option(error, config_name)
    text = str(error)
    unknown = re.search(r"Could not (?:override|delete from config[^']*) '([^']+)'", text)
    if unknown:
        return _explain_unknown_key(unknown.group(1).removeprefix("+").removeprefix("~"), config_name)
    ambiguous = re.search(r"Ambiguous value for argument '([^=]+)=([^']+)'", text)
    if ambiguous:
        key, values = ambiguous.groups()
        return f"{key} has several values: add -m to run each of them, or write {key}=[{values}] for a list"
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    if isinstance(cause, MissingMandatoryValue):
        key = str(cause.full_key or cause.key)
        return f"{key} has no default: set {key}=..."
    if isinstance(cause, InterpolationKeyError):
        missing = re.search(r"'(.+)' not found", str(cause))
        name = missing.group(1) if missing else str(cause)
        return f"another part of the configuration refers to {name}, which is not set: do the model and the data match?"
    return text or str(cause)


def _explain_missing_option(error: MissingConfigException, config_name: str) -> str:
    missing = error.missing_cfg_file or ""
    group, _, option = missing.rpartition("/")
    if group and error.options:
        return f"there is no '{option}' in the group '{group}': {did_you_mean(option, error.options)}{_own_folder()}"
    unknown = re.search(r"Could not (?:override|find) '([^']+)'", str(error))
    return _explain_unknown_key(unknown.group(1), config_name) if unknown else str(error)


def _own_folder() -> str:
    """Say how to name a folder of one's own options, unless one is named; `--resume` does not know that of the run."""
    named = any(text.startswith("--config-dir") or text == "-cd" for text in sys.argv)
    return "" if named else "; an option of your own needs --config-dir FOLDER, also beside --resume"


def _explain_unknown_key(key: str, config_name: str) -> str:
    key = key.partition("@")[0].replace("/", ".")
    parent, _, last = key.rpartition(".")
    valid = _valid_keys(config_name, with_hydra=parent.partition(".")[0] == "hydra")
    # Names of the same node come first, since a typo rarely changes the node.
    siblings = [name for name in valid if name.rpartition(".")[0] == parent]
    for names in (siblings, valid):
        near = difflib.get_close_matches(last, {name.rpartition(".")[2] for name in names}, n=1, cutoff=0.6)
        if near:
            full = [name for name in names if name.rpartition(".")[2] == near[0]]
            return f"there is no config key '{key}': did you mean {' or '.join(map(repr, full[:3]))}?"
    here = [name.rpartition(".")[2] for name in siblings]
    hint = f"valid there: {', '.join(name for name in here if not name.startswith('_'))}; " if here else ""
    return f"there is no config key '{key}': {hint}add a new one with +{key}=..."


def _valid_keys(config_name: str, with_hydra: bool) -> list[str]:
    """Return all keys of the configuration with the valid group choices of the command line."""
    GlobalHydra.instance().clear()
    with initialize_config_module(CONFIG_MODULE, version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        groups = [name for name in loader.list_groups("") if name != "hydra"]
        chosen: list[str] = []
        for argument in sys.argv[1:]:
            name, _, value = argument.partition("=")
            if name in groups and value in loader.get_group_options(name):
                chosen.append(argument)
        config = compose(config_name, overrides=chosen, return_hydra_config=with_hydra)
    return sorted({*groups, *_keys(config)})


def _keys(config: DictConfig, prefix: str = "") -> Iterator[str]:
    for key in config:
        yield f"{prefix}{key!s}"
        node = config._get_node(key)
        if isinstance(node, DictConfig) and not OmegaConf.is_missing(config, key) and not node._is_none():
            yield from _keys(node, f"{prefix}{key!s}.")


def _one_line(message: str) -> str:
    return printable(" ".join(message.split()))
