"""A convolution by blocks beside the dense one of cuDNN, in channels_last: on a GPU in bfloat16, with Triton's kernels.

    python benchmarks/gpu_conv.py [--size full]

Without a GPU it times PyTorch's operators in float32 on one thread, beside PyTorch's dense convolution there. A kernel
of 1×1 is also multiplied as a matrix, as packed layers do. Times, speeds and limits are as in gpu.py.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from gpu_timing import PAIRS, Call, aim, device_name, medians, pair_name, peak_memory
from tables import Row, table
from torch import Tensor
from torch.nn import functional as F

from lightning_topkast.ops import BlockPattern, block_sparse_conv2d, block_sparse_linear, choose_block_kernels
from lightning_topkast.ops.blocks.conv import library
from lightning_topkast.ops.blocks.conv.geometry import Geometry

AIM, AIM_PAIR = 2, (0.9, 0.8)  # times cuDNN, a step of a 3×3 convolution with the better of the blocks


@dataclass(frozen=True)
class Size:
    """What is timed, and how often.

    Args:
        images: channels, which are inputs and outputs, and the side of the images.
        kernels: sides of the kernel, which keeps the side of the images.
        blocks: sides of the blocks.
        batches: numbers of images.
        pairs: forward and backward sparsities.
        rounds: number of times each call is timed.
        dtype: of all tensors.
    """

    images: tuple[tuple[int, int], ...]
    kernels: tuple[int, ...]
    blocks: tuple[int, ...]
    batches: tuple[int, ...]
    pairs: tuple[tuple[float, float], ...]
    rounds: int
    dtype: torch.dtype = torch.bfloat16


SIZES = {
    "full": Size(((256, 14), (512, 7)), (3, 1), (64, 128), (64, 256), PAIRS[1:], 9),
    "quick": Size(((256, 14),), (3,), (64,), (64,), PAIRS[1:2], 3),
    "rehearsal": Size(((64, 5),), (3, 1), (16, 32), (2,), PAIRS[1:2], 2),
    "cpu": Size(((128, 28), (256, 14)), (3,), (16, 32, 64), (32,), PAIRS, 5, torch.float32),
}


class Dense:
    """The dense convolution."""

    def __init__(self, channels: int, side: int, kernel: int, batch: int, dtype: torch.dtype, device: torch.device):
        def random(*shape: int) -> Tensor:
            drawn = torch.randn(*shape, device=device, dtype=dtype)
            return drawn.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else drawn

        self.padding = kernel // 2, kernel // 2
        self.images = random(batch, channels, side, side).requires_grad_()
        self.grad = random(batch, channels, side, side)
        self.weight = random(channels, channels, kernel, kernel).div_(kernel * channels**0.5).requires_grad_()
        self.bias = random(channels).requires_grad_()
        self.flops = 2 * batch * side**2 * self.weight.numel()

    def parts(self) -> dict[str, Call]:
        """What is timed."""
        images, weight, bias = self.images.detach(), self.weight.detach(), self.bias.detach()

        def gradient(of_images: bool) -> Call:
            mask = [of_images, not of_images, False]
            return lambda: torch.ops.aten.convolution_backward(
                self.grad, images, weight, None, (1, 1), self.padding, (1, 1), False, (0, 0), 1, mask
            )

        forward = lambda: F.conv2d(images, weight, bias, padding=self.padding)  # noqa: E731
        return {"forward": forward, "dx": gradient(True), "dW": gradient(False), "step": self.step}

    def step(self) -> tuple[Tensor, ...]:
        """The forward pass and all gradients."""
        leaves = (self.images, self.weight, self.bias)
        output = F.conv2d(*leaves, padding=self.padding)
        return (output, *torch.autograd.grad(output, leaves, self.grad))


class Sparse:
    """The same convolution with some of its blocks."""

    def __init__(self, dense: Dense, block: int, pair: tuple[float, float], kernels: str) -> None:
        self.dense, self.kernels = dense, kernels
        channels, _, *sides = dense.weight.shape
        grid = channels // block, channels // block, *sides
        count = torch.Size(grid).numel()
        active, updated = (round((1 - sparsity) * count) for sparsity in pair)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(channels + block))
        places = order[:active].sort().values, order[active:updated].sort().values
        self.pattern = BlockPattern.from_flat(*places, grid, (block, block)).to(dense.images.device)
        entries = dense.weight.detach().contiguous().view(-1)[self.pattern.flat_indices()]
        self.values = entries.view(-1, block, block).requires_grad_()
        self.is_matrix = sides == [1, 1]
        self.matrix = BlockPattern.from_flat(*places, grid[:2], (block, block)).to(dense.images.device)

    def parts(self) -> dict[str, Call]:
        """What is timed."""
        dense, pattern, kernels, values = self.dense, self.pattern, self.kernels, self.values.detach()
        images, grads = (each.detach().permute(0, 2, 3, 1) for each in (dense.images, dense.grad))
        kernel, size = (pattern.shape[2], pattern.shape[3]), images.shape[1:3]
        numbers = Geometry(kernel, (1, 1), dense.padding, (1, 1)).numbers
        rows, columns, updated = pattern.active_by_row, pattern.active_by_column, pattern.updated_by_row
        bias = dense.bias.detach()
        return {
            "forward": lambda: library.block_conv(images, values, bias, *rows, numbers, size, False, kernels),
            "dx": lambda: library.block_conv(grads, values, None, *columns, numbers, size, True, kernels),
            "dW": lambda: library.block_conv_sampled(grads, images, *updated, numbers, values.shape, kernels),
            "step": self.step,
        }

    def step(self) -> tuple[Tensor, ...]:
        """The forward pass and all gradients."""
        dense = self.dense
        leaves = dense.images, self.values, dense.bias
        output = block_sparse_conv2d(*leaves, self.pattern, padding=dense.padding, kernels=self.kernels)
        return (output, *torch.autograd.grad(output, leaves, dense.grad))

    def matrix_step(self) -> tuple[Tensor, ...]:
        """The same of a 1×1 kernel, as a product of matrices."""
        dense = self.dense
        leaves = dense.images, self.values, dense.bias
        output = block_sparse_linear(leaves[0].permute(0, 2, 3, 1), *leaves[1:], self.matrix, self.kernels)
        return (output, *torch.autograd.grad(output, leaves, dense.grad.permute(0, 2, 3, 1)))

    def error(self) -> float:
        """The largest relative error of output and gradients, by norm, against dense float32 convolutions.

        It also sees that a second step gives the same bits.
        """
        found, again = self.step(), self.step()
        assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True)), "two steps differ"
        places, dense = self.pattern.flat_indices(), self.dense
        active = self.pattern.active_count * self.values[0].numel()
        weight = torch.zeros(dense.weight.shape, dtype=torch.float32, device=places.device)
        weight.view(-1)[places[:active]] = self.values.detach().view(-1)[:active].float()
        leaves = [each.detach().float().requires_grad_() for each in (dense.images, weight, dense.bias)]
        output = F.conv2d(*leaves, padding=dense.padding)
        of_images, of_weight, of_bias = torch.autograd.grad(output, leaves, dense.grad.float())
        expected = (output, of_images, of_weight.reshape(-1)[places].view_as(self.values), of_bias)
        pairs = zip(found, expected, strict=True)
        return max(((mine.float() - theirs).norm() / theirs.norm()).item() for mine, theirs in pairs)


def measure(size: Size, device: torch.device) -> Iterator[Row]:
    """One row for each convolution, block, pair of sparsities and part of a step."""
    torch.backends.cudnn.benchmark = True  # cuDNN's fastest way
    name = "triton" if device.type == "cuda" else "torch"
    for channels, side in size.images:
        for kernel in size.kernels:
            for batch in size.batches:
                dense = Dense(channels, side, kernel, batch, size.dtype, device)
                dense_peak = peak_memory(dense.step, device)
                for block in size.blocks:
                    kernels = choose_block_kernels(name, device, (block, block), size.dtype)  # type: ignore[arg-type]
                    for pair in size.pairs:
                        of = {"channels": channels, "side": side, "kernel": f"{kernel}×{kernel}", "batch": batch}
                        of |= {"block": block, "sparsity": pair_name(pair)}
                        sparse = Sparse(dense, block, pair, kernels)
                        yield from measure_one(of, sparse, pair, dense_peak, size.rounds, device)


def measure_one(
    of: Row,
    sparse: Sparse,
    pair: tuple[float, float],
    dense_peak: float | None,
    rounds: int,
    device: torch.device,
) -> Iterator[Row]:
    """One row for each part of a step."""
    dense, error = sparse.dense, sparse.error()
    assert error < 0.02, f"{of}: relative error {error:.3f}"
    variants = {"dense": dense.parts(), "sparse": sparse.parts()}
    if sparse.is_matrix:
        variants["matrix"] = {"step": sparse.matrix_step}
    forward, backward = (1 - sparsity for sparsity in pair)
    limits = {"forward": 1 / forward, "dx": 1 / forward, "dW": 1 / backward, "step": 3 / (2 * forward + backward)}
    for part, limit in limits.items():
        calls = {name: parts[part] for name, parts in variants.items() if part in parts}
        found = medians(calls, device, rounds)
        speed = found["dense"] / found["sparse"]
        flops = 1e-9 * (3 if part == "step" else 1) * dense.flops
        row = of | {"part": part, "dense ms": found["dense"], "sparse ms": found["sparse"]}
        row |= {"matrix ms": found["matrix"]} if "matrix" in found else {}
        row |= {"speed": speed, "of limit": speed / limit}
        row |= {"dense TFLOP/s": flops / found["dense"], "sparse TFLOP/s": flops / limit / found["sparse"]}
        if part == "step":
            eager = medians(calls, device, rounds, queued=False)
            row |= {"eager dense ms": eager["dense"], "eager sparse ms": eager["sparse"]}
            row |= {"eager speed": eager["dense"] / eager["sparse"], "error": error}
            row |= {"dense peak MB": dense_peak, "sparse peak MB": peak_memory(sparse.step, device)}
        yield row


def aims(rows: list[Row]) -> list[Row]:
    """The aim for each number of channels and batch, with the better of the blocks."""
    wanted = {"sparsity": pair_name(AIM_PAIR), "kernel": "3×3", "part": "step"}
    size, speeds = SIZES["full"], {}
    for row in rows:
        if wanted.items() <= row.items():
            case = row["channels"], row["side"], row["batch"]
            speeds[case] = max(row["speed"], speeds.get(case, 0))
    return [
        aim(
            f"{pair_name(AIM_PAIR)}: a step of 3×3 with {channels} channels, {batch} images of {side}² ≥ {AIM} × cuDNN",
            speeds.get((channels, side, batch)),
            AIM,
            at_least=True,
        )
        for channels, side in size.images
        for batch in size.batches
    ]


def main() -> None:
    """Time one size and print it."""
    has_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="full" if has_gpu else "cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda" if has_gpu else "cpu")
    rows = list(measure(SIZES[arguments.size], device))
    title = f"A convolution, on {device_name(device) if has_gpu else 'one thread of a CPU'}"
    for kind, wanted in (("products", False), ("steps", True)):
        table(f"{title}: {kind}", [row for row in rows if (row["part"] == "step") == wanted])
    if has_gpu:
        table("Aims", aims(rows))


if __name__ == "__main__":
    main()
