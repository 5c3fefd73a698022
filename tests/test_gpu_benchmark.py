"""The benchmark for a GPU, without one: what its rows hold, its arithmetic, and that it ends in time."""

import importlib.util
import itertools
import json
import os
import signal
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from subprocess import DEVNULL
from unittest import mock

import pytest
import torch
from torch.sparse._semi_structured_conversions import _sparse_semi_structured_tile
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_topkast.engine.cuda_graph import CudaGraph
from tests import benchmark_parts, processes

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PARTS = ["linear", "block", "stack", "layer", "conv", "masked", "refresh", "offload", "semi"]
PAIRS = ("80% / 50%", "90% / 80%", "95% / 90%", "98% / 95%")


def run_gpu(*arguments):
    run = processes.run([sys.executable, BENCHMARKS / "gpu.py", *arguments])
    assert run.returncode == 0, run.stderr
    return run


@pytest.fixture
def gpu(monkeypatch):
    """Import a module of the benchmark."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


# --- all parts in tiny sizes on CPU -------------------------------------------------------------------------------


def test_checks_run_in_the_interpreter_where_there_is_no_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, on which it would take minutes")
    run = run_gpu("--quick", "--parts", "semi", "--json", tmp_path / "figures.json")
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [row["library"] for row in figures["parts"]["semi"]["rows"]] == ["torch's choice", "cuSPARSELt", "CUTLASS"]
    if importlib.util.find_spec("triton") is None:
        assert "There is no GPU, and triton is not installed: nothing is checked or timed." in run.stdout
    else:
        assert "There is no GPU: the checks run in Triton's interpreter, and nothing is timed." in run.stdout
        assert [row["result"] for row in figures["checks"]] == ["passed", "passed", "passed"]


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """The figures; on CPU, where the same code times tiny sizes by torch's operators."""
    path = tmp_path_factory.mktemp("gpu") / "figures.json"
    printed = run_gpu("--rehearse", "--minutes", "60", "--json", path).stdout
    return json.loads(path.read_text()) | {"printed": printed}


@pytest.fixture
def rows(rehearsal):
    return {name: part["rows"] for name, part in rehearsal["parts"].items()}


def test_every_part_runs_to_its_end(rehearsal):
    assert list(rehearsal["parts"]) == PARTS
    for part in rehearsal["parts"].values():
        assert (part["failed"], part["left_out"]) == (None, None)
        assert part["seconds"] > 0
    assert "rehearsal" in rehearsal["device"]


def test_what_was_timed_is_recorded(rehearsal):
    about = rehearsal["about"]
    assert about["torch"] == torch.__version__
    assert about["commit"] is None or len(about["commit"].rstrip("+")) == 40
    assert {"device", "python", "triton", "machine", "clocks before"} <= about.keys()


def test_aims_are_summed_up_also_where_they_are_not_measured(rehearsal):
    summary = rehearsal["printed"].partition("### Aims")[2]
    assert len(rehearsal["aims"]) == 3 + (3 + 3) + 2 + 3 + 4 + 1 + 3
    for row in rehearsal["aims"]:
        assert (row["measured"], row["met"]) == (None, "not measured"), "these sizes are not those of the aims"
        assert row["aim"] in summary


def test_a_linear_layers_step_is_launched_in_four_ways(rows):
    (row,) = rows["linear"]
    assert (row["width"], row["rows"], row["block"], row["sparsity"]) == (128, 48, 16, "90% / 80%")
    for kind in ("dense", "sparse"):
        assert row[f"best {kind} ms"] == min(row[f"eager {kind} ms"], row[f"compiled {kind} ms"])
        for way in ("captured", "compiled, captured"):
            assert "CUDA" in row[f"{way} {kind} failed"]
    assert row["from Python"] == pytest.approx(row["best dense ms"] / row["best sparse ms"])


