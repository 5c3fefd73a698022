"""`topkast-export`: a trained run as a file for others, and what it costs and is worth."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_topkast.app.checkpoint import Checkpoint
from lightning_topkast.app.errors import AppError, let_errors_through, one_line_errors, quiet_broken_pipe
from lightning_topkast.app.export_check import check_outputs, check_weights, run_on
from lightning_topkast.app.run_folder import build_data, build_network, example_input, find_checkpoint, read_config
from lightning_topkast.export import OnnxModel, load_csr, load_sparse, save_csr, save_dense, save_onnx, save_sparse
from lightning_topkast.export.state import density, is_sparse, nbytes, tensors_of

Stored = dict[str, str]

ONNX_SPARSE = "onnx-sparse"

_DESCRIPTION = """\
Writes a trained run as a file for others, who can read each format without this package. A run's folder stands for
its best checkpoint. Nothing is pruned or rounded: the file holds the checkpoint's weights.

formats:
  safetensors   sparse weights take a place for their non-zero entries only; layout in docs/export.md
  2:4           the same for weights of which at most two in each group of four are not zero; refused where more are
  csr           state dict with torch's sparse CSR matrices, for products on CPU; torch.load(weights_only=True)
  dense         plain state dict, sparse weights with their zeros; torch.load(weights_only=True)
  onnx          the network itself, for onnxruntime and others, for batches of any size; weights are dense in it
  onnx-sparse   the same in a small file, by sparse initializers: onnxruntime reads them, other tools may not
"""
_EXAMPLES = """\
examples:
  topkast-export outputs/2026-01-31/12-00-00                             model.safetensors in that folder
  topkast-export outputs/2026-01-31/12-00-00 --format onnx --check       run it and compare, with the test accuracy
  topkast-export last.ckpt --format csr --output small.pt
"""


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Args:
        suffix: of its name.
        save: writes a state dict, and says how each tensor is stored; None if a network is needed.
        load: reads it as a state dict.
    """

    suffix: str
    save: Callable[[dict[str, Tensor], Path, bool], Stored] | None = None
    load: Callable[[Path], dict[str, Tensor]] | None = None


def _save_two_of_four(state: dict[str, Tensor], path: Path, overwrite: bool) -> Stored:
    return save_sparse(state, path, structure="2:4", overwrite=overwrite)


def _save_unstructured(state: dict[str, Tensor], path: Path, overwrite: bool) -> Stored:
    return save_sparse(state, path, overwrite=overwrite)


FORMATS = {
    "safetensors": Format(".safetensors", _save_unstructured, load_sparse),
    "2:4": Format(".2of4.safetensors", _save_two_of_four, load_sparse),
    "csr": Format(".csr.pt", save_csr, load_csr),
    "dense": Format(".dense.pt", save_dense, load_csr),
    "onnx": Format(".onnx"),
    ONNX_SPARSE: Format(".sparse.onnx"),
}


def main() -> None:
    """Run on the command line's arguments."""
    let_errors_through()
    with quiet_broken_pipe(), one_line_errors(program="topkast-export"):
        given = _arguments()
        export(given.path, given.format, given.output, check=given.check, force=given.force, trust=given.trust)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="topkast-export",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", type=Path, metavar="RUN_OR_CKPT", help="the folder of a run, or a checkpoint")
    parser.add_argument("--format", choices=FORMATS, default="safetensors", help="default: safetensors")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: model.* in the run's folder, or beside "
                        "the checkpoint under its name")  # fmt: skip
    parser.add_argument("--check", action="store_true", help="read the file again and compare: weights, outputs, and "
                        "the accuracy on the run's test data")  # fmt: skip
    parser.add_argument("--force", action="store_true", help="write over the file if it exists")
    parser.add_argument("--trust", action="store_true", help="build what the run's configuration names, even classes "
                        "that are not this package's or torch's: only for runs that you know")  # fmt: skip
    return parser.parse_args()


def export(
    path: Path, name: str, output: Path | None = None, *, check: bool = False, force: bool = False, trust: bool = False
) -> Path:
    """Write what `path` holds in the format `name`, print sizes and, with `check`, what comes of reading it again.

    Returns:
        the file.

    Raises:
        AppError, TopKastError: for what the user can mend, with the way to do so.
    """
    file = find_checkpoint(path)
    checkpoint = Checkpoint(str(file))
    kind = FORMATS[name]
    target = output or (path / f"model{kind.suffix}" if path.is_dir() else file.with_suffix(kind.suffix))
    if target.exists() and not force:
        raise AppError(f"{target} exists already: --output names another file, --force writes over it")
    state = tensors_of(checkpoint.content["state_dict"])
    # paths must stay whole, to be copied; they and names may hold what rich takes for [markup] or an :emoji:
    console = Console(soft_wrap=True, markup=False, emoji=False)
    console.print(f"Checkpoint: {file}, step {checkpoint.step:,}", highlight=False)
    cfg = read_config(file)
    network: nn.Module | None = None
    prefix = ""
    if cfg is not None and (check or kind.save is None):
        network, prefix = build_network(cfg, checkpoint, trust)
    if kind.save is not None:
        stored = kind.save(state, target, force)
    elif network is None or cfg is None:
        raise AppError(
            f"{name} needs the network itself: {file} lies in no run's folder, whose .hydra/config.yaml says what it is"
        )
    else:
        sparse = name == ONNX_SPARSE
        save_onnx(network, example_input(cfg, network), target, sparse, force)
        stored = {key: "sparse" if sparse and is_sparse(tensor) else "dense" for key, tensor in state.items()}
    _print_sizes(console, state, stored, target)
    if not check:
        return target
    read = None if kind.load is None else kind.load(target)
    if read is not None:
        check_weights(console, state, read)
    if network is None or cfg is None:
        console.print(f"Outputs not compared: {file} lies in no run's folder", highlight=False)
    else:
        forward = OnnxModel(target, torch.get_num_threads()) if read is None else run_on(network, prefix, read, target)
        check_outputs(console, network, forward, build_data(cfg, trust))
    return target


def _print_sizes(console: Console, state: dict[str, Tensor], stored: Stored, target: Path) -> None:
    sparse = {name: tensor for name, tensor in state.items() if is_sparse(tensor)}
    if sparse:
        table = Table(title="Sparse weights", title_justify="left")
        table.add_column("weight", overflow="fold")  # names must stay whole
        table.add_column("shape")
        table.add_column("density", justify="right")
        table.add_column("stored as")
        for name, tensor in sparse.items():
            table.add_row(name, "×".join(map(str, tensor.shape)), f"{density(tensor):.2%}", stored[name])
        console.print(table)
    else:
        console.print("Nothing in it is sparse: no weight has a tenth of zeros, and all are stored dense")
    dense, size = nbytes(state), target.stat().st_size
    console.print(
        f"Wrote {target}: {size:,} bytes, {size / max(dense, 1):.3f} of the {dense:,} that all weights take dense",
        highlight=False,
    )


if __name__ == "__main__":
    main()
