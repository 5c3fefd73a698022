"""The benchmarks run, and print what they promise."""

import json
import re
import runpy
import statistics
import sys
from pathlib import Path

import pytest

from tests import processes
from tests.app.data_files import write_fashion_mnist

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run_benchmark(name, *arguments, launcher=()):
    run = processes.run([sys.executable, *launcher, BENCHMARKS / name, *arguments], check=False)
    assert run.returncode == 0, run.stderr
    return run


def test_step_overhead_compares_every_variant_on_every_network(tmp_path):
    run = run_benchmark("step_overhead.py", "--quick", "--json", tmp_path / "figures.json")
    figures = json.loads((tmp_path / "figures.json").read_text())

    for network in ("MLP", "ResNet-18", "transformer"):
        rows = [row for row in figures["steps"] if row["network"] == network]
        assert {row["variant"] for row in rows} == {
            "dense",
            "dense again",
            "masked",
            "rigl-torch",
            "WeightNormSparsifier",
        }
        for row in rows:
            if row["variant"] in ("dense", "dense again", "masked"):
                assert "failed" not in row
            assert row.get("failed") or min(row["early ratio"], row["late ratio"]) > 0
        (masked,) = (row for row in figures["states"] if row["network"] == network and row["variant"] == "masked")
        assert masked["refresh ms"] > 0
        assert 5 <= masked["extra bytes/entry"] <= 9

    assert {row["weights"].split()[0] for row in figures["refresh"]} == {"1", "4"}
    assert [row["mask"] for row in figures["masks"]] == ["int8, all bits set (ours)", "uint8", "float32", "bool"]
    assert {row["met"] for row in figures["aims"]} <= {"met", "not met"}
    for title in ("MLP: a step", "ResNet-18: refresh and memory", "Refresh of large weights", "Aims"):
        assert f"### {title}" in run.stdout


def test_packed_times_every_variant_and_counts_its_bytes(tmp_path):
    run_benchmark("packed.py", "--quick", "--json", tmp_path / "figures.json", "--plot", tmp_path / "speed.png")
    figures = json.loads((tmp_path / "figures.json").read_text())
    rows = [row for row in figures["rows"] if "failed" not in row]
    failed = {row["variant"] for row in figures["rows"] if "failed" in row}
    assert failed <= {"sparselab", "sparseprop", "packed, compiled"}, "a peer or a compiler may be missing"
    assert {"dense", "masked", "packed, torch", "compact"} <= {row["variant"] for row in rows}
    for row in rows:
        assert row["speed"] > 0
        if row["network"].startswith("MLP") and row["variant"] == "packed, torch":
            # biases are all that is dense
            backward = 1 - int(row["sparsity"].split(" / ")[1].removesuffix("%")) / 100
            assert row["bytes"] == pytest.approx((64 * backward + 1) / 65, abs=2e-3)
    if sys.platform == "linux":
        assert all(row["packed, torch, MB"] > 0 for row in figures["peaks"])
    assert [row["delay"] for row in figures["refreshes"]] == [0, 2]
    assert (tmp_path / "speed.png").stat().st_size > 10_000