def test_a_transformer_block_is_timed_and_its_bytes_are_counted(rows):
    assert [row["sparsity"] for row in rows["block"]] == list(PAIRS[1:3])
    for row in rows["block"]:
        assert row["speed"] == pytest.approx(row["dense ms"] / row["sparse ms"])
        assert row["from Python"] == pytest.approx(row["best dense ms"] / row["best sparse ms"])
        assert row["compiled sparse ms"] > 0
        backward = 1 - int(row["sparsity"].split("/")[1].rstrip("%")) / 100
        assert row["bytes"] == pytest.approx(backward, abs=0.03), "biases and norms are dense"


PACKED = ["packed 90% / 80%", "packed 95% / 90%"]
TRANSFORMER = 2 * (12 * 128**2 + 13 * 128) + (256 + 16 + 256) * 128 + 2 * 128 + 256  # entries


def test_a_transformer_trains_in_every_variant(rows):
    found = {row["variant"]: row for row in rows["stack"]}
    assert list(found) == ["dense", *(f"{name}, blocks of 16" for name in PACKED), "2:4 by torch"]
    assert "_sparse_semi_structured_tile" in found.pop("2:4 by torch")["failed"]
    for row in found.values():
        assert (row["blocks"], row["tokens a step"]) == (2, 2 * 16)
        assert row["B parameters"] * 1e9 == pytest.approx(TRANSFORMER), "packed weights count whole"
        assert row["tokens/s"] == pytest.approx(32e3 / min(row["eager ms"], row["compiled ms"]))
        assert row["× dense"] == pytest.approx(row["tokens/s"] / found["dense"]["tokens/s"])
        assert row["graphs"] == 1, "one for all blocks"
        assert row["last loss"] < row["first loss"]
    held = [row["held GB"] * 1e9 for row in found.values()]
    assert held[0] == pytest.approx(16 * TRANSFORMER, rel=1e-3)
    packed = 2 * 12 * 128**2
    assert held[1] == pytest.approx(16 * (TRANSFORMER - 0.8 * packed), rel=1e-2)
    assert held[2] == pytest.approx(16 * (TRANSFORMER - 0.9 * packed), rel=1e-2)


def test_what_does_not_fit_dense_is_compared_with_offloading(rows):
    assert [row["variant"] for row in rows["offload"]] == ["FSDP2 with CPU offload", "dense", *PACKED]
    first = rows["offload"][0]
    for row in rows["offload"]:
        assert "failed" not in row
        assert row["blocks"] == 2
        assert row["room GB"] == 0.005
        assert row["× FSDP2 with CPU offload"] == pytest.approx(row["tokens/s"] / first["tokens/s"])
    assert first["held GB"] == rows["offload"][1]["held GB"] > rows["offload"][1]["room GB"]
    assert first["first loss"] == pytest.approx(rows["offload"][1]["first loss"], rel=1e-2), "the same network"


def test_every_part_of_a_layers_step_is_timed(rows):
    found = [(row["width"], row["block"], row["sparsity"], row["part"]) for row in rows["layer"]]
    assert found == list(itertools.product([128], [16, 32], PAIRS, ["forward", "dx", "dW", "step"]))
    for row in rows["layer"]:
        assert row["speed"] == pytest.approx(row["dense ms"] / row["sparse ms"])
        forward, backward = (1 - int(part.rstrip("% ")) / 100 for part in row["sparsity"].split("/"))
        limit = {"dW": 1 / backward, "step": 3 / (2 * forward + backward)}.get(row["part"], 1 / forward)
        assert row["of limit"] == pytest.approx(row["speed"] / limit)
        if row["part"] == "step":
            assert 0 < row["error"] < 0.02, "the products are in bfloat16"
            assert row["eager speed"] == pytest.approx(row["eager dense ms"] / row["eager sparse ms"])


def test_masked_steps_and_refreshes_are_timed(rows):
    (row,) = rows["masked"]
    assert row["ratio"] > 0
    assert row["refresh %"] == pytest.approx(100 * row["refresh ms"] / 5 / row["dense ms"]), "spread over 5 steps"
    found = [(row["of"], row["structure"]) for row in rows["refresh"]]
    assert found == list(itertools.product(["a weight", "a transformer"], ["unstructured", "block", "2:4"]))
    for row in rows["refresh"]:
        assert row["refresh ms"] > 0
        assert 0 < row["entries that change their set, %"] < 20


