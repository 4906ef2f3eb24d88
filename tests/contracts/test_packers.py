"""What every packer promises: the same bytes back, or an error; equal input, equal output."""

import pytest
import torch
from torch import Tensor

from kvpack.core.packed_bytes import PackedBytes, pack, unpack, worthwhile
from kvpack.core.roles import Packer
from kvpack.core.types import ITEM_BYTES
from kvpack.recipe.build import build, to_mapping
from kvpack.recipe.yaml_lines import Node, Position
from tests.contracts.discovery import parts

PACKERS = parts("packers")
DTYPES = sorted(ITEM_BYTES)
COUNTS = [0, 1, 3, 1000, 4097]
BLOCK = 4096


def contents(count: int, dtype: str) -> dict[str, Tensor]:
    """Bytes of `count` items: random, constant, few different ones, and numbers as weights have them."""
    nbytes, g = count * ITEM_BYTES[dtype], torch.Generator().manual_seed(count)
    found = {
        "random": torch.randint(0, 256, (nbytes,), generator=g, dtype=torch.uint8),
        "constant": torch.full((nbytes,), 7, dtype=torch.uint8),
        "few": torch.randint(0, 3, (nbytes,), generator=g, dtype=torch.uint8),
    }
    if "float" in dtype and "float8" not in dtype:
        weights = (0.02 * torch.randn(count, generator=g)).to(getattr(torch, dtype))
        found["weights"] = weights.view(torch.uint8) if count else torch.empty(0, dtype=torch.uint8)
    return found


def packed(packer: Packer, raw: Tensor, dtype: str) -> tuple[Tensor, PackedBytes]:
    blocks = list(pack(packer, raw.numpy().data, dtype, BLOCK))
    shape = (raw.numel() // ITEM_BYTES[dtype],)
    spec = PackedBytes(shape, dtype, packer, BLOCK, tuple(map(len, blocks)), "")
    return torch.tensor(list(b"".join(blocks)), dtype=torch.uint8), spec


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packer", PACKERS)
def test_the_same_bytes_come_back(packer: Packer, dtype: str) -> None:
    for count in COUNTS:
        for kind, raw in contents(count, dtype).items():
            tuned = packer.tuned(bytes(raw.numpy().data), dtype)
            for each in (packer, tuned):
                back = unpack(*packed(each, raw, dtype), "x")
                assert back.dtype == getattr(torch, dtype)
                assert back.numel() == count
                assert torch.equal(back.view(torch.uint8) if count else back.byte(), raw), (count, kind)


@pytest.mark.parametrize("packer", PACKERS)
def test_equal_bytes_are_packed_equally_and_tuned_equally(packer: Packer) -> None:
    raw = bytes(contents(4097, "bfloat16")["weights"].numpy().data)
    assert packer.tuned(raw, "bfloat16") == packer.tuned(raw, "bfloat16")
    assert packer.pack(raw, "bfloat16") == packer.pack(raw, "bfloat16")


@pytest.mark.parametrize("packer", PACKERS)
def test_what_was_tuned_survives_a_manifest(packer: Packer) -> None:
    tuned = packer.tuned(bytes(contents(1000, "float32")["weights"].numpy().data), "float32")
    errors: list = []
    assert build(Packer, Node.of(to_mapping(tuned), Position("m")), "packer", errors) == tuned
    assert not errors


@pytest.mark.parametrize("packer", PACKERS)
def test_random_bytes_are_not_worth_it_and_constant_ones_are(packer: Packer) -> None:
    found = contents(4097, "int16")
    assert worthwhile(packer, found["random"].numpy().data, "int16", 0.02) is None
    assert worthwhile(packer, found["constant"].numpy().data, "int16", 0.02) is not None
    assert worthwhile(packer, memoryview(b""), "int16", 0.02) is None


@pytest.mark.parametrize("packer", PACKERS)
def test_no_damage_goes_unnoticed(packer: Packer) -> None:
    raw = contents(600, "bfloat16")["weights"]
    block = packer.pack(raw.numpy().data, "bfloat16")
    for position in range(len(block)):
        for bit in (0, 7):
            bad = bytearray(block)
            bad[position] ^= 1 << bit
            out = torch.zeros_like(raw)
            try:
                packer.check(bad, "bfloat16", len(raw))
                packer.unpack(bytes(bad), "bfloat16", out)
            except ValueError:
                continue
            assert torch.equal(out, raw), (position, bit)  # an unused bit of a header


@pytest.mark.parametrize("packer", PACKERS)
def test_cut_grown_and_foreign_blocks_are_refused(packer: Packer) -> None:
    raw = contents(600, "bfloat16")["weights"]
    block = packer.pack(raw.numpy().data, "bfloat16")
    bad = [b"", b"\0" * 40, *(block[:n] for n in range(0, len(block), 7)), block + b"\0", block + block]
    for data in bad:
        with pytest.raises(ValueError):
            packer.unpack(data, "bfloat16", torch.empty_like(raw))


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("announced", [0, 2, 1198, 1202, 1 << 40])
def test_a_size_that_lies_is_found_by_looking(packer: Packer, announced: int) -> None:
    block = packer.pack(contents(600, "bfloat16")["weights"].numpy().data, "bfloat16")
    packer.check(block, "bfloat16", 1200)
    with pytest.raises(ValueError):
        packer.check(block, "bfloat16", announced)
