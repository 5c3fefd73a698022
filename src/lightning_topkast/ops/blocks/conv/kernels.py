"""Triton kernels for convolutions by blocks; `launch` starts them and computes their arguments.

Images are matrices with a row for each pixel. A kernel sums over blocks, each of whose terms are some columns of rows
that are shifted by the block's position in the convolution's kernel; see `geometry.Axis`. Otherwise as the kernels for
matrices: without atomics, and with block sides that are powers of two from 16 to 128.
"""

import triton
import triton.language as tl

from lightning_topkast.ops.blocks.kernels import dot, find, load, place


@triton.jit
def _pixel(row, rows, height, width):
    """Return the image, y and x of rows of a result, and which of the rows there are."""
    return row // (height * width), row // width % height, row % width, row < rows


@triton.jit
def _source(image, y, x, height, width, DOWN_Y: tl.constexpr, DOWN_X: tl.constexpr):
    """Return the rows of the pixels at y / DOWN_Y and x / DOWN_X of each image, and which of them there are."""
    present = (y >= 0) & (y % DOWN_Y == 0) & (y // DOWN_Y < height)
    present &= (x >= 0) & (x % DOWN_X == 0) & (x // DOWN_X < width)
    return (image * height + y // DOWN_Y) * width + x // DOWN_X, present


_SIZES = ["height", "width", "first_y", "first_x", "step_y", "step_x", "batch_bucket", "length_bucket"]


@triton.jit(do_not_specialize=[*_SIZES, "result_height", "result_width"])
def conv_kernel(
    dense,  # (images × height × width, others × DEPTH), contiguous
    values,  # (blocks × height, width), contiguous
    bias,  # (lines × BREADTH,)
    result,  # (rows, lines × BREADTH), contiguous
    starts,
    others,
    blocks,
    longest_first,
    rows,
    lines,
    value_rows,
    dense_stride,
    height,  # of the images
    width,
    result_height,
    result_width,
    first_y,
    first_x,
    step_y,
    step_x,
    batch_bucket,  # this and the next distinguish the cases of autotuning
    length_bucket,
    POSITIONS: tl.constexpr,  # of the convolution's kernel
    ACROSS: tl.constexpr,  # those in a row
    UP_Y: tl.constexpr,
    UP_X: tl.constexpr,
    DOWN_Y: tl.constexpr,
    DOWN_X: tl.constexpr,
    DEPTH: tl.constexpr,  # as in `product_kernel`, like all that follow
    BREADTH: tl.constexpr,
    DEEP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Multiply shifted rows of `dense` by the blocks of one line, for one tile of pixels of the result."""
    line, row = place(longest_first, rows, lines, TILE, GROUP)
    down = row + tl.arange(0, TILE)
    image, y, x, inside = _pixel(down, rows, result_height, result_width)
    y = y * UP_Y + first_y
    x = x * UP_X + first_x

    PARTS: tl.constexpr = DEPTH // DEEP
    broad = line * BREADTH + tl.arange(0, BREADTH)
    total = tl.zeros((TILE, BREADTH), tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + broad)[None, :].to(tl.float32)
    for turn in range(tl.load(starts + line) * PARTS, tl.load(starts + line + 1) * PARTS):
        at = turn // PARTS
        part = turn % PARTS * DEEP
        other = tl.load(others + at)
        block = tl.load(blocks + at)
        position = other % POSITIONS
        source, present = _source(
            image,
            y + position // ACROSS * step_y,
            x + position % ACROSS * step_x,
            height,
            width,
            DOWN_Y,
            DOWN_X,
        )
        across = other // POSITIONS * DEPTH + part + tl.arange(0, DEEP)
        from_dense = dense + source[:, None].to(tl.int64) * dense_stride + across[None, :]
        a = tl.load(from_dense, mask=(inside & present)[:, None], other=0.0)
        if TRANSPOSED:
            b = load(values, BREADTH, block * DEPTH + part, 0, value_rows, DEEP, BREADTH, False)
        else:
            b = load(values, DEPTH, block * BREADTH, part, value_rows, BREADTH, DEEP, False).T
        total = dot(a, b, total, PRECISION, WIDEN)

    to = result + down[:, None].to(tl.int64) * (lines * BREADTH) + broad[None, :]
    tl.store(to, total.to(result.dtype.element_ty), mask=inside[:, None])


@triton.jit(do_not_specialize=[*_SIZES, "grads_height", "grads_width"])
def conv_sampled_kernel(
    grads,  # (rows, lines × HEIGHT), contiguous
    dense,  # (images × height × width, others × WIDTH), contiguous
    result,  # (splits, blocks, HEIGHT, WIDTH), contiguous
    starts,
    others,
    blocks,
    rows,
    lines,
    split_rows,  # rows that a split sums over
    grads_stride,
    dense_stride,
    split_stride,
    height,  # of the images
    width,
    grads_height,
    grads_width,
    first_y,
    first_x,
    step_y,
    step_x,
    batch_bucket,
    length_bucket,
    POSITIONS: tl.constexpr,
    ACROSS: tl.constexpr,
    UP_Y: tl.constexpr,
    UP_X: tl.constexpr,
    HEIGHT: tl.constexpr,  # as in `sampled_kernel`, like all that follow
    WIDTH: tl.constexpr,
    LINES: tl.constexpr,
    ITEM: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    SIDE: tl.constexpr,
    STEP: tl.constexpr,
):
    """Compute SIDE neighbouring blocks of one line of gradsᵀ @ shifted rows of `dense`, summed over one split."""
    line, begin, end = find(starts, lines, SIDE, LINES)
    if begin >= end:
        return
    DOWN: tl.constexpr = STEP // ITEM
    split = tl.program_id(1)
    top = split * split_rows
    bottom = tl.minimum(rows, top + split_rows)
    result += split.to(tl.int64) * split_stride

    # The columns of the blocks, side by side, are the rows of the sum, of which a tensor core needs at least 64.
    lane = tl.arange(0, SIDE * WIDTH)
    at = begin + lane // WIDTH
    wanted = at < end
    other = tl.load(others + at, mask=wanted, other=0)
    column = other // POSITIONS * WIDTH + lane % WIDTH
    column = tl.max_contiguous(tl.multiple_of(column, WIDTH), WIDTH)
    position = other % POSITIONS
    shift_y = position // ACROSS * step_y + first_y
    shift_x = position % ACROSS * step_x + first_x
    total = tl.zeros((SIDE * WIDTH, HEIGHT), tl.float32)
    for row in range(top, bottom, DOWN):
        image, y, x, inside = _pixel(row + tl.arange(0, DOWN), bottom, grads_height, grads_width)
        source, present = _source(
            image[None, :],
            (y * UP_Y)[None, :] + shift_y[:, None],
            (x * UP_X)[None, :] + shift_x[:, None],
            height,
            width,
            1,
            1,
        )
        from_dense = dense + source.to(tl.int64) * dense_stride + column[:, None]
        a = tl.load(from_dense, mask=wanted[:, None] & inside[None, :] & present, other=0.0)
        b = load(grads, grads_stride, row, line * HEIGHT, bottom, DOWN, HEIGHT, False)
        total = dot(a, b, total, PRECISION, WIDEN)
    block = tl.load(blocks + at, mask=wanted, other=0).to(tl.int64) * (HEIGHT * WIDTH) + lane % WIDTH
    block = tl.max_contiguous(tl.multiple_of(block, WIDTH), WIDTH)
    to = result + block[:, None] + (tl.arange(0, HEIGHT) * WIDTH)[None, :]
    tl.store(to, total.to(result.dtype.element_ty), mask=wanted[:, None])
