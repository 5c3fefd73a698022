"""What was timed, where and in which state: versions, the device and its clocks, and the commit."""

import platform
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from gpu_timing import device_name

ROOT = Path(__file__).parents[1]
CLOCKS = (
    "clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem", "power.draw", "power.limit", "temperature.gpu",
)  # fmt: skip


def about(device: torch.device) -> dict[str, Any]:
    """Versions, the device, its clocks before the work, and the commit of this checkout."""
    found: dict[str, Any] = {
        "device": device_name(device),
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version(),
        "machine": platform.platform(),
        "clocks before": clocks(device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "CUDA": torch.version.cuda,
            "cuDNN": torch.backends.cudnn.version(),
            "driver": nvidia_smi(device, ("driver_version",)).get("driver_version"),
            "capability": f"{properties.major}.{properties.minor}",
            "processors": properties.multi_processor_count,
            "memory GB": properties.total_memory / 1e9,
        }
    return found


def triton_version() -> str | None:
    with suppress(ImportError):
        import triton

        return str(triton.__version__)
    return None


def commit() -> str | None:
    """Of this checkout, with "+" where files differ from it; None where git does not know."""
    head = output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    changed = output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return head and head + ("+" if changed else "")


def clocks(device: torch.device) -> dict[str, str]:
    """The device's clocks, power and temperature now, as nvidia-smi shows them."""
    return nvidia_smi(device, CLOCKS) if device.type == "cuda" else {}


def nvidia_smi(device: torch.device, queries: tuple[str, ...]) -> dict[str, str]:
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    line = output("nvidia-smi", f"--query-gpu={','.join(queries)}", "--format=csv,noheader", f"--id={uuid}")
    values = (line or "").split(", ")
    return dict(zip(queries, values, strict=True)) if len(values) == len(queries) else {}


def output(*command: str) -> str | None:
    """What a command prints; None if it cannot run or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
