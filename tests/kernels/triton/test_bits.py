from __future__ import annotations

import pytest
import torch

from kvpack import ops
from kvpack.kernels.triton import available
from tests.kernels.triton.coded import DEVICE

if not available():
    pytest.skip("triton, with a GPU or its interpreter, is needed", allow_module_level=True)

import triton
import triton.language as tl

from kvpack.kernels.triton.bits import dot_type, load_units, plane, split_planes, unit


@triton.jit
def _unpack(packed, out, C: tl.constexpr, U: tl.constexpr, N: tl.constexpr, BYTES: tl.constexpr,
            BITS: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    u = tl.arange(0, U)
    word = load_units(packed, u * BYTES, u >= 0, C, U, BITS)
    for j in tl.static_range(N):
        tl.store(out + u * N + j, plane(word, j, BITS, DTYPE), mask=u * N + j < C)


@triton.jit
def _split(x, out, A: tl.constexpr, U: tl.constexpr, N: tl.constexpr):
    a, u, d = tl.arange(0, A)[:, None], tl.arange(0, U)[None, :], tl.arange(0, U * N)[None, :]
    planes = split_planes(tl.load(x + a * (U * N) + d), N)
    for j in tl.static_range(N):
        tl.store(out + a * (U * N) + u * N + j, planes[j])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_come_out_centred_and_exact(bits: int, dtype: torch.dtype) -> None:
    codes = torch.randint(0, 2**bits, (43,), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
    count, size = unit(bits)
    out = torch.empty(43, device=DEVICE)
    _unpack[(1,)](ops.bits.pack(codes, bits).to(DEVICE), out, 43, 64, count, size, bits, dot_type(dtype))
    assert torch.equal(out.cpu(), codes.float() - 2 ** (bits - 1))


@pytest.mark.parametrize("planes", [1, 2, 4, 8])
def test_channels_split_into_planes(planes: int) -> None:
    x = torch.arange(2.0 * 8 * planes, device=DEVICE)
    out = torch.full_like(x, -1)
    _split[(1,)](x, out, 2, 8, planes)
    assert torch.equal(out, x)


def test_codes_have_1_to_8_bits() -> None:
    with pytest.raises(ValueError, match="1 to 8"):
        unit(9)
