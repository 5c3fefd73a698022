"""Exported models: read again bit for bit, by others, and refused where they would not be what they claim."""

import json
import os
import re
import stat
import struct
import sys
from pathlib import Path

import ml_dtypes  # noqa: F401  (gives numpy bfloat16, as docs/export.md says)
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_topkast import Targets, TopKast, TopKastError
from lightning_topkast.export import OnnxModel, load_csr, load_sparse, save_csr, save_dense, save_onnx, save_sparse
from lightning_topkast.export.encodings import Encoded, decode, encode, encode_two_of_four
from lightning_topkast.export.state import same_bits
from tests import processes

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn)
SHAPES = ((1,), (5000,), (70, 90), (20, 5, 60), (8, 7, 9, 11), (3, 4, 5, 6, 7), (0, 3), (4, 0, 2))
EXAMPLE = torch.zeros(2, 100)
DOC = Path(__file__).parents[1] / "docs" / "export.md"


def sparse(*shape, density=0.1, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(shape, generator=generator) < density
    return (torch.randn(shape, generator=generator) * kept + 0).to(dtype)


def two_of_four(rows, columns):
    """Two of each four at most: none in the first group, one in the second."""
    weight = torch.arange(1.0, rows * columns + 1).view(-1, 4)
    kept = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)).argsort(1) < 2
    kept[0], kept[1] = False, torch.tensor([False, False, False, True])
    return (weight * kept).view(rows, columns)


def all_same(one, other):
    return one.keys() == other.keys() and all(same_bits(one[name], other[name]) for name in one)


@pytest.mark.parametrize("density", [0.0, 0.003, 0.1, 0.4, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_tensor_comes_back_bit_for_bit(dtype, density, tmp_path):
    state = {str(shape): sparse(*shape, density=density, dtype=dtype, seed=len(shape)) for shape in SHAPES}
    state |= {"scalar": torch.tensor(3.5), "count": torch.tensor(7), "mask": torch.ones(40, 40).tril().bool()}
    state["strided"] = sparse(64, 32, density=density).t()
    save_sparse(state, tmp_path / "model.safetensors")
    assert all_same(load_sparse(tmp_path / "model.safetensors"), state)
    save_dense(state, tmp_path / "dense.pt")
    assert all_same(torch.load(tmp_path / "dense.pt", weights_only=True), state)
    save_csr(state, tmp_path / "csr.pt")
    read = torch.load(tmp_path / "csr.pt", weights_only=True)
    assert all_same({n: t.to_dense() if t.layout is torch.sparse_csr else t for n, t in read.items()}, state)


def test_nan_infinity_and_minus_zero_keep_their_bits(tmp_path):
    weight = sparse(64, 64)
    weight.view(-1)[:5] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-45])
    weight.view(torch.int32)[1, 0] = 0x7FC12345  # a NaN with a payload
    save_sparse({"w": weight}, tmp_path / "a.safetensors")
    (read,) = load_sparse(tmp_path / "a.safetensors").values()
    assert same_bits(read, weight)
    assert read.view(-1)[3].signbit()
    assert not same_bits(read, weight + 0), "the test could not tell -0.0 from 0"


def test_gaps_lead_from_entry_to_entry_with_zeros_where_one_is_too_long():
    weight = torch.zeros(2, 600)
    weight.view(-1)[[3, 258, 259, 260, 262, 264, 600]] = torch.arange(1.0, 8.0)
    encoded = encode(weight)
    assert encoded.encoding == "gaps"
    assert encoded.places.tolist() == [3, 255, 1, 1, 2, 2, 255, 81]
    assert encoded.values.tolist() == [1, 2, 3, 4, 5, 6, 0, 7]
    assert torch.equal(decode(encoded), weight)


def test_first_gap_may_be_zero_or_longer_than_a_type():
    for place, expected in ((0, [0]), (255, [255]), (256, [255, 1]), (510, [255, 255]), (511, [255, 255, 1])):
        weight = torch.zeros(1, 4096)
        weight[0, place : place + 20] = 5
        encoded = encode(weight)
        assert encoded.places.tolist() == expected + [1] * 19
        assert torch.equal(decode(encoded), weight)


