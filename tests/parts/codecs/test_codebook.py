"""The learned codebook: a slow re-computation of KVQuant's formulas in float64."""

import pytest
import torch

from kvpack.core.errors import KvpackError, RecipeError
from kvpack.core.types import Stats
from kvpack.parts.codecs.codebook import Codebook
from kvpack.parts.codecs.top_outliers import TopOutliers
from tests.contracts.discovery import fitted, random, specs

AXES = ["channel", "token"]


def rows(heads: int = 1, tokens: int = 400, channels: int = 32, seed: int = 0) -> torch.Tensor:
    """Channels with their own offsets and widths, some one-signed, and skewed heavy tails."""
    x = random(heads, tokens, channels, seed=seed)
    x = torch.where(x > 0, x**2, x) + random(heads, tokens, channels, seed=seed + 1)
    return x * torch.linspace(0.2, 4, channels) + torch.linspace(-9, 9, channels)


def stats(x: torch.Tensor, gradient: torch.Tensor, sample: int = 100) -> Stats:
    position = (torch.arange(x.shape[1]) % sample).int()
    found = {"rows": {"rows": x, "position": position}}
    found["gradient.rows"] = {"rows": gradient, "position": position}
    return found


def gradients(x: torch.Tensor, seed: int = 7) -> torch.Tensor:
    """Larger where numbers are large, so that weights matter."""
    return 1e-6 * random(*x.shape, seed=seed) * (1 + x.abs())


def by_hand(codec: Codebook, x: torch.Tensor, gradient: torch.Tensor, sample: int = 100):
    """Kept normalised numbers and their weights, entry by entry in float64."""
    late = torch.arange(x.shape[1]) % sample >= codec.skip_tokens
    x, gradient = x[:, late].double(), gradient[:, late].double()
    dim = 1 if codec.axis == "channel" else 2
    out = int(round((1 - codec.keep_fraction) / 2 * x.shape[dim], 6))
    ordered = x.sort(dim).values
    lower, upper = ordered.narrow(dim, out, 1), ordered.narrow(dim, x.shape[dim] - 1 - out, 1)
    z, s = ((upper + lower) / 2).half().double(), ((upper - lower) / 2).half().double()
    kept = (x >= lower) & (x <= upper)
    power = {"fisher_scaled": s**2, "fisher": torch.ones_like(s), "none": None}[codec.weight]
    weight = torch.ones_like(x) if power is None else gradient**2 * power
    return ((x - z) / s)[kept], weight[kept]