def obstacle_to_namespaces():
    sys.path.insert(0, str(BENCHMARKS))  # where its `tables` lies
    try:
        return runpy.run_path(str(BENCHMARKS / "communication.py"))["obstacle"]()
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_communication_sends_the_updated_set_over_a_cable_of_its_own(tmp_path):
    reason = obstacle_to_namespaces()
    if reason:
        pytest.skip(reason)
    run_benchmark("communication.py", "--quick", "--json", tmp_path / "figures.json")
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == [
        "dense", "sparse", "sparse_bf16", "largest", "packed", "fsdp2", "fsdp2_packed", "fsdp2_blocks",
    ]  # fmt: skip
    by_ddp, by_fsdp2 = rows[:5], rows[5:]
    # 2 · 256² sparse weights with 20 % of them sent, and 19,722 dense ones
    entries = 2 * 256**2 + 19_722
    share = (2 * 256**2 * 0.2 + 19_722) / entries
    # a tenth of those 20 %, each with its place, and for each of the two weights whether it was used
    largest = (2 * round(0.1 * round(0.2 * 256**2)) * 8 + (2 + 19_722) * 4) / (4 * entries)
    for row in by_ddp:
        expected = {"dense": 1, "sparse_bf16": share / 2, "largest": largest}.get(row["variant"], share)
        assert row["expected"] == pytest.approx(expected, rel=1e-3)
        assert row["bytes / dense"] == pytest.approx(expected, rel=0.05), "small messages carry more headers"
        assert row["payload / dense"] == pytest.approx(expected, rel=2e-3)
    for row in by_fsdp2:  # half of the values for each pass, and half of the gradients
        assert row["expected"] == pytest.approx(1.5 * (1 if row["variant"] == "fsdp2" else share), rel=5e-3)
        assert row["payload / dense"] == pytest.approx(row["expected"], rel=2e-3)
        assert row["bytes / dense"] > 0.99 * row["payload / dense"]
    of_the_same_sets = [row for row in rows if row["variant"] not in ("largest", "fsdp2_blocks")]
    for row in of_the_same_sets:
        assert float(row["weights differ by"]) < (1e-2 if row["variant"] == "sparse_bf16" else 1e-5)
    assert rows[0]["link"] == "100 Mbit/s"
    assert rows[1]["step ms"] < rows[0]["step ms"]
    assert by_fsdp2[1]["step ms"] < by_fsdp2[0]["step ms"]


def test_capacity_is_the_deepest_network_that_fits(tmp_path):
    figures = tmp_path / "figures.json"
    run_benchmark("capacity.py", "--limit", "3", "--width", "64", "--time", "8", "--json", figures)
    rows = json.loads(figures.read_text())["rows"]
    assert [row["kind"] for row in rows] == ["dense", "90/80", "95/90"] * 2
    for row in rows:
        assert row["peak MB"] <= 3 < row["next deeper MB"]
    assert rows[0]["times dense"] == 1 < rows[4]["times dense"] <= rows[1]["times dense"] < rows[2]["times dense"]


def test_time_to_accuracy_ends_at_the_goal_or_says_that_it_was_not_reached(tmp_path):
    write_fashion_mnist(tmp_path / "data")
    run_benchmark(
        "time_to_accuracy.py", "--folder", tmp_path / "data", "--width", "16", "--accuracy", "0", "--seeds", "0",
        "--json", tmp_path / "reached.json",
    )  # fmt: skip
    runs = json.loads((tmp_path / "reached.json").read_text())
    assert [run["method"] for run in runs][:2] == ["dense", "masked, 90/80"]
    assert all(run["seconds"] > 0 and run["accuracy"] >= 0 for run in runs)
    out = run_benchmark(
        "time_to_accuracy.py", "--folder", tmp_path / "data", "--accuracy", "1.1", "--seeds", "0", "--epochs", "1",
        "--network", "cnn", "--width", "8",
    )  # fmt: skip
    assert "0 of 1" in out.stdout


def test_top_k_gradients_has_a_row_for_every_way_to_send(tmp_path):
    write_fashion_mnist(tmp_path / "data")
    methods = ["sparse", "largest 10 %", "Gaussian threshold, 10 %"]
    arguments = ["--folder", tmp_path / "data", "--seeds", "0", "--epochs", "8", "--methods", *methods]
    out = run_benchmark("top_k_gradients.py", *arguments).stdout
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line[:1] == "|"]
    assert [row[0] for row in rows[2:5]] == methods
    assert [float(row[3]) for row in rows[2:4]] == [217.8, 48.1]  # kB that a rank of two sends in a step


