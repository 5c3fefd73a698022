"""The block-sparse linear operators: torch's here, Triton's by its interpreter in a process of its own."""

import importlib.util
import itertools
import json
import os
import random
import re
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path

import pytest
import torch

from lightning_topkast.errors import TopKastError
from lightning_topkast.ops import BlockPattern, block_sparse_linear, choose_block_kernels
from lightning_topkast.ops.blocks import choice
from tests import blocks, processes
from tests.blocks import pattern_of
from tests.helpers import plain_path

CPU = torch.device("cpu")
has_triton = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not has_triton, reason="triton is not installed")


def run_python(*arguments, **variables) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment |= {"PYTHONPATH": os.pathsep.join(plain_path()), "OMP_NUM_THREADS": "1", **variables}
    done = processes.run(
        [sys.executable, *map(str, arguments)],
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def seed():
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed {seed}")
    return seed


@pytest.fixture(scope="module")
def failures_of_triton(seed):
    return json.loads(run_python(Path(__file__).with_name("blocks.py"), seed, TRITON_INTERPRET="1"))


@pytest.mark.parametrize("check", blocks.CHECKS, ids=lambda check: check.__name__)
def test_with_torchs_operators(check, seed):
    check(blocks.On("torch", "cpu", seed))


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("check", blocks.OF_TRITON, ids=lambda check: check.__name__)
def test_with_interpreted_triton(check, seed, failures_of_triton):
    assert not failures_of_triton[check.__name__], failures_of_triton[check.__name__]


# --- patterns ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tiers", "rows", "columns"),
    [
        ([[1, 2, 0], [2, 0, 1]], [0, 1, 0, 1], [1, 0, 0, 2]),
        ([[0, 0, 0], [2, 2, 2]], [1, 1, 1], [0, 1, 2]),
        ([[0, 0, 0], [0, 0, 0]], [], []),
    ],
)
def test_active_blocks_come_first_each_set_by_rows(tiers, rows, columns):
    pattern = pattern_of(torch.tensor(tiers, dtype=torch.uint8), (2, 4))
    assert (pattern.rows.tolist(), pattern.columns.tolist()) == (rows, columns)
    assert pattern.shape == (4, 12)
    assert pattern.active_count == sum(row.count(2) for row in tiers)
    assert pattern.updated_count == len(rows)


