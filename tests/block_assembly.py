"""Compiles the block-sparse kernels for GPUs that need not be there, and prints what their assembly holds as JSON."""

import json
import re

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightning_topkast.ops.blocks.kernels import product_kernel, sampled_kernel

INDICES = ("starts", "others", "blocks", "longest_first")
TENSORS = ("dense", "values", "bias", "result", "grads")


def compile_kernel(kernel, constants: dict, architecture: int, warps: int, stages: int) -> dict[str, int]:
    """For bfloat16 matrices with contiguous rows whose length 16 divides."""
    constants |= {"PRECISION": "ieee", "WIDEN": False, "dense_column_stride": 1}
    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    types = dict.fromkeys(INDICES, "*i32") | dict.fromkeys(TENSORS, "*bf16")
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    divisible = {
        *INDICES,
        *TENSORS,
        "rows",
        "lines",
        "dense_row_stride",
        "grads_row_stride",
        "split_stride",
        "split_rows",
    }
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in names if name in divisible},
    )
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    assembly = compiled.asm["ptx"]
    return {
        "wgmma": len(re.findall(r"wgmma\.mma_async", assembly)),
        "mma": len(re.findall(r"\bmma\.sync", assembly)),
        "copies of 16 bytes": len(re.findall(r"cp\.async\.cg\.shared\.global.*0x10", assembly)),
        "atomics": len(re.findall(r"\b(atom|red)\.global", assembly)),
        "shared": compiled.metadata.shared,
    }


def main() -> None:
    made = {}
    for architecture, side, transposed in ((90, 128, False), (90, 64, True), (80, 32, False)):
        product = {"DEPTH": side, "BREADTH": side, "TRANSPOSED": transposed, "HAS_BIAS": True}
        tile = {"TILE": 128, "STEP": 64, "GROUP": 8}
        made[f"product sm_{architecture} {side}"] = compile_kernel(product_kernel, product | tile, architecture, 8, 5)
        sampled = {"HEIGHT": side, "WIDTH": side, "SIDE": 128 // side, "STEP": 64, "grads_column_stride": 1}
        made[f"sampled sm_{architecture} {side}"] = compile_kernel(sampled_kernel, sampled, architecture, 8, 3)
    print(json.dumps(made))


if __name__ == "__main__":
    main()