def test_soft_has_a_row_for_every_gradient_of_three_uses(tmp_path):
    write_fashion_mnist(tmp_path / "data")
    out = run_benchmark("soft.py", "--folder", tmp_path / "data", "--seeds", "0", "--epochs", "1").stdout
    routes, uses = (
        [line.split("|")[1].strip() for line in part.splitlines() if line[:1] == "|"][2:]
        for part in out.split("### ")[1:]
    )
    assert len(routes) == 4
    assert uses == ["densities"] * 6 + ["supermask"] * 4 + ["θ"] * 4


def test_private_compares_units_and_entries_under_both_noises(tmp_path):
    write_fashion_mnist(tmp_path / "data")
    out = run_benchmark("private.py", "--folder", tmp_path / "data").stdout
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line[:1] == "|"][2:]
    assert len(rows) == 24
    assert {(row[1], row[4]) for row in rows} == {(s, n) for s in ("units", "entries") for n in ("gumbel", "laplace")}
    assert all(0 <= float(row[-2]) <= 1 for row in rows)


def test_dart_is_compared_with_three_other_searches():
    out = run_benchmark("dart.py", "--seeds", "1", "--steps", "2").stdout
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line[:1] == "|"][2:]
    assert [row[0] for row in rows] == ["dart", "random sets", "random search", "halving"]
    assert all(0 <= float(cell) <= 1 for row in rows for cell in row[1:])


def test_fan_in_compares_every_bound(tmp_path):
    write_fashion_mnist(tmp_path / "data")
    arguments = ["--quick", "--seeds", "0", "--epochs", "1", "--folder", tmp_path / "data"]
    lines = [line for line in run_benchmark("fan_in.py", *arguments).stdout.splitlines() if line.startswith("| ")]
    for bounds in ("free", "at most 2", "at least 0.25", "0.25 to 2", "constant"):
        assert sum(f"| {bounds} " in line for line in lines) == 3 + 1 + 2, bounds
    assert sum("| free, again " in line for line in lines) == 2


def test_diverse_compares_with_a_greedy_choice_and_counts_duplicates(tmp_path):
    write_fashion_mnist(tmp_path / "data")
    out = run_benchmark("diverse.py", "--quick", "--folder", tmp_path / "data").stdout
    gains = [float(gain) for gain in re.findall(r"(-?\d+\.\d\d)% +\|", out.partition("### Cosines")[0])]
    assert len(gains) == 2
    assert min(gains) >= 0
    assert all(f"| {network} " in out for network in ("dense", "Top-KAST 98/95"))


def test_pivot_has_a_row_a_method_and_a_column_a_sparsity(tmp_path):
    def row(method, forward, values, diverged=0, backward=0.5):
        mean, std = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None
        figures = {"test": {"mean": mean, "std": std}, "training_flops_ratio": {"mean": 0.25, "std": None}}
        return {"method": method, "forward_sparsity": forward, "backward_sparsity": backward, "settings": [],
                "figures": figures, "diverged": diverged}  # fmt: skip

    rows = [row("dense", 0.0, [0.9]), row("topkast_80_50", 0.8, [0.80, 0.82], 1), row("topkast_90_80", 0.9, [0.7])]
    rows.append(row("topkast_80_80", 0.8, [0.5], backward=0.8))
    comparison = {"data": "d", "model": "m", "test": "test/acc", "validation": "val/acc", "rows": rows}
    (tmp_path / "comparison.json").write_text(json.dumps({"comparisons": [comparison]}))
    out = run_benchmark("pivot.py", tmp_path).stdout
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line[:1] == "|"]
    assert lines[:4:2] == [["method", "80%", "90%"], ["dense", "90.00", "90.00"]]
    assert lines[3:5] == [["topkast", "81.00 ± 1.41, 1 diverged", "70.00"], ["topkast backward 80%", "50.00", ""]]