def test_lines_lead_to_every_block_once(seed):
    tiers = torch.randint(3, (13, 7), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    tiers[4], tiers[:, 2] = 0, 0
    pattern = pattern_of(tiers, (16, 32))
    for lines, grid in (
        (pattern.active_by_row, tiers == 2),
        (pattern.active_by_column, tiers.t() == 2),
        (pattern.updated_by_row, tiers > 0),
    ):
        counts = grid.sum(1)
        assert lines.starts.diff().tolist() == counts.tolist()
        assert lines.others.tolist() == grid.nonzero()[:, 1].tolist()
        own = torch.repeat_interleave(torch.arange(len(grid)), counts)
        places = (pattern.rows, pattern.columns) if len(grid) == 13 else (pattern.columns, pattern.rows)
        assert torch.equal(places[0][lines.blocks.long()], own.int())
        assert torch.equal(places[1][lines.blocks.long()], lines.others)
        assert sorted(lines.longest_first.tolist()) == list(range(len(grid)))
        assert (counts[lines.longest_first.long()].diff() <= 0).all()
        assert {tensor.dtype for tensor in lines} == {torch.int32}


def test_flat_indices_are_where_the_values_belong():
    pattern = pattern_of(torch.tensor([[1, 0], [0, 2]], dtype=torch.uint8), (2, 3))
    # the active block is at the lower right of 4 × 6
    assert pattern.flat_indices().tolist() == [15, 16, 17, 21, 22, 23, 0, 1, 2, 6, 7, 8]


def test_pattern_moves_with_all_its_indices():
    pattern = pattern_of(torch.tensor([[1, 0], [0, 2]], dtype=torch.uint8), (2, 3))
    moved = pattern.to("meta")
    lines = (moved.active_by_row, moved.active_by_column, moved.updated_by_row)
    tensors = [moved.rows, moved.columns, *(tensor for each in lines for tensor in each)]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert pattern.nbytes == 4 * sum(tensor.numel() for tensor in tensors)


# --- refusals ---------------------------------------------------------------------------------------------------------


def layer_of_48_by_64():
    pattern = pattern_of(torch.full((3, 2), 2, dtype=torch.uint8), (16, 32))
    return {"input": torch.ones(2, 64), "values": torch.ones(6, 16, 32), "bias": torch.ones(48), "pattern": pattern}


def test_on_the_meta_device_there_are_shapes():
    arguments = {name: each.to("meta") for name, each in layer_of_48_by_64().items()}
    assert block_sparse_linear(**arguments).shape == (2, 48)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"input": torch.ones(2, 48)}, r"expected input to be \(\.\.\., 64\), got \(2, 48\)"),
        ({"input": torch.ones(())}, r"expected input to be \(\.\.\., 64\), got \(\)"),
        ({"values": torch.ones(5, 16, 32)}, r"expected values to be at least \(6, 16, 32\), got \(5, 16, 32\)"),
        ({"values": torch.ones(6, 32, 16)}, r"expected values to be at least \(6, 16, 32\), got \(6, 32, 16\)"),
        ({"values": torch.ones(6 * 16 * 32)}, r"expected values to be at least \(6, 16, 32\), got \(3072,\)"),
        ({"bias": torch.ones(64)}, r"expected bias to be \(48,\), got \(64,\)"),
        ({"input": torch.ones(2, 64).half()}, r"input \(torch.float16\), values \(torch.float32\).* the same dtype"),
        ({"bias": torch.ones(48).double()}, "the same dtype; convert the input, or run under torch.autocast"),
        ({"values": torch.ones(6, 16, 32, device="meta")}, r"values \(meta\).* must be on the same device"),
        ({"bias": torch.ones(48, device="meta")}, "must be on the same device"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_in_one_line(wrong, message):
    arguments = layer_of_48_by_64()
    block_sparse_linear(**arguments)
    with pytest.raises(TopKastError, match=message) as caught:
        block_sparse_linear(**(arguments | wrong))
    assert "\n" not in str(caught.value)


def test_a_transposed_weight_swaps_the_sides():
    arguments = layer_of_48_by_64() | {"transposed": True}
    with pytest.raises(TopKastError, match=r"expected input to be \(\.\.\., 48\), got \(2, 64\)"):
        block_sparse_linear(**arguments)
    with pytest.raises(TopKastError, match=r"expected bias to be \(64,\), got \(48,\)"):
        block_sparse_linear(**arguments | {"input": torch.ones(2, 48)})


@pytest.mark.parametrize(
    ("shape", "block", "message"),
    [((4,), (16, 16), r"2-D grid .* got a grid of shape \(4,\)"), ((2, 2), (0, 16), r"blocks of \(0, 16\)")],
)
def test_grids_that_are_no_matrix_are_refused(shape, block, message):
    with pytest.raises(TopKastError, match=message):
        pattern_of(torch.zeros(shape, dtype=torch.uint8), block)


def test_grids_too_large_for_their_indices_are_refused():
    none = torch.empty(0, dtype=torch.int64)
    with pytest.raises(TopKastError, match="exceed the int32 limit of 2147483647; use larger blocks"):
        BlockPattern.from_flat(none, none, (2**20, 2**11), (1, 1))


# --- the choice -------------------------------------------------------------------------------------------------------


def test_cpu_uses_torchs_operators_unless_told_otherwise():
    assert choose_block_kernels("auto", CPU, (32, 32), torch.float32) == "torch"
    assert choose_block_kernels("torch", CPU, (5, 7), torch.float64) == "torch"


def test_unknown_operators_are_refused():
    with pytest.raises(TopKastError, match="expected kernels to be one of auto, torch, triton, got 'cuda'"):
        choose_block_kernels("cuda", CPU, (32, 32), torch.float32)


@pytest.mark.parametrize("has_triton", [False, True])
@pytest.mark.parametrize(
    ("device", "block", "dtype", "message"),
    [
        ("cpu", (32, 24), torch.float32, r"expected block sides from \(16, 32, 64, 128\), got \(32, 24\)"),
        ("cpu", (32, 32), torch.float64, "got torch.float64"),
        ("meta", (32, 32), torch.float32, "expected a CUDA device, got meta"),
    ],
)
def test_triton_that_cannot_be_had_is_refused_with_the_way_out(monkeypatch, has_triton, device, block, dtype, message):
    monkeypatch.setattr(choice, "triton_version", lambda: "3.4.0" if has_triton else "")
    message = message if has_triton else "triton is not installed"
    with pytest.raises(TopKastError, match=rf"kernels='triton' is not available: .*{message}.*; use kernels='auto'"):
        choose_block_kernels("triton", torch.device(device), block, dtype)


def test_product_by_kernels_that_cannot_be_had_says_what_it_was_given(monkeypatch):
    monkeypatch.setattr(choice, "triton_version", lambda: "3.4.0")
    pattern = pattern_of(torch.tensor([[2, 1]], dtype=torch.uint8), (16, 32))
    input, values = torch.ones(3, 64, dtype=torch.float64), torch.ones(2, 16, 32, dtype=torch.float64)
    with pytest.raises(TopKastError, match=r"kernels='triton' is not available: .*got torch\.float64"):
        block_sparse_linear(input, values, None, pattern, "triton")


def test_auto_falls_back_to_torch_on_a_gpu_without_triton(monkeypatch):
    monkeypatch.setattr(choice, "triton_version", lambda: "")
    assert choose_block_kernels("auto", torch.device("cuda"), (32, 32), torch.float32) == "torch"


@pytest.mark.parametrize("version", ["3.3.1", "2.10.0", "3.3.0+git1234"])
def test_triton_without_tensor_descriptors_is_too_old(monkeypatch, version):
    monkeypatch.setattr(choice, "triton_version", lambda: version)
    assert choose_block_kernels("auto", torch.device("cuda"), (32, 32), torch.float32) == "torch"
    with pytest.raises(TopKastError, match=rf"expected triton 3\.4 or newer, got {re.escape(version)}; use"):
        choose_block_kernels("triton", torch.device("cuda"), (32, 32), torch.float32)


@pytest.mark.parametrize("version", ["3.4.0", "3.10.0", "4.0", "3.4.0+git1234"])
def test_triton_with_tensor_descriptors_is_new_enough(monkeypatch, version):
    monkeypatch.setattr(choice, "triton_version", lambda: version)
    with pytest.raises(TopKastError, match="expected a CUDA device, got meta"):
        choose_block_kernels("triton", torch.device("meta"), (32, 32), torch.float32)


@pytest.mark.slow
@needs_triton
def test_triton_on_cpu_asks_for_its_interpreter():
    script = """if True:
        import torch
        from lightning_topkast.ops import choose_block_kernels
        try:
            choose_block_kernels("triton", torch.device("cpu"), (32, 32), torch.float32)
        except Exception as error:
            print(type(error).__name__, error)
    """
    said = run_python("-c", script)
    assert "TopKastError" in said
    assert "on CPU it needs TRITON_INTERPRET=1 in the environment" in said


@pytest.mark.slow
def test_the_package_imports_without_triton():
    script = "import sys; sys.modules['triton'] = None; import lightning_topkast; import lightning_topkast.ops"
    run_python("-W", "error", "-c", script)


# --- tiles ------------------------------------------------------------------------------------------------------------


@needs_triton
def test_every_case_has_tiles_to_choose_from():
    from lightning_topkast.ops.blocks import launch

    for height, width in itertools.product((16, 32, 64, 128), repeat=2):
        sizes = {"HEIGHT": height, "WIDTH": width, "DEPTH": width, "BREADTH": height}
        for rows in (1, 16, 17, 33, 64, 65, 1000, 8192):
            arguments = {"batch_bucket": launch.bucket(rows)}
            tiles = {
                config.kwargs["TILE"] for config in launch._product_tiles(launch._PRODUCT_TILES, arguments, **sizes)
            }
            assert min(tiles) >= 64 if rows > 32 else len(tiles) == 1, "sums would depend on tuning"
            assert max(tiles) < 2 * max(rows, 16)
        columns = [
            config.kwargs["SIDE"] * width for config in launch._sampled_tiles(launch._SAMPLED_TILES, {}, **sizes)
        ]
        assert columns
        assert all(128 <= each <= 256 for each in columns)


class Starts(list):
    """In place of the compiler, so that there need be no GPU: what the kernels were started with."""

    def run(self, **options):
        if options.get("DESCRIBED"):
            down = options["TILE"] if "TILE" in options else options["STEP"] // options["ITEM"]
            across = options["DEEP"] if "TILE" in options else options["WIDTH"]
            assert options["dense"].block_shape == [down, across], "boxes of another tile"
        self.append(options)

    def __getitem__(self, at):
        return super().__getitem__(at) if isinstance(at, int) else self.run


@pytest.fixture
def launched(monkeypatch):
    from lightning_topkast.ops.blocks import launch
    from lightning_topkast.ops.blocks.conv import launch as conv

    launched = Starts()

    def measure(call, quantiles):
        call()
        return [-len(launched)] * 3  # the last is the fastest

    monkeypatch.setattr(launch, "fold_kernel", defaultdict(lambda: lambda *_, **__: None))
    monkeypatch.setattr(launch, "_tiles", {})
    for tuner in (launch._product, launch._sampled, conv._product, conv._sampled):
        monkeypatch.setattr(tuner, "fn", launched)
        monkeypatch.setattr(tuner, "cache", {})
        monkeypatch.setitem(vars(tuner), "do_bench", measure)
    return launched


@needs_triton
def test_tuning_tries_the_tiles_that_fit_once_for_each_shape(launched):
    from lightning_topkast.ops.blocks import launch

    layer = blocks.On("triton", "cpu", 0).layer((256, 256), (64, 64), tiers=torch.full((4, 4), 2))
    input, rows, updated = torch.ones(500, 256), layer.pattern.active_by_row, layer.pattern.updated_by_row

    def tried(call) -> list[tuple]:
        launched.clear()
        call()
        names = ("TILE", "SIDE", "STEP", "num_warps", "num_stages")
        return [tuple(options[name] for name in names if name in options) for options in launched]

    for call, fitting in (
        (lambda: launch.product(input, layer.values, None, rows, False), 5),
        (lambda: launch.sampled(input, input, updated, layer.values.shape), 5),
    ):
        first = tried(call)
        assert len(set(first)) == len(first) - 1 == fitting, "each is timed, and the best one runs"
        assert first[-1] == first[-2]
        assert tried(call) == [first[-1]]
    assert len(tried(lambda: launch.product(input[:70], layer.values, None, rows, False))) > 1, "another shape"


def linear_products():
    from lightning_topkast.ops.blocks import launch

    on = blocks.On("triton", "cpu", 0)
    shapes = ((256, 256), (32, 64)), ((256, 256), (64, 32)), ((256, 256), (64, 64)), ((512, 256), (64, 64))
    for shape, dtype, active in itertools.product(shapes, (torch.float32, torch.bfloat16), (0.2, 0.6)):
        layer = on.layer(*shape, dtype, tiers=on.tiers(shape[0][0] // shape[1][0], shape[0][1] // shape[1][1], active))
        values, pattern = layer.values, layer.pattern
        for rows in (100, 500):
            input, grad = (torch.ones(rows, side, dtype=dtype) for side in reversed(pattern.shape))
            yield partial(launch.product, input, values, layer.bias, pattern.active_by_row, False)
            yield partial(launch.product, grad, values, None, pattern.active_by_column, True)
            yield partial(launch.sampled, grad, input, pattern.updated_by_row, values.shape)


def convolutions():
    from lightning_topkast.ops.blocks.conv import launch
    from lightning_topkast.ops.blocks.conv.geometry import Geometry

    kernels, strides, dtypes = ((1, 1), (3, 2), (2, 3)), ((1, 1), (1, 2)), (torch.float32, torch.bfloat16)
    for kernel, stride, dtype, batch in itertools.product(kernels, strides, dtypes, (4, 20)):
        pattern = pattern_of(torch.full((2, 2, *kernel), 2), (32, 64))
        geometry = Geometry(kernel, stride, (1, 1), (1, 1))
        size = geometry.result_size((5, 6))
        values = torch.ones(pattern.updated_count, 32, 64, dtype=dtype)
        images, grads = torch.ones(batch, 5, 6, 128, dtype=dtype), torch.ones(batch, *size, 64, dtype=dtype)
        yield partial(launch.product, images, values, None, pattern.active_by_row, geometry, size, False)
        yield partial(launch.product, grads, values, None, pattern.active_by_column, geometry, (5, 6), True)
        yield partial(launch.sampled, grads, images, pattern.updated_by_row, geometry, values.shape)


@needs_triton
@pytest.mark.parametrize("products", [linear_products, convolutions])
def test_cases_are_told_apart_as_by_triton(launched, monkeypatch, products):
    from lightning_topkast.ops.blocks import launch
    from lightning_topkast.ops.blocks.conv import launch as conv

    calls = list(products())

    def start_all(clears):
        for splits in (1, 2):
            monkeypatch.setattr(launch, "split", lambda *_, splits=splits: (splits, 256))
            for call in calls:
                call()
                if clears:
                    launch._tiles.clear()

    start_all(clears=True)
    by_triton = sum(len(tuner.cache) for tuner in (launch._product, launch._sampled, conv._product, conv._sampled))
    start_all(clears=False)
    assert len(launch._tiles) == by_triton > 10


# --- what the compiler makes of the kernels; needs no GPU -------------------------------------------------------------


@pytest.mark.slow
@needs_triton
def test_kernels_compile_to_tensor_core_instructions_and_wide_copies(tmp_path):
    made = json.loads(run_python(Path(__file__).with_name("block_assembly.py"), TRITON_CACHE_DIR=str(tmp_path)))
    assert {name.split()[0] for name in made} == {"product", "sampled", "conv", "conv_sampled"}
    for name, counts in made.items():
        tensor_core = "wgmma" if "sm_90" in name else "mma"
        assert counts[tensor_core] > 0, f"{name}: no tensor core"
        boxes = "sm_90" in name and "conv" not in name and name != "sampled sm_90 32"
        assert counts["copies of boxes" if boxes else "copies of 16 bytes"] > 0, f"{name}: narrow copies"
        assert counts["atomics"] == 0
        assert counts["shared"] <= (227 if "sm_90" in name else 163) * 1024
