"""Compiles the block-sparse kernels for GPUs that need not be there, and prints what their assembly holds as JSON."""

import json
import re

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightning_topkast.ops.blocks.conv.kernels import conv_kernel, conv_sampled_kernel
from lightning_topkast.ops.blocks.kernels import product_kernel, sampled_kernel

INDICES = ("starts", "others", "blocks", "longest_first")
TENSORS = ("dense", "values", "bias", "result", "grads")
DIVISIBLE = (*INDICES, *TENSORS, "rows", "lines", "dense_stride", "grads_stride", "split_stride", "split_rows")


def compile_kernel(kernel, constants: dict, architecture: int, warps: int, stages: int, **boxes) -> dict[str, int]:
    """For bfloat16 matrices whose rows begin at multiples of 16 bytes; `boxes` of those that are descriptors."""
    constants |= {"PRECISION": "ieee", "WIDEN": False, "DESCRIBED": bool(boxes)}
    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    types = dict.fromkeys(INDICES, "*i32") | dict.fromkeys(TENSORS, "*bf16")
    types |= {name: f"tensordesc<bf16[{tall},{broad}]>" for name, (tall, broad) in boxes.items()}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    divisible = [name for name in DIVISIBLE if name in names and name not in boxes]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    assembly = compiled.asm["ptx"]
    return {
        "wgmma": len(re.findall(r"wgmma\.mma_async", assembly)),
        "mma": len(re.findall(r"\bmma\.sync", assembly)),
        "copies of boxes": len(re.findall(r"cp\.async\.bulk\.tensor\.2d\.shared", assembly)),
        "copies of 16 bytes": len(re.findall(r"cp\.async\.cg\.shared\.global.*0x10", assembly)),
        "atomics": len(re.findall(r"\b(atom|red)\.global", assembly)),
        "shared": compiled.metadata.shared,
    }


def main() -> None:
    made = {}
    for architecture, side, transposed in (
        (90, 128, False),
        (90, 64, True),
        (90, 32, False),
        (80, 32, False),
        (80, 128, True),
    ):
        product = {"DEPTH": side, "BREADTH": side, "TRANSPOSED": transposed, "HAS_BIAS": True}
        product |= {"DEEP": min(side, 64), "TILE": 128, "GROUP": 8}
        boxes = {"dense": (128, min(side, 64)), "result": (128, side)}
        boxes["values"] = (min(side, 64), side) if transposed else (side, min(side, 64))
        made[f"product sm_{architecture} {side}"] = compile_kernel(
            product_kernel, product, architecture, 4, 3, **(boxes if architecture == 90 else {})
        )
        sampled = {"HEIGHT": side, "WIDTH": side, "LINES": 64, "ITEM": 2, "SIDE": 256 // side, "STEP": 128}
        boxes = {"grads": (64, side), "dense": (64, side)}
        made[f"sampled sm_{architecture} {side}"] = compile_kernel(
            sampled_kernel, sampled, architecture, 8, 3, **(boxes if architecture == 90 and side > 32 else {})
        )
        shifts = {"POSITIONS": 9, "ACROSS": 3, "UP_Y": 1, "UP_X": 1, "DOWN_Y": 2, "DOWN_X": 2}
        made[f"conv sm_{architecture} {side}"] = compile_kernel(conv_kernel, product | shifts, architecture, 4, 3)
        made[f"conv_sampled sm_{architecture} {side}"] = compile_kernel(
            conv_sampled_kernel, sampled | shifts, architecture, 8, 3
        )
    print(json.dumps(made))


if __name__ == "__main__":
    main()
