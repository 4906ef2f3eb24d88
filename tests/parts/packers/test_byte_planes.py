"""The planes against a slow computation, and what they save on weights."""

import struct

import pytest
import torch

from kvpack import ops
from kvpack.core.packed_bytes import pack, worthwhile
from kvpack.parts.packers.byte_planes import BytePlanes
from kvpack.parts.packers.zstd import Zstd

DTYPES = {torch.bfloat16: 2, torch.float16: 2, torch.float32: 4, torch.float64: 8, torch.int32: 4}


def planes_by_hand(raw: bytes, item: int, turn: bool) -> list[bytes]:
    """Most significant byte first, after a rotation by one bit, item by item."""
    rows = []
    for at in range(0, len(raw), item):
        number = int.from_bytes(raw[at : at + item], "little")
        if turn and item > 1:
            top = number >> (8 * item - 1)
            number = ((number << 1) & ((1 << 8 * item) - 1)) | top
        rows.append(number.to_bytes(item, "big"))
    return [bytes(row[i] for row in rows) for i in range(item)]


@pytest.mark.parametrize("turn", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_planes_are_those_of_the_definition_and_join_again(dtype: torch.dtype, turn: bool) -> None:
    special = [0.0, -0.0, 1.0, -1.5, 3e-5, -7e4]
    x = torch.tensor(special + torch.randn(57, generator=torch.Generator().manual_seed(0)).tolist())
    raw = (1000 * x if dtype == torch.int32 else x).to(dtype).view(torch.uint8)
    item = DTYPES[dtype]
    planes = ops.byte_planes.split(raw, item, turn=turn)
    assert [bytes(p.numpy().data) for p in planes] == planes_by_hand(bytes(raw.numpy().data), item, turn)
    out = torch.empty_like(raw)
    ops.byte_planes.join(planes, out, turn=turn)
    assert torch.equal(out, raw)


@pytest.mark.parametrize(("dtype", "shift"), [(torch.bfloat16, 16), (torch.float32, 0)], ids=str)
def test_the_first_plane_is_the_exponent(dtype: torch.dtype, shift: int) -> None:
    x = torch.randn(50, generator=torch.Generator().manual_seed(1)).to(dtype)
    item = x.element_size()
    bits = [struct.unpack("<I", struct.pack("<f", float(v)))[0] for v in x]
    first = ops.byte_planes.split(x.view(torch.uint8), item, turn=True)[0]
    assert first.tolist() == [(b >> 23) & 255 for b in bits]


def saved(x: torch.Tensor, packer: BytePlanes | Zstd) -> float:
    """Bytes over packed bytes, tuned as an export does it; 1 where it is not worth it."""
    raw, dtype = x.view(torch.uint8).numpy().data, str(x.dtype).removeprefix("torch.")
    tuned = worthwhile(packer, raw, dtype, 0.02)
    return len(raw) / sum(map(len, pack(tuned, raw, dtype, 1 << 20))) if tuned else 1.0


def test_bfloat16_weights_take_two_thirds() -> None:
    """Issue 4: 1.45 times or better at no loss. Normal weights: ideal 1.517, seen 1.50."""
    w = (0.02 * torch.randn(1 << 18, generator=torch.Generator().manual_seed(2))).to(torch.bfloat16)
    assert saved(w, BytePlanes((Zstd(),))) > 1.47
    assert saved(w, Zstd((1,))) < 1.35


def test_float32_that_came_from_bfloat16_loses_its_empty_planes() -> None:
    w = (0.02 * torch.randn(1 << 17, generator=torch.Generator().manual_seed(3))).to(torch.bfloat16).float()
    assert saved(w, BytePlanes((Zstd(),))) > 2.9


def test_every_plane_has_a_packer_of_its_own_after_tuning() -> None:
    w = (0.02 * torch.randn(1 << 16, generator=torch.Generator().manual_seed(4))).to(torch.bfloat16)
    tuned = BytePlanes((Zstd(),)).tuned(bytes(w.view(torch.uint8).numpy().data), "bfloat16")
    assert [p.levels for p in tuned.packers] == [(0,), (0,)]
    with pytest.raises(ValueError, match="2 packers and more planes"):
        tuned.pack(bytes(16), "float32")
    with pytest.raises(ValueError, match="at least one"):
        BytePlanes(())
