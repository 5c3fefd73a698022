"""The products of block-sparse matrices as Triton kernels; `launch` starts them, and says what their arguments are.

Every element of a result is summed by one program in the order of the blocks, and none by atomics, so that results
don't depend on how programs are scheduled. Block sides are powers of two from 16 to 128.
"""

import triton
import triton.language as tl


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    if WIDEN:  # Triton's interpreter would multiply the bits of bfloat16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit(do_not_specialize=["batch_bucket", "length_bucket"])
def product_kernel(
    dense,  # (rows, others × DEPTH)
    values,  # (blocks, height, width), contiguous
    bias,  # (lines × BREADTH,)
    result,  # (rows, lines × BREADTH), contiguous
    starts,
    others,
    blocks,
    longest_first,
    rows,
    lines,
    dense_row_stride,
    dense_column_stride,
    batch_bucket,  # these two tell autotuning's cases apart
    length_bucket,
    DEPTH: tl.constexpr,  # side of a block that is summed over
    BREADTH: tl.constexpr,  # its other side
    TRANSPOSED: tl.constexpr,  # blocks lie as (DEPTH, BREADTH), else as (BREADTH, DEPTH)
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    TILE: tl.constexpr,  # rows of the result that a program computes
    STEP: tl.constexpr,  # at most so many terms are summed at a time
    GROUP: tl.constexpr,  # tiles that go through the lines together
):
    """`dense` times the blocks of one line, for one tile of rows."""
    # Programs that run at the same time share lines and tiles, whose data the L2 cache then holds.
    program = tl.program_id(0)
    tiles = tl.cdiv(rows, TILE)
    first = program // (GROUP * lines) * GROUP
    width = min(tiles - first, GROUP)
    within = program % (GROUP * lines)
    line = tl.load(longest_first + within // width)
    row = (first + within % width).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = row[:, None] < rows

    DEEP: tl.constexpr = STEP if STEP < DEPTH else DEPTH
    PARTS: tl.constexpr = DEPTH // DEEP
    deep = tl.arange(0, DEEP)
    broad = tl.arange(0, BREADTH)
    if TRANSPOSED:
        factor = values + deep[:, None] * BREADTH + broad[None, :]
    else:
        factor = values + broad[None, :] * DEPTH + deep[:, None]
    from_dense = dense + row[:, None] * dense_row_stride + deep[None, :].to(tl.int64) * dense_column_stride
    column = line * BREADTH + broad
    total = tl.zeros((TILE, BREADTH), tl.float32)
    if HAS_BIAS:  # first, as nothing waits for it here
        total += tl.load(bias + column)[None, :].to(tl.float32)
    for turn in range(tl.load(starts + line) * PARTS, tl.load(starts + line + 1) * PARTS):
        at = turn // PARTS
        part = turn % PARTS * DEEP
        across = tl.load(others + at).to(tl.int64) * DEPTH + part
        block = tl.load(blocks + at).to(tl.int64) * (DEPTH * BREADTH)
        a = tl.load(from_dense + across * dense_column_stride, mask=inside, other=0.0)
        b = tl.load(factor + (block + part * (BREADTH if TRANSPOSED else 1)))
        total = _dot(a, b, total, PRECISION, WIDEN)

    to = result + row[:, None] * (lines * BREADTH) + column[None, :]
    tl.store(to, total.to(result.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["batch_bucket", "length_bucket"])
def sampled_kernel(
    grads,  # (rows, lines × HEIGHT)
    dense,  # (rows, others × WIDTH)
    result,  # (splits, blocks, HEIGHT, WIDTH), contiguous
    starts,
    others,
    blocks,
    rows,
    across,  # blocks of a whole line
    split_rows,  # rows that a split sums over
    grads_row_stride,
    grads_column_stride,
    dense_row_stride,
    dense_column_stride,
    split_stride,
    batch_bucket,
    length_bucket,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    SIDE: tl.constexpr,  # blocks that a program computes side by side
    STEP: tl.constexpr,  # rows that are summed at a time
):
    """SIDE neighbouring blocks of one line of gradsᵀ @ dense, summed over one split of the rows."""
    chunks = tl.cdiv(across, SIDE)
    line = tl.program_id(0) // chunks
    begin = tl.load(starts + line) + tl.program_id(0) % chunks * SIDE
    end = tl.load(starts + line + 1)
    if begin >= end:
        return
    # The blocks' columns side by side are the result's rows, of which a tensor core wants 64 at least.
    lane = tl.arange(0, SIDE * WIDTH)
    at = begin + lane // WIDTH
    present = at < end
    column = tl.load(others + at, mask=present, other=0) * WIDTH + lane % WIDTH
    column = tl.max_contiguous(tl.multiple_of(column, WIDTH), WIDTH)
    down = tl.arange(0, HEIGHT)
    from_dense = dense + column[:, None].to(tl.int64) * dense_column_stride
    from_grads = grads + (line * HEIGHT + down)[None, :].to(tl.int64) * grads_column_stride

    split = tl.program_id(1)
    bottom = tl.minimum(rows, (split + 1) * split_rows)
    total = tl.zeros((SIDE * WIDTH, HEIGHT), tl.float32)
    for top in range(split * split_rows, bottom, STEP):
        row = top + tl.arange(0, STEP)
        inside = row < bottom
        far = row.to(tl.int64)
        a = tl.load(from_dense + far[None, :] * dense_row_stride, mask=present[:, None] & inside[None, :], other=0.0)
        b = tl.load(from_grads + far[:, None] * grads_row_stride, mask=inside[:, None], other=0.0)
        total = _dot(a, b, total, PRECISION, WIDEN)

    block = tl.load(blocks + at, mask=present, other=0).to(tl.int64) * (HEIGHT * WIDTH) + lane % WIDTH
    block = tl.max_contiguous(tl.multiple_of(block, WIDTH), WIDTH)
    to = result + split.to(tl.int64) * split_stride + block[:, None] + down[None, :] * WIDTH
    tl.store(to, total.to(result.dtype.element_ty), mask=present[:, None])


@triton.jit
def fold_kernel(
    partial,  # (splits, size), contiguous, float32
    result,  # (count,)
    size,  # at most count
    count,
    splits,
    CHUNK: tl.constexpr,
):
    """The sum of `partial` over its splits, in their order, and zeros up to `count`."""
    at = tl.program_id(0).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    inside = at < size
    total = tl.zeros((CHUNK,), tl.float32)
    for split in range(0, splits):
        total += tl.load(partial + split * tl.cast(size, tl.int64) + at, mask=inside, other=0.0)
    tl.store(result + at, total.to(result.dtype.element_ty), mask=at < count)
