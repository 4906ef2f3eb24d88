"""What every transform promises."""

import pytest
import torch
from torch import Tensor

from kvpack.core.roles import Transform
from kvpack.core.types import Site, State
from tests.contracts.discovery import parts, random, specs, stats_of, through_safetensors

TRANSFORMS = parts("transforms")
SHAPES = [(1, 64, 5), (2, 48, 1), (4, 80, 3), (8, 8, 5), (8, 128, 1), (2, 7, 3), (6, 100, 2)]
IDS = ["K{}-D{}-T{}".format(*s) for s in SHAPES]


class HalfRope:
    """Rotary embedding that pairs channel d with d + D/2; an odd last channel stays."""

    def turn(self, x: Tensor, positions: Tensor, sign: float) -> Tensor:
        half = x.shape[-1] // 2
        frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = positions[:, None, :, None].double() * frequency
        cos, sin = angle.cos().float(), sign * angle.sin().float()
        a, b, rest = x.float().split([half, half, x.shape[-1] - 2 * half], -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)

    def apply(self, x: Tensor, positions: Tensor) -> Tensor:
        return self.turn(x, positions, 1.0)

    def undo(self, x: Tensor, positions: Tensor) -> Tensor:
        return self.turn(x, positions, -1.0)

    def partners(self, channels: int) -> Tensor:
        half = channels // 2
        index = torch.arange(channels)
        return torch.where(index < 2 * half, (index + half) % max(1, 2 * half), index)


def site(heads: int, tokens: int, start: int = 100) -> Site:
    positions = torch.arange(start, start + tokens).expand(2, tokens)
    return Site(layer=0, rope=HalfRope(), positions=positions, kv_heads=heads)


def fitted(transform: Transform, x: Tensor) -> State:
    return through_safetensors(transform.fit(stats_of(transform, x)))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(("heads", "channels", "tokens"), SHAPES, ids=IDS)
def test_inverse_undoes_forward(transform: Transform, heads: int, channels: int, tokens: int) -> None:
    x = random(2, heads, tokens, channels)
    at, state = site(heads, tokens), fitted(transform, x)
    z = transform.forward(x, state, at)
    assert tuple(z.shape) == transform.shape(tuple(x.shape))
    back = transform.inverse(z, state, at)
    assert back.shape == x.shape
    assert torch.allclose(back, x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(("heads", "channels", "tokens"), SHAPES, ids=IDS)
def test_dual_keeps_the_products(transform: Transform, heads: int, channels: int, tokens: int) -> None:
    k = random(2, heads, tokens, channels)
    q = random(2, heads, tokens, channels, seed=1)
    at, state = site(heads, tokens), fitted(transform, k)
    dual = transform.dual(q, state, at)
    z = transform.forward(k, state, at)
    if dual is None:
        return
    assert dual.shape == z.shape
    assert torch.allclose(dual @ z.transpose(2, 3), q @ k.transpose(2, 3), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(("heads", "channels", "tokens"), SHAPES, ids=IDS)
def test_dual_takes_any_number_of_query_heads(
    transform: Transform, heads: int, channels: int, tokens: int
) -> None:
    k = random(2, heads, tokens, channels)
    q = random(2, 3 * heads, tokens, channels, seed=1)
    at, state = site(heads, tokens), fitted(transform, k)
    dual = transform.dual(q, state, at)
    if dual is not None:
        z = transform.forward(k, state, at).repeat_interleave(3, 1)
        expected = q @ k.repeat_interleave(3, 1).transpose(2, 3)
        assert torch.allclose(dual @ z.transpose(2, 3), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(("heads", "channels", "tokens"), SHAPES, ids=IDS)
def test_state_is_the_announced_one(transform: Transform, heads: int, channels: int, tokens: int) -> None:
    x = random(2, heads, tokens, channels)
    assert specs(transform.fit(stats_of(transform, x))) == transform.state_spec(tuple(x.shape))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(("heads", "channels"), [(4, 64), (4, 80), (2, 7)])
def test_tokens_do_not_see_each_other(transform: Transform, heads: int, channels: int) -> None:
    """Bit for bit: the same token gives the same codes in a prompt and on its own."""
    x = random(2, heads, 33, channels)
    state = fitted(transform, x)
    together = transform.forward(x, state, site(heads, 33))
    restored = transform.inverse(together, state, site(heads, 33))
    for start, stop in ((0, 1), (1, 20), (20, 33)):
        at = site(heads, stop - start, 100 + start)
        z = transform.forward(x[:, :, start:stop], state, at)
        assert torch.equal(z, together[:, :, start:stop])
        assert torch.equal(transform.inverse(z, state, at), restored[:, :, start:stop])


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_rows_do_not_see_each_other(transform: Transform) -> None:
    x = random(2, 4, 5, 48)
    state = fitted(transform, x)
    together = transform.forward(x, state, site(4, 5))
    at = Site(0, HalfRope(), site(4, 5).positions[:1], 4)
    assert torch.equal(transform.forward(x[1:], state, at), together[1:])


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_linear_means_linear_and_blind_to_position(transform: Transform) -> None:
    x, y = random(2, 4, 5, 48), random(2, 4, 5, 48, seed=1)
    state = fitted(transform, x)
    a, b = (transform.forward(v, state, site(4, 5)) for v in (x, y))
    assert torch.allclose(transform.forward(3 * x + y, state, site(4, 5)), 3 * a + b, atol=1e-4)
    if transform.linear:
        bare = Site(layer=0, kv_heads=4)
        assert torch.equal(transform.forward(x, state, bare), a)
        assert torch.equal(transform.forward(x.flip(2), state, bare), a.flip(2))
    assert not (transform.linear and transform.needs_rope)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_input_is_computed_in_float32(transform: Transform, dtype: torch.dtype) -> None:
    x = random(2, 4, 5, 48).to(dtype)
    at, state = site(4, 5), fitted(transform, x)
    z = transform.forward(x, state, at)
    assert z.dtype == torch.float32
    assert torch.equal(z, transform.forward(x.float(), state, at))
    back = transform.inverse(z, state, at)
    assert back.dtype == torch.float32
    assert torch.equal(back.to(dtype), x) or torch.allclose(back, x.float(), atol=1e-5)
