"""Export the checkpoint of a run in one of several formats, and compare the file with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor, nn

from lightning_topkast.app import formatting
from lightning_topkast.app.errors import AppError
from lightning_topkast.app.export.check import check_outputs, check_weights, run_on
from lightning_topkast.app.export.rebuild import build_data, build_network, example_input
from lightning_topkast.app.run_folder.checkpoint import Checkpoint, is_sharded
from lightning_topkast.app.run_folder.folder import RunFolder, run_of
from lightning_topkast.app.terminal import Terminal
from lightning_topkast.export import OnnxModel, load_csr, load_sparse, save_csr, save_dense, save_onnx, save_sparse
from lightning_topkast.export.state import density, is_sparse, nbytes, tensors_of

Stored = dict[str, str]

ONNX_SPARSE = "onnx-sparse"


@dataclass(frozen=True)
class Format:
    """A file format.

    Args:
        suffix: Suffix of its files.
        save: Writes a state dict and returns how each tensor is stored; None if the network itself is needed.
        load: Reads the file as a state dict.
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


def export(
    path: Path, name: str, output: Path | None = None, *, check: bool = False, force: bool = False, trust: bool = False
) -> Path:
    """Export a run or a checkpoint in the format `name`, print its size and, with `check`, compare it.

    Returns:
        The file.

    Raises:
        AppError, TopKastError: The checkpoint cannot be read, or not be exported in this format.
    """
    file = checkpoint_of(path)
    checkpoint = Checkpoint(str(file))
    kind = FORMATS[name]
    target = output or (path / f"model{kind.suffix}" if path.is_dir() else file.with_suffix(kind.suffix))
    if target.exists() and not force:
        raise AppError(f"{target} exists already: name another file with --output, or overwrite it with --force")
    state = tensors_of(checkpoint.content["state_dict"])
    console = Terminal(soft_wrap=True)  # do not wrap paths, so that they can be copied
    console.print(f"Checkpoint: {file}, step {checkpoint.step:,}")
    run = run_of(file)
    cfg = None if run is None else run.config()
    network: nn.Module | None = None
    prefix = ""
    if cfg is not None and (check or kind.save is None):
        network, prefix = build_network(cfg, checkpoint, trust)
    if kind.save is not None:
        stored = kind.save(state, target, force)
    elif network is None or cfg is None:
        raise AppError(
            f"{name} needs the network: {file} is not in the folder of a run, whose .hydra/config.yaml describes it"
        )
    else:
        sparse = name == ONNX_SPARSE
        example = example_input(cfg, network)
        texts = not example.is_floating_point() and example.dim() == 2  # of any length
        save_onnx(network, example, target, sparse, force, any_size=(0, 1) if texts else (0,))
        stored = {key: "sparse" if sparse and is_sparse(tensor) else "dense" for key, tensor in state.items()}
    _print_sizes(console, state, stored, target)
    if not check:
        return target
    read = None if kind.load is None else kind.load(target)
    if read is not None:
        check_weights(console, state, read)
    if network is None or cfg is None:
        console.print(f"Outputs not compared: {file} is not in the folder of a run")
    else:
        forward = OnnxModel(target, torch.get_num_threads()) if read is None else run_on(network, prefix, read, target)
        check_outputs(console, network, forward, build_data(cfg, trust))
    return target


def _print_sizes(console: Terminal, state: dict[str, Tensor], stored: Stored, target: Path) -> None:
    sparse = {name: tensor for name, tensor in state.items() if is_sparse(tensor)}
    if sparse:
        table = Table(title="Sparse weights", title_justify="left")
        table.add_column("weight", overflow="fold")  # do not truncate names
        table.add_column("shape")
        table.add_column("density", justify="right")
        table.add_column("stored as")
        for name, tensor in sparse.items():
            table.add_row(name, formatting.shape(tensor.shape), formatting.percent(density(tensor)), stored[name])
        console.print(table)
    else:
        console.print("No weight is sparse: none has a tenth of zeros, and all are stored dense")
    dense, size = nbytes(state), target.stat().st_size
    console.print(
        f"Wrote {target}: {size:,} bytes, {size / max(dense, 1):.3f} of the {dense:,} bytes of the dense weights",
    )


def checkpoint_of(path: Path) -> Path:
    """Return the best checkpoint of a run's folder; a file is returned as it is.

    Raises:
        AppError: There is none, or it is distributed over several files.
    """
    if not path.is_dir():
        return path
    if is_sharded(path):
        raise AppError(f"{path} is a distributed checkpoint: convert it with topkast-consolidate {path} FILE")
    best = RunFolder(path).best_checkpoint()
    if best is None:
        raise AppError(f"{path} is not the folder of a run: it has no checkpoints/*.ckpt")
    return checkpoint_of(best)
