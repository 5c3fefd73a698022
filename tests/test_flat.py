"""The passes over flat entries: compiled and in PyTorch they are the same, bit for bit, and read nothing else."""

import os
import shlex
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_topkast import L1, L2, Norm, Targets, TopKast
from lightning_topkast.ops import flat, memory, passes, step
from lightning_topkast.ops.compiled import Compiled
from lightning_topkast.ops.csr.rows import compressed_rows, flat_indices, transposed
from tests.helpers import has_compiler, needs_compiler, same
from tests.processes import run

# around the blocks and vectors of the compiled functions, and enough for several threads
SIZES = [1, 7, 64, 65, 2047, 2048, 2049, 5000, 100_003]


class Neither:
    """Stands for functions that could not be compiled."""

    def functions(self):
        return None


def both(function, *arguments):
    """What a function returns with the compiled functions, after checking that it is the same without them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "MANY", 0)
        assert passes.passes_over(torch.zeros(1)) is not None
        compiled = function(*arguments)
        patch.setattr(passes, "COMPILED", Neither())
        plain = function(*arguments)
    assert same(bits(compiled), bits(plain))
    return compiled


def bits(result):
    """The same with every float32 as an integer, since NaN differs from itself and -0 does not from 0."""
    if isinstance(result, torch.Tensor):
        return result.view(torch.int32) if result.dtype == torch.float32 else result
    return tuple(map(bits, result)) if isinstance(result, tuple | list) else result


def sets(size, seed, active=0.1, exploring=0.2):
    """Random tiers with what a masked weight keeps of them: members, exploring places, and values."""
    generator = torch.Generator().manual_seed(seed)
    lottery, theta = torch.rand(size, generator=generator), torch.randn(size, generator=generator)
    theta[::11] = 0.0
    theta[::13] = -0.0
    tiers = (lottery < active + exploring).to(torch.uint8) + (lottery < active).to(torch.uint8)
    places = (tiers == 1).nonzero().flatten()
    return tiers, -(tiers != 0).to(torch.int8), places, theta


@needs_compiler
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_masking_moving_and_filling_are_the_same(size, dtype):
    _, members, places, theta = sets(size, 0)
    theta = theta.to(dtype)
    theta[::5] = float("nan")

    def passes():
        masked, filled, written = theta.clone(), theta.clone(), theta.clone()
        flat.mask_outside_(masked, members)
        flat.fill_(filled, places, 0.5)
        flat.put_(written, places, theta.new_full((places.numel(),), -0.0))
        return [each.view(torch.uint8) for each in (masked, filled, written, flat.take(theta, places))]

    both(passes)


@needs_compiler
@given(size=st.sampled_from(SIZES), seed=st.integers(0, 99), threads=st.sampled_from([1, 3]))
@settings(max_examples=60, deadline=None)
def test_two_sorted_runs_of_places_are_passed_over_together(size, seed, threads):
    tiers, _, second, theta = sets(size, seed, active=0.3 * (seed % 3 > 0), exploring=0.2 * (seed % 4 > 0))
    first = (tiers == 2).nonzero().flatten()
    places = torch.cat([first, second])

    def passes():
        written = flat.put_(theta.clone(), places, places.float(), first.numel())
        return written, flat.take(theta, places, first.numel())

    torch.set_num_threads(threads)
    written, taken = both(passes)
    torch.set_num_threads(1)
    assert torch.equal(taken, theta[places])
    assert torch.equal(written, torch.where(tiers > 0, torch.arange(size).float(), theta))


@needs_compiler
def test_a_gradient_in_another_memory_order_is_masked_entry_by_entry():
    gradient = torch.randn(6, 5, 3, 3).to(memory_format=torch.channels_last)
    members = -(torch.rand(6, 5, 3, 3) < 0.5).to(torch.int8)

    def masked(members):
        result = gradient.clone()
        flat.mask_outside_(result, members)
        return result.contiguous()

    expected = torch.where(members.bool(), gradient, 0.0).contiguous()
    assert torch.equal(both(masked, members), expected)
    assert torch.equal(both(masked, members.to(memory_format=torch.channels_last)), expected)


@needs_compiler
def test_autograd_hears_of_what_is_written():
    weight, members = torch.ones(8, requires_grad=True), torch.zeros(8, dtype=torch.int8)
    product = weight.square().sum()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(passes, "MANY", 0)
        flat.mask_outside_(weight.detach(), members)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@needs_compiler
@given(size=st.sampled_from(SIZES), seed=st.integers(0, 99), threads=st.sampled_from([1, 3]))
@settings(max_examples=60, deadline=None)
def test_closing_in_one_pass_is_what_the_steps_do_one_by_one(size, seed, threads):
    _, members, places, values = sets(size, seed)
    factors = [(0.999, 1 - 1e-4), (1.0, 1.0), (0.0, 0.5)][seed % 3]
    values[:: seed + 2] = float("inf")
    explored = values[places] * torch.tensor(factors[0])
    expected = values.clone()
    expected[places] = 0
    expected = torch.where(members.bool(), expected, 0.0) * torch.tensor(factors[1])
    taken, is_open = torch.zeros_like(explored), bytearray([1])
    torch.set_num_threads(threads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "MANY", 0)
        assert step.close_(step.Entries(values, members, places, taken, factors), is_open)
    torch.set_num_threads(1)
    assert same(bits([values, taken]), bits([expected, explored]))
    assert not is_open[0]


@needs_compiler
@given(size=st.sampled_from(SIZES), seed=st.integers(0, 99), share=st.sampled_from([0.0, 0.02, 1.0]))
@settings(max_examples=60, deadline=None)
def test_changes_of_the_sets_are_the_same(size, seed, share):
    tiers, members, places, theta = sets(size, seed, active=0.3 * (seed % 2))
    redrawn = torch.rand(size, generator=torch.Generator().manual_seed(seed)) < share
    after = torch.where(redrawn, sets(size, seed + 1)[0], tiers)
    alpha, explored = theta * (tiers == 2), theta[places]

    def found():
        latent = torch.where(tiers == 0, theta, torch.where(tiers == 1, 7.0, 0.0))  # that of exploring entries is old
        change = flat.changes(alpha, latent, members, places, explored, after)
        return change, torch.where(after == 1, 0.0, latent), flat.magnitudes(alpha, latent, places, explored)

    (change, latent, magnitudes) = both(found)
    assert torch.equal(change.places, (after != tiers).nonzero().flatten())
    assert torch.equal(change.before, tiers[change.places])
    assert torch.equal(change.after, after[change.places])
    assert torch.equal(change.exploring, (after == 1).nonzero().flatten())
    assert torch.equal(change.explored, theta[change.exploring])
    assert torch.equal(latent[tiers == 1], torch.where(after == 1, 0.0, theta)[tiers == 1])
    assert torch.equal(magnitudes, theta.abs())


@needs_compiler
@given(size=st.sampled_from(SIZES), seed=st.integers(0, 99), levels=st.sampled_from([1, 3, 10_000]))
@settings(max_examples=60, deadline=None)
def test_scores_are_compared_alike(size, seed, levels):
    scores = (torch.rand(size, generator=torch.Generator().manual_seed(seed)) * levels).floor() / levels
    brackets = [(0.2, 0.4), (0.3, 0.3), (-float("inf"), 0.1), (0.5, float("inf"))][: seed % 5]
    both(lambda: flat.scan(scores, brackets))
    for bad in (float("nan"), float("inf"), -float("inf")):
        broken = scores.clone()
        broken[size // 2] = bad
        assert both(lambda: flat.scan(broken, brackets)) is None  # noqa: B023


@needs_compiler
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (64, 64), (50, 2049), (300, 5)])
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_rows_and_their_transpose_are_the_same(shape, density):
    rows, columns = shape
    entries = (torch.rand(rows * columns) < density).nonzero().flatten()

    def pattern():
        crow, col = compressed_rows(entries, rows, columns)
        back = torch.empty_like(entries)
        flat_indices(crow, col, columns, out=back)
        return crow, col, *transposed(crow, col, columns), back

    assert torch.equal(both(pattern)[-1], entries)


@needs_compiler
@pytest.mark.parametrize("size", SIZES)
def test_values_move_to_the_places_of_other_sets(size):
    def order(seed):
        tiers = sets(size, seed)[0]
        return torch.cat([flat.indices_of(tiers, tier) for tier in (2, 1)])

    before, after = both(order, 1), both(order, 2)
    sources = both(flat.positions, before, after, size)
    table = {place: at for at, place in enumerate(before.tolist())}
    assert sources.tolist() == [table.get(place, -1) for place in after.tolist()]
    moved = both(flat.moved, before.float(), sources, 0.5)
    assert torch.equal(moved, torch.where(sources < 0, 0.5, after.float()))


@needs_compiler
@pytest.mark.parametrize("storage", ["masked", "packed"])
@pytest.mark.parametrize("penalty", ["l2", L2(strength=3.0), L1(strength=1e-3), Norm(strength=1e-3), None])
def test_a_run_has_the_same_bits_without_a_compiler(storage, penalty):
    def trained():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(9, 33), nn.ReLU(), nn.Linear(33, 40), nn.ReLU(), nn.Linear(40, 3))
        topkast = TopKast(model, 0.9, 0.7, update_every=3, penalty=penalty, storage=storage)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.03)
        topkast.attach(optimizer)
        for _ in range(10):
            optimizer.zero_grad()
            model(torch.randn(16, 9)).square().sum().backward()
            optimizer.step()
        state = optimizer.state_dict()["state"]
        return [*model.state_dict().values()], topkast.state_dict(), [[*each.values()] for each in state.values()]

    both(trained)


def test_without_a_compiler_nothing_is_said(monkeypatch, tmp_path, caplog, recwarn):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "/no/such/compiler")
    monkeypatch.setattr(passes, "COMPILED", Compiled(passes.COMPILED.source, "large weights"))
    values = torch.ones(passes.MANY)
    flat.mask_outside_(values, torch.zeros(passes.MANY, dtype=torch.int8))
    assert not values.any()
    assert not [record for record in caplog.records if record.levelname != "DEBUG"]
    assert not recwarn


def test_small_weights_compile_nothing(monkeypatch):
    class Refuses:
        def functions(self):
            raise AssertionError("compiled for a small weight")

    monkeypatch.setattr(passes, "COMPILED", Refuses())
    flat.mask_outside_(torch.ones(100), torch.zeros(100, dtype=torch.int8))


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_compiler), False])
def test_a_refresh_resets_state_of_entries_that_leave_or_enter_b_and_all_of_state_that_it_does_not_know(
    monkeypatch, compiled
):
    monkeypatch.setattr(passes, "MANY", 0 if compiled else 1 << 60)
    torch.manual_seed(0)
    model = nn.Linear(40, 40, bias=False)
    topkast = TopKast(model, 0.9, 0.8, targets=Targets(keep_first_dense=False, keep_last_dense=False))
    optimizer = torch.optim.Adam(model.parameters())
    topkast.attach(optimizer)
    (weight,) = topkast.weights.values()
    model(torch.randn(8, 40)).square().sum().backward()
    optimizer.step()
    state = optimizer.state[model.weight]
    for turn in range(3):
        before = weight.updated
        if turn == 2:  # other memory, of which the last refresh knew nothing
            state["exp_avg"] = torch.ones(40, 40)
        state["exp_avg"][~before] = 1.0  # which an optimizer may leave there
        state["exp_avg"][before] = 2.0
        weight.parameter.detach()[weight.active] *= torch.rand(int(weight.active.sum()))
        topkast.refresh()
        after = weight.updated
        assert not torch.equal(before, after)
        assert (state["exp_avg"][before & after] == 2).all()
        assert (state["exp_avg"][before ^ after] == 0).all()
        assert turn == 1 or (state["exp_avg"][~after] == 0).all()


@needs_compiler
def test_steps_and_refreshes_on_cpu_know_no_default_device(monkeypatch):
    monkeypatch.setattr(passes, "MANY", 0)
    model = nn.Sequential(nn.Linear(40, 40))
    topkast = TopKast(model, 0.8, 0.5, update_every=2, targets=Targets(keep_first_dense=False, keep_last_dense=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    topkast.attach(optimizer)
    x = torch.randn(4, 40)
    with torch.device("meta"):  # stands for a GPU
        for _ in range(4):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    assert topkast.refresh_count == 2
    assert int(topkast.weights["0.weight"].active_entries) == 320


# Memory


def address(tensor):
    return tensor.untyped_storage().data_ptr()


def test_memory_is_used_again_once_nothing_refers_to_it(monkeypatch):
    monkeypatch.setattr(memory, "_kept", [])
    size = memory._LARGE
    first = memory.empty(size, torch.float32)
    part, where = first[:10], address(first)
    del first
    second = memory.empty(size, torch.float32)
    assert address(second) != where, "a part of it is in use"
    del part
    third = memory.empty(size - 1, torch.float32)
    assert (address(third), third.shape, third.dtype) == (where, (size - 1,), torch.float32)
    del third
    assert address(memory.empty(size // 2, torch.float32)) not in (where, address(second)), (
        "that would waste half of it"
    )


def test_no_more_memory_is_kept_than_the_limit(monkeypatch):
    monkeypatch.setattr(memory, "_kept", [])
    monkeypatch.setattr(memory, "_MOST", 3 * memory._LARGE)
    tensors = [memory.empty(memory._LARGE, torch.uint8) for _ in range(10)]
    assert len(memory._kept) == 10
    del tensors
    memory.empty(2 * memory._LARGE, torch.uint8)
    assert sum(kept.nbytes for kept, user in memory._kept if user() is None) <= 5 * memory._LARGE


@needs_compiler
@pytest.mark.parametrize("busy", [memory, passes.COMPILED], ids=["memory", "kernels"])
def test_a_signal_handler_that_saves_need_not_wait_for_whom_it_interrupts(busy, monkeypatch):
    monkeypatch.setattr(passes.COMPILED, "_functions", None)
    done = threading.Event()

    def interrupted():
        with busy._lock:  # as if the handler ran here
            flat.take(memory.empty(memory._LARGE, torch.float32), torch.tensor([0]))
            done.set()

    threading.Thread(target=interrupted, daemon=True).start()
    assert done.wait(60)


def test_small_tensors_and_empty_ones_have_memory_of_their_own(monkeypatch):
    monkeypatch.setattr(memory, "_kept", [])
    assert memory.empty(0, torch.bfloat16).shape == (0,)
    assert memory.empty(5, torch.int64).dtype == torch.int64
    assert memory._kept == []


# An address sanitizer


def sanitized(folder):
    """An environment in which every C++ source is built with the compiler's address sanitizer, if it has one."""
    if not has_compiler or sys.platform != "linux":
        pytest.skip("no address sanitizer")
    compiler, *rest = (os.environ.get("CXX") or "c++").split()
    # it comes before Python in the process; and the library that throws C++ exceptions, which it wraps
    names = [f"-print-file-name={name}" for name in ("libasan.so", "libstdc++.so.6")]
    paths = [subprocess.run([compiler, name], capture_output=True, text=True).stdout.strip() for name in names]
    if not all(Path(path).is_absolute() for path in paths):
        pytest.skip("no address sanitizer")
    wrapper = Path(folder, "sanitizing")
    command = shlex.join([compiler, *rest, "-fsanitize=address", "-fno-omit-frame-pointer", "-g"])
    wrapper.write_text(f'#!/bin/sh\nexec {command} "$@" -O1\n')  # the last level counts; more takes minutes
    wrapper.chmod(0o700)
    return os.environ | {
        "CXX": str(wrapper),
        "TORCH_EXTENSIONS_DIR": str(folder),
        "LD_PRELOAD": " ".join(paths),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python leaves memory to the end of the process
        "OMP_NUM_THREADS": "1",
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tests", "source"),
    [
        ("test_flat.py", "ops_flat"),
        ("test_one_pass.py", "ops_flat"),
        ("test_ops.py", "csr_kernels"),
        ("test_conv.py", "conv_kernels"),
    ],
)
def test_compiled_functions_stay_within_their_tensors(tests, source, tmp_path):
    """The tests over random shapes pass where a wrong access would end the process."""
    path = Path(__file__).with_name(tests)
    building = "not built and not compilers and not damaged and not libraries and not cache"  # needs no kernels
    command = [sys.executable, "-m", "pytest", "-m", "not slow", "-k", building, "-p", "no:cacheprovider", path]
    done = run(command, env=sanitized(tmp_path), cwd=path.parents[1])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert [*tmp_path.rglob(f"{source}_*.so")], "nothing was built"


@pytest.mark.slow
def test_a_wrong_access_is_noticed(tmp_path):
    program = """
        import torch
        from lightning_topkast.ops import flat, passes
        passes.MANY = 0
        flat.take(torch.zeros(1000), torch.tensor([1000]))
        """
    done = run([sys.executable, "-c", textwrap.dedent(program)], env=sanitized(tmp_path))
    assert done.returncode
    assert "heap-buffer-overflow" in done.stderr
    assert "topkast_take" in done.stderr
