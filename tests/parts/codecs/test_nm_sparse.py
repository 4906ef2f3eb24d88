"""Two of four: what is kept, in how many bytes, and that all else is zero."""

import math

import pytest
import torch
from torch import Tensor

from kvpack import ops
from kvpack.core.errors import RecipeError
from kvpack.core.types import Group
from kvpack.parts.codecs.affine import Affine
from kvpack.parts.codecs.codebook import Codebook
from kvpack.parts.codecs.identity import Identity
from kvpack.parts.codecs.mirrored_levels import MirroredLevels
from kvpack.parts.codecs.nm_sparse import NmSparse
from kvpack.parts.solvers.rtn import Rtn
from kvpack.recipe.compat import check_weight_codec
from tests.contracts.discovery import random

PATTERNS = [(2, 4), (1, 2), (1, 4), (4, 8), (3, 5)]


def pruned(row: Tensor, keep: int, of: int) -> Tensor:
    """The largest magnitudes of every group, the first among equals."""
    out = torch.zeros_like(row)
    for start in range(0, len(row), of):
        group = row[start : start + of].abs().tolist()
        for i in sorted(range(len(group)), key=lambda i: (-group[i], i))[:keep]:
            out[start + i] = row[start + i]
    return out


def nonzeros(x: Tensor, of: int) -> Tensor:
    return torch.unflatten(ops.masks.filled(x, of) != 0, -1, (-(-x.shape[-1] // of), of)).sum(-1)


@pytest.mark.parametrize(("keep", "of"), PATTERNS)
@pytest.mark.parametrize("channels", [48, 64, 80, 172, 35, 3, 1])
def test_the_largest_survive_unchanged(channels: int, keep: int, of: int) -> None:
    codec, x = NmSparse(Identity(), keep, of), random(6, channels, seed=2)
    x[1], x[2], x[3, ::2] = 0.0, 0.7, 0.0
    found = codec.decode(codec.encode(x, {}), {}, torch.float32)
    assert torch.equal(found, torch.stack([pruned(row, keep, of) for row in x]))
    assert nonzeros(found, of).max() <= keep


@pytest.mark.parametrize(("keep", "of"), PATTERNS)
def test_patterns_are_numbered_without_gaps(keep: int, of: int) -> None:
    every = ops.masks.patterns(keep, of)
    assert len(every) == math.comb(of, keep)
    numbers = ops.masks.numbers(every.flatten()[None], keep, of)
    assert numbers.tolist() == [list(range(len(every)))]
    assert torch.equal(ops.masks.kept_by(numbers, keep, of)[0], every.flatten())
    assert 2 ** ops.masks.index_bits(keep, of) >= len(every) > 2 ** (ops.masks.index_bits(keep, of) - 1)


@pytest.mark.parametrize("channels", [48, 64, 80, 172, 256, 35])
def test_bytes_are_the_formula(channels: int) -> None:
    groups = -(-channels // 4)
    kept = 2 * groups
    scales = 2 * 2 * -(-kept // 64)
    expected = 7 * (-(-groups * 3 // 8) + -(-kept * 2 // 8) + scales)
    for inner in (Affine(bits=2, group=Group("channel", 64)), MirroredLevels(64)):
        codec, x = NmSparse(inner), random(7, channels)
        assert (
            codec.encode(x, {}).nbytes
            == sum(s.nbytes for s in codec.spec((7, channels)).values())
            == expected
        )
    if channels == 256:
        assert 8 * expected / (7 * 256) == 1.75 + 32 / 128, "three bits of mask and two codes for four"


@pytest.mark.parametrize("inner", [Affine(bits=2, group=Group("channel", 16)), MirroredLevels(8)], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_codes_of_survivors_are_their_codecs(inner, dtype: torch.dtype) -> None:
    x = random(5, 172, seed=3).to(dtype)
    kept = torch.stack([pruned(row, 2, 4) for row in x]) != 0
    alone = inner.decode(inner.encode(x[kept].reshape(5, -1), {}), {}, dtype)
    found = NmSparse(inner).decode(NmSparse(inner).encode(x, {}), {}, dtype)
    assert torch.equal(found[kept], alone.flatten())
    assert (found[~kept] == 0).all()


def test_rows_can_be_cut() -> None:
    codec, weight = NmSparse(Affine(bits=2)), random(9, 80)
    payload = Rtn().solve(weight, codec, {}).payload
    whole = codec.decode(payload, {}, torch.float32)
    assert torch.equal(codec.decode(payload.rows(3, 7), {}, torch.float32), whole[3:7])


def test_what_cannot_be_is_refused() -> None:
    for keep, of in ((4, 4), (0, 4), (5, 12)):
        with pytest.raises(RecipeError, match="cannot be kept"):
            NmSparse(Affine(), keep, of)
    for inner in (Codebook(), NmSparse(Affine())):
        with pytest.raises(RecipeError, match="cannot hold"):
            NmSparse(inner)
    with pytest.raises(RecipeError, match="segments"):
        check_weight_codec(NmSparse(Affine(group=Group("token", 0))), Rtn())
