"""`topkast-export`: export a trained run for use without this package."""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning_topkast.app.commands.common import argument_parser, console_script
from lightning_topkast.app.errors import AppError

PROGRAM = "topkast-export"
FORMATS = ("safetensors", "2:4", "csr", "dense", "onnx", "onnx-sparse")

_DESCRIPTION = """\
Exports a trained run in a format that can be read without this package. The folder of a run stands for its best
checkpoint. Nothing is pruned or rounded: the file has the weights of the checkpoint.

formats:
  safetensors   stores only the non-zero entries of sparse weights; layout in docs/export.md
  2:4           the same for weights with at most two non-zeros in each group of four; others are refused
  csr           state dict with torch.sparse_csr tensors, for products on CPU; torch.load(weights_only=True)
  dense         plain state dict, including the zeros; torch.load(weights_only=True)
  onnx          the network with dense weights, for onnxruntime and others, for batches of any size
  onnx-sparse   the same with the places of non-zero values: a small file; onnxruntime makes it dense at load
"""
_EXAMPLES = """\
examples:
  topkast-export outputs/2026-01-31/12-00-00                             model.safetensors in that folder
  topkast-export outputs/2026-01-31/12-00-00 --format onnx --check       compare outputs and test accuracy
  topkast-export last.ckpt --format csr --output small.pt
"""


def main() -> None:
    """Run the command."""
    with console_script(PROGRAM):
        given = _arguments()
        if not given.path.exists():
            raise AppError(f"there is no {given.path.absolute()}: name a checkpoint or the folder of a run")
        from lightning_topkast.app.export.export_run import export

        export(given.path, given.format, given.output, check=given.check, force=given.force, trust=given.trust)


def _arguments() -> argparse.Namespace:
    parser = argument_parser(PROGRAM, _DESCRIPTION, _EXAMPLES)
    parser.add_argument("path", type=Path, metavar="RUN_OR_CKPT", help="the folder of a run, or a checkpoint")
    parser.add_argument("--format", choices=FORMATS, default="safetensors", help="default: safetensors")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: model.* in the run's folder, or beside "
                        "the checkpoint under its name")  # fmt: skip
    parser.add_argument("--check", action="store_true", help="read the file and compare weights, outputs and "
                        "the accuracy on the test data of the run")  # fmt: skip
    parser.add_argument("--force", action="store_true", help="overwrite an existing file")
    parser.add_argument("--trust", action="store_true", help="also build classes of the run's configuration that "
                        "are not from this package or torch; only for runs that you trust")  # fmt: skip
    return parser.parse_args()


if __name__ == "__main__":
    main()