def cost(points: torch.Tensor, weights: torch.Tensor, levels: torch.Tensor) -> float:
    distance = (points[:, None] - levels.double()[None]).square().amin(1)
    return float((weights * distance).sum() / weights.sum())


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("weight", ["fisher_scaled", "fisher", "none"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_levels_are_weighted_means(axis: str, weight: str, bits: int) -> None:
    codec = Codebook(bits, axis, weight=weight)
    x = rows()
    levels = codec.fit(stats(x, gradients(x)))["codebook"].double()
    points, weights = by_hand(codec, x, gradients(x))
    nearest = (points[:, None] - levels[None]).abs().argmin(1)
    for i in range(2**bits):
        mine = nearest == i
        mean = (weights * points)[mine].sum() / weights[mine].sum()
        assert abs(mean - levels[i]) < 2e-3
    even = torch.linspace(-1, 1, 2**bits)
    assert cost(points, weights, levels) < cost(points, weights, even)


@pytest.mark.parametrize("axis", AXES)
def test_weights_lower_the_weighted_error(axis: str) -> None:
    x = rows()
    learned = {
        w: Codebook(3, axis, weight=w).fit(stats(x, gradients(x)))["codebook"]
        for w in ("fisher_scaled", "none")
    }
    points, weights = by_hand(Codebook(3, axis), x, gradients(x))
    assert cost(points, weights, learned["fisher_scaled"]) < cost(points, weights, learned["none"])
    same = torch.ones_like(points)
    assert cost(points, same, learned["none"]) < cost(points, same, learned["fisher_scaled"])


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("q_norm", [False, True])
@pytest.mark.parametrize("channels", [8, 48, 64, 80, 128])
@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decoding_equals_the_formula(axis: str, q_norm: bool, channels: int, tokens: int, dtype) -> None:
    codec = Codebook(3, axis, q_norm=q_norm)
    known, x = rows(2, 300, channels), rows(4, tokens, channels, seed=3).view(2, 2, tokens, channels)
    state, x = codec.fit(stats(known, gradients(known))), x.to(dtype)
    payload = codec.encode(x, state)
    if axis == "channel":
        z, s = (state[n].double().unsqueeze(1) for n in ("centre", "scale"))
    else:
        low, high = x.double().amin(-1, True), x.double().amax(-1, True)
        z, s = ((high + low) / 2).half().double(), ((high - low) / 2).half().double()
    levels = state["codebook"].double()
    code = ((x.double() - z) / s)[..., None].sub(levels).abs().argmin(-1)
    if q_norm:
        levels = state["norm"][0].double() * levels + state["norm"][1].double()
    expected = z + s * levels[code]
    found = codec.decode(payload, state, torch.float32).double()
    wrong = ~torch.isclose(found, expected, rtol=1e-4, atol=1e-4)
    assert wrong.double().mean() < 0.002, "all but ties between two levels"


def test_q_norm_restores_mean_and_deviation() -> None:
    for axis in AXES:
        codec = Codebook(2, axis, q_norm=True)
        x = rows()
        state = codec.fit(stats(x, gradients(x)))
        points, _ = by_hand(codec, x, gradients(x))
        raw = state["codebook"].double()
        levels = state["norm"][0].double() * raw + state["norm"][1].double()
        rounded = levels[(points[:, None] - raw[None]).abs().argmin(1)]
        assert abs(rounded.mean() - points.mean()) < 1e-3
        assert abs(rounded.std() - points.std()) < 1e-3


@pytest.mark.parametrize("axis", AXES)
def test_learned_levels_beat_even_ones(axis: str) -> None:
    known, x = rows(), rows(seed=20)[None]
    errors = []
    for levels in ("learned", "even"):
        codec = TopOutliers(Codebook(2, axis, weight="none", levels=levels), keep=0.01)
        state = codec.fit(stats(known, gradients(known)))
        errors.append((codec.decode(codec.encode(x, state), state, torch.float32) - x).square().mean())
    assert errors[0] < errors[1]


def test_ranges_along_channels_are_frozen() -> None:
    """A token on its own gets the codes that it gets among others."""
    known, x = rows(), rows(seed=20)[None]
    codec = Codebook(3)
    state = codec.fit(stats(known, gradients(known)))
    whole = codec.encode(x, state).tensors["codes"]
    assert torch.equal(codec.encode(x[:, :, 17:18], state).tensors["codes"], whole[:, :, 17:18])


def test_first_tokens_do_not_count() -> None:
    x = rows()
    wild = x.clone()
    wild[:, ::100] = 1e4
    for axis in AXES:
        expected = Codebook(3, axis).fit(stats(x, gradients(x)))
        found = Codebook(3, axis).fit(stats(wild, gradients(x)))
        assert all(torch.equal(found[n], t) for n, t in expected.items())


@pytest.mark.parametrize("axis", AXES)
def test_constant_vectors_are_exact(axis: str) -> None:
    x = torch.full((1, 40, 16), 3.0) if axis == "token" else torch.arange(16.0).expand(1, 40, 16).clone()
    x[:, :, -1] = random(40) if axis == "channel" else x[:, :, -1]
    x[:, 20:] = rows(1, 20, 16) if axis == "token" else x[:, 20:]
    codec = Codebook(2, axis)
    state = codec.fit(stats(x, gradients(x)))
    y = codec.decode(codec.encode(x[None], state), state, torch.float32)[0]
    constant = (slice(None), slice(0, 20), slice(0, 15))
    assert torch.equal(y[constant], x[constant])


@pytest.mark.parametrize("weight", ["fisher_scaled", "none"])
def test_no_gradient_anywhere_is_no_weight(weight: str) -> None:
    x = rows()
    found = Codebook(3, weight=weight).fit(stats(x, torch.zeros_like(x)))
    assert torch.equal(found["codebook"], Codebook(3, weight="none").fit(stats(x, x))["codebook"])


def test_same_statistics_same_bytes() -> None:
    x = rows()
    first, second = (Codebook(4).fit(stats(x, gradients(x))) for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert specs(first) == Codebook(4).state_spec((1, 1, 1, 32))


def test_refusals() -> None:
    x = rows(1, 4, 8)
    with pytest.raises(KvpackError, match="256 levels cannot be learned from") as info:
        Codebook(8, skip_tokens=0).fit(stats(x, gradients(x)))
    assert "set bits to 4" in info.value.hint or "set bits to 5" in info.value.hint
    with pytest.raises(KvpackError, match="were not measured"):
        Codebook().fit({"rows": stats(x, x)["rows"]})
    with pytest.raises(KvpackError, match="not finite"):
        Codebook().fit(stats(x * torch.nan, x))
    with pytest.raises(KvpackError, match="which is all of them"):
        Codebook(skip_tokens=100).fit(stats(rows(), rows()))
    with pytest.raises(RecipeError, match="cannot learn from 9 calibration tokens"):
        Codebook(skip_tokens=8).for_rows(9)
    assert Codebook(skip_tokens=8).for_rows(10) == Codebook(skip_tokens=8)


def test_before_rope_beats_after_rope() -> None:
    """Channels with offsets keep them before RoPE only (KVQuant's ablation at 2 and 3 bits)."""
    before = rows(1, 600, 32)[None]
    half, t = 16, torch.arange(600.0)[:, None]
    angle = t * 10000.0 ** (-torch.arange(half) / half)
    a, b = before.split(half, -1)
    after = torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)
    for bits in (2, 3):
        codec = TopOutliers(Codebook(bits), select="threshold")
        errors = []
        for x in (before, after):
            state = fitted(codec, x)
            errors.append((codec.decode(codec.encode(x, state), state, torch.float32) - x).square().mean())
        assert errors[0] < 0.6 * errors[1]