def test_2_to_4_weights_are_multiplied_where_a_gpu_can(rows):
    assert [row["library"] for row in rows["semi"]] == ["torch's choice", "cuSPARSELt", "CUTLASS"]
    assert all("Only CUDA tensors" in row["failed"] for row in rows["semi"])


# --- sizes and aims -----------------------------------------------------------------------------------------------


def test_depths_follow_from_parameters_and_memory(gpu):
    stack = gpu("gpu_stack")
    block = 12 * 4096**2 + 13 * 4096
    assert stack.block_parameters(4096) == block
    assert stack.depth_of(4096, stack.SIZES["full"].parameters) == 5
    assert 5 * block == pytest.approx(1e9, rel=0.01)
    depth = stack.depth_beyond(4096, 24e9)
    assert (depth - 1) * block * 16 <= 24e9 < depth * block * 16


def layer_step(pair, block, speed, width=8192):
    return {"width": width, "block": block, "sparsity": pair, "part": "step", "speed": speed}


AIMS = [
    ("gpu_linear", [{"width": 4096, "rows": 8192, "block": 64, "sparsity": PAIRS[1], "from Python": 2.4},
                    {"width": 4096, "rows": 8192, "block": 128, "sparsity": PAIRS[1], "from Python": 2.5},
                    {"width": 4096, "rows": 8192, "block": 128, "sparsity": PAIRS[2], "from Python": 3.9},
                    {"width": 4096, "rows": 8192, "block": 128, "sparsity": PAIRS[3], "failed": "memory"},
                    {"width": 1024, "rows": 8192, "block": 128, "sparsity": PAIRS[3], "from Python": 9.0}],
     [(2.5, "met"), (3.9, "not met"), (None, "not measured")]),
    ("gpu_block", [{"width": 4096, "sparsity": PAIRS[0], "from Python": 9.0, "held": 0.5},
                   {"width": 4096, "sparsity": PAIRS[2], "from Python": 2.9, "held": 0.25},
                   {"width": 4096, "sparsity": PAIRS[3], "from Python": 4.0, "failed": "memory"}],
     [(None, "not measured"), (2.9, "not met"), (4.0, "met"),
      (None, "not measured"), (0.25, "met"), (None, "not measured")]),
    ("gpu_stack", [{"width": 4096, "variant": "dense", "× dense": 1.0},
                   {"width": 4096, "variant": f"{PACKED[0]}, blocks of 128", "× dense": 1.9},
                   {"width": 4096, "variant": f"{PACKED[0]}, blocks of 64", "× dense": 2.1},
                   {"width": 4096, "variant": f"{PACKED[1]}, blocks of 128", "× dense": 2.9},
                   {"width": 4096, "variant": f"{PACKED[1]}, blocks of 64", "failed": "memory"}],
     [(2.1, "met"), (2.9, "not met")]),
    ("gpu_layer", [layer_step(PAIRS[1], 128, 4.0), layer_step(PAIRS[2], 32, 9.0), layer_step(PAIRS[3], 64, 11.0)],
     [(4.0, "met"), (None, "not measured"), (11.0, "not met")]),
]  # fmt: skip


@pytest.mark.parametrize(("module", "rows", "expected"), AIMS, ids=[module for module, _, _ in AIMS])
def test_an_aim_is_met_by_the_best_of_its_rows(gpu, module, rows, expected):
    assert [(row["measured"], row["met"]) for row in gpu(module).aims(rows)] == expected


def test_a_row_says_why_it_failed_and_keeps_what_it_had(gpu):
    def figures():
        yield {"eager ms": 1.0}
        raise torch.OutOfMemoryError("out of memory\nwith details")

    row = gpu("gpu_timing").filled({"variant": "dense"}, figures(), torch.device("cpu"))
    assert row == {"variant": "dense", "eager ms": 1.0, "failed": "OutOfMemoryError: out of memory"}


