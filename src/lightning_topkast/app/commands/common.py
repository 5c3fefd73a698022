"""What the console scripts share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import lightning_topkast
from lightning_topkast.app.errors import CONFIG_NAME, let_errors_through, one_line_errors, quiet_broken_pipe
from lightning_topkast.app.overrides import split_options
from lightning_topkast.app.terminal import say


@contextmanager
def console_script(program: str, config_name: str = CONFIG_NAME) -> Iterator[None]:
    """Answer a user's mistake with one line and exit code 2, and end quietly on Ctrl-C or a closed pipe."""
    if "--version" in sys.argv[1:]:  # Hydra would print its own
        say(f"{program} {lightning_topkast.__version__}")
        sys.exit()
    let_errors_through()
    with quiet_broken_pipe(), one_line_errors(program, config_name):
        yield


def options_first() -> None:
    """Let options stand anywhere in a command line of Hydra's, which reads none behind its overrides."""
    options, overrides = split_options(sys.argv[1:])
    sys.argv[1:] = [*options, *overrides]


def argument_parser(
    program: str, description: str, epilog: str | None = None, usage: str | None = None
) -> argparse.ArgumentParser:
    """Return a parser that prints its texts as they are laid out."""
    parser = argparse.ArgumentParser(
        prog=program, description=description, epilog=epilog, usage=usage,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="store_true", help="print the version and exit")  # by console_script
    return parser