def test_two_of_four_holds_two_values_a_group_and_two_bits_each():
    weight = torch.tensor([[0.0, 7, 0, 8, 0, 0, 0, 0], [5, 0, 0, 0, 0, 0, 0, 6]])
    encoded = encode_two_of_four(weight)
    assert encoded.values.tolist() == [7, 8, 0, 0, 5, 0, 0, 6]
    indices = [byte >> shift & 3 for byte in encoded.places.tolist() for shift in (0, 2, 4, 6)]
    assert indices[:2] == [1, 3]
    assert indices[4] == 0
    assert indices[7] == 3
    assert torch.equal(decode(encoded), weight)


@pytest.mark.parametrize(
    ("density", "encoding", "kind"),
    [(0.4, "bitmask", torch.uint8), (0.1, "gaps", torch.uint8), (0.001, "gaps", torch.uint16)],
)
def test_the_smallest_encoding_is_taken(density, encoding, kind):
    weight = sparse(500, 500, density=density)
    count = int(weight.count_nonzero())
    flat = torch.nonzero(weight.view(-1)).view(-1)
    steps = torch.diff(flat, prepend=torch.zeros(1, dtype=torch.int64))
    bytes_a_step = count * 5 + int(((steps - 1).clamp(min=0) // 255).sum()) * 5
    encoded = encode(weight)
    assert (encoded.encoding, encoded.places.dtype) == (encoding, kind)
    assert encoded.nbytes == min(250_000 // 8 + count * 4, bytes_a_step, count * 6)


def test_files_take_what_the_documentation_says(tmp_path):
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    table = DOC.read_text().partition("\n\nBytes are")[0]
    rows = {name: row for row, name in re.findall(r"^(\| `([a-z0-9:-]+)` \|.*)$", table, re.MULTILINE)}
    for column, density in enumerate((0.10, 0.05, 0.02)):
        flat = torch.zeros(1024**2)
        kept = weight.view(-1).abs().topk(int(density * flat.numel())).indices
        flat[kept] = weight.view(-1)[kept]
        for name, save in (("safetensors", save_sparse), ("csr", save_csr), ("dense", save_dense)):
            save({"w": flat.view(1024, 1024)}, tmp_path / name, overwrite=True)
            claimed = float(rows[name].split("|")[4 + column])
            assert (tmp_path / name).stat().st_size / 4 / 1024**2 == pytest.approx(claimed, abs=6e-4), name
    save_sparse({"w": two_of_four(1024, 1024)}, tmp_path / "2:4", structure="2:4")
    assert float(rows["2:4"].split("|")[4].split(",")[0]) == pytest.approx(
        (tmp_path / "2:4").stat().st_size / 4 / 1024**2, abs=6e-4
    )


def test_only_what_gets_smaller_is_stored_sparse(tmp_path):
    state = {
        "dense": torch.randn(100, 100),
        "bias": torch.zeros(5000),
        "tiny": torch.zeros(3, 3),
        "half": sparse(100, 100, density=0.5),
        "counts": torch.zeros(100, 100, dtype=torch.int64),
    }
    stored = save_sparse(state, tmp_path / "a.safetensors")
    assert stored == {"dense": "dense", "bias": "dense", "tiny": "dense", "half": "bitmask", "counts": "dense"}
    assert set(load_file(tmp_path / "a.safetensors")) == {
        "dense",
        "bias",
        "tiny",
        "half.values",
        "half.places",
        "counts",
    }


def test_a_name_that_is_taken_keeps_the_weight_dense(tmp_path):
    state = {"w": sparse(64, 64), "w.values": torch.ones(3)}
    assert save_sparse(state, tmp_path / "a.safetensors")["w"] == "dense"
    assert all_same(load_sparse(tmp_path / "a.safetensors"), state)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(96, 96)
        self.second = nn.Linear(96, 96)
        self.second.weight = self.first.weight


@pytest.mark.parametrize("storage", ["masked", "packed"])
def test_tied_weights_are_stored_once(storage, tmp_path):
    torch.manual_seed(0)
    model = Tied()
    engine = TopKast(model, 0.9, 0.8, targets=Targets(keep_first_dense=False, keep_last_dense=False), storage=storage)
    engine.attach(torch.optim.SGD(model.parameters(), 0.1))
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert expected["second.weight"].count_nonzero() == 922
    for name, save, load in (("a.safetensors", save_sparse, load_sparse), ("a.pt", save_csr, load_csr)):
        assert save(model, tmp_path / name)["second.weight"] == "tied"
        read = {n: t.to_dense() if t.layout is torch.sparse_csr else t for n, t in load(tmp_path / name).items()}
        assert all_same(read, expected)
    assert (tmp_path / "a.safetensors").stat().st_size < 922 * 5 + 2 * 96 * 4 + 1000
    fresh = Tied()
    fresh.load_state_dict(load_sparse(tmp_path / "a.safetensors"))
    assert torch.equal(fresh.second.weight, expected["first.weight"])


def documented_reader():
    (code,) = (
        block for block in re.findall(r"```python\n(.*?)```", DOC.read_text(), re.DOTALL) if "def read_sparse" in block
    )
    assert "topkast." not in code
    assert "import torch" not in code
    names = {}
    exec(code, names)
    return names["read_sparse"]


def test_the_documented_reader_reads_every_encoding_without_this_package(tmp_path):
    state = {
        "gaps": sparse(70, 90),
        "wide gaps": sparse(300, 400, density=0.001),
        "bitmask": sparse(8, 7, 9, 11, density=0.4),
        "pairs": two_of_four(25, 12),
        "bf16": sparse(64, 64, dtype=torch.bfloat16),
        "dense": torch.randn(3),
    }
    state["again"] = state["gaps"]
    pairs = {"pairs": state.pop("pairs")}
    stored = save_sparse(state, tmp_path / "a.safetensors")
    stored |= save_sparse(pairs, tmp_path / "b.safetensors", structure="2:4")
    assert set(stored.values()) == {"gaps", "bitmask", "2:4", "dense", "tied"}
    read = documented_reader()(tmp_path / "a.safetensors") | documented_reader()(tmp_path / "b.safetensors")
    assert read.keys() == stored.keys()
    for name, expected in (state | pairs).items():
        own = expected.float().numpy() if name == "bf16" else expected.numpy()
        assert np.array_equal(read[name].astype(np.float32), own), name
        assert str(read[name].dtype) == str(expected.dtype).removeprefix("torch.")


def test_two_of_four_round_trip_also_of_emptier_groups(tmp_path):
    state = {"w": two_of_four(16, 64), "conv": sparse(16, 8, 3, 3), "dense": torch.randn(8, 8)}
    stored = save_sparse(state, tmp_path / "a.safetensors", structure="2:4")
    assert stored == {"w": "2:4", "conv": "gaps", "dense": "dense"}
    assert all_same(load_sparse(tmp_path / "a.safetensors"), state)


def test_weight_that_is_not_two_of_four_is_refused_with_the_share_that_breaks_it(tmp_path):
    weight = two_of_four(10, 40)
    weight[3, 4:8] = torch.tensor([1.0, 2.0, 3.0, 0.0])
    with pytest.raises(TopKastError, match=r"'deep.w' is not 2:4: 1\.0% of its groups of four \(1 of 100\)"):
        save_sparse({"deep.w": weight}, tmp_path / "a.safetensors", structure="2:4")
    with pytest.raises(TopKastError, match="rows of 42 entries"):
        save_sparse({"w": sparse(40, 42)}, tmp_path / "a.safetensors", structure="2:4")
    assert not list(tmp_path.iterdir())


def damage(path, change):
    """Rewrite a file of `save_sparse` with another layout or other tensors."""
    tensors = load_file(path)
    layout = json.loads(header(path)["__metadata__"]["topkast_sparse"])
    change(layout, tensors)
    save_file(tensors, path, metadata={"topkast_sparse": json.dumps(layout)})


def header(path):
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length])


@pytest.mark.parametrize(
    "change",
    [
        lambda layout, tensors: layout.update(version=2),
        lambda layout, tensors: layout.pop("tied"),
        lambda layout, tensors: layout.update(tied=[]),
        lambda layout, tensors: layout.update(weights=[]),
        lambda layout, tensors: layout["tied"].update(x="nowhere"),
        lambda layout, tensors: layout["weights"]["w"].update(shape=[2, 3]),
        lambda layout, tensors: layout["weights"]["w"].update(shape=[-70, -90]),
        lambda layout, tensors: layout["weights"]["w"].update(shape=[1 << 40, 1 << 40]),
        lambda layout, tensors: layout["weights"]["w"].update(shape="wide"),
        lambda layout, tensors: layout["weights"]["w"].update(encoding="bitmask"),
        lambda layout, tensors: layout["weights"]["w"].update(encoding="2:4"),
        lambda layout, tensors: layout["weights"]["w"].update(encoding="pickle"),
        lambda layout, tensors: layout["weights"]["w"].update(dtype="float64"),
        lambda layout, tensors: layout["weights"].update(other=layout["weights"]["w"]),
        lambda layout, tensors: tensors.pop("w.places"),
        lambda layout, tensors: tensors.update({"w.places": tensors["w.places"][1:].clone()}),
        lambda layout, tensors: tensors.update({"w.places": tensors["w.places"].float()}),
        lambda layout, tensors: tensors.update({"w.values": tensors["w.values"][1:].clone()}),
        lambda layout, tensors: tensors["w.places"].fill_(255),
    ],
)
def test_damaged_file_is_named(change, tmp_path):
    path = tmp_path / "a.safetensors"
    save_sparse({"w": sparse(70, 90)}, path)
    damage(path, lambda layout, tensors: None)
    assert load_sparse(path)["w"].shape == (70, 90)
    damage(path, change)
    with pytest.raises(TopKastError, match=re.escape(str(path))):
        load_sparse(path)


def test_other_files_are_named(tmp_path):
    path = tmp_path / "a.safetensors"
    save_sparse({"w": sparse(70, 90)}, path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(TopKastError, match="damaged"):
        load_sparse(path)
    with pytest.raises(FileNotFoundError):
        load_sparse(tmp_path / "nothing")
    save_file({"w": torch.ones(2)}, path)
    assert load_sparse(path)["w"].tolist() == [1, 1]


def test_places_outside_of_the_weight_are_refused():
    for encoded in (
        Encoded("gaps", (2, 3), torch.ones(2), torch.tensor([3, 3], dtype=torch.uint8)),
        Encoded("gaps", (2, 3), torch.ones(2), torch.tensor([3, 0], dtype=torch.uint8)),
        Encoded("bitmask", (2, 3), torch.ones(1), torch.tensor([1, 0], dtype=torch.uint8)),
        Encoded("bitmask", (2, 3), torch.ones(1), torch.tensor([64], dtype=torch.uint8)),
        Encoded("2:4", (2, 3), torch.ones(4), torch.tensor([0b11_10_01_00], dtype=torch.uint8)),
    ):
        with pytest.raises(TopKastError, match=r"do not fit the shape \(2, 3\)|expected places of 1 bytes, got 2"):
            decode(encoded)


def test_file_is_replaced_only_when_asked_to_and_only_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_sparse({"w": torch.ones(2)}, path)
    before = path.read_bytes()
    with pytest.raises(TopKastError, match="exists already"):
        save_sparse({"w": torch.zeros(2)}, path)
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_sparse({"w": torch.zeros(2)}, path, overwrite=True)
    assert path.read_bytes() == before
    monkeypatch.undo()
    save_sparse({"w": torch.zeros(2)}, path, overwrite=True)
    assert path.read_bytes() != before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on files")
@pytest.mark.parametrize(
    "save",
    [save_sparse, save_csr, save_dense, lambda model, *args, **options: save_onnx(model, EXAMPLE, *args, **options)],
    ids=["sparse", "csr", "dense", "onnx"],
)
def test_full_disk_is_named_with_the_file_and_leaves_the_old_one(save, tmp_path):
    import resource

    path = tmp_path / "a"
    path.write_text("before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError, match="not written: File too large") as caught:
            save(nn.Sequential(nn.Linear(100, 100)), path, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.filename == str(path)
    assert [entry.read_text() for entry in tmp_path.iterdir()] == ["before"]


@pytest.mark.skipif(sys.platform == "win32", reason="no umask")
def test_files_may_be_read_by_whom_the_umask_lets(tmp_path):
    before = os.umask(0o027)
    try:
        save_sparse({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o640


def test_targets_that_are_no_place_for_a_file_are_refused(tmp_path):
    with pytest.raises(TopKastError, match="is a folder"):
        save_dense({"w": torch.ones(2)}, tmp_path)
    with pytest.raises(TopKastError, match="there is no folder"):
        save_dense({"w": torch.ones(2)}, tmp_path / "no" / "a.pt")


def test_state_without_ordinary_tensors_is_refused(tmp_path):
    for value in ("text", torch.ones(2, device="meta"), torch.eye(3).to_sparse()):
        with pytest.raises(TopKastError, match="expected 'extra' to be"):
            save_sparse({"extra": value}, tmp_path / "a.safetensors")
    with pytest.raises(TopKastError, match="expected a string as name of a tensor, got 7"):
        save_sparse({7: torch.ones(2)}, tmp_path / "a.safetensors")


def test_part_of_a_large_tensor_does_not_bring_it_all(tmp_path):
    save_dense({"row": torch.randn(1000, 1000)[3]}, tmp_path / "a.pt")
    assert (tmp_path / "a.pt").stat().st_size < 10_000


def test_csr_products_are_those_of_the_dense_weight(tmp_path):
    weight, input = sparse(60, 80), torch.randn(7, 80)
    stored = save_csr({"w": weight, "half": sparse(60, 80, density=0.8), "conv": sparse(4, 4, 3, 3)}, tmp_path / "a.pt")
    assert stored == {"w": "csr", "half": "dense", "conv": "dense"}
    read = load_csr(tmp_path / "a.pt")["w"]
    assert read.col_indices().dtype == torch.int32
    torch.testing.assert_close((read @ input.t()).t(), input @ weight.t())


def test_csr_indices_that_lead_outside_are_refused(tmp_path):
    save_csr({"w": sparse(60, 80)}, tmp_path / "a.pt")
    state = load_csr(tmp_path / "a.pt")
    state["w"].col_indices()[5] = 1000
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(RuntimeError, match="col_indices"):
        load_csr(tmp_path / "a.pt")


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
        nn.Linear(288, 64), nn.Dropout(0.5), nn.Linear(64, 64), nn.Linear(64, 10),
    )  # fmt: skip


@pytest.mark.parametrize(("storage", "stored_sparse"), [("masked", False), ("packed", True)])
@pytest.mark.slow
def test_onnxruntime_computes_what_the_model_does(storage, stored_sparse, tmp_path):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    engine = TopKast(model, 0.9, 0.8, storage=storage)
    if storage == "packed":
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
    engine.attach(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(16, 1, 8, 8)).square().mean().backward()
        optimizer.step()
    kinds = [type(module) for module in model.modules()]
    save_onnx(model, torch.randn(1, 1, 8, 8), tmp_path / "a.onnx", sparse=stored_sparse)
    assert model.training
    assert kinds == [type(module) for module in model.modules()]
    exported, model = OnnxModel(tmp_path / "a.onnx", threads=1), model.eval()
    for batch in (1, 2, 33):
        input = torch.randn(batch, 1, 8, 8)
        with torch.no_grad():
            expected = model(input)
        assert expected.std() > 0.01
        torch.testing.assert_close(exported(input), expected, rtol=1e-5, atol=1e-6)
    # 10 % of 288 · 64 + 64 · 64 entries, and the first and the last layer
    expected_size = 2253 * 6 + 4 * (72 + 640) if stored_sparse else 4 * (288 * 64 + 64 * 64 + 72 + 640)
    assert expected_size < (tmp_path / "a.onnx").stat().st_size < expected_size + 4000
    assert b'File "' not in (tmp_path / "a.onnx").read_bytes(), "it tells of folders on this machine"


class Masked(nn.Module):
    """Takes tokens and a mask of the same shape."""

    def __init__(self):
        super().__init__()
        self.tokens, self.inside, self.output = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, tokens, mask):
        return self.output(self.inside(self.tokens(tokens)) * mask.unsqueeze(-1)).sum(1)


@pytest.mark.slow
@pytest.mark.parametrize("named", [True, False])
def test_onnx_file_takes_several_inputs_of_any_length(named, tmp_path):
    model = Masked().eval()
    if not named:
        forward = model.forward
        model.forward = lambda *inputs: forward(*inputs)
    example = torch.randint(20, (1, 6)), torch.ones(1, 6)
    save_onnx(model, example, tmp_path / "a.onnx", any_size=(0, 1))
    exported = OnnxModel(tmp_path / "a.onnx", threads=1)
    for batch, length in ((1, 6), (3, 6), (2, 11)):
        inputs = torch.randint(20, (batch, length)), torch.rand(batch, length).round()
        with torch.no_grad():
            torch.testing.assert_close(exported(*inputs), model(*inputs), rtol=1e-5, atol=1e-6)


def test_what_torch_cannot_export_to_onnx_is_one_error(tmp_path):
    class Branches(nn.Module):
        def forward(self, input):
            return input if input.sum().item() > 0 else -input

    with pytest.raises(TopKastError, match=r"cannot export this Branches to ONNX: .+"):
        save_onnx(Branches(), torch.ones(2, 3), tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


def test_file_that_is_no_onnx_is_one_error(tmp_path):
    (tmp_path / "a.onnx").write_bytes(b"nothing")
    with pytest.raises(TopKastError, match="onnxruntime cannot load"):
        OnnxModel(tmp_path / "a.onnx")


@pytest.mark.parametrize(
    ("module", "use"),
    [
        ("safetensors.torch", lambda path: save_sparse({}, path)),
        ("safetensors", load_sparse),
        ("onnx", lambda path: save_onnx(nn.Linear(2, 2), torch.ones(2, 2), path)),
        ("onnxscript", lambda path: save_onnx(nn.Linear(2, 2), torch.ones(2, 2), path)),
        ("onnxruntime", OnnxModel),
    ],
)
def test_missing_package_is_named_with_what_brings_it(module, use, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(TopKastError, match=rf"needs {module}.*pip install 'lightning-topkast\[export\]'"):
        use(tmp_path / "a")


def test_exporting_loads_neither_lightning_nor_what_a_format_does_not_need():
    code = (
        "import sys, lightning_topkast.export; print({'lightning', 'hydra', 'onnx', 'safetensors'} & set(sys.modules))"
    )
    assert processes.run([sys.executable, "-c", code], check=True).stdout == "set()\n"


def test_small_onnx_file_passes_the_full_check_and_is_made_dense_once(tmp_path):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 32), nn.Linear(32, 4)
    )
    for index, share in ((0, 0.3), (3, 0.1), (4, 0.0)):
        weight = network[index].weight.data
        weight *= torch.rand(weight.shape) < share
    save_onnx(network, torch.rand(2, 1, 4, 4), tmp_path / "dense.onnx")
    save_onnx(network, torch.rand(2, 1, 4, 4), tmp_path / "small.onnx", sparse=True)
    assert (tmp_path / "small.onnx").stat().st_size < 0.5 * (tmp_path / "dense.onnx").stat().st_size
    onnx.checker.check_model(onnx.load(tmp_path / "small.onnx"), full_check=True)
    inputs = torch.rand(3, 1, 4, 4)
    assert torch.equal(OnnxModel(tmp_path / "small.onnx")(inputs), OnnxModel(tmp_path / "dense.onnx")(inputs))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    onnxruntime.InferenceSession(str(tmp_path / "small.onnx"), options, providers=["CPUExecutionProvider"])
    left = {node.op_type for node in onnx.load(tmp_path / "loaded.onnx").graph.node}
    assert not left & {"Expand", "ScatterElements"}