class Capture:
    """Stands in for `torch.cuda.graph`; its end raises, as that of a capture that has failed."""

    def __init__(self, graph, stream, capture_error_mode, fails=False):
        self.fails = fails

    def __enter__(self):
        pass

    def __exit__(self, *error):
        if self.fails:
            raise RuntimeError("the capture is not valid")


@pytest.fixture
def captures(gpu, monkeypatch):
    """A training, with stand-ins for streams and graphs: a replay is a step."""
    training = gpu("gpu_training").Training(
        torch.nn.Linear(32, 32, dtype=torch.bfloat16), torch.randn(8, 32, dtype=torch.bfloat16, requires_grad=True)
    )
    monkeypatch.setattr(CudaGraph, "supports", lambda tensor: True)
    monkeypatch.setattr(torch.cuda, "Stream", mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "current_stream", mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: mock.Mock(replay=training.step))
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    return training


def test_a_capture_is_of_whole_steps(captures, monkeypatch):
    captures.captured(captures.model)()
    assert captures.optimizer.state[captures.model.weight]["step"] == 3 + 1 + 1 + 1
    monkeypatch.setattr(torch.cuda, "CUDAGraph", mock.Mock)
    with pytest.raises(AssertionError, match="a replay changes no parameter"):
        captures.captured(captures.model)


def test_a_capture_that_fails_says_what_failed_first(captures, monkeypatch):
    monkeypatch.setattr(torch.cuda, "graph", partial(Capture, fails=True))
    with pytest.raises(RuntimeError, match="the capture is not valid"):
        captures.captured(captures.model)
    calls = itertools.count()

    def forward(x):
        if next(calls) == 3:
            raise ValueError("a step waits for the device")
        return captures.model(x)

    with pytest.raises(ValueError, match="a step waits for the device"):
        captures.captured(forward)


