"""The largest transformer that trains under a limit of device memory, dense and packed.

    OMP_NUM_THREADS=1 python benchmarks/capacity.py [--limit MB] [--width WIDTH] [--json FILE]

What counts is what a device must hold at the peak of a training step: parameters, gradients, Adam's state, activations
and temporaries, as torch's MemTracker sees them, and the indices of packed weights, with which the packed network is
also shown. What lies in host memory (reservoir, sets) is listed apart. Depth grows; the reported network and the next
deeper one, which no longer fits, were both built (on the meta device, then drawn on the host) and trained.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tables import Row, table
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn import functional as F
from torch.optim import Adam

from lightning_topkast import TopKast
from lightning_topkast.app.models import TransformerLM
from lightning_topkast.engine.materialize import materialize
from lightning_topkast.layers import packed_weights

KINDS: dict[str, tuple[float, float] | None] = {"dense": None, "90/80": (0.9, 0.8), "95/90": (0.95, 0.9)}


@dataclass
class Measured:
    """What training a network of some depth takes."""

    parameters: int
    peak: int
    indices: int
    host: int
    loss: float


def train(depth: int, width: int, pair: tuple[float, float] | None, time: int) -> Measured:
    """Build a transformer, take three steps, and return the peak of the last."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = TransformerLM(256, time, width=width, depth=depth, heads=4)
    if pair is None:
        materialize(model)
    else:
        topkast = TopKast(model, *pair, storage="packed")
    parameters = sum(tensor.numel() for tensor in model.state_dict().values())
    optimizer = Adam(model.parameters(), lr=1e-4, fused=True)
    if pair is not None:
        topkast.attach(optimizer)
    batch = torch.randint(256, (1, time + 1))

    def step() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    step()
    step()
    tracker = MemTracker()
    tracker.track_external(model, optimizer)
    with tracker:
        loss = step()
    peak = sum(found["Total"] for found in tracker.get_tracker_snapshot("peak").values())
    packed = list(packed_weights(model).values())
    host = sum(value.nbytes for w in packed for value in vars(w).values() if isinstance(value, torch.Tensor))
    host -= sum(w.parameter.nbytes for w in packed)
    return Measured(parameters, peak, sum(w.layout.nbytes for w in packed), host, loss)


def deepest(measure: Callable[[int], int], limit: int) -> int:
    """The largest depth whose bytes fit; bytes grow with depth, about linearly, and both neighbours are measured."""
    one, three = measure(1), measure(3)
    depth = max(1, int(1 + (limit - one) * 2 / (three - one)))
    while measure(depth) > limit:
        depth -= 1
    while measure(depth + 1) <= limit:
        depth += 1
    return depth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, default=400, help="device memory in MB (default: %(default)s)")
    parser.add_argument("--width", type=int, default=512, help="of the transformer (default: %(default)s)")
    parser.add_argument("--time", type=int, default=32, help="tokens of the one sequence a step (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    limit = int(arguments.limit * 1e6)
    rows: list[Row] = []
    trained: dict[tuple[str, int], Measured] = {}
    for counted in ("without indices", "with indices"):
        for kind, pair in KINDS.items():

            def measure(
                depth: int, kind: str = kind, pair: Any = pair, indices: bool = counted == "with indices"
            ) -> int:
                if (kind, depth) not in trained:
                    trained[kind, depth] = train(depth, arguments.width, pair, arguments.time)
                return trained[kind, depth].peak + indices * trained[kind, depth].indices

            if measure(1) > limit:
                raise SystemExit(f"not even one block of width {arguments.width} fits into {arguments.limit} MB")
            depth = deepest(measure, limit)
            found = trained[kind, depth]
            row: Row = {"counted": counted, "kind": kind, "blocks": depth, "M parameters": found.parameters / 1e6}
            dense = next((r for r in rows if r["counted"] == counted and r["kind"] == "dense"), row)
            row["times dense"] = row["M parameters"] / dense["M parameters"]
            row |= {"peak MB": measure(depth) / 1e6, "next deeper MB": measure(depth + 1) / 1e6}
            row |= {"indices MB": found.indices / 1e6, "host MB": found.host / 1e6, "loss": found.loss}
            rows.append(row)
    table(f"The largest transformer of width {arguments.width} in {arguments.limit:.0f} MB", rows)
    aims = [
        {"aim": f"{kind}: ≥ {aim} × the parameters", "counted": row["counted"], "measured": row["times dense"],
         "met": "met" if row["times dense"] >= aim else "not met"}
        for kind, aim in (("90/80", 4), ("95/90", 8)) for row in rows if row["kind"] == kind
    ]  # fmt: skip
    table("Aims", aims)
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": rows, "aims": aims}, indent=1) + "\n")


if __name__ == "__main__":
    main()
