"""Packing is exact and little-endian for every width and length."""

import pytest
import torch

from kvpack.ops import bits

WIDTHS = range(1, 9)
LENGTHS = [1, 2, 3, 7, 8, 9, 31, 64, 100]


def codes_of(width: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(width)
    return torch.randint(0, 2**width, shape, generator=generator).to(torch.uint8)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("count", LENGTHS)
def test_round_trip(width: int, count: int) -> None:
    codes = codes_of(width, 2, 3, count)
    packed = bits.pack(codes, width)
    assert packed.dtype == torch.uint8
    assert packed.shape == (2, 3, bits.packed_size(count, width))
    assert torch.equal(bits.unpack(packed, width, count), codes)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("count", [5, 8, 13])
def test_stream_is_little_endian(width: int, count: int) -> None:
    codes = codes_of(width, count)
    stream = sum(int(code) << (width * j) for j, code in enumerate(codes))
    expected = stream.to_bytes(bits.packed_size(count, width), "little")
    assert bytes(bits.pack(codes, width).tolist()) == expected


@pytest.mark.parametrize("width", WIDTHS)
def test_largest_code_survives_at_every_place(width: int) -> None:
    codes = torch.eye(24, dtype=torch.uint8) * (2**width - 1)
    assert torch.equal(bits.unpack(bits.pack(codes, width), width, 24), codes)


@pytest.mark.parametrize("width", WIDTHS)
def test_strided_and_empty_rows(width: int) -> None:
    codes = codes_of(width, 12, 10).T
    assert torch.equal(bits.unpack(bits.pack(codes, width), width, 12), codes)
    none = torch.empty(0, 12, dtype=torch.uint8)
    assert bits.unpack(bits.pack(none, width), width, 12).shape == (0, 12)


def test_three_bits_are_three_bits() -> None:
    assert bits.packed_size(64, 3) == 24


@pytest.mark.parametrize("width", [0, 9])
def test_refuses_other_widths(width: int) -> None:
    with pytest.raises(ValueError, match="1 to 8 bits"):
        bits.pack(torch.zeros(8, dtype=torch.uint8), width)


def test_refuses_other_dtypes_and_sizes() -> None:
    with pytest.raises(ValueError, match="uint8"):
        bits.pack(torch.zeros(8), 4)
    with pytest.raises(ValueError, match="fill 4 bytes, got 5"):
        bits.unpack(torch.zeros(5, dtype=torch.uint8), 4, 8)
