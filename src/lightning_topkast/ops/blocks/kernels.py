"""Triton kernels for products of block-sparse matrices; `launch` starts them and computes their arguments.

One program sums each element of a result in the order of the blocks, without atomics, so that results do not depend on
the scheduling of programs. Block sides are powers of two from 16 to 128.
"""

import triton
import triton.language as tl


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """Return total + a @ b."""
    if WIDEN:  # Triton's interpreter would multiply the bits of bfloat16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def load(matrix, stride, row, column, rows, TALL: tl.constexpr, BROAD: tl.constexpr, DESCRIBED: tl.constexpr):
    """Load TALL × BROAD elements of a matrix; zero beyond its last row."""
    if DESCRIBED:
        box = matrix.load([row, column])
    else:
        down = row + tl.arange(0, TALL)
        at = matrix + down[:, None].to(tl.int64) * stride + (column + tl.arange(0, BROAD))[None, :]
        box = tl.load(at, mask=down[:, None] < rows, other=0.0)
    return box


@triton.jit
def place(longest_first, rows, lines, TILE: tl.constexpr, GROUP: tl.constexpr):
    """Return the line of a product's program and the first row of its tile.

    Programs that run at the same time share lines and tiles, so that the L2 cache holds their data.
    """
    program = tl.program_id(0)
    tiles = tl.cdiv(rows, TILE)
    first = program // (GROUP * lines) * GROUP
    width = min(tiles - first, GROUP)
    within = program % (GROUP * lines)
    line = tl.load(longest_first + within // width)
    return line, (first + within % width) * TILE


@triton.jit(do_not_specialize=["batch_bucket", "length_bucket"])
def product_kernel(
    dense,  # (rows, others × DEPTH)
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
    batch_bucket,  # this and the next distinguish the cases of autotuning
    length_bucket,
    DEPTH: tl.constexpr,  # side of a block that is summed over
    BREADTH: tl.constexpr,  # the other side
    DEEP: tl.constexpr,  # number of terms that are summed at a time; divides DEPTH
    TRANSPOSED: tl.constexpr,  # blocks are stored as (DEPTH, BREADTH), else as (BREADTH, DEPTH)
    HAS_BIAS: tl.constexpr,
    DESCRIBED: tl.constexpr,  # dense, values and result are tensor descriptors, else pointers
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    TILE: tl.constexpr,  # rows of the result that a program computes
    GROUP: tl.constexpr,  # tiles that pass through the lines together
):
    """Multiply `dense` by the blocks of one line, for one tile of rows."""
    line, row = place(longest_first, rows, lines, TILE, GROUP)
    PARTS: tl.constexpr = DEPTH // DEEP
    column = line * BREADTH
    broad = column + tl.arange(0, BREADTH)
    total = tl.zeros((TILE, BREADTH), tl.float32)
    if HAS_BIAS:  # loaded first, since nothing waits for it here
        total += tl.load(bias + broad)[None, :].to(tl.float32)
    for turn in range(tl.load(starts + line) * PARTS, tl.load(starts + line + 1) * PARTS):
        at = turn // PARTS
        part = turn % PARTS * DEEP
        across = tl.load(others + at) * DEPTH + part
        block = tl.load(blocks + at)
        a = load(dense, dense_stride, row, across, rows, TILE, DEEP, DESCRIBED)
        if TRANSPOSED:
            b = load(values, BREADTH, block * DEPTH + part, 0, value_rows, DEEP, BREADTH, DESCRIBED)
        else:
            b = load(values, DEPTH, block * BREADTH, part, value_rows, BREADTH, DEEP, DESCRIBED).T
        total = dot(a, b, total, PRECISION, WIDEN)

    if DESCRIBED:
        result.store([row, column], total.to(result.dtype))
    else:
        down = row + tl.arange(0, TILE)
        to = result + down[:, None].to(tl.int64) * (lines * BREADTH) + broad[None, :]
        tl.store(to, total.to(result.dtype.element_ty), mask=down[:, None] < rows)


@triton.jit
def find(starts, lines, SIDE: tl.constexpr, LINES: tl.constexpr):
    """Return this program's line, the start of its SIDE neighbouring blocks in that line, and the end of the line.

    For programs after the last block, start and end are equal.
    """
    program = tl.program_id(0)
    line = tl.arange(0, LINES)
    begins = tl.load(starts + line, mask=line < lines, other=0)
    ends = tl.load(starts + line + 1, mask=line < lines, other=0)
    programs = tl.cdiv(ends - begins, SIDE)
    passed = tl.cumsum(programs) <= program
    found = tl.sum(passed.to(tl.int32))
    within = program - tl.sum(tl.where(passed, programs, 0))
    end = tl.load(starts + min(found + 1, lines))
    begin = tl.load(starts + min(found, lines)) + within * SIDE
    return found, min(begin, end), end


@triton.jit(do_not_specialize=["batch_bucket", "length_bucket"])
def sampled_kernel(
    grads,  # (rows, lines × HEIGHT)
    dense,  # (rows, others × WIDTH)
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
    batch_bucket,
    length_bucket,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    LINES: tl.constexpr,  # a power of two, at least `lines`
    ITEM: tl.constexpr,  # bytes of an element
    DESCRIBED: tl.constexpr,  # grads and dense are tensor descriptors, else pointers
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    SIDE: tl.constexpr,  # blocks that a program computes side by side
    STEP: tl.constexpr,  # bytes of a column that are summed at a time
):
    """Compute SIDE neighbouring blocks of one line of gradsᵀ @ dense, summed over one split of the rows."""
    line, begin, end = find(starts, lines, SIDE, LINES)
    if begin >= end:
        return
    DOWN: tl.constexpr = STEP // ITEM
    height = line * HEIGHT
    split = tl.program_id(1)
    top = split * split_rows
    bottom = tl.minimum(rows, top + split_rows)
    result += split.to(tl.int64) * split_stride
    type = result.dtype.element_ty
    if DESCRIBED:
        # One sum per block: tensor cores multiply 64 rows of it at a time.
        totals = ()
        columns = ()
        for i in tl.static_range(SIDE):
            columns += (tl.load(others + min(begin + i, end - 1)) * WIDTH,)
            totals += (tl.zeros((HEIGHT, WIDTH), tl.float32),)
        for row in range(top, bottom, DOWN):
            a = grads.load([row, height]).T
            sums = ()
            for i in tl.static_range(SIDE):
                sums += (dot(a, dense.load([row, columns[i]]), totals[i], PRECISION, WIDEN),)
            totals = sums
        element = tl.arange(0, HEIGHT)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        for i in tl.static_range(SIDE):
            if begin + i < end:
                block = tl.load(blocks + begin + i).to(tl.int64) * (HEIGHT * WIDTH)
                tl.store(result + block + element, totals[i].to(type))
    else:
        # The adjacent columns of the blocks are the rows of the sum, of which a tensor core needs at least 64.
        lane = tl.arange(0, SIDE * WIDTH)
        at = begin + lane // WIDTH
        present = at < end
        column = tl.load(others + at, mask=present, other=0) * WIDTH + lane % WIDTH
        column = tl.max_contiguous(tl.multiple_of(column, WIDTH), WIDTH)
        total = tl.zeros((SIDE * WIDTH, HEIGHT), tl.float32)
        for row in range(top, bottom, DOWN):
            down = row + tl.arange(0, DOWN)
            inside = down < bottom
            from_dense = dense + down[None, :].to(tl.int64) * dense_stride + column[:, None]
            a = tl.load(from_dense, mask=present[:, None] & inside[None, :], other=0.0)
            b = load(grads, grads_stride, row, height, bottom, DOWN, HEIGHT, DESCRIBED)
            total = dot(a, b, total, PRECISION, WIDEN)
        block = tl.load(blocks + at, mask=present, other=0).to(tl.int64) * (HEIGHT * WIDTH) + lane % WIDTH
        block = tl.max_contiguous(tl.multiple_of(block, WIDTH), WIDTH)
        to = result + block[:, None] + (tl.arange(0, HEIGHT) * WIDTH)[None, :]
        tl.store(to, total.to(type), mask=present[:, None])


@triton.jit
def fold_kernel(
    partial,  # (splits, size), contiguous, float32
    result,  # (count,)
    size,  # at most count
    count,
    splits,
    CHUNK: tl.constexpr,
):
    """Sum `partial` over its splits, in order, and write zeros from `size` up to `count`."""
    at = tl.program_id(0).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    inside = at < size
    total = tl.zeros((CHUNK,), tl.float32)
    for split in range(0, splits):
        total += tl.load(partial + split * tl.cast(size, tl.int64) + at, mask=inside, other=0.0)
    tl.store(result + at, total.to(result.dtype.element_ty), mask=at < count)
