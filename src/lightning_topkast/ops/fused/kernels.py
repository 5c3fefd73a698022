"""Triton kernels that pass over many tensors in one launch.

The tensors' addresses and sizes come in a table, which has a row of integers for each kind of argument and a column for
each tensor. A program passes over CHUNK elements of one tensor, and finds out by itself which these are.
"""

import triton
import triton.language as tl


@triton.jit
def place(sizes, tensors, program, CHUNK: tl.constexpr, WIDTH: tl.constexpr):
    """Return the tensor of a program and the first of its elements; WIDTH is a power of two, at least `tensors`."""
    at = tl.arange(0, WIDTH)
    ends = tl.cumsum(tl.cdiv(tl.load(sizes + at, mask=at < tensors, other=0), CHUNK))
    done = ends <= program
    return tl.sum(done.to(tl.int32)), (program - tl.max(tl.where(done, ends, 0))) * CHUNK


@triton.jit
def tensor(addresses, number, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return the pointer to a tensor, whose address is a multiple of 16 if it is ALIGNED."""
    pointer = tl.load(addresses + number).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def scaled(values, factors, number):
    """Multiply as PyTorch's `mul_` does, by a factor whose bits, as a float64, are in the table."""
    factor = tl.load(factors + number).to(tl.float64, bitcast=True)
    if values.dtype == tl.float64:
        product = values * factor
    else:
        product = (values.to(tl.float32) * factor.to(tl.float32)).to(values.dtype)
    return product


@triton.jit
def mask_chunk(values, members, factors, number, at, inside, SCALES: tl.constexpr):
    """Zero values outside of the members, even NaN, and multiply the others."""
    value = tl.load(values + at, mask=inside)
    if SCALES:
        value = scaled(value, factors, number)
    member = tl.load(members + at, mask=inside)
    tl.store(values + at, tl.where(member != 0, value, 0.0), mask=inside)


@triton.jit
def mask(
    table, tensors, program, CHUNK: tl.constexpr, WIDTH: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr,
    SCALES: tl.constexpr
):  # fmt: skip
    """Mask one chunk; rows of the table: sizes, addresses of the values, addresses of their members, factors."""
    number, begin = place(table, tensors, program, CHUNK, WIDTH)
    size = tl.load(table + number)
    values = tensor(table + tensors, number, TYPE, ALIGNED)
    members = tensor(table + 2 * tensors, number, tl.int8, ALIGNED)
    factors = table + 3 * tensors
    at = begin + tl.arange(0, CHUNK)
    if begin + CHUNK <= size:  # without a condition several elements are loaded at once
        mask_chunk(values, members, factors, number, at, None, SCALES)
    else:
        mask_chunk(values, members, factors, number, at, at < size, SCALES)


@triton.jit
def put(table, tensors, program, CHUNK: tl.constexpr, WIDTH: tl.constexpr, TYPE: tl.constexpr):
    """Put entries to their places; rows of the table: their numbers, addresses of values, places and entries."""
    number, begin = place(table, tensors, program, CHUNK, WIDTH)
    values = tensor(table + tensors, number, TYPE, False)
    places = tensor(table + 2 * tensors, number, tl.int64, False)
    entries = tensor(table + 3 * tensors, number, TYPE, False)
    at = begin + tl.arange(0, CHUNK)
    inside = at < tl.load(table + number)
    to = tl.load(places + at, mask=inside, other=0)
    tl.store(values + to, tl.load(entries + at, mask=inside, other=0.0), mask=inside)


@triton.jit(do_not_specialize=["masked", "masking", "opened"])
def open_kernel(
    masks,  # table of `mask`, of gradients
    masked,  # their number
    masking,  # number of programs that mask
    puts,  # table of `put`
    opened,  # number of weights in it
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
    TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Mask gradients, and put entries into values."""
    program = tl.program_id(0)
    if program < masking:
        mask(masks, masked, program, CHUNK, WIDTH, TYPE, ALIGNED, False)
    else:
        put(puts, opened, program - masking, CHUNK, WIDTH, TYPE)


@triton.jit(do_not_specialize=["tensors"])
def take_kernel(table, tensors, CHUNK: tl.constexpr, WIDTH: tl.constexpr, TYPE: tl.constexpr):
    """Take entries out of values, which become 0 there, and multiply them; rows: as of `put`, and factors."""
    number, begin = place(table, tensors, tl.program_id(0), CHUNK, WIDTH)
    values = tensor(table + tensors, number, TYPE, False)
    places = tensor(table + 2 * tensors, number, tl.int64, False)
    entries = tensor(table + 3 * tensors, number, TYPE, False)
    at = begin + tl.arange(0, CHUNK)
    inside = at < tl.load(table + number)
    source = tl.load(places + at, mask=inside, other=0)
    taken = tl.load(values + source, mask=inside, other=0.0)
    tl.store(entries + at, scaled(taken, table + 4 * tensors, number), mask=inside)
    tl.store(values + source, tl.zeros_like(taken), mask=inside)


@triton.jit(do_not_specialize=["tensors"])
def mask_kernel(
    table, tensors, CHUNK: tl.constexpr, WIDTH: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr
):  # fmt: skip
    """Mask values and multiply the others; for the table see `mask`."""
    mask(table, tensors, tl.program_id(0), CHUNK, WIDTH, TYPE, ALIGNED, True)
