"""Five ternary codes to a byte, exactly."""

import pytest
import torch

from kvpack.ops import trits

LENGTHS = [1, 4, 5, 6, 8, 48, 64, 80, 128]


@pytest.mark.parametrize("count", LENGTHS)
def test_round_trip(count: int) -> None:
    codes = torch.randint(0, 3, (2, 3, count), generator=torch.Generator().manual_seed(count)).byte()
    packed = trits.pack(codes)
    assert packed.shape == (2, 3, trits.packed_size(count))
    assert packed.dtype == torch.uint8
    assert torch.equal(trits.unpack(packed, count), codes)


def test_digits_have_base_three_least_first() -> None:
    assert trits.pack(torch.tensor([2, 1, 0, 0, 2, 1], dtype=torch.uint8)).tolist() == [2 + 3 + 2 * 81, 1]


def test_largest_codes_fill_a_byte() -> None:
    codes = torch.full((10,), 2, dtype=torch.uint8)
    assert trits.pack(codes).tolist() == [242, 242]
    assert torch.equal(trits.unpack(trits.pack(codes), 10), codes)


def test_wrong_dtypes_and_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="uint8"):
        trits.pack(torch.zeros(5))
    with pytest.raises(ValueError, match="6 ternary codes fill 2 bytes"):
        trits.unpack(torch.zeros(1, dtype=torch.uint8), 6)
