"""Vectors from a shared codebook: what is stored, what it decodes to, what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvpack.core.errors import KvpackError, RecipeError
from kvpack.core.types import Payload
from kvpack.core.weight_code import stored_spec
from kvpack.parts.codecs.shared_vectors import SharedVectors
from tests.contracts.discovery import random


def by_hand(x: Tensor, codec: SharedVectors, books: Tensor) -> Tensor:
    """Every vector by itself, in float64."""
    result = torch.zeros_like(x, dtype=torch.float64)
    group = codec.columns or x.shape[1]
    for r, row in enumerate(x.double()):
        for first in range(0, x.shape[1], group):
            part = row[first : first + group]
            scale = part.square().mean().sqrt().half().double()
            for at in range(0, len(part), codec.size):
                piece = part[at : at + codec.size] / (scale if scale else 1.0)
                book = books[first // group].double()
                best = book[(piece - book).square().sum(1).argmin()]
                result[r, first + at : first + at + codec.size] = best * scale
    return result


@pytest.mark.parametrize(
    ("codec", "channels"),
    [
        (SharedVectors(size=4, bits=5), 48),
        (SharedVectors(size=4, bits=5, columns=32), 80),
        (SharedVectors(size=4, bits=3, columns=64), 172),
        (SharedVectors(size=8, bits=9, columns=24), 64),
        (SharedVectors(size=2, bits=4, codebook_dtype="float8_e4m3fn"), 64),
        (SharedVectors(size=4, bits=12), 4),
    ],
    ids=repr,
)
@pytest.mark.parametrize("rows", [1, 7])
def test_it_is_the_nearest_vector_by_hand(codec: SharedVectors, channels: int, rows: int) -> None:
    groups = -(-channels // (codec.columns or channels))
    x, books = random(rows, channels), random(groups, 2**codec.bits, codec.size, seed=1)
    state = codec.store(books)
    payload = codec.encode(x, state)
    decoded = codec.decode(payload, state, torch.float32)
    assert torch.allclose(decoded.double(), by_hand(x, codec, codec.books(state)), atol=1e-5)
    stored = sum(t.numel() * t.element_size() for t in {**payload.tensors, **state}.values())
    codes = rows * -(-channels // codec.size * codec.bits // 8)
    item = 1 if codec.codebook_dtype.startswith("float8") else 2
    assert stored == codes + 2 * rows * groups + item * groups * 2**codec.bits * codec.size
    specs = stored_spec(codec, (rows, channels), "float32")
    assert stored == sum(spec.nbytes for spec in specs.values())


def test_rows_can_be_cut_and_zero_rows_stay_zero() -> None:
    codec, x = SharedVectors(size=4, bits=4), random(9, 16)
    x[3] = 0
    state = codec.store(random(1, 16, 4, seed=1))
    payload = codec.encode(x, state)
    whole = codec.decode(payload, state, torch.bfloat16)
    assert torch.equal(codec.decode(payload.rows(2, 5), state, torch.bfloat16), whole[2:5])
    places = torch.tensor([8, 3, 3])
    assert torch.equal(codec.decode(payload.blocks(places, 1), state, torch.bfloat16), whole[places])
    assert torch.equal(whole[3], torch.zeros(16, dtype=torch.bfloat16))
    assert isinstance(payload, Payload)


def test_scales_of_extreme_rows() -> None:
    codec = SharedVectors(size=2, bits=2)
    scales = codec.scales(torch.tensor([[1e30, -1e30], [3e-5, 4e-5], [0.0, 0.0], [1e-30, 1e-30]]))
    assert scales[0, 0] == 65504
    assert scales[1, 0] == pytest.approx(3.5355e-5, rel=0.01)
    assert scales[2, 0] == scales[3, 0] == 0


def test_what_does_not_fit_is_refused_by_name() -> None:
    with pytest.raises(RecipeError, match="50 channels are no whole number of vectors of 4") as caught:
        SharedVectors(bits=4).spec((8, 50))
    assert "size to 2" in caught.value.hint
    with pytest.raises(RecipeError, match="groups of 30 channels cut vectors of 4"):
        SharedVectors(bits=4, columns=30)
    with pytest.raises(KvpackError, match="were not measured"):
        SharedVectors(bits=4).fit({})
    with pytest.raises(KvpackError, match="not finite"):
        SharedVectors(bits=4).fit({"all_rows": {"rows": torch.full((1, 4, 8), torch.nan)}})
