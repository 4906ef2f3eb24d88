"""Bring every kernel into Triton's own language for an H100 or H200; run as a script, without a GPU."""

from __future__ import annotations

import triton
import triton.language as tl
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from kvpack.kernels.triton import affine_attention, affine_matmul, int8_matmul, linear_tiles

target = GPUTarget("cuda", 90, 32)
backend = make_backend(target)


def check(kernel: triton.JITFunction, constants: dict[str, object], **pointers: str) -> None:
    types = {name: pointers.get(name, "i32") for name in kernel.arg_names}
    signature = {name: "constexpr" if name in constants else kind for name, kind in types.items()}
    options = backend.parse_options({})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source = ASTSource(kernel, signature, constants)
    module = source.make_ir(
        target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context
    )
    assert module.verify()


def attention(bits: int, by_token: bool, dot: tl.dtype, zero: int) -> None:
    count, size = {2: (4, 1), 3: (8, 3), 4: (2, 1), 8: (1, 1)}[bits]
    units = max(16, 128 // count)
    constants = {}
    for name, token in (("K", by_token), ("V", not by_token)):
        constants |= {
            f"{name}_T": units * size,
            f"{name}S_T": 128 if token else 4,
            f"{name}D": 128,
            f"{name}_TOKEN": token,
            f"{name}_SIZE": 32,
            f"{name}_I": 4,
            f"{name}_U": units,
            f"{name}_N": count,
            f"{name}_UB": size,
            f"{name}_BITS": bits,
            f"{name}_ZERO": zero,
        }
    constants |= {"MP": 4, "TILE": 128, "DOT": dot, "SOFTCAP": True, "MASK": True, "STAGES": 3}
    codes, grid, real = "*u8", "*fp16", "*fp32"
    check(
        affine_attention._attend,
        constants,
        query="*bf16",
        keys=codes,
        values=codes,
        key_scale=grid,
        key_zero=grid,
        value_scale=grid,
        value_zero=grid,
        mask=real,
        out=real,
        maximum=real,
        total=real,
        scale="fp32",
        softcap="fp32",
    )


def join() -> None:
    check(
        affine_attention._join,
        {"DP": 128, "SP": 64, "BLOCK": 16},
        parts="*fp32",
        part_maximum="*fp32",
        part_total="*fp32",
        out="*fp32",
        maximum="*fp32",
        total="*fp32",
    )


def affine_linear(bits: int, unit: int, size: int, few: bool, grouped: bool) -> None:
    constants = {
        "C": 4000,
        "BITS": bits,
        "UNIT": unit,
        "UNIT_BYTES": size,
        "ZERO": 1,
        "SIZE": 128,
        "BY_ROW": False,
        "GROUPED": grouped,
        "FEW": few,
        "BR": 64,
        "BN": 16,
        "BU": max(16, 128 // unit),
        "DOT": tl.bfloat16,
        "STAGES": 3,
    }
    check(
        affine_matmul._multiply, constants, x="*bf16", codes="*u8", scale="*fp16", zero="*fp16", out="*bf16"
    )


def int8_linear(grouped: bool) -> None:
    constants = {"C": 4000, "SIZE": 128, "GROUPED": grouped, "BR": 64, "BN": 16, "BC": 128, "STAGES": 3}
    check(int8_matmul._multiply, constants, x="*i8", x_scale="*fp32", codes="*u8", scale="*fp16", out="*bf16")


def main() -> None:
    attention(2, True, tl.float16, 1)
    attention(3, False, tl.float16, 2)
    attention(4, True, tl.float32, 0)
    join()
    affine_linear(4, 2, 1, few=True, grouped=True)
    affine_linear(3, 8, 3, few=False, grouped=False)
    affine_linear(8, 1, 1, few=False, grouped=True)
    int8_linear(grouped=True)
    int8_linear(grouped=False)
    check(linear_tiles._sum_parts, {"SPLITS": 4, "BLOCK": 256}, parts="*fp32", out="*bf16")


if __name__ == "__main__":
    main()