class AsksForValues(TorchDispatchMode):
    """Counts operators for whose result the host waits."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("pair", [None, (0.9, 0.8)], ids=["dense", "packed"])
def test_a_step_asks_no_tensor_for_its_value(gpu, pair):
    x = torch.randn(8, 64, dtype=torch.bfloat16, requires_grad=True)
    training = gpu("gpu_training").Training(torch.nn.Linear(64, 64, dtype=torch.bfloat16), x, pair, 16)
    for _ in range(2):
        training.step()
    with AsksForValues() as asked:
        training.step()
        assert asked.count == 0, "a CUDA graph cannot be captured"
        x.sum().item()
        assert asked.count == 1


def test_semi_structured_layers_train_with_a_dense_gradient(gpu, monkeypatch):
    semi = gpu("gpu_semi")
    kind = torch.sparse.SparseSemiStructuredTensorCUSPARSELT
    device = torch.device("cpu")
    monkeypatch.setattr(kind, "prune_dense_static_sort", _sparse_semi_structured_tile)
    semi.check_semi(device)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU())
    semi.make_semi(model)
    x = torch.randn(2, 4, 64, requires_grad=True)
    model(x).float().sum().backward()
    assert model[0].weight.grad.count_nonzero() > 0.9 * 64 * 64
    assert x.grad.shape == x.shape
    monkeypatch.setattr(kind, "prune_dense_static_sort", lambda weight: weight)
    with pytest.raises(AssertionError, match="more than two entries"):
        semi.check_semi(device)


# --- time -----------------------------------------------------------------------------------------------------------


def run_parts(gpu, seconds, **measures):
    """The last result of each part; sizes and shares are given beside what measures."""
    module = gpu("gpu_parts")
    parts = {
        name: module.Part(name, {"tiny": size}, measure, share=share)
        for name, (measure, size, share) in measures.items()
    }
    end = time.monotonic() + seconds
    results = dict(module.run_parts(parts, "tiny", torch.device("cpu"), end))
    assert time.monotonic() < end + 5
    assert all(result.seconds is not None for result in results.values())
    return results


def test_a_part_that_hangs_is_ended_and_the_next_ones_run(gpu):
    results = run_parts(
        gpu, 60, hangs=(benchmark_parts.hangs, 0, 1), rows=(benchmark_parts.rows, 3, 2)
    )  # the first one has 20 s, and half as many more  # fmt: skip
    assert [len(result.rows) for result in results.values()] == [1, 3]
    assert "it was ended in the middle of one" in results["hangs"].left_out
    assert 19 < results["hangs"].seconds < 35
    assert results["rows"].left_out is None


def test_a_part_has_its_share_and_begins_no_row_after_it(gpu):
    results = run_parts(gpu, 45, slow=(benchmark_parts.slow, 100, 1), rows=(benchmark_parts.rows, 3, 2))
    assert "its time was over" in results["slow"].left_out
    assert len(results["slow"].rows) < 16
    assert len(results["rows"].rows) == 3


def test_a_part_is_left_out_when_time_is_over(gpu):
    results = run_parts(gpu, 3, rows=(benchmark_parts.rows, 3, 1))
    assert results["rows"].rows == []
    assert results["rows"].left_out == "all of it: 3 s were left for it"


@pytest.mark.parametrize(
    ("measure", "message"),
    [(benchmark_parts.raises, "ValueError: a part is broken"), (benchmark_parts.dies, "exit code 7")],
)
def test_a_part_that_fails_keeps_its_rows_and_the_next_ones_run(gpu, measure, message):
    results = run_parts(gpu, 600, fails=(measure, 0, 1), rows=(benchmark_parts.rows, 3, 1))
    assert results["fails"].rows == [{"number": 0}]
    assert message in results["fails"].failed
    assert (results["rows"].failed, len(results["rows"].rows)) == (None, 3)


def processes_with(mark):
    """Ids of the processes in whose environment this is."""
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # it has ended, or is somebody else's
            if mark.encode() in environment.read_bytes():
                found.append(environment.parent.name)
    return found


def test_what_was_measured_outlives_a_kill(tmp_path):
    path = tmp_path / "figures.json"
    command = [sys.executable, BENCHMARKS / "gpu.py", "--rehearse", "--minutes", "60", "--json", path]
    mark = f"GPU_BENCHMARK={tmp_path}"
    variables = os.environ | dict([mark.split("=")])
    with processes.started(
        [*command, "--parts", "layer", "stack"], variables, stdout=DEVNULL, stderr=DEVNULL
    ) as process:
        figures = {"parts": {}}
        while not figures["parts"]:
            assert process.poll() is None
            figures = json.loads(path.read_text()) if path.exists() else figures
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if Path("/proc/self/environ").exists():
            end = time.monotonic() + 5
            while others := processes_with(mark):
                assert time.monotonic() < end, f"{others} are still on the device"
                time.sleep(0.1)
    figures = json.loads(path.read_text())
    assert list(figures["parts"]) == ["stack"]
    stack = figures["parts"]["stack"]
    assert stack["rows"][0]["variant"] == "dense"
    assert stack["seconds"] is None, "it was not at its end"


def test_figures_stay_whole_while_they_are_replaced(gpu, tmp_path, monkeypatch):
    write, path = gpu("gpu").write, tmp_path / "figures.json"
    write({"parts": {"block": [1]}}, path)
    monkeypatch.setattr(os, "replace", mock.Mock(side_effect=OSError("the machine is gone")))
    with pytest.raises(OSError, match="is untouched"):
        write({"parts": {}}, path)
    assert json.loads(path.read_text()) == {"parts": {"block": [1]}}
    assert list(tmp_path.iterdir()) == [path]


def test_parts_that_are_not_there_are_refused():
    run = processes.run([sys.executable, BENCHMARKS / "gpu.py", "--parts", "nothing"])
    assert run.returncode == 2
    assert "invalid choice: 'nothing'" in run.stderr