def test_inference_compares_every_way_and_the_files(tmp_path):
    out = run_benchmark("inference.py", "--quick", "--batches", "2", "--json", tmp_path / "figures.json").stdout
    figures = json.loads((tmp_path / "figures.json").read_text())
    ways = {"dense", "dense again", "csr, torch", "torch's csr", "packed", "onnx", "onnx-sparse"}
    for sparsity in ("80%", "98%"):
        rows = [row for row in figures["speeds"] if row["sparsity"] == sparsity]
        assert ways <= {row["way"] for row in rows} <= ways | {"csr, compiled"}
        assert all(row["times dense"] > 0 for row in rows)
    assert "### Batch 2: times as fast as dense" in out
    assert figures["files"][0].keys() == {"sparsity", "dense", "csr", "safetensors", "onnx", "onnx-sparse"}
    first, last = (row["safetensors"] for row in figures["files"])
    assert last < first < 0.3


def test_gpu_conv_times_every_part_of_a_convolution():
    run = run_benchmark("gpu_conv.py", "--size", "rehearsal")
    products, steps = run.stdout.split("### ")[1:]
    lines = {
        name: re.findall(r"^\| +64 .*", text, re.MULTILINE) for name, text in (("products", products), ("steps", steps))
    }
    assert [line.split("|")[7].strip() for line in lines["products"]] == ["forward", "dx", "dW"] * 4
    assert [line.split("|")[3].strip() for line in lines["steps"]] == ["3×3", "3×3", "1×1", "1×1"]


GIANT = ("--blocks", "2", "--width", "256", "--side", "16", "--batch", "1", "--time", "16", "--steps", "3")


def test_giant_trains_and_says_what_it_holds(tmp_path):
    run_benchmark("giant.py", *GIANT, "--json", tmp_path / "figures.json")
    figures = json.loads((tmp_path / "figures.json").read_text())
    (row,) = figures["rows"]
    assert row["B parameters"] * 1e9 == pytest.approx(2 * 12 * 256**2 + (256 + 16 + 256) * 256, rel=0.01)
    assert row["θ at home GB"] * 1e9 == 4 * 2 * 12 * 256**2
    assert row["weights, gradients, Adam GB"] < 0.2 * row["dense Adam GB"]
    assert row["last loss"] < row["first loss"]
    assert len(figures["losses"]) == 7


def test_giant_trains_over_two_ranks_each_of_which_holds_half(tmp_path):
    run_benchmark("giant.py", *GIANT, "--json", tmp_path / "alone.json")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    out = run_benchmark("giant.py", *GIANT, "--json", tmp_path / "both.json", launcher=torchrun).stdout
    (alone,), both = (json.loads((tmp_path / f"{name}.json").read_text())["rows"] for name in ("alone", "both"))
    assert [row["rank"] for row in both] == [0, 1]
    for row in both:
        assert row["B parameters"] == alone["B parameters"]
        assert row["θ at home GB"] == alone["θ at home GB"] / 2
        held = row["weights, gradients, Adam GB"]
        assert held == pytest.approx(alone["weights, gradients, Adam GB"] / 2, rel=1e-3)
        assert row["ms a step"] > 0 < row["s a refresh"]
        assert row["promoted"] == both[0]["promoted"] > 0
        assert row["last loss"] < row["first loss"]
    assert both[0]["first loss"] == pytest.approx(alone["first loss"]), "the network is the same"
    assert both[0]["first loss"] != both[1]["first loss"], "each rank has tokens of its own"
    assert out.count("Training on CPU") == 1


def test_largest_lets_packed_transformers_grow_beyond_dense_ones():
    sizes = ("--width", "1024", "--device-gb", "8", "--activations-gb", "1", "--host-gb", "60")
    lines = run_benchmark("largest.py", *sizes).stdout.splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    found = {row[0]: row for row in rows if row[3] in ("devices", "host memory")}
    assert len(found) == 7
    assert float(found["90% / 80%, blocks"][1]) > 3 * float(found["dense"][1])
    assert found["dense"][3] == "devices"
    assert found["98% / 95%, blocks"][3] == "host memory"
    for row in found.values():
        assert float(row[4]) <= 7
        assert float(row[5]) <= 60
