"""Compiles the fused kernels of masked steps for GPUs that need not be there, and prints what their assembly holds."""

import json
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightning_topkast.ops.fused.kernels import mask_kernel, open_kernel, take_kernel

TYPES = {"float32": tl.float32, "bfloat16": tl.bfloat16, "float64": tl.float64}


def counts_of(kernel, architecture: int, dtype, aligned: bool) -> dict[str, int]:
    constants = {"CHUNK": 2048, "WIDTH": 64, "TYPE": dtype, "ALIGNED": aligned}
    names = kernel.arg_names
    tables = ("table", "masks", "puts")
    types = dict.fromkeys(tables, "*i64")
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else types.get(name, "i32") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items() if name in names},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in tables if name in names},
    )
    assembly = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": 4}).asm["ptx"]
    return {
        "wide loads": len(re.findall(r"ld\.global\.v[24]\.b(?:32|64)", assembly)),
        "wide stores": len(re.findall(r"st\.global\.v[24]\.b(?:32|64)", assembly)),
        "atomics": len(re.findall(r"\b(atom|red)\.global", assembly)),
    }


def main() -> None:
    made = {}
    for kernel in (open_kernel, take_kernel, mask_kernel):
        for architecture in (80, 90):
            for name, dtype in TYPES.items():
                for aligned in (False, True):
                    case = f"{kernel.fn.__name__} sm_{architecture} {name}{' aligned' * aligned}"
                    made[case] = counts_of(kernel, architecture, dtype, aligned)
    print(json.dumps(made))


if __name__ == "__main__":
    main()
