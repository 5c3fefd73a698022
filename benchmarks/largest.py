"""The largest transformer that some GPUs could train, and one of GPT-3's shape on more and more of them.

    python benchmarks/largest.py [--devices 8] [--device-gb 80] [--host-gb 1000] [--width 8192]

Arithmetic of `make_plan`, whose bytes tests/test_homes.py compares with those of 2 and of 4 processes; nothing is
allocated. All is float32, with Adam, under FSDP2; blocks are 128 × 128. Added to what a device holds are the values of
two transformer blocks that FSDP2 has gathered and the gradient of one, and `--activations-gb` are left free.
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import astuple

import torch
from tables import Row, table

from lightning_topkast import Block, Packed
from lightning_topkast.app.models import TransformerLM
from lightning_topkast.costs import Bytes, OptimizerState, Parallel, make_plan
from lightning_topkast.settings import Settings

PAIRS = [(0.9, 0.8), (0.95, 0.9), (0.98, 0.95)]
KINDS: dict[str, Settings | None] = {"dense": None} | {
    f"{forward:.0%} / {backward:.0%}, {name}": Settings(
        forward, backward, storage=Packed(kernels="torch", theta="sharded"), **structure
    )
    for name, structure in {"entries": {}, "blocks": {"structure": Block(128, 128)}}.items()
    for forward, backward in PAIRS
}
TIME, VOCABULARY = 2048, 50257
GPT3_WIDTH, GPT3_DEPTH = 12288, 96
PROCESSES_A_HOST = 8


class Costs:
    """What a transformer takes by depth: some for all, and as much for each of its blocks.

    Args:
        width: of the transformer.
        settings: of Top-KAST; None: dense.
        devices: number of devices.
    """

    def __init__(self, width: int, settings: Settings | None, devices: int) -> None:
        self._width, self._settings = width, settings
        (size, taken), (larger, more) = (self._plan(depth, Parallel(devices, "fsdp2")) for depth in (2, 3))
        self._two, self._block = taken, [b - a for a, b in zip(astuple(taken), astuple(more), strict=True)]
        self._sizes = size, larger - size
        weights = [self._plan(depth, Parallel())[1].weights for depth in (2, 3)]
        self.moment = 3 * (weights[1] - weights[0])

    def _plan(self, depth: int, parallel: Parallel) -> tuple[int, Bytes]:
        with torch.device("meta"):
            model = TransformerLM(VOCABULARY, TIME, self._width, depth, heads=self._width // 128)
            tokens = torch.zeros(1, TIME, dtype=torch.long)
        plan = make_plan(model, [tokens], self._settings, OptimizerState(torch.optim.Adam), parallel)
        return plan.totals()["size"], plan.bytes

    def bytes(self, depth: int) -> Bytes:
        """Those of one process and its device."""
        return self._two + Bytes(*((depth - 2) * each for each in self._block))

    def parameters(self, depth: int) -> int:
        return self._sizes[0] + (depth - 2) * self._sizes[1]

    def deepest(self, device: float, host: float) -> tuple[int, str]:
        """The depth that these bytes of a device and of a process' host memory allow, and which of them limits it."""
        block = Bytes(*self._block)
        devices = 2 + math.floor((device - self.moment - self._two.device) / block.device)
        hosts = 2 + math.floor((host - self._two.host) / block.host) if block.host else devices
        return min(devices, hosts), "devices" if devices <= hosts else "host memory"


def largest(options: argparse.Namespace) -> Iterator[Row]:
    for name, settings in KINDS.items():
        costs = Costs(options.width, settings, options.devices)
        device, host = (options.device_gb - options.activations_gb) * 1e9, options.host_gb * 1e9 / options.devices
        depth, limit = costs.deepest(device, host)
        taken = costs.bytes(depth)
        yield {
            "network": name,
            "parameters, 10⁹": costs.parameters(depth) / 1e9,
            "blocks deep": depth,
            "limited by": limit,
            "GB a device": (taken.device + costs.moment) / 1e9,
            "GB of host memory": taken.host * options.devices / 1e9,
            **sent(taken),
        }


def over_devices() -> Iterator[Row]:
    for name in ("dense", "95% / 90%, entries", "95% / 90%, blocks"):
        for devices in (8, 64, 512, 4096):
            costs = Costs(GPT3_WIDTH, KINDS[name], devices)
            taken = costs.bytes(GPT3_DEPTH)
            yield {
                "network": name,
                "devices": devices,
                "GB a device": (taken.device + costs.moment) / 1e9,
                f"GB a host of {PROCESSES_A_HOST}": taken.host * PROCESSES_A_HOST / 1e9,
                **sent(taken),
            }


def sent(taken: Bytes) -> Row:
    return {"GB sent a step": taken.sent / 1e9, "a refresh": taken.refresh / 1e9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--device-gb", type=float, default=80, help="of each (default: %(default)s)")
    parser.add_argument("--host-gb", type=float, default=1000, help="of all (default: %(default)s)")
    parser.add_argument("--activations-gb", type=float, default=10, help="room for them (default: %(default)s)")
    parser.add_argument("--width", type=int, default=8192, help="a multiple of 128 (default: %(default)s)")
    options = parser.parse_args()
    where = f"{options.devices} devices of {options.device_gb:.0f} GB with {options.host_gb:.0f} GB of host memory"
    table(f"The largest transformer of width {options.width:,} on {where}", list(largest(options)))
    table(f"{GPT3_DEPTH} blocks of width {GPT3_WIDTH:,}, as GPT-3", list(over_devices()))


if __name__ == "__main__":
    main()
