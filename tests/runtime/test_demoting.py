"""Tiers whose share holds at every step: MiKV's schedule against a slow one of our own."""

import math

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from kvpack.core.types import Group
from kvpack.parts.codecs.affine import Affine
from kvpack.parts.codecs.identity import Identity
from kvpack.parts.policies.top_fraction import TopFraction
from kvpack.parts.scorers.accumulated_attention import AccumulatedAttention
from kvpack.parts.transforms.channel_balance import ChannelBalance
from kvpack.report import kv_bytes
from kvpack.runtime.install import new_cache
from tests.runtime.ranked import Fed, Ranked, attention, check_moved_rows, feed, mikv, tokenwise
from tests.runtime.rows import ROW_CHANGES, generated, padded
from tests.runtime.schemes import logits, text, tiny


def snapped(x: Tensor, bits: int, size: int) -> Tensor:
    """Every token by itself, in groups of `size` channels."""
    parts = []
    for part in x.split(size, -1):
        low, high = part.amin(-1, keepdim=True), part.amax(-1, keepdim=True)
        scale = torch.where(high > low, (high - low) / (2**bits - 1), torch.ones_like(high))
        parts.append(torch.round((part - low) / scale) * scale + low)
    return torch.cat(parts, -1)


class Slow:
    """One head of MiKV as lists: scores, which tokens are high, and what is stored of each."""

    def __init__(self, share: float, least: int) -> None:
        self.share, self.least = share, least
        self.high: list[bool] = []
        self.stored: list[Tensor] = []

    def step(self, exact: Tensor, scores: Tensor) -> None:
        """`exact` [n, D] are new, `scores` [T] those of all tokens."""
        old, total = len(self.high), len(scores)
        wanted = max(math.floor(self.share * total + 1e-9), min(self.least, total))
        recent = round(wanted / 2)
        candidates = [j for j in range(total) if j >= old or self.high[j]]
        kept = {j for j in candidates if j >= total - recent}
        others = sorted((j for j in candidates if j not in kept), key=lambda j: (-float(scores[j]), j))
        kept |= set(others[: wanted - len(kept)])
        for j in range(total):
            if j >= old:
                self.stored.append(snapped(exact[j - old], 8 if j in kept else 2, 4))
            elif self.high[j] and j not in kept:
                self.stored[j] = snapped(self.stored[j], 2, 4)
        self.high = [j in kept for j in range(total)]
        assert sum(self.high) == wanted


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5])
def test_every_step_is_what_the_card_says(kv_heads: int, share: float) -> None:
    least = 2 if share else 0
    model = mikv(share).install(tiny(num_key_value_heads=kv_heads, num_hidden_layers=1))
    cache, past, batch = new_cache(model), 0, 2
    slow = [[[Slow(share, least) for _ in range(kv_heads)] for _ in range(batch)] for _ in range(2)]
    sums = torch.zeros(batch, kv_heads, 0, dtype=torch.float64)
    for i, tokens in enumerate([13, *[1] * 12, 5, 1]):
        fed: Fed = feed(cache, tokens, batch=batch, seed=i)
        for plane, seen in enumerate((fed.seen_key, fed.seen_value)):
            for b in range(batch):
                for h in range(kv_heads):
                    stored = slow[plane][b][h].stored
                    if stored:
                        torch.testing.assert_close(
                            seen[b, h, :past], torch.stack(stored), rtol=1e-4, atol=1e-5
                        )
        sums = torch.nn.functional.pad(sums, (0, tokens))
        for b in range(batch):
            given = attention(fed.query[b], fed.seen_key[b], past)
            sums[b] += given.sum(1).unflatten(0, (kv_heads, -1)).sum(1)
        past += tokens
        for plane, exact in enumerate((fed.key, fed.value)):
            for b in range(batch):
                for h in range(kv_heads):
                    slow[plane][b][h].step(exact[b, h], sums[b, h])
        mask = cache.layers[0]._ranking.chunks[0].mask()
        assert mask.tolist() == [[s.high for s in row] for row in slow[0]]


