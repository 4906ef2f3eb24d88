"""Classes of channels: sizes, bits, bytes, and every channel back in its place."""

import pytest
import torch

from kvpack.core.errors import KvpackError, RecipeError
from kvpack.core.types import Group, Payload
from kvpack.parts.codecs.affine import Affine
from kvpack.parts.codecs.block_float import BlockFloat
from kvpack.parts.codecs.column_classes import ColumnClasses
from kvpack.parts.codecs.identity import Identity
from tests.contracts.discovery import random, through_safetensors

GROUPS = Affine(group=Group("channel", 128), zero="integer")


def sizes(codec: ColumnClasses, channels: int) -> list[tuple[int, int]]:
    return [(count, part.bits) for count, part in codec.classes(channels)]


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        (2, [(48, 4), (48, 3), (1952, 2)]),
        (3, [(48, 4), (1952, 3), (48, 2)]),
        (4, [(48, 5), (1952, 4), (48, 3)]),
        (8, [(48, 8), (1952, 8), (48, 7)]),
    ],
)
def test_sizes_and_bits(bits: int, expected: list) -> None:
    assert sizes(ColumnClasses(GROUPS, bits), 2048) == expected


@pytest.mark.parametrize(
    ("channels", "counts"),
    [
        (48, [48]),
        (64, [8, 56]),
        (172, [8, 164]),
        (512, [16, 496]),
        (1024, [24, 1000]),
        (2048, [48, 1952, 48]),
    ],
)
def test_narrow_rows(channels: int, counts: list[int]) -> None:
    """A class of 8 channels would save 8 bits of codes and cost 24 of scale and zero point."""
    assert [count for count, _ in ColumnClasses(GROUPS).classes(channels)] == counts
    assert len(ColumnClasses(GROUPS, 2).classes(channels)) == (3 if channels >= 64 else 1)


def test_half_and_half_leaves_nothing_between() -> None:
    codec = ColumnClasses(GROUPS, salient_fraction=0.5, other_fraction=0.5)
    assert sizes(codec, 64) == [(32, 4), (32, 2)]
    assert sizes(codec, 88) == [(48, 4), (40, 2)]


def test_bytes_of_a_square_layer() -> None:
    """2048 x 2048: 48*4 + 1952*3 + 48*2 bits of codes a row, 24 for each of 18 groups; 2 a channel."""
    codec = ColumnClasses(GROUPS)
    tensors = codec.spec((2048, 2048)) | codec.state_spec((1, 2048, 2048))
    bits = 8 * sum(spec.nbytes for spec in tensors.values()) / 2048**2
    assert bits == 3 + 24 * 18 / 2048 + 2 / 2048
    assert round(bits, 4) == 3.2119


@pytest.mark.parametrize("channels", [48, 64, 80, 172])
@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("rows", [1, 9])
def test_each_class_is_coded_alone(channels: int, bits: int, rows: int) -> None:
    weight, salience = random(rows, channels), random(channels, seed=2).square()
    codec = ColumnClasses(Affine(group=Group("channel", 24), zero="integer"), bits, 0.2, 0.3)
    state = through_safetensors(codec.rank(salience))
    decoded = codec.decode(codec.encode(weight, state), state, torch.float32)
    ranked = salience.argsort(descending=True, stable=True)
    start = 0
    for count, part in codec.classes(channels):
        members = ranked[start : start + count].sort().values
        alone = part.decode(part.encode(weight[:, members], {}), {}, torch.float32)
        assert torch.equal(decoded[:, members], alone)
        start += count
    assert start == channels


def test_rows_can_be_cut() -> None:
    weight, codec = random(12, 80), ColumnClasses(GROUPS)
    state = codec.rank(random(80, seed=1))
    payload = codec.encode(weight, state)
    whole = codec.decode(payload, state, torch.float32)
    assert torch.equal(codec.decode(payload.rows(3, 8), state, torch.float32), whole[3:8])
    assert isinstance(payload, Payload)


def test_ties_keep_their_order() -> None:
    codec = ColumnClasses(GROUPS)
    state = codec.rank(torch.ones(80))
    assert torch.equal(codec.order(state, 80), torch.arange(80))
    assert state["classes"].tolist() == [0] * 2 + [0b01010101] * 18


def test_one_class_learns_nothing() -> None:
    for codec, channels in ((ColumnClasses(GROUPS), 48), (ColumnClasses(GROUPS, 3, 0.0, 0.0), 512)):
        assert codec.rank(torch.ones(channels)) == codec.state_spec((1, 5, channels)) == {}
        plain = Affine(bits=3, group=Group("channel", 128), zero="integer").encode(random(5, channels), {})
        found = codec.encode(random(5, channels), {})
        assert all(torch.equal(found.tensors[name], plain.tensors[name]) for name in plain.tensors)


def test_salience_must_be_finite() -> None:
    with pytest.raises(KvpackError, match="not finite"):
        ColumnClasses(GROUPS).rank(torch.full((80,), torch.nan))


@pytest.mark.parametrize("codec", [Identity(), BlockFloat(), Affine(group=Group("token", 8))], ids=repr)
def test_codecs_without_bits_or_channel_groups_are_refused(codec) -> None:
    with pytest.raises(RecipeError, match="classes of channels") as caught:
        ColumnClasses(codec)
    assert caught.value.hint


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("channels", [328, 480, 2048])
def test_products_of_classes_whose_last_groups_are_short(bits: int, channels: int) -> None:
    """Whole groups and the rest of a class take different ways; both start within a row of all classes."""
    codec = ColumnClasses(GROUPS, bits, salient_fraction=0.08)
    state = codec.rank(random(channels, seed=1).abs())
    payload = codec.encode(random(70, channels), state)
    dense = codec.decode(payload, state, torch.float32).double()
    for count in (1, 3):
        x, weights = random(count, channels, seed=2), random(count, 70, seed=3)
        for found, expected in (
            (codec.scores(x, payload, state), x.double() @ dense.mT),
            (codec.mix(weights, payload, state), weights.double() @ dense),
        ):
            assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
