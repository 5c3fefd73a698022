"""`topkast-train`: train and test the run that Hydra composes from the configuration and the overrides."""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from lightning_topkast.app.commands.common import console_script, options_first
from lightning_topkast.app.errors import CONFIG_MODULE, CONFIG_NAME
from lightning_topkast.app.run_folder.folder import refuse_missing

PROGRAM = "topkast-train"


@hydra.main(version_base="1.3", config_path=f"pkg://{CONFIG_MODULE}", config_name=CONFIG_NAME)
def _run(cfg: DictConfig) -> float:
    with console_script(PROGRAM):  # here too, since Hydra reports every error that leaves its job
        if str(cfg.ckpt_path).endswith(".ckpt") and "://" not in cfg.ckpt_path:
            refuse_missing(Path(cfg.ckpt_path))  # before PyTorch, which takes seconds to import
        import lightning_topkast.app.vision  # noqa: F401  before Lightning
        from lightning_topkast.app.commands.train_job import train_and_report

        return train_and_report(cfg, PROGRAM)


def main() -> None:
    """Run the command."""
    with console_script(PROGRAM):
        arguments = sys.argv[1:]
        if not any(text.startswith(("--resume", "--trust")) for text in arguments):
            options_first()
            _run()
            return
        from lightning_topkast.app.run_folder.resume_arguments import resumed

        sys.argv[1:] = resumed(arguments)  # the processes that Lightning starts read them, too
        _run()


if __name__ == "__main__":
    main()