def test_counts_hold_and_demoted_tokens_never_return() -> None:
    model = mikv(0.3).install(tiny(num_hidden_layers=1))
    cache = new_cache(model)
    low = torch.zeros(1, 2, 0, dtype=torch.bool)
    seen = [(torch.zeros(1, 2, 0, 8), low)]
    for i, tokens in enumerate([1, 1, 17, *[1] * 20]):
        fed = feed(cache, tokens, seed=i)
        mask = cache.layers[0]._ranking.chunks[0].mask()
        total = cache.get_seq_length()
        assert (mask.sum(-1) == max(int(0.3 * total + 1e-9), min(2, total))).all()
        assert not (mask[..., : low.shape[-1]] & low).any()
        before, then_low = seen[-1]
        count = then_low.shape[-1]
        assert torch.equal(fed.seen_value[:, :, :count][then_low], before[:, :, :count][then_low])
        seen.append((fed.seen_value, low))
        low = ~mask
    planes = cache.layers[0]._planes.values()
    assert [p.stored_tokens for p in planes] == [39, 39]
    assert all(p.encoded_tokens > 39 for p in planes)
    assert cache.allocated_nbytes == cache.nbytes


@pytest.mark.parametrize("tokens", [1, 2, 9, 10, 64])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("high", [None, Identity()])
def test_bytes_are_what_the_plan_says(
    tokens: int, family: str, dtype: torch.dtype, high: Identity | None
) -> None:
    plain = mikv(high=high)
    scheme = Ranked(plain.key, plain.value, plain.policy, (ChannelBalance(),))
    model = scheme.install(tiny(family, dtype=dtype))
    cache = new_cache(model)
    assert logits(model, text(tokens), cache).isfinite().all()
    name = str(dtype).removeprefix("torch.")
    assert cache.nbytes == kv_bytes(scheme.plans(model), tokens, name).total


@pytest.mark.parametrize(("bits", "expected"), [(16, 5.2), (8, 3.7), (4, 2.9), (2, 2.5)])
def test_bytes_are_the_card_formula(bits: int, expected: float) -> None:
    def codec(width: int) -> Affine | Identity:
        return Identity() if width == 16 else Affine(bits=width, group=Group("channel", 64))

    codecs = (codec(bits), codec(2))
    policy = TopFraction(AccumulatedAttention(), share=0.2, interval=1, recent_share=0.5, demote=True)
    scheme = Ranked(codecs, codecs, policy)
    model = tiny(dtype=torch.float16, head_dim=128, num_hidden_layers=1)
    planned = kv_bytes(scheme.plans(model), 2000, "float16")
    assert 8 * planned.coded / planned.elements == pytest.approx(expected, rel=1e-6)
    ranked = codecs[0] != codecs[1]
    extra = (32 / 256 + 1 / 256) if ranked else 0
    assert 8 * planned.ranking / planned.elements == pytest.approx(extra, rel=1e-6)


def test_everything_important_and_exact_is_the_dense_cache() -> None:
    model = mikv(1.0, high=Identity()).install(tiny(dtype=torch.bfloat16))
    ids, steps = text(40, batch=2), [20, *[1] * 20]
    ours = logits(model, ids, new_cache(model), steps)
    assert torch.equal(ours, logits(model, ids, DynamicCache(config=model.config), steps))


def test_a_share_of_nothing_is_plain_rounding() -> None:
    model = mikv(0.0).install(tiny(num_hidden_layers=1))
    cache = new_cache(model)
    given = feed(cache, 50)
    seen = feed(cache, 1, seed=1)
    torch.testing.assert_close(seen.seen_key[:, :, :50], snapped(given.key, 2, 4), rtol=1e-5, atol=1e-5)


