"""The CPU's kernels for codes that are looked up: the reference's decoded bits, products as in float64."""

import pytest
import torch
from torch import Tensor

from kvpack.core.roles import Codec
from kvpack.core.types import Group, Payload, State
from kvpack.kernels import choice
from kvpack.kernels.cpu import lookup, lookups
from kvpack.parts.codecs.affine import Affine
from kvpack.parts.codecs.mirrored_levels import MirroredLevels
from kvpack.parts.codecs.nm_sparse import NmSparse
from kvpack.parts.codecs.shared_vectors import SharedVectors
from tests.contracts.discovery import random

pytestmark = pytest.mark.skipif(not choice.found("cpu").used, reason="the CPU's kernels are not used here")

EIGHTHS = Affine(bits=5, group=Group("channel", 24), zero="none", scale_dtype="float8_e4m3fn")
CODECS = [
    MirroredLevels(),
    MirroredLevels(size=0),
    MirroredLevels(size=12),
    MirroredLevels(size=1),
    NmSparse(MirroredLevels()),
    NmSparse(Affine(bits=2, group=Group("channel", 64))),
    NmSparse(Affine(bits=2, group=Group("channel", 16), zero="integer")),
    NmSparse(Affine(bits=8, group=Group("channel", 64))),
    NmSparse(Affine(bits=3, group=Group("channel", 24), zero="integer")),
    NmSparse(EIGHTHS, keep=4, of=8),
    NmSparse(Affine(bits=2, group=Group("channel", 16), zero="none"), keep=3, of=5),
    SharedVectors(size=4, bits=8, codebook_dtype="float8_e4m3fn"),
    SharedVectors(size=2, bits=6),
    SharedVectors(size=2, bits=8, columns=16),
    SharedVectors(size=4, bits=12),
    SharedVectors(size=1, bits=3),
]
WIDTHS = [48, 80, 172, 480, 2048]


def state_of(codec: Codec, channels: int) -> State:
    """Codebooks at random."""
    spec = codec.state_spec((1, 1, channels))
    return {name: random(*s.shape, seed=3).to(getattr(torch, s.dtype)) for name, s in spec.items()}


def encoded(codec: Codec, *shape: int) -> tuple[Payload, State]:
    state = state_of(codec, shape[-1])
    return codec.encode(random(*shape), state), state


def decoded(codec: Codec, payload: Payload, state: State, dtype: torch.dtype) -> Tensor:
    """By the reference."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(choice.VARIABLE, "reference")
        return codec.decode(payload, state, dtype)


def close(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_decoded_numbers_are_the_same_bits(codec: Codec) -> None:
    for channels in WIDTHS:
        payload, state = encoded(codec, 9, channels)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            expected = decoded(codec, payload, state, dtype)
            assert torch.equal(codec.decode(payload, state, dtype), expected), (channels, dtype)


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_products_and_sums_are_those_of_decoded_numbers(codec: Codec) -> None:
    for channels in WIDTHS:
        payload, state = encoded(codec, 37, channels)
        x = decoded(codec, payload, state, torch.float32).double()
        for vectors in (1, 3, 8, 9):
            for dtype in (torch.float32, torch.bfloat16):
                query = random(vectors, channels, seed=vectors).to(dtype)
                close(codec.scores(query, payload, state), query.double() @ x.mT)
            weights = random(vectors, 37, seed=vectors)
            close(codec.mix(weights, payload, state), weights.double() @ x)


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_outer_axes_and_threads(codec: Codec) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        payload, state = encoded(codec, 2, 3, 17, 80)
        x = decoded(codec, payload, state, torch.float32)
        query, weights = random(2, 3, 2, 80, seed=1), random(2, 3, 2, 17, seed=2)
        close(codec.scores(query, payload, state), query.double() @ x.double().mT)
        close(codec.mix(weights, payload, state), weights.double() @ x.double())
        assert torch.equal(codec.decode(payload, state, torch.float32), x)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_some_rows_of_a_weight_are_views(codec: Codec) -> None:
    payload, state = encoded(codec, 40, 96)
    x = decoded(codec, payload, state, torch.float32)
    part = payload.rows(8, 31)
    assert torch.equal(codec.decode(part, state, torch.float32), x[8:31])
    close(codec.scores(random(2, 96), part, state), random(2, 96).double() @ x[8:31].double().mT)


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_constant_rows_and_rows_of_zeros(codec: Codec) -> None:
    weight, state = random(6, 64), state_of(codec, 64)
    weight[1], weight[2], weight[3, :] = 0, 1, -1e-7
    payload = codec.encode(weight, state)
    x = decoded(codec, payload, state, torch.float32)
    assert torch.equal(codec.decode(payload, state, torch.float32), x)
    close(codec.scores(torch.ones(1, 64), payload, state), x.double().sum(-1)[None])


def test_patterns_beyond_the_last_stand_for_the_last() -> None:
    codec = NmSparse(MirroredLevels())
    payload, state = encoded(codec, 8, 64)
    payload.tensors["mask"].fill_(255)
    x = decoded(codec, payload, state, torch.float32)
    assert torch.equal(codec.decode(payload, state, torch.float32), x)
    close(codec.scores(random(1, 64), payload, state), random(1, 64).double() @ x.double().mT)


def test_nothing_is_nothing() -> None:
    codec = MirroredLevels()
    payload = codec.encode(random(4, 32), {}).rows(0, 0)
    assert codec.scores(random(2, 32), payload, {}).shape == (2, 0)
    assert torch.equal(codec.mix(torch.empty(2, 0), payload, {}), torch.zeros(2, 32))
    assert codec.decode(payload, {}, torch.float32).shape == (0, 32)


def test_processors_without_shuffles_find_the_same() -> None:
    """The loop that other processors run, here by the interpreter."""
    pairs = lookup._pairs()
    numbers, words, x = random(16), torch.tensor([0, 13, 44, 63], dtype=torch.int16), random(32, seed=1)
    expected = sum(
        float(numbers[4 * pair + i]) * float(x[8 * pair + int(pairs[word, i])])
        for pair, word in enumerate(words.tolist())
        for i in range(4)
    )
    addresses = (t.data_ptr() for t in (numbers, words, x, pairs))
    assert float(lookups._kept_product_anywhere(*addresses, 4)) == pytest.approx(expected, rel=1e-5)
