"""The trial of levels, and frames that others made."""

import math

import pytest
import torch
import zstandard

from kvpack.parts.packers.zstd import Zstd


def codes(sigma: float, count: int = 1 << 18) -> bytes:
    """Independent rounded normal numbers, as int8."""
    x = sigma * torch.randn(count, generator=torch.Generator().manual_seed(0))
    return bytes(x.round().clamp(-127, 127).to(torch.int8).view(torch.uint8).numpy().data)


def entropy(data: bytes) -> float:
    """Bits per byte of the histogram."""
    counts = [data.count(bytes([value])) for value in range(256)]
    return -sum(c / len(data) * math.log2(c / len(data)) for c in counts if c)


@pytest.mark.parametrize(("sigma", "most"), [(1.0, 1.09), (1.5, 1.03), (3.0, 1.01), (8.0, 1.02)])
def test_independent_codes_come_near_their_entropy(sigma: float, most: float) -> None:
    """Card, b.6: levels 3 to 9 lose a tenth or more to matches. Bounds fitted to what was seen."""
    data = codes(sigma, 1 << 17)
    bits = {n: 8 * len(Zstd((n,)).pack(data, "int8")) / len(data) for n in (0, 3)}
    assert Zstd().tuned(data, "int8").levels == (0,)
    assert bits[0] < most * entropy(data)
    assert sigma > 3 or bits[3] > 1.07 * bits[0]


def test_the_best_of_the_levels_is_taken_and_a_later_one_only_where_it_pays() -> None:
    text = b"".join(b"%d kvpack " % (i * i % 9973) for i in range(20_000))
    assert Zstd((1, 19)).tuned(text, "uint8").levels == (19,)
    assert Zstd((1, 19), margin=0.9).tuned(text, "uint8").levels == (1,)
    assert Zstd((3, 0)).tuned(codes(1.0), "int8").levels == (0,)
    with pytest.raises(ValueError, match="at least one"):
        Zstd(())


def frame(**options: bool) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(b"a" * 5000)


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (frame(write_checksum=False), "checksum"),
        (frame(write_checksum=True, write_content_size=False), "announced"),
        (b"not a frame at all", "no zstd frame"),
    ],
)
def test_frames_that_cannot_be_checked_are_refused(made: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Zstd().check(made, "uint8", 5000)


def test_a_wide_window_is_refused() -> None:
    parameters = zstandard.ZstdCompressionParameters(
        window_log=27, write_checksum=True, write_content_size=True
    )
    whole = zstandard.ZstdCompressor(compression_params=parameters).compress(b"a" * (1 << 25))
    with pytest.raises(ValueError, match="window"):
        Zstd().check(whole, "uint8", 1 << 25)