def test_errors_fall_with_the_bits() -> None:
    def error(scheme: Ranked) -> float:
        model = scheme.install(tiny(num_hidden_layers=1))
        cache = new_cache(model)
        given = feed(cache, 128)
        seen = feed(cache, 1, seed=1)
        return float((seen.seen_value[:, :, :128] - given.value).square().mean())

    assert error(mikv(0.5, low=2)) > 2 * error(mikv(0.5, low=3)) > 4 * error(mikv(0.5, low=4))


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
@pytest.mark.parametrize("pad", [1, 16])
def test_a_padded_row_equals_its_single_run(family: str, pad: int) -> None:
    plain = mikv(0.3, low=4)
    model = Ranked(plain.key, plain.value, plain.policy, (ChannelBalance(),)).install(tiny(family))
    ids = text(40)
    expected, _ = generated(model, ids)
    ours, _ = generated(model, *padded(ids, pad))
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("change", ROW_CHANGES)
def test_rows_can_be_selected_repeated_and_reordered(change: str) -> None:
    plain = mikv(0.3)
    scheme = Ranked(plain.key, plain.value, plain.policy, (ChannelBalance(),))
    check_moved_rows(scheme.install(tiny()), change)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_sliding_layers_keep_the_share_of_the_window(family: str, share: float) -> None:
    exact = mikv(share, high=Identity())
    codecs = (Identity(), tokenwise(8, 1))
    model = Ranked(codecs, codecs, exact.policy).install(tiny(family))
    ids, steps = text(100), [30, *[1] * 40, 25, *[1] * 5]
    cache = new_cache(model)
    ours = logits(model, ids, cache, steps)
    dense = logits(model, ids, DynamicCache(config=model.config), steps)
    torch.testing.assert_close(ours, dense, rtol=2e-2, atol=2e-2)
    for layer in cache.layers:
        held = min(100, (layer.sliding_window or 101) - 1)
        (chunk,) = layer._ranking.chunks
        assert chunk.tokens == held
        assert (chunk.mask().sum(-1) == max(2, int(share * held + 1e-9))).all()
        assert layer.stored_tokens == {"key": held, "value": held}


def test_beams_turns_and_the_measuring_mode_run() -> None:
    model = mikv(0.3).install(tiny("mistral"))
    assert model.generate(text(40), num_beams=3, max_new_tokens=20, do_sample=False).shape == (1, 60)
    cache = new_cache(model, exact_prefill=False)
    for turn in range(3):
        assert logits(model, text(37, seed=turn), cache, [20, 16, 1]).isfinite().all()
    one = mikv(0.3).install(tiny(num_hidden_layers=1))
    measured = new_cache(one, exact_prefill=False)
    fed = feed(measured, 20)
    assert not torch.equal(fed.key, fed.seen_key)


def test_the_balancer_belongs_to_the_first_prompt() -> None:
    plain = mikv(0.2)
    scheme = Ranked(plain.key, plain.value, plain.policy, (ChannelBalance(),))
    model = scheme.install(tiny(num_hidden_layers=1))
    cache = new_cache(model)
    fed = feed(cache, 30, batch=2)
    transform, state, _ = cache.layers[0]._planes["key"].transforms[0]
    grouped = fed.query.unflatten(1, (2, -1)).abs().amax((2, 3))
    expected = (grouped / fed.key.abs().amax(2)).sqrt().half()
    assert isinstance(transform, ChannelBalance)
    assert torch.equal(state["scale"], expected)
    feed(cache, 30, batch=2, seed=5)
    assert torch.equal(cache.layers[0]._planes["key"].transforms[0][1]["scale"], expected)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(cache.layers[0]._planes["key"].transforms[0][1]["scale"], expected.flip(0))


def test_the_balancer_lowers_the_error_of_scores_with_outlier_channels() -> None:
    errors = []
    for transforms in ((), (ChannelBalance(),)):
        plain = mikv(0.0)
        scheme = Ranked(plain.key, plain.value, plain.policy, transforms)
        model = scheme.install(tiny(num_hidden_layers=1, head_dim=16))
        cache = new_cache(model)
        layer = cache.layers[0]
        generator = torch.Generator().manual_seed(0)
        keys = torch.randn(1, 2, 64, 16, generator=generator)
        query = torch.randn(1, 4, 64, 16, generator=generator)
        keys[..., 3] *= 20
        query[..., 3] /= 20
        cache.begin(1, 64)
        layer.update(keys, keys)
        layer.attend(query, keys, keys, None, 0.25)
        cache.begin(1, 1)
        got, _ = layer.update(keys[:, :, :1], keys[:, :, :1])
        wide = query.unflatten(1, (2, -1)).flatten(2, 3)
        errors.append(float(((got[:, :, :64] - keys) @ wide.transpose(2, 3)).square().mean()))
    assert errors[1] < 0.3 * errors[0]
